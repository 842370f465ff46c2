"""Sends requests at their times, whatever has come back so far (open loop), and times what a client sees."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
from bench_workload import Shot

TIMEOUT_S = 120.0
"""For one request. Those of a run that is not overloaded take seconds."""
TAIL_BYTES = 32
"""Kept of what was read before, so that nothing is missed that two reads have parts of."""


@dataclass(slots=True)
class Answer:
    """What came of one request. Times are real seconds since it was due, or None if that never came."""

    number: int
    late_s: float = 0.0
    """From when it was due to when it was sent: this process's own fault."""
    sent_s: float = 0.0
    first_token_s: float | None = None
    last_token_s: float | None = None
    error: str = ""
    """Empty: answered in full."""


async def send_all(url: str, shots: Sequence[Shot], answered: Callable[[], None]) -> list[Answer]:
    """All requests of a run; the answers in the same order. `answered` is called after each."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session,
        asyncio.TaskGroup() as group,
    ):
        start_s = time.perf_counter()
        tasks = []
        for shot in shots:
            await asyncio.sleep(max(0.0, start_s + shot.at_s - time.perf_counter()))
            task = group.create_task(_send(session, shot, start_s + shot.at_s))
            task.add_done_callback(lambda _: answered())
            tasks.append(task)
    return [task.result() for task in tasks]


async def _send(session: aiohttp.ClientSession, shot: Shot, due_s: float) -> Answer:
    answer = Answer(shot.number, late_s=time.perf_counter() - due_s)
    try:
        await _stream(session, shot, due_s, answer)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer


async def _stream(session: aiohttp.ClientSession, shot: Shot, due_s: float, answer: Answer) -> None:
    headers = {"content-type": "application/json"}
    # Engines answer `tok0 tok1 …`: the first and the last token can be told from any other text.
    first, last = b"tok0", b"tok%d" % (shot.output_tokens - 1)
    async with session.post("/v1/completions", data=shot.body, headers=headers) as response:
        if response.status != 200:
            answer.error = f"status {response.status}: {(await response.text())[:200]}"
            return
        tail = b""
        async for part in response.content.iter_any():
            tail += part
            if answer.first_token_s is None and first in tail:
                answer.first_token_s = time.perf_counter() - due_s
            if answer.last_token_s is None and last in tail:
                answer.last_token_s = time.perf_counter() - due_s
            if len(tail) > TAIL_BYTES and answer.last_token_s is None:
                tail = tail[-TAIL_BYTES:]
    usage = b'"completion_tokens":%d' % shot.output_tokens
    if answer.last_token_s is None:
        answer.error = "the stream ended before its last token"
    elif usage not in tail.replace(b'": ', b'":') or b"[DONE]" not in tail:
        answer.error = f"no usage of {shot.output_tokens} tokens, or no [DONE], at the end: {tail[-200:]!r}"
