"""A prefill and a decode engine in one event loop, and a client that sends both legs as a gateway does."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from extproc.sim import Engine, EngineConfig, Role

PATIENCE_S = 30.0
"""Longest wait for anything in these tests: a shared machine can be slow."""


@dataclass
class Pair:
    prefill: Engine
    decode: Engine
    http: httpx.AsyncClient

    def bodies(
        self, body: dict[str, Any], room: Any, prefill_rank: int | None = None, decode_rank: int | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The two bodies of a request that is placed on those ranks."""
        port = self.prefill.bootstrap_port
        common = {**body, "bootstrap_host": "127.0.0.1", "bootstrap_port": port, "bootstrap_room": room}
        prefill, decode = dict(common), dict(common)
        if prefill_rank is not None:
            prefill["routed_dp_rank"] = prefill_rank
            decode["disagg_prefill_dp_rank"] = prefill_rank
        if decode_rank is not None:
            decode["routed_dp_rank"] = decode_rank
        return prefill, decode

    async def send(
        self,
        path: str,
        body: dict[str, Any],
        room: Any,
        prefill_rank: int | None = None,
        decode_rank: int | None = None,
    ) -> tuple[httpx.Response, httpx.Response]:
        """Both legs at the same time."""
        prefill, decode = self.bodies(body, room, prefill_rank, decode_rank)
        return await asyncio.gather(self.to_prefill(path, prefill), self.to_decode(path, decode))

    async def to_prefill(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(self.prefill.url + path, json=body)

    async def to_decode(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(self.decode.url + path, json=body)


@asynccontextmanager
async def running_pair(**settings: Any) -> AsyncIterator[Pair]:
    """Engines with two ranks each, 200 times faster than the modelled GPU unless told otherwise.

    Nothing times out unless told to: the engines' time-outs shrink with the time scale, a slow test machine does not.
    """
    patient = EngineConfig(dp_size=2, time_scale=200.0, bootstrap_timeout_s=1e6, waiting_timeout_s=1e6)
    config = replace(patient, **settings)
    async with (
        Engine(replace(config, role=Role.PREFILL)) as prefill,
        Engine(replace(config, role=Role.DECODE)) as decode,
        httpx.AsyncClient(timeout=PATIENCE_S) as http,
    ):
        yield Pair(prefill, decode, http)


def with_pair(test: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
    """Run a test against a fresh pair; afterwards nothing may be left on either engine."""

    async def run() -> None:
        async with asyncio.timeout(2 * PATIENCE_S), running_pair(**settings) as pair:
            await test(pair)
            await until(lambda: pair.prefill.open_requests == pair.decode.open_requests == 0)
            for engine in (pair.prefill, pair.decode):
                state = (await pair.http.get(engine.url + "/sim/state")).json()
                assert state["kv_used_tokens"] == [0] * engine.config.dp_size

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - the engines have no event for it
            await asyncio.sleep(0.005)


def sse(text: str) -> list[Any]:
    """The events of a stream; the last must be `[DONE]`, which is left out."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def words(count: int) -> str:
    """The text of an answer of that many tokens."""
    return " ".join(f"tok{i}" for i in range(count))
