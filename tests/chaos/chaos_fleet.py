"""Workers die, are away, or talk nonsense: the deaths of rows 2, 4 and 5, and rows 7, 8 and 11."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from chaos_client import Client, Seen, chat
from chaos_field import Field, memory_mb, volley
from chaos_legs import BROKEN, CLIENT_MS, OTHER_LEG_MS, PROMPT_BYTES
from chaos_rows import Row

from extproc.demo.stack import EngineProcess

LOAD = 16
"""Connections."""
REFUSED_PAUSE_S = 0.05
"""A refused client tries again after this: without a pause, the load would only measure how fast it is refused."""
RESTART_AFTER_S = 4.0
HEALTH_INTERVAL_S = 1.0
"""The stack's `--health-check-interval-secs`."""
PAGES = ("down", "slow", "garbage", "huge", "gzip-bomb", "redirect", "html")
PAGE_MEMORY_MB = 32
"""For each worker: a page may have 8 MiB, and is there twice while it is put together."""
_DIED = re.compile(r"simulated fault: \S+ at ([\d.]+)")


@dataclass(frozen=True)
class Death:
    """A process that ends in the middle of its work, with many requests on it."""

    number: int
    name: str
    role: str
    spec: str
    allowed: tuple[str, ...]
    """What clients may see."""
    tokens: int = 2
    rounds: int = 4


DEATHS = [
    Death(2, "one prefill dies mid-prefill, 16 in flight", "prefill", "die@work,delay=0.05,count=1", ("200",)),
    Death(4, "one decode dies while it waits, 16 in flight", "decode", "die@work,delay=0.05,count=1", ("200",)),
    Death(
        5,
        "one decode dies mid-stream, 16 in flight",
        "decode",
        "die@stream,after=5,count=1",
        ("200", BROKEN),
        tokens=60,
    ),
]


async def run_death(field: Field, death: Death, rounds: int | None = None) -> Row:
    """Each round: 16 requests, one death, more requests that find the port closed, a restart."""
    row = Row(death.number, death.name)
    for _ in range(rounds or death.rounds):
        await field.calm()
        victim = next(engine for engine in field.engines if engine.role == death.role)
        async with field.client() as client:
            await field.set_faults([victim], death.spec)
            stream = death.tokens > 2
            body = chat(death.tokens, PROMPT_BYTES, stream)
            seen = await volley(LOAD, LOAD, lambda _, body=body, client=client: client.send(body))
            row.clients.update(one.said(stream) for one in seen)
            died = _DIED.search(victim.process.log_text)
            row.check(died is not None, "the process died")
            died_unix = float(died[1]) if died else 0.0
            await _after_death(field, row, victim, seen, died_unix)
            later = await volley(LOAD, 2, lambda _, client=client: client.send(chat()))
            row.clients.update(f"{one.said()} (port closed)" for one in later)
            for one in later:
                row.took("a request that may find the port closed", one.total_ms)
        await field.do(lambda victim=victim: field.stack.restart_engine(victim))
    allowed = {*death.allowed, "200 (port closed)"}
    row.check(set(row.clients) <= allowed, f"clients see nothing but {', '.join(sorted(allowed))}")
    other = "decode" if death.role == "prefill" else "prefill"
    if f"death to {other} leg's end" in row.figures:
        row.check_p99(f"death to {other} leg's end", OTHER_LEG_MS[death.number])
    if "death to the client's answer" in row.figures:
        row.check_p99("death to the client's answer", CLIENT_MS[death.number])
    return row


async def _after_death(field: Field, row: Row, victim: EngineProcess, seen: Sequence[Seen], died_unix: float) -> None:
    """What became of the other legs of requests on a process that died."""
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")
    other = "decode" if victim.role == "prefill" else "prefill"
    attempts = await field.attempts(seen)
    for one in seen:
        if one.error:
            row.took("death to the client's answer", (one.ended_unix - died_unix) * 1e3)
        for attempt in attempts.get(one.request_id, []):
            leg = getattr(attempt, other)
            if leg is None or leg["headers"].get(f"x-pd-{victim.role}-endpoint") != victim.address:
                continue
            if leg["outcome"] != "finished" and leg["ended_unix"]:
                row.took(f"death to {other} leg's end", max(0.0, leg["ended_unix"] - died_unix) * 1e3)


async def all_down(field: Field, role: str, count: int = 60) -> Row:
    """Row 7: no healthy worker of a role."""
    await field.calm()
    row = Row(7, f"all {role} workers are down")
    engines = [engine for engine in field.engines if engine.role == role]
    await field.set_faults(engines, "health=down")

    async def healthy(wanted: int) -> bool:
        return await field.metric("extproc_worker_healthy", role=role) == wanted

    row.took("health noticed", 1e3 * await field.until(lambda: healthy(0), "health noticed"))
    async with field.client() as client:
        await volley(4, 2, lambda _: client.send(chat()))
        seen = await volley(count, 2, lambda _: client.send(chat()))
        row.clients.update(one.said() for one in seen)
        for one in seen:
            row.took("answer", one.total_ms)
        row.check(set(row.clients) == {"503"}, "every client gets 503")
        row.check(all("retry-after" in one.headers for one in seen), "retry-after says when to come back")
        row.check_p99("answer", 10)
        row.check(not await field.attempts(seen), "no attempt reaches an engine")

        async def served() -> bool:
            return (await client.send(chat())).status == 200

        await field.set_faults(engines)
        row.took("recovery", 1e3 * await field.until(served, "requests are served again"))
    row.check_p99("recovery", 1e3 * HEALTH_INTERVAL_S + 200)
    return row


async def killed_under_load(field: Field, role: str, seconds: float = 12.0) -> Row:
    """Row 8: SIGKILL of one engine under load, and its return."""
    await field.calm()
    row = Row(8, f"SIGKILL of one {role} under load of {LOAD}, back after {RESTART_AFTER_S:g} s")
    victim = next(engine for engine in field.engines if engine.role == role)
    seen: list[Seen] = []
    async with field.client() as client, asyncio.TaskGroup() as group:
        loads = [group.create_task(load(client, seen, seconds)) for _ in range(LOAD)]
        await asyncio.sleep(2.0)
        killed_unix = time.time()
        os.kill(victim.pid, signal.SIGKILL)
        await asyncio.sleep(RESTART_AFTER_S)
        await field.do(lambda: field.stack.restart_engine(victim))
        ready_unix = time.time()
        await asyncio.wait(loads)
    _judge_load(row, seen, killed_unix, allow_truncated=role == "decode")
    arrived = [record["arrived_unix"] for record in victim.requests()]
    row.check(bool(arrived), "the engine takes traffic again")
    if arrived:
        row.took("ready to first request", max(0.0, min(arrived) - ready_unix) * 1e3)
        row.check_p99("ready to first request", 2e3 * HEALTH_INTERVAL_S)
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")
    return row


async def load(client: Client, seen: list[Seen], seconds: float) -> None:
    """One connection's worth: streams of 30 tokens, one after the other."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        seen.append(await client.send(chat(30, stream=True)))
        if seen[-1].status != 200:
            await asyncio.sleep(REFUSED_PAUSE_S)


def _judge_load(row: Row, seen: Sequence[Seen], killed_unix: float, *, allow_truncated: bool) -> None:
    row.clients.update(one.said(stream=True) for one in seen)
    truncated = [one for one in seen if one.status == 200 and one.error and one.body]
    failed = [one for one in seen if one.status != 200 or (one.error and not one.body)]
    row.check(not failed, f"no failed request among those without a byte sent ({len(failed)} of {len(seen)} failed)")
    row.check(allow_truncated or not truncated, f"no truncated stream ({len(truncated)})")
    row.check(not any(one.said(stream=True).endswith("[DONE]") for one in seen), "no stream ends early but cleanly")
    row.notes.append(f"{len(truncated)} truncated streams")
    for one in seen:
        if not one.error:
            around = one.sent_unix < killed_unix < one.ended_unix
            row.took("request during the kill" if around else "request", one.total_ms)


async def bad_pages(field: Field, kind: str, seconds: float = 3.0) -> Row:
    """Row 11: pages with figures go wrong on all engines while requests go on."""
    await field.calm()
    row = Row(11, f"metrics pages: {kind}")
    before = memory_mb(field.stack.gateway.pid)
    failures = await field.metric("extproc_scrape_failures_total")
    await field.set_faults(field.engines, f"metrics={kind}")
    seen: list[Seen] = []
    async with field.client() as client, asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(load(client, seen, seconds))
    row.clients.update(one.said(stream=True) for one in seen)
    row.check(set(row.clients) == {"200"}, "every client gets 200")
    for one in seen:
        row.took("request of 30 tokens", one.total_ms)
    failures = await field.metric("extproc_scrape_failures_total") - failures
    after = memory_mb(field.stack.gateway.pid)
    row.notes.append(f"{failures:g} scrapes failed; service {before:.0f} MB -> {after:.0f} MB")
    row.check(failures > 0, "the service noticed")
    row.check(after - before < PAGE_MEMORY_MB * len(field.engines), f"memory is bounded (+{after - before:.0f} MB)")
    row.check(await field.metric("extproc_worker_healthy") == len(field.engines), "workers stay healthy")
    return row
