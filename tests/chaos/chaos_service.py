"""The service itself dies, is stopped, or is asked nonsense: rows 9, 10 and 14. It runs apart from its Envoy here."""

import asyncio
import contextlib
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
from chaos_client import Seen, chat
from chaos_field import Field
from chaos_fleet import LOAD, load
from chaos_rows import Row
from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpHeaders, ProcessingRequest, ProcessingResponse
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc import envoy_config
from extproc.config import Config
from extproc.demo.child import Child
from extproc.demo.stack import GATEWAY_FLAGS, HOST, START_TIMEOUT_S, free_port
from extproc.envoy_process import EnvoyProcess

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
LONG_TOKENS = 250
"""A stream of 2-3 s: longer than the service is away."""
LONGER_TOKENS = 800
"""A stream of 7-8 s: longer than the drain delay and the load after it."""
DRAIN_DELAY_S = 3.0
AROUND_S = 1.0
"""A client does not see when exactly the service closes; requests sent so close to it may go either way."""
DRAINING_S = 4.0
"""How long a worker of the load drains."""
_READY = re.compile(r"ext_proc service on (\S+), metrics on (http://\S+)/metrics")


class Service:
    """`extproc serve` in front of a field's engines; may be ended and started again on its ports."""

    def __init__(self, field: Field, directory: Path) -> None:
        self._field = field
        self._log = directory / "service.log"
        self.grpc_port, self._status_port = free_port(), free_port()
        self.target = f"{HOST}:{self.grpc_port}"
        self.process: Child

    async def start(self) -> None:
        """Start it, and wait until it has a healthy pair."""
        workers = [part for engine in self._field.engines for part in (f"--{engine.role}", engine.url)]
        ports = ("--grpc-port", str(self.grpc_port), "--prometheus-port", str(self._status_port))
        command = ("serve", *workers, *GATEWAY_FLAGS, *ports, "--shutdown-drain-delay-secs", str(DRAIN_DELAY_S))
        self.process = await self._field.do(lambda: Child("the service", command, self._log))
        ready = await self._field.do(
            lambda: self.process.wait_until(lambda: _READY.search(self.process.log_text), "ready", START_TIMEOUT_S)
        )
        self._field.status_url = ready[2]
        await self._field.until(self._healthy, "all workers are healthy")

    async def _healthy(self) -> bool:
        return await self._field.metric("extproc_worker_healthy") == len(self._field.engines)


@contextlib.asynccontextmanager
async def apart(field: Field) -> AsyncIterator[Service]:
    """A service and an Envoy of its own, in place of the field's gateway."""
    with tempfile.TemporaryDirectory(prefix="extproc-chaos-") as directory:
        service = Service(field, Path(directory))
        await service.start()
        config = Config(host=HOST, port=free_port(), grpc_port=service.grpc_port)
        bootstrap = envoy_config.bootstrap(config, admin=f"{HOST}:0")
        try:
            async with EnvoyProcess(envoy_config.to_yaml(bootstrap)):
                field.url = f"http://{HOST}:{config.port}"
                yield service
        finally:
            field.url, field.status_url = "", ""
            await field.do(lambda: service.process.stop(10))


async def service_killed(field: Field, service: Service, rounds: int) -> Row:
    """Row 9: SIGKILL of the service under load, and its restart."""
    row = Row(9, f"SIGKILL of the service under load of {LOAD}, restart after 1 s")
    for _ in range(rounds):
        await field.calm()
        seen: list[Seen] = []
        async with field.client() as client, asyncio.TaskGroup() as group:
            streams = [group.create_task(client.send(chat(LONG_TOKENS, stream=True))) for _ in range(LOAD)]
            await asyncio.sleep(0.7)
            loads = [group.create_task(load(client, seen, 4.0)) for _ in range(LOAD)]
            await asyncio.sleep(0.3)
            killed_unix = time.time()
            await field.do(service.process.kill)
            await asyncio.sleep(1.0)
            await service.start()
            back_unix = time.time()
            await asyncio.wait([*streams, *loads])
        running = [task.result() for task in streams]
        row.clients.update(f"{one.said(stream=True)} (streams that ran)" for one in running)
        row.check(all(one.said(stream=True) == "200" for one in running), "running streams go on to their end")
        at_kill = [one for one in seen if one.sent_unix < killed_unix < one.ended_unix]
        meanwhile = [one for one in seen if killed_unix < one.sent_unix < back_unix]
        after = [one for one in seen if one.sent_unix >= back_unix]
        row.clients.update(f"{one.said(stream=True)} (under way at the kill)" for one in at_kill)
        row.clients.update(f"{one.said(stream=True)} (sent while it was away)" for one in meanwhile)
        row.clients.update(f"{one.said(stream=True)} (sent later)" for one in after)
        for one in meanwhile:
            if one.status == 503:
                row.took("503 while it was away", one.total_ms)
        row.check({one.status for one in meanwhile} <= {503, 200}, "new requests get 503 until it is back")
        row.check({one.said(stream=True) for one in after} <= {"200"}, "then all is normal")
        left = await field.left_over()
        row.check(not left, f"no leg is orphaned ({left})")
    row.check_p99("503 while it was away", 50)
    return row


async def service_stopped(field: Field, service: Service) -> Row:
    """Row 10: SIGTERM of the service under load, which goes on after the drain delay, when nobody is there any more."""
    row = Row(10, f"SIGTERM of the service alone under load of {LOAD}, drain delay {DRAIN_DELAY_S:g} s")
    await field.calm()
    seen: list[Seen] = []
    health: list[tuple[float, str]] = []
    async with field.client() as client, asyncio.TaskGroup() as group:
        watch = group.create_task(_watch_health(service.target, health))
        streams = [group.create_task(client.send(chat(LONGER_TOKENS, stream=True))) for _ in range(4)]
        await asyncio.sleep(0.5)
        loads = [group.create_task(load(client, seen, DRAIN_DELAY_S + 2.5)) for _ in range(LOAD)]
        await asyncio.sleep(0.5)
        stopped_unix = time.time()
        service.process.signal(signal.SIGTERM)
        await field.until(_says(service, "draining: no new requests"), "the drain delay is over")
        closed_unix = time.time()
        await asyncio.wait([*streams, *loads])
        ended_unix = max(task.result().ended_unix for task in streams)
        row.took("last stream's end to exit", 1e3 * (await _exit_unix(service, stopped_unix) - ended_unix))
        watch.cancel()
    old = [*(one for one in seen if one.sent_unix < stopped_unix), *(task.result() for task in streams)]
    meanwhile = [one for one in seen if stopped_unix <= one.sent_unix < stopped_unix + DRAIN_DELAY_S - AROUND_S]
    later = [one for one in seen if one.sent_unix >= closed_unix + AROUND_S]
    for when, some in (("sent before", old), ("sent in the drain delay", meanwhile), ("sent later", later)):
        row.clients.update(f"{one.said(stream=True)} ({when})" for one in some)
    row.check(all(one.said(stream=True) == "200" for one in old), "the old requests are finished")
    row.check(bool(meanwhile), "there was traffic in the drain delay")
    row.check(all(one.said(stream=True) == "200" for one in meanwhile), "no failed request in the drain delay")
    row.check({one.status for one in later} == {503}, "then 503")
    refused = [one for one in seen if one.status == 503]
    row.check(all(one.headers.get("retry-after") == "1" for one in refused), "retry-after says when to come back")
    row.check({one.said(stream=True) for one in seen} == {"200", "503"}, "nobody is served by half")
    row.check(service.process.exit_status == 0, f"exit status 0 ({service.process.exit_status})")
    turned = [(when - stopped_unix) * 1e3 for when, status in health if status == "NOT_SERVING"]
    row.check(bool(turned), "health says NOT_SERVING")
    if turned:
        row.took("SIGTERM to NOT_SERVING", turned[0])
        row.check_p99("SIGTERM to NOT_SERVING", 50)
    row.notes.append(f"health: {' -> '.join(status for _, status in health)}")
    await service.start()
    async with field.client() as client:
        row.check((await client.send(chat())).status == 200, "the next process serves")
    return row


def _says(service: Service, words: str) -> Callable[[], Awaitable[bool]]:
    async def said() -> bool:
        return words in service.process.log_text

    return said


async def worker_draining(field: Field, role: str) -> Row:
    """Row 10: a worker is marked draining under load, and put back."""
    row = Row(10, f"a {role} worker marked draining under load of {LOAD}, put back after {DRAINING_S:g} s")
    await field.calm()
    victim = next(engine for engine in field.engines if engine.role == role)
    path = f"{field.stack.status_url}/workers/{role}/{victim.address}/drain"
    seen: list[Seen] = []

    async def left() -> bool:
        return not await field.metric("extproc_legs_in_flight", worker=victim.address)

    async with field.client() as client, asyncio.TaskGroup() as group:
        streams = [group.create_task(client.send(chat(LONG_TOKENS, stream=True))) for _ in range(4)]
        loads = [group.create_task(load(client, seen, DRAINING_S + 3.0)) for _ in range(LOAD)]
        await asyncio.sleep(1.0)
        async with field.http.put(path) as answer:
            marked_unix = time.time()
            state = await answer.json()
        row.took("marked to none in flight", 1e3 * await field.until(left, "none in flight"))
        await asyncio.sleep(max(0.0, marked_unix + DRAINING_S - time.time()))
        undone_unix = time.time()
        async with field.http.delete(path):
            pass
        await asyncio.wait([*streams, *loads])
    every = [*seen, *(task.result() for task in streams)]
    row.clients.update(one.said(stream=True) for one in every)
    row.check(set(row.clients) == {"200"}, "0 failed")
    row.check(state["draining"], "it is marked")
    arrived = [record["arrived_unix"] for record in victim.requests()]
    before = sum(one < marked_unix for one in arrived)
    row.check(before > 0, "it had requests before")
    row.notes.append(f"{before} requests on it before, {state['in_flight']} of them in flight when it was marked")
    # What was placed before the mark may arrive a moment after it.
    late = [one for one in arrived if marked_unix + 0.05 * row.slack < one < undone_unix]
    row.check(not late, f"nothing new arrives there ({len(late)})")
    row.check(any(one > undone_unix for one in arrived), "it gets requests again when that is undone")
    return row


async def gateway_stopped(field: Field) -> Row:
    """Row 10: SIGTERM of `extproc up` under load."""
    row = Row(10, f"SIGTERM of `extproc up` under load of {LOAD}, with streams of 2.5 s")
    await field.calm()
    seen: list[Seen] = []
    async with field.client() as client, asyncio.TaskGroup() as group:
        streams = [group.create_task(client.send(chat(LONG_TOKENS, stream=True))) for _ in range(4)]
        await asyncio.sleep(0.5)
        loads = [group.create_task(load(client, seen, 1.5)) for _ in range(LOAD)]
        await asyncio.sleep(0.5)
        stopped_unix = time.time()
        process = field.stack.gateway.process
        process.signal(signal.SIGTERM)
        await asyncio.wait([*streams, *loads])
        while process.exit_status is None:  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.02)
        row.took("SIGTERM to exit", (time.time() - stopped_unix) * 1e3)
    old = [*(one for one in seen if one.sent_unix < stopped_unix), *(task.result() for task in streams)]
    later = [one for one in seen if one.sent_unix >= stopped_unix]
    row.clients.update(f"{one.said(stream=True)} (sent before)" for one in old)
    row.clients.update(f"{one.said(stream=True)} (sent later)" for one in later)
    row.check(all(one.said(stream=True) == "200" for one in old), "the old requests are finished")
    row.check(all(one.status in {0, 200} for one in later), "new ones are refused a connection, not answered 503")
    await field.do(field.stack.restart_gateway)
    return row


async def _watch_health(target: str, seen: list[tuple[float, str]]) -> None:
    """Every change of the gRPC health of readiness."""
    names = health_pb2.HealthCheckResponse.ServingStatus
    async with grpc.aio.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for answer in stub.Watch(health_pb2.HealthCheckRequest(service="readiness")):
                seen.append((time.time(), names.Name(answer.status)))


async def _exit_unix(service: Service, since_unix: float) -> float:
    while service.process.exit_status is None:
        assert time.time() - since_unix < 60, "it does not exit"
        await asyncio.sleep(0.02)
    return time.time()


async def wrong_prefill_streams(field: Field, service: Service, count: int) -> list[Row]:
    """Row 14: prefill streams that nobody waits for, as Envoy (or a stranger) could open them."""
    unknown, twice, late = (
        Row(14, f"a prefill stream {what}") for what in ("of an unknown room", "for a room that has one", "too late")
    )
    await field.calm()
    async with field.client() as client, grpc.aio.insecure_channel(service.target) as channel:
        for number in range(count):
            await _refused(channel, unknown, str(number))
            for strange in ("", "-1", "1e3", "9" * 30, "٣"):
                await _refused(channel, unknown, strange)
        for _ in range(count):
            sending = asyncio.create_task(client.send(chat(20)))
            room = await _open_room(field)
            await _refused(channel, twice, room)
            answer = await sending
            twice.clients[answer.said()] += 1
            await _refused(channel, late, room)
    for row in (unknown, twice, late):
        row.check(set(row.clients) <= {"410", "200"}, "refused (410), and the request itself is not disturbed")
        left = await field.left_over()
        row.check(not left, f"nothing is left over ({left})")
    unknown.notes.append("rooms are never used twice, so no tombstone has to expire")
    return [unknown, twice, late]


async def _open_room(field: Field) -> str:
    """The room of the request that runs."""
    while True:
        for engine in field.stack.decodes:
            async with field.http.get(f"{engine.url}/sim/state") as answer:
                jobs = (await answer.json())["jobs"]
            if any(job["generated_tokens"] for job in jobs):
                return str(jobs[0]["room"])
        await asyncio.sleep(0.005)


async def _refused(channel: grpc.aio.Channel, row: Row, room: str) -> None:
    started_s = time.monotonic()
    call = channel.stream_stream(METHOD)()
    values = [HeaderValue(key="x-pd-room", raw_value=room.encode())]
    await call.write(bytes(ProcessingRequest(request_headers=HttpHeaders(headers=HeaderMap(headers=values)))))
    answer = ProcessingResponse.parse(await call.read())
    call.cancel()
    row.took("refusal", (time.monotonic() - started_s) * 1e3)
    row.clients[str(answer.immediate_response.status.code.value) if answer.immediate_response else "let in"] += 1
