"""What clients do: all endpoints, streams, batches; one in a hundred leaves, one in a hundred sends nonsense."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from chaos_client import CHAT, GENERATE, Client, Seen, chat, generate
from chaos_field import Field

COMPLETIONS = "/v1/completions"
LEAVING_SHARE = 0.01
NONSENSE_SHARE = 0.01
MOST_TOKENS = 16
MOST_PROMPT_BYTES = 2000

ENGINE_FAULTS = (
    *("status=500@arrival,p=0.001", "status=503@arrival,p=0.0005", "status=400@arrival,p=0.0005"),
    *("reset@arrival,p=0.0005", "close@arrival,p=0.0005", "reset@work,delay=0.005,p=0.0005"),
    *("status=500@work,delay=0.005,p=0.0005", "close@work,delay=0.005,p=0.0005"),
)
"""Of each engine; every request is on two, so that one request in a hundred meets one of these."""
STREAM_FAULTS = ("reset@stream,after=2,p=0.001", "close@stream,after=2,p=0.001")
"""Of decode engines: half of the requests are streams."""
HANGS = ("hang@arrival,p=0.0001",)
"""Of prefill engines, until the gateway gives them up."""


async def set_engine_faults(field: Field) -> None:
    """Faults by chance, from now on."""
    await field.set_faults(field.stack.prefills, *HANGS, *ENGINE_FAULTS)
    await field.set_faults(field.stack.decodes, *ENGINE_FAULTS, *STREAM_FAULTS)


async def fault_hits(field: Field) -> int:
    """How often faults have struck on all engines."""
    hits = 0
    for engine in field.engines:
        async with field.http.get(f"{engine.url}/sim/faults") as answer:
            hits += sum(fault["hits"] for fault in await answer.json())
    return hits


@dataclass(frozen=True, slots=True)
class Sent:
    """One request of a client, and what came of it."""

    kind: str
    """Words for the table: `chat, stream`; `nonsense`; `leaves`."""
    request_id: str
    status: int
    said: str


def _half_an_upload() -> AsyncIterator[bytes]:
    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        await asyncio.sleep(60)

    return pieces()


NONSENSE: tuple[tuple[str, Any, int], ...] = (
    (CHAT, b"nonsense", 400),
    (GENERATE, b"", 400),
    (COMPLETIONS, b'{"prompt": []}', 400),
    (CHAT, {**chat(), "n": 2}, 400),
    (GENERATE, b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}", 400),
    ("/flush_cache", b"{}", 404),
)
"""Path, body and the status that it must get."""


class Traffic:
    """Sends one request after the other; seeded, so that a run can be repeated as far as processes allow."""

    def __init__(self, client: Client, seed: int) -> None:
        self._client = client
        self._random = random.Random(seed)

    async def send(self, _number: int = 0) -> Sent:
        """The next request."""
        rng = self._random
        if rng.random() < NONSENSE_SHARE:
            path, body, status = rng.choice(NONSENSE)
            seen = await self._client.send(body, path)
            return self._note("nonsense" if seen.status == status else f"nonsense for {path}", seen)
        path, body, stream = self._request()
        kind = f"{path}{', stream' if stream else ''}"
        if rng.random() >= LEAVING_SHARE:
            return self._note(kind, await self._client.send(body, path), stream)
        if rng.random() < 0.2:
            return self._note("leaves", await self._client.send(_half_an_upload(), path, leave_after_s=0.02))
        if stream and rng.random() < 0.5:
            leaving = {"leave_after_bytes": rng.randint(1, 600)}
        else:
            leaving = {"leave_after_s": rng.uniform(0.001, 0.03)}
        return self._note("leaves", await self._client.send(body, path, **leaving), stream)

    def _request(self) -> tuple[str, Any, bool]:
        rng = self._random
        tokens, prompt_bytes = rng.randint(1, MOST_TOKENS), rng.randint(1, MOST_PROMPT_BYTES)
        stream = rng.random() < 0.5
        match rng.randrange(4):
            case 0:
                return CHAT, chat(tokens, prompt_bytes, stream), stream
            case 1:
                body = {"model": "sim-model", "prompt": "x" * prompt_bytes, "max_tokens": tokens, "stream": stream}
                return COMPLETIONS, body, stream
            case 2:
                return GENERATE, generate(tokens, prompt_bytes, stream), stream
            case _:
                sampling = {"max_new_tokens": tokens}
                return GENERATE, {"text": ["x" * prompt_bytes, "y" * 10], "sampling_params": sampling}, False

    @staticmethod
    def _note(kind: str, seen: Seen, stream: bool = False) -> Sent:
        return Sent(kind, seen.request_id, seen.status, seen.said(stream and seen.status == 200))
