"""Clients and engines that leave, stall or ask for too much: rows 3, 6, 12 and 13."""

import asyncio
import contextlib
import json
import subprocess
import time
import uuid
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
UPLOADS = 64
UPLOAD_PATIENCE_S = 60.0
ENVOY_HEAP_BYTES = 512 << 20
ENVOY_KEEPS_SHARE = 0.85
"""Of the limit, once all is over: free, but tcmalloc keeps it for the next time."""
ENVOY_HEAP_SHARE = 1.25
"""Of the limit, resident, besides what Envoy takes when it is idle: free pages, and bodies let in that still grow."""


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
    return [row, await uploads_at_once(field)]


async def uploads_at_once(field: Field) -> Row:
    """Row 12: more bytes than Envoy may hold. Without its limit 32 of these took 2 GB."""
    limit_mb = ENVOY_HEAP_BYTES >> 20
    row = Row(12, f"{UPLOADS} uploads of 20 MB at once, twice, to an Envoy that may have {limit_mb} MiB")
    await field.do(lambda: field.stack.restart_gateway(["--envoy-max-heap-bytes", str(ENVOY_HEAP_BYTES)]))
    envoy = _envoy_of(field.stack.gateway.pid)
    before, peak = memory_mb(envoy), 0.0
    body = json.dumps(big_chat()).encode()
    for _ in range(2):
        sending = asyncio.create_task(volley(UPLOADS, UPLOADS, lambda _: upload(field, body)))
        while not sending.done():
            peak = max(peak, memory_mb(envoy))
            await asyncio.wait([sending], timeout=0.01)
        for one in await sending:
            row.clients[one.said()] += 1
            row.took("answer", one.total_ms)
            row.check(one.status == 200 or one.headers.get("retry-after") == "1", "who is refused hears when to retry")
        left = await field.left_over()
        row.check(not left, f"nothing is left over ({left})")
    row.notes.append(f"Envoy {before:.0f} MB -> {peak:.0f} MB")
    row.check(set(row.clients) <= {"200", "503"}, "every client gets 200 or 503")
    row.check(row.clients["200"] > 0, "some are served")
    row.check(peak <= before + ENVOY_HEAP_SHARE * limit_mb, f"Envoy stays within {ENVOY_HEAP_SHARE:g} of its limit")
    alone = await upload(field, body)
    row.check(alone.status == 200, f"one more alone is served ({alone.said()})")

    async def given_back() -> bool:
        return memory_mb(envoy) <= before + ENVOY_KEEPS_SHARE * limit_mb

    row.took("memory is given back", await field.until(given_back, "Envoy gives memory back") * 1e3)
    await field.do(field.stack.restart_gateway)
    return row


async def upload(field: Field, body: bytes) -> Seen:
    """A request whose answer may come in the middle of its upload; usual clients then often see a broken pipe only."""
    seen = Seen(str(uuid.uuid4()), sent_unix=time.time())
    host, _, port = field.stack.url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))

    async def send() -> None:
        with contextlib.suppress(ConnectionError):
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nx-request-id: {seen.request_id}\r\ncontent-length: {len(body)}"
            writer.write(head.encode() + b"\r\n\r\n")
            for start in range(0, len(body), 1 << 18):
                writer.write(body[start : start + (1 << 18)])
                await writer.drain()

    sending = asyncio.create_task(send())
    try:
        async with asyncio.timeout(UPLOAD_PATIENCE_S):
            line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            seen.headers = dict(header.split(": ", 1) for header in lines if header)
            seen.body = await reader.readexactly(int(seen.headers.get("content-length", "0")))
            seen.status = int(line.split()[1])
    except (TimeoutError, ConnectionError, asyncio.IncompleteReadError) as error:
        seen.error = type(error).__name__
    sending.cancel()
    await asyncio.wait([sending])
    writer.close()
    with contextlib.suppress(ConnectionError):  # it was closed in the middle of our upload
        await writer.wait_closed()
    seen.ended_unix = time.time()
    return seen


def _envoy_of(pid: int) -> int:
    """The Envoy that `extproc up` runs."""
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=True)
    return int(listed.stdout.split()[0])
