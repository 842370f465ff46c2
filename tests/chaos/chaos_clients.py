"""Clients and engines that leave, stall or ask for too much: rows 3, 6, 12 and 13."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Sequence
from typing import Any

from chaos_client import CHAT, GENERATE, Seen, chat, generate
from chaos_field import Field, memory_mb, volley
from chaos_legs import PROMPT_BYTES
from chaos_rows import Row

LEAVE_MS = 50
"""Row 6: within this the engines have heard of it."""
PREFILL_TIMEOUT_S = 2.0
"""`--prefill-timeout-secs` of the rows that wait for a time-out."""
REQUEST_TIMEOUT_S = 4.0
"""`--request-timeout-secs` of the same rows; a longer upload is ended by it."""
MOST_REQUESTS = 24
"""`--max-worker-requests` of row 12: with two workers a role, 96 legs in all."""
BIG_BYTES = 20_000_000
"""More than all buffers between a client and an engine that does not read."""
MANY = 200


async def client_leaves(
    field: Field, name: str, body: Any, path: str, count: int, *, prefill_fault: str = "", **how: Any
) -> Row:
    """Row 6: both legs hear of it. `prefill_fault`: on all prefill engines."""
    await field.calm()
    row = Row(6, f"the client leaves {name}")
    await field.set_faults(field.stack.prefills, *([prefill_fault] if prefill_fault else []))
    async with field.client() as client:
        seen = await volley(count, 2, lambda _: client.send(body(), path, **how))
    row.clients.update(one.said() for one in seen)
    row.check(set(row.clients) == {"left"}, "every client leaves in time")
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")
    attempts = await field.attempts(seen)
    for one in seen:
        for attempt in attempts.get(one.request_id, []):
            for role in ("prefill", "decode"):
                leg = getattr(attempt, role)
                if leg and leg["aborted_unix"]:
                    row.took(f"leaving to {role} leg's cancellation", (leg["aborted_unix"] - one.ended_unix) * 1e3)
                elif leg and leg["outcome"] != "finished":  # the other engine told it
                    row.took(f"leaving to {role} leg's own end", (leg["ended_unix"] - one.ended_unix) * 1e3)
    for figure in row.figures:
        row.check_p99(figure, LEAVE_MS)
    row.notes.append(f"{sum(map(len, attempts.values()))} attempts at engines")
    return row


async def client_leaves_rows(field: Field, count: int) -> list[Row]:
    """Row 6 in all its forms."""
    before = await client_leaves(
        field, "before headers", lambda: chat(20, PROMPT_BYTES), CHAT, count, leave_after_s=0.06
    )
    middle = await client_leaves(
        field, "mid-stream", lambda: chat(200, stream=True), CHAT, count, leave_after_bytes=600
    )
    alone = await client_leaves(
        field, "while prefill hangs", chat, CHAT, count, prefill_fault="hang", leave_after_s=0.06
    )
    hung = await client_leaves(
        field,
        "a /generate stream while prefill hangs",
        lambda: generate(20, stream=True),
        GENERATE,
        min(count, 20),
        prefill_fault="hang",
        leave_after_s=0.06,
    )
    early = await client_leaves(
        field,
        "a /generate stream mid-prefill",
        lambda: generate(20, 4 * PROMPT_BYTES, stream=True),
        GENERATE,
        count,
        leave_after_s=0.1,
    )
    upload = await client_leaves(field, "during upload", half_an_upload, CHAT, count, leave_after_s=0.1)
    upload.check(upload.notes[-1].startswith("0 "), "no engine hears of it")
    return [before, alone, middle, early, hung, upload]


async def half_an_upload() -> AsyncIterator[bytes]:
    """The beginning of a body, and then nothing for a minute."""
    yield b'{"messages": [{"role": "user", "content": "'
    yield b"x" * 100_000
    await asyncio.sleep(60)


def big_chat() -> dict[str, Any]:
    """A short prompt in a long body."""
    return {**chat(2), "user": "x" * BIG_BYTES}


async def prefill_hangs(field: Field, count: int) -> Row:
    """Row 3. Under a gateway whose prefill legs may take `PREFILL_TIMEOUT_S`."""
    await field.calm()
    row = Row(3, "all prefills hang")
    await field.set_faults(field.stack.prefills, "hang")
    await _timed_out(field, row, chat(2, PROMPT_BYTES), count, count)
    return row


async def stalled_prefill_reader(field: Field) -> Row:
    """Row 13: a prefill engine that reads nothing, and a body that fills all buffers."""
    await field.calm()
    row = Row(13, "prefill does not read a 20 MB body")
    await field.set_faults(field.stack.prefills, "hang@upload")
    await _timed_out(field, row, big_chat(), 4, 1)
    return row


async def stalled_upload(field: Field, count: int) -> Row:
    """Row 13: a client that stops in the middle of its body."""
    await field.calm()
    row = Row(13, "the client's upload stalls")
    await _timed_out(field, row, half_an_upload, count, count, limit_s=REQUEST_TIMEOUT_S)
    return row


async def _timed_out(
    field: Field, row: Row, body: Any, count: int, width: int, *, limit_s: float = PREFILL_TIMEOUT_S
) -> None:
    async with field.client() as client:
        seen = await volley(count, width, lambda _: client.send(body() if callable(body) else body, patience_s=6))
    row.clients.update(one.said() for one in seen)
    for one in seen:
        row.took("the client's answer", one.total_ms)
    row.notes.append(f"says {seen[0].body[:120].decode(errors='replace')!r}")
    row.check(set(row.clients) <= {"504", "408"}, "every client gets 504 (408 for its own upload)")
    await _ends_of_legs(field, row, seen)
    row.check_p99("the client's answer", limit_s * 1e3 + 500)
    await field.set_faults(field.engines)  # an engine that does not read does not see its client go
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")


async def _ends_of_legs(field: Field, row: Row, seen: Sequence[Seen]) -> None:
    await asyncio.sleep(2)
    attempts = await field.attempts(seen)
    for one in seen:
        for attempt in attempts.get(one.request_id, []):
            for role in ("prefill", "decode"):
                leg = getattr(attempt, role)
                if leg and leg["ended_unix"]:
                    row.took(f"answer to {role} leg's end", (leg["ended_unix"] - one.ended_unix) * 1e3)
                elif leg:
                    row.clients[f"({role} engine does not see its client go, as it does not read)"] += 1


async def overload(field: Field) -> list[Row]:
    """Row 12: more than the engines can do at once, and more bytes than anybody should hold."""
    await field.calm()
    row = Row(12, f"{MANY} requests at once")
    await field.do(lambda: field.stack.restart_gateway(["--max-worker-requests", str(MOST_REQUESTS)]))
    async with field.client() as client:
        sending = asyncio.create_task(volley(MANY, MANY, lambda _: client.send(chat(20, PROMPT_BYTES))))
        most = 0.0
        while not sending.done():
            most = max(most, await field.metric("extproc_legs_in_flight"))
            await asyncio.sleep(0.05)
        seen = await sending
    row.clients.update(one.said() for one in seen)
    for one in seen:
        row.took("answer", one.total_ms)
    row.notes.append(f"up to {most:g} legs in flight")
    row.check(set(row.clients) == {"200", "429"}, "every client gets 200 or 429")
    row.check(most <= 4 * MOST_REQUESTS, f"no worker has more than {MOST_REQUESTS}")
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")
    await field.do(field.stack.restart_gateway)
    uploads = Row(12, "8 uploads of 20 MB at once")
    uploads.missing = "no overload manager in the Envoy configuration"
    envoy = _envoy_of(field.stack.gateway.pid)
    before, peak = memory_mb(envoy), 0.0
    async with field.client() as client:
        sending = asyncio.create_task(volley(8, 8, lambda _: client.send(big_chat(), patience_s=60)))
        while not sending.done():
            peak = max(peak, memory_mb(envoy))
            await asyncio.sleep(0.05)
        seen = await sending
    uploads.clients.update(one.said() for one in seen)
    uploads.notes.append(f"Envoy {before:.0f} MB -> {peak:.0f} MB for 160 MB of bodies, with both legs and the retry")
    return [row, uploads]


def _envoy_of(pid: int) -> int:
    """The Envoy that `extproc up` runs."""
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return int(listed.stdout.split()[0])
