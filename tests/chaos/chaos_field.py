"""The gateway under test, its engines, and what they remember: faults on, records and leftovers off."""

import asyncio
import contextlib
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from chaos_client import Client, Seen
from prometheus_client.parser import text_string_to_metric_families

from extproc.demo.stack import EngineProcess, Stack

SETTLE_S = 5.0
"""How long what is left over is waited for before it counts as left behind."""
CHARGES = ("extproc_outstanding_tokens", "extproc_legs_in_flight", "extproc_open_exchanges")

ENGINE_FLAGS = ("--time-scale", "1", "--prefill-tokens-per-s", "20000", "--decode-base-ms", "8")
"""A prompt of 8 kB takes prefill 0.1 s, a token 8 ms: long enough to fail in the middle."""


@dataclass
class Attempt:
    """The records of both legs of one attempt; None: it never got to the engine."""

    prefill: dict[str, Any] | None = None
    decode: dict[str, Any] | None = None
    engines: dict[str, str] = field(default_factory=dict)
    """Role → label of the engine."""

    @property
    def arrived_unix(self) -> float:
        """When the first leg arrived."""
        return min(leg["arrived_unix"] for leg in (self.prefill, self.decode) if leg)

    @property
    def fault_unix(self) -> float | None:
        """When a leg met a fault."""
        return next((leg["fault_unix"] for leg in (self.prefill, self.decode) if leg and leg["fault_unix"]), None)


class Field:
    """A running stack. Its processes are started by one thread that outlives them (`extproc.demo.child` says why)."""

    def __init__(self, stack: Stack, http: aiohttp.ClientSession, thread: ThreadPoolExecutor) -> None:
        self.stack = stack
        self.http = http
        self._thread = thread
        self.url, self.status_url = "", ""
        """The gateway's, unless a row has one of its own."""

    @property
    def engines(self) -> list[EngineProcess]:
        """All engines."""
        return self.stack.engines

    async def do(self, work: Callable[[], Any]) -> Any:
        """Something that blocks, starts or ends processes."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def client(self) -> Client:
        """A client of the gateway."""
        return Client(self.url or self.stack.url)

    async def set_faults(self, engines: Iterable[EngineProcess], *specs: str) -> None:
        """These faults and no others on the engines."""
        for engine in engines:
            async with self.http.put(f"{engine.url}/sim/faults", json=list(specs)) as answer:
                assert answer.status == 200, await answer.text()

    async def calm(self) -> None:
        """No faults, no records, and everything that ran has ended."""
        await self.set_faults(self.engines)
        await self.until(self._healthy, "all workers are healthy")
        for engine in self.engines:
            async with self.http.delete(f"{engine.url}/sim/requests"):
                pass

    async def _healthy(self) -> bool:
        return await self.metric("extproc_worker_healthy") == len(self.engines)

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str, within_s: float = 30.0) -> float:
        """Wait; returns the seconds that it took."""
        started_s = time.monotonic()
        while not await condition():
            assert time.monotonic() - started_s < within_s, f"not within {within_s:g} s: {what}"
            await asyncio.sleep(0.01)
        return time.monotonic() - started_s

    async def metric(self, name: str, **labels: str) -> float:
        """Sum over the samples of the service's own metric that have these labels."""
        async with self.http.get(f"{self.status_url or self.stack.status_url}/metrics") as answer:
            text = await answer.text()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def _ask(self, engine: EngineProcess, path: str) -> Any:
        async with self.http.get(engine.url + path) as answer:
            return await answer.json()

    async def attempts(self, seen: Iterable[Seen]) -> dict[str, list[Attempt]]:
        """The attempts of each request, first to last, as the engines that live recorded them."""
        found: dict[str, dict[str, Attempt]] = defaultdict(lambda: defaultdict(Attempt))
        wanted = {one.request_id for one in seen}
        for engine in self.engines:
            if not engine.running:
                continue
            for record in await self._ask(engine, "/sim/requests"):
                request_id = record["headers"].get("x-request-id")
                if request_id in wanted:
                    attempt = found[request_id][record["headers"].get("x-pd-room", "")]
                    setattr(attempt, engine.role, record)
                    attempt.engines[engine.role] = engine.label
        return {key: sorted(rooms.values(), key=lambda one: one.arrived_unix) for key, rooms in found.items()}

    async def left_over(self) -> str:
        """What does not go away within a few seconds: charges in the service, requests and jobs on engines."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            left = {name.removeprefix("extproc_"): await self.metric(name) for name in CHARGES}
            for engine in self.engines:
                if engine.running:
                    state = await self._ask(engine, "/sim/state")
                    left[f"{engine.label} jobs"] = state["open"]
                    left[f"{engine.label} requests"] = state["open_requests"]
            left = {name: value for name, value in left.items() if value}
            if not left or time.monotonic() > deadline_s:
                return ", ".join(f"{name} {value:g}" for name, value in left.items())
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running_field(**settings: Any) -> AsyncIterator[Field]:
    """A fresh stack of 2 prefill and 2 decode engines; `settings` are `Stack`'s."""
    # Without circuit breakers: after ten failures the faulty worker would not be picked, and nothing be measured.
    checks = ("--worker-load-check-interval", "0.5", "--worker-load-check-timeout", "0.5")
    flags = (*checks, "--disable-circuit-breaker")
    with ThreadPoolExecutor(1) as thread:
        stack = Stack(**{"engine_flags": ENGINE_FLAGS, "up_flags": flags, **settings})
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(thread, stack.__enter__)
        try:
            async with aiohttp.ClientSession() as http:
                yield Field(stack, http, thread)
        finally:
            await loop.run_in_executor(thread, stack.close)


async def volley(count: int, width: int, send: Callable[[int], Awaitable[Seen]]) -> list[Seen]:
    """`count` requests, `width` at a time."""
    numbers = iter(range(count))
    seen: list[Seen] = []

    async def worker() -> None:
        for number in numbers:
            seen.append(await send(number))

    async with asyncio.TaskGroup() as group:
        for _ in range(width):
            group.create_task(worker())
    return seen


def memory_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0
