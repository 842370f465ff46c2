"""A leader and its follower with a real socket between them, both in this process: who is told what, and what becomes
of a follower that dies, hangs, or cannot begin."""

import asyncio
import contextlib
import socket

import pytest

from extproc.cli.process import follow
from extproc.config import Config, WorkerConfig
from extproc.errors import ConfigError
from extproc.model import Role
from extproc.processes import snapshot
from extproc.processes.channel import Channel
from extproc.processes.leader import Leader
from extproc.processes.messages import Batch, Charged, End, Listening, Message, Start, batch_frame
from extproc.server import Service

KILLED = -9


class Task:
    """A follower as a task of this process, in the place of a child process."""

    def __init__(self, connection: socket.socket) -> None:
        self.pid = 4711
        self._connection = connection
        self._task = asyncio.create_task(follow(connection))

    @property
    def returncode(self) -> int | None:
        if not self._task.done():
            return None
        return KILLED if self._task.cancelled() else self._task.result()

    def kill(self) -> None:
        """As the kernel does it: it is told nothing, and its socket closes with it."""
        if self._task.done():
            raise ProcessLookupError
        self._task.add_done_callback(lambda _: self._connection.shutdown(socket.SHUT_RDWR))
        self._task.cancel()

    async def wait(self) -> int:
        await asyncio.wait([self._task])
        assert self.returncode is not None
        return self.returncode


class Spawner:
    """Starts followers; keeps those it has started."""

    def __init__(self) -> None:
        self.started: list[Task] = []

    async def __call__(self, connection: socket.socket) -> Task:
        self.started.append(Task(connection.dup()))
        return self.started[-1]


class Silent:
    """A follower that is there and does what the test does."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[Message] = asyncio.Queue()
        self.pid, self.returncode = 4712, None
        self._ended = asyncio.Event()
        self.channel: Channel

    async def __call__(self, connection: socket.socket) -> "Silent":
        self.channel = Channel(connection.dup(), self.said.put_nowait, lambda: None)
        return self

    def kill(self) -> None:
        if self.returncode is not None:
            raise ProcessLookupError
        self.returncode = KILLED
        self.channel.close()
        self._ended.set()

    async def wait(self) -> int:
        await self._ended.wait()
        return KILLED


async def until(condition) -> None:
    """What is looked at is in this process: it changes as tasks get their turns."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)


def config(**settings) -> Config:
    return Config(
        prefill=(WorkerConfig(url="http://127.0.0.1:1", dp_size=2),),
        decode=(WorkerConfig(url="http://127.0.0.1:2", dp_size=2),),
        processes=2,
        **settings,
    )


def socket_of(path) -> bool:
    """Whether the follower's is there."""
    return (path / "s.1").exists()


@contextlib.asynccontextmanager
async def leading(path, spawn, settings=None, **options):
    """(service, leader) of a leader that has neither scraper nor port, and its followers."""
    settings = settings or config()
    target = f"unix:{path}/s"
    service = Service(settings, grpc_target=target)
    for worker in settings.workers():
        service.table.worker_changed(worker, True)
    leader = Leader(settings, service.replica, service._summed, target=target, spawn=spawn, **options)
    service.changed, service.table.catch_up = leader.wake, leader.catch_up
    async with leader.running():
        keeping = asyncio.create_task(leader.keep(1))
        try:
            yield service, leader
        finally:
            keeping.cancel()


@pytest.fixture
def path(tmp_path_factory):
    """Short: a unix socket's name is."""
    return tmp_path_factory.mktemp("p")


@pytest.fixture
def made(monkeypatch):
    """Every service that is made: that of a follower is otherwise out of reach."""
    services = []
    init = Service.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        services.append(self)

    monkeypatch.setattr(Service, "__init__", remember)
    monkeypatch.setattr("extproc.cli.process.setup_logging", lambda *_: None)
    return services


def charge(service: Service, role: Role = Role.PREFILL):
    return service.table.charge(service.table.eligible(role)[0], 1, 100, 20)


def test_both_know_what_either_charges_and_all_ends_in_order(path, made):
    async def main():
        spawn = Spawner()
        async with leading(path, spawn) as (leader_service, _):
            theirs = made[1]
            mine, other = charge(leader_service), charge(theirs, Role.DECODE)
            await until(lambda: theirs.table.in_flight == leader_service.table.in_flight == dict.fromkeys(Role, 1))
            leader_service.table.release(mine)
            theirs.table.release(other)
            await until(lambda: theirs.table.in_flight == leader_service.table.in_flight == dict.fromkeys(Role, 0))
            leader_service.set_draining("127.0.0.1:1", True)
            await until(lambda: not theirs.table.eligible(Role.PREFILL))
            theirs.gateway.blame("id", "127.0.0.1:2")
            # Told at the end of that go of the loop, and read before the next placement, not when the loop comes to it.
            await asyncio.sleep(0)
            assert leader_service.gateway.blamed("id") == set()
            leader_service.table.catch_up()
            assert leader_service.gateway.blamed("id") == {"127.0.0.1:2"}
        assert [task.returncode for task in spawn.started] == [0]
        assert not socket_of(path)

    asyncio.run(main())


def test_one_that_dies_is_released_and_replaced(path, made):
    async def main():
        spawn = Spawner()
        async with leading(path, spawn) as (service, leader):
            kept = charge(service)
            for _ in range(3):
                charge(made[1])
            await until(lambda: service.table.in_flight[Role.PREFILL] == 4)
            spawn.started[0].kill()
            await until(lambda: service.table.in_flight[Role.PREFILL] == 1)
            await until(lambda: len(made) == 3)
            # The next one knows what is charged, and is told what happens.
            assert made[2].table.in_flight[Role.PREFILL] == 1
            await until(lambda: leader.pids)
            service.table.release(kept)
            await until(lambda: made[2].table.in_flight[Role.PREFILL] == 0)
            assert made[2].table.states[0].circuit.failures == 0
        assert [task.returncode for task in spawn.started] == [KILLED, 0]

    asyncio.run(main())


def test_one_that_hangs_is_killed(path, made):
    async def main():
        silent = Silent()
        starting = asyncio.create_task(anext(silent_leader := lead(path, silent, silent_s=0.05)))
        assert isinstance(await silent.said.get(), Start)
        silent.channel.send(Listening())
        service, _ = await starting
        silent.channel.send_frame(batch_frame(1, 0.0, [Charged(1, "127.0.0.1:1", 0, 5.0, 0.0, 0.0)]))
        await until(lambda: service.table.in_flight[Role.PREFILL] == 1)
        await until(lambda: silent.returncode == KILLED)
        await until(lambda: service.table.in_flight[Role.PREFILL] == 0)
        await silent_leader.aclose()

    asyncio.run(main())


async def lead(path, spawn, **options):
    async with leading(path, spawn, **options) as leading_now:
        yield leading_now


def test_one_that_does_not_end_when_it_is_told_to_is_killed(path, made, monkeypatch):
    monkeypatch.setattr("extproc.processes.leader.END_S", 0.01)

    async def main():
        silent = Silent()
        leading_now = lead(path, silent)
        starting = asyncio.create_task(anext(leading_now))
        await silent.said.get()
        silent.channel.send(Listening())
        await starting
        await leading_now.aclose()
        assert silent.returncode == KILLED
        assert isinstance(silent.said.get_nowait(), End)

    asyncio.run(main())


def test_nonsense_is_the_last_word_of_a_follower(path, made):
    async def main():
        silent = Silent()
        leading_now = lead(path, silent)
        starting = asyncio.create_task(anext(leading_now))
        await silent.said.get()
        silent.channel.send(Listening())
        service, _ = await starting
        silent.channel.send_frame(batch_frame(1, 0.0, [Charged(1, "127.0.0.1:1", 0, 5.0, 0.0, 0.0)]) + b"\0\0\0\1\x01")
        await until(lambda: silent.returncode == KILLED)
        assert service.table.in_flight[Role.PREFILL] == 0
        await leading_now.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": "least_load", "tokenizer_path": "/none.json"}, "none.json"),
        ({}, "another process listens"),
    ],
)
def test_one_that_cannot_begin_says_why(path, made, settings, words):
    async def main():
        with socket.socket(socket.AF_UNIX) as taken:
            taken.bind(f"{path}/s.1")
            taken.listen()
            broken = config(**settings)
            good = Service(config(), grpc_target=f"unix:{path}/s")
            leader = Leader(broken, good.replica, good._summed, target=f"unix:{path}/s", spawn=Spawner())
            with pytest.raises(ConfigError, match=words):
                async with leader.running():
                    pytest.fail("it does not serve")
            assert leader.pids == {}

    asyncio.run(main())


def test_a_follower_whose_leader_is_gone_ends(path, made):
    async def main():
        ours, theirs = socket.socketpair()
        follower = asyncio.create_task(follow(theirs))
        said: asyncio.Queue[Message] = asyncio.Queue()
        channel = Channel(ours, said.put_nowait, lambda: None)
        leader = Service(config(), grpc_target=f"unix:{path}/s")
        channel.send(Start(1, config(), f"unix:{path}/s", snapshot.take(leader.replica)))
        assert isinstance(await said.get(), Listening)
        charge_seen = charge_in(made[1])
        assert isinstance(await said.get(), Batch)
        made[1].table.release(charge_seen)
        channel.close()
        assert await follower == 0
        assert not socket_of(path)

    asyncio.run(main())


def charge_in(service: Service):
    for worker in service.config.workers():
        service.table.worker_changed(worker, True)
    return charge(service)


def test_a_follower_that_never_hears_anything_ends():
    async def main():
        ours, theirs = socket.socketpair()
        ours.close()
        assert await follow(theirs) == 1

    asyncio.run(main())
