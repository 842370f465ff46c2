"""The leader's side: starts the other processes, passes on what they say, and takes their place in order when they die.

The middle of a star: what a follower tells is applied here and passed on as it came, so that every follower hears of a
lease's changes in the order in which they were made, and of a follower's end after all that it did.
"""

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from extproc.config import Config
from extproc.errors import ConfigError
from extproc.processes import snapshot
from extproc.processes.channel import Channel
from extproc.processes.figures import SummedRegistry
from extproc.processes.messages import (
    Batch,
    Close,
    End,
    Failed,
    Figures,
    Gone,
    Leave,
    Listening,
    Message,
    Rest,
    Start,
    batch_frame,
    frame,
)
from extproc.processes.replica import Replica

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
"""A Python process is there in one to two seconds; on a busy machine several start at once."""
SILENT_S = 30.0
"""A follower says something every second; one that has not for so long hangs, and is killed."""
FIRST_BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 10.0
"""Before a follower that died is started again; doubled each time, as what kills it may kill it again at once."""
LONG_LIVED_S = 60.0
"""After such a life, a death is taken for the first one."""
END_S = 3.0
"""How long a follower may take to end when it is told to; its streams are cut off, so that is little."""


class Child(Protocol):
    """The part of `asyncio.subprocess.Process` that is used."""

    @property
    def pid(self) -> int:
        """Its id."""

    @property
    def returncode(self) -> int | None:
        """Its exit status; None while it runs."""

    def kill(self) -> None:
        """End it. Raises ProcessLookupError when it has ended."""

    async def wait(self) -> int:
        """Return its exit status."""


Spawn = Callable[[socket.socket], Awaitable[Child]]
"""Starts a follower at the other end of a socket, which stays the caller's."""


async def spawn(connection: socket.socket) -> Child:
    """A child process. It inherits the socket and standard error, and learns everything else over the socket."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "extproc", "process", str(connection.fileno())),
        stdin=asyncio.subprocess.DEVNULL,
        pass_fds=[connection.fileno()],
        start_new_session=True,  # Ctrl-C in a terminal reaches the leader alone
    )


@dataclass(slots=True, eq=False)
class Follower:
    """One process, as the leader sees it."""

    process: int
    child: Child
    channel: Channel
    begun_s: float
    heard_s: float
    """When it last said something."""
    listening: asyncio.Future[None]
    """Raises ConfigError when it cannot."""
    resting: asyncio.Event = field(default_factory=asyncio.Event)
    """It has no exchange, since it was last asked."""


class Leader:
    """All followers. Made where there is an event loop."""

    def __init__(
        self,
        config: Config,
        replica: Replica,
        registry: SummedRegistry,
        *,
        target: str,
        clock: Callable[[], float] = time.monotonic,
        spawn: Spawn = spawn,
        silent_s: float = SILENT_S,
    ) -> None:
        """`target`: of the service, as in `config.target_of`. `silent_s`: a follower that says nothing for so long is
        killed."""
        self._config = config
        self._replica = replica
        self._registry = registry
        self._target = target
        self._clock = clock
        self._spawn = spawn
        self._silent_s = silent_s
        self._followers: dict[int, Follower] = {}
        self._flush_is_due = False
        self._leaving = False
        self._closing = False
        self._ending = False

    @property
    def pids(self) -> dict[int, int]:
        """The followers' process ids."""
        return {process: follower.child.pid for process, follower in self._followers.items()}

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All processes serve while the context is open. Raises ConfigError when one cannot."""
        try:
            processes = range(1, self._config.processes)
            for follower in [await self._start(process) for process in processes]:
                await self._listens(follower)
            yield
        finally:
            self._ending = True
            for follower in self._followers.values():
                follower.channel.send(End())
            await asyncio.gather(*(self._ended(follower) for follower in [*self._followers.values()]))

    async def keep(self, process: int) -> None:
        """See to it that a process serves, again and again."""
        back_off_s = FIRST_BACK_OFF_S
        while not self._ending:
            follower = self._followers.get(process)
            if follower is not None:
                await self._outlived(follower)
                if self._clock() - follower.begun_s > LONG_LIVED_S:
                    back_off_s = FIRST_BACK_OFF_S
            if self._closing:
                return
            await asyncio.sleep(back_off_s)
            back_off_s = min(2 * back_off_s, LONGEST_BACK_OFF_S)
            try:
                await self._listens(await self._start(process))
            except (ConfigError, OSError) as error:
                logger.error("process %d does not start: %s", process, error)  # noqa: TRY400 - no bug
            else:
                logger.info("process %d serves again", process)

    def wake(self) -> None:
        """The leader's own table has changed: tell everybody at the end of this go of the event loop."""
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def catch_up(self) -> None:
        """Take what the followers have said by now."""
        for follower in [*self._followers.values()]:
            follower.channel.poll()

    def leave(self) -> None:
        """Have the followers do the same; see `Service`."""
        self._leaving = True
        self._tell_all(Leave())

    def close(self) -> None:
        """Have the followers do the same; see `Service`. Those that die now are not started again."""
        self._closing = True
        self._tell_all(Close())

    async def idle(self) -> None:
        """Return when no follower has an exchange."""
        asked = list(self._followers.values())
        for follower in asked:
            follower.resting.clear()
            follower.channel.send(Rest())
        await asyncio.gather(*(follower.resting.wait() for follower in asked))

    # Inside

    async def _start(self, process: int) -> Follower:
        ours, theirs = socket.socketpair()
        with theirs:
            child = await self._spawn(theirs)
        now_s = self._clock()
        listening = asyncio.get_running_loop().create_future()
        channel = Channel(ours, lambda message: self._received(follower, message), lambda: self._lost(follower))
        follower = Follower(process, child, channel, now_s, now_s, listening)
        # In one step with the snapshot: what happens after it goes to the new one, too.
        self._flush()
        channel.send(Start(process, self._config, self._target, snapshot.take(self._replica)))
        self._followers[process] = follower
        if self._leaving:
            channel.send(Leave())
        return follower

    async def _listens(self, follower: Follower) -> None:
        """Return when it does. Raises ConfigError, when it is dead and forgotten."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await follower.listening
        except TimeoutError:
            await self._kill(follower)
            raise ConfigError(f"process {follower.process} did not start within {START_TIMEOUT_S:g} s") from None
        except ConfigError:
            await self._kill(follower)
            raise
        self._registry.begun(follower.process)
        logger.info("process %d serves, pid %d", follower.process, follower.child.pid)

    async def _outlived(self, follower: Follower) -> None:
        """Return when it has ended, which it is helped to do when it hangs."""
        ended = asyncio.create_task(follower.channel.closed())
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=self._silent_s / 2)
                if not ended.done() and self._clock() - follower.heard_s > self._silent_s:
                    logger.error("process %d has said nothing for %g s: killing it", follower.process, self._silent_s)
                    break
        finally:
            ended.cancel()
        await self._kill(follower)
        if not self._ending:
            logger.error(
                "process %d (pid %d) ended unexpectedly, exit status %s",
                *(follower.process, follower.child.pid, follower.child.returncode),
            )

    async def _ended(self, follower: Follower) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await follower.child.wait()
        await self._kill(follower)

    async def _kill(self, follower: Follower) -> None:
        with contextlib.suppress(ProcessLookupError):
            follower.child.kill()
        await follower.child.wait()
        follower.channel.close()
        self._lost(follower)

    def _received(self, follower: Follower, message: Message) -> None:
        follower.heard_s = now_s = self._clock()
        match message:
            case Batch(process, sent_at_s, events):
                self._flush()  # what was done here before comes before it everywhere
                self._registry.lag_s = now_s - sent_at_s
                passed_on = None
                for other in self._followers.values():
                    if other is not follower:
                        passed_on = passed_on or frame(message)
                        other.channel.send_frame(passed_on)
                self._replica.apply(process, events)
            case Figures():
                self._registry.reported(follower.process, message)
            case Listening():
                if not follower.listening.done():
                    follower.listening.set_result(None)
            case Failed(reason):
                if not follower.listening.done():
                    follower.listening.set_exception(ConfigError(reason))
            case Rest():
                follower.resting.set()

    def _lost(self, follower: Follower) -> None:
        """Nothing more will be heard of it: what it charged is given back, at once and everywhere."""
        if self._followers.get(follower.process) is not follower:
            return
        del self._followers[follower.process]
        self._registry.ended(follower.process)
        follower.resting.set()
        if not follower.listening.done():
            follower.listening.set_exception(ConfigError(f"process {follower.process} ended before it served"))
            follower.listening.exception()  # whoever waits gets it; if nobody does, asyncio need not say so
        leases = self._replica.forget(follower.process)
        self._replica.tell(Gone(follower.process))
        if leases:
            logger.warning("process %d is gone: %d leases of its requests are released", follower.process, leases)

    def _tell_all(self, message: Message) -> None:
        self._flush()
        for follower in self._followers.values():
            follower.channel.send(message)

    def _flush(self) -> None:
        self._flush_is_due = False
        changes = self._replica.take()
        if changes and self._followers:
            framed = batch_frame(0, self._clock(), changes)
            for follower in self._followers.values():
                follower.channel.send_frame(framed)
