"""One run: a contender, fresh engines, one seed's requests. What the client saw, joined with what engines recorded."""

import asyncio
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvloop
from bench_client import Answer, send_all
from bench_contenders import Contender, running
from bench_cpu import CpuTimes
from bench_workload import Plan, Shot, shots

from extproc.demo.spread import spread
from extproc.demo.stack import EngineProcess, Stack, StackError
from extproc.lab.request import TraceRequest
from extproc.lab.stats import Latency, quantile

WARM_UP = 12
"""Requests before the run: connections are open, code paths have been run, Envoy's threads know the way."""
SETTLE_S = 2.5
"""After that: every gateway has read the engines' loads at least once."""
IDLE_WITHIN_S = 60.0
RECORDS_TIMEOUT_S = 60.0
"""Records hold all bodies: some 20 MB."""
_NUMBER = re.compile(r'"prompt":\s*"#(\d+) ')


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Real seconds, as the client saw them."""

    contender: str
    seed: int
    ttft_s: Latency
    tpot_s: Latency
    failures: int
    errors: tuple[str, ...]
    """The first few."""
    prefill_tokens: tuple[int, ...]
    """Prompt tokens that each prefill rank was given."""
    decode_tokens: tuple[int, ...]
    """The same of decode ranks, with the output."""
    explicit_ranks: float
    """Share of prefill legs that named their rank."""
    outside_s: Latency
    """TTFT beyond what the decode engine took from a request's arrival to its first token: gateway and client."""
    late_p99_s: float
    """How late the client sent."""
    cpu_idle: float | None
    """Share of the machine's CPU time during the run."""
    gateway_cpu_s: float | None
    client_cpu_s: float | None
    seconds: float

    @property
    def prefill_spread(self) -> float | None:
        """Largest over mean of the ranks' tokens."""
        return spread(self.prefill_tokens)

    @property
    def decode_spread(self) -> float | None:
        """The same of the decode ranks."""
        return spread(self.decode_tokens)


def run(contender: Contender, plan: Plan, seed: int, answered: Callable[[], None]) -> RunFigures:
    """One run, on engines of its own. Raises StackError when something does not start."""
    todo = shots(plan.arrivals(seed), plan.time_scale, seed)
    warm_up = shots([TraceRequest(n * 0.5, 16 * (n + 1), 8) for n in range(WARM_UP)], plan.time_scale, seed)
    with (
        tempfile.TemporaryDirectory(prefix="bench-scheduling-") as logs,
        running(contender, plan, Path(logs)) as (stack, gateway),
    ):
        _send(gateway.url, warm_up, lambda: None)
        _wait_until_idle(stack)
        for engine in stack.engines:
            engine.forget_requests()
        time.sleep(SETTLE_S)
        before, started_s = CpuTimes.now(gateway.pid), time.monotonic()
        answers = _send(gateway.url, todo, answered)
        after, seconds = CpuTimes.now(gateway.pid), time.monotonic() - started_s
        _wait_until_idle(stack)
        legs = {role: _records(engines) for role, engines in (("prefill", stack.prefills), ("decode", stack.decodes))}
    used = None if before is None or after is None else _Used.between(before, after)
    return _figures(
        contender,
        plan,
        seed,
        todo=todo,
        answers=answers,
        prefill=legs["prefill"],
        decode=legs["decode"],
        used=used,
        seconds=seconds,
    )


def _send(url: str, todo: Sequence[Shot], answered: Callable[[], None]) -> list[Answer]:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(send_all(url, todo, answered))


def _wait_until_idle(stack: Stack) -> None:
    deadline_s = time.monotonic() + IDLE_WITHIN_S
    while any(engine.state()["open"] for engine in stack.engines):
        if time.monotonic() > deadline_s:
            raise StackError(f"engines were not idle within {IDLE_WITHIN_S:g} s")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class _Used:
    idle: float
    gateway_s: float
    client_s: float

    @classmethod
    def between(cls, before: CpuTimes, after: CpuTimes) -> "_Used":
        total = after.machine_total - before.machine_total
        idle = after.machine_idle - before.machine_idle
        return cls(idle / total if total else 0.0, after.gateway - before.gateway, after.client - before.client)


@dataclass(frozen=True, slots=True)
class _Leg:
    """What an engine recorded of one leg."""

    rank: int
    """Counted over all workers of the role."""
    explicit: bool
    tokens: int
    first_token_s: float
    """Virtual, since its arrival there."""


def _records(engines: Sequence[EngineProcess]) -> dict[int, _Leg]:
    """By the requests' numbers. Of a leg that was tried twice, the last."""
    legs, first_rank = {}, 0
    for engine in engines:
        page = httpx.get(f"{engine.url}/sim/requests", timeout=RECORDS_TIMEOUT_S, trust_env=False)
        for record in page.raise_for_status().json():
            found = _NUMBER.search(record["body"] or "")
            if found and record["outcome"] == "finished":
                legs[int(found[1])] = _leg(record, engine.role, first_rank)
        info: dict[str, Any] = httpx.get(f"{engine.url}/server_info", timeout=10.0, trust_env=False).json()
        first_rank += info["dp_size"]
    return legs


def _leg(record: dict[str, Any], role: str, first_rank: int) -> _Leg:
    tokens = sum(record["prompt_tokens"]) + (sum(record["output_tokens"]) if role == "decode" else 0)
    waited_s = record["first_token_s"] - record["arrived_s"]
    return _Leg(first_rank + record["rank"], record["routed_dp_rank"] is not None, tokens, waited_s)


def _figures(
    contender: Contender,
    plan: Plan,
    seed: int,
    *,
    todo: Sequence[Shot],
    answers: Sequence[Answer],
    prefill: dict[int, _Leg],
    decode: dict[int, _Leg],
    used: _Used | None,
    seconds: float,
) -> RunFigures:
    ttft_s, tpot_s, outside_s, errors = [], [], [], []
    for shot, answer in zip(todo, answers, strict=True):
        legs = prefill.get(shot.number), decode.get(shot.number)
        if answer.error or answer.first_token_s is None or answer.last_token_s is None:
            errors.append(f"request {shot.number}: {answer.error}")
            continue
        ttft_s.append(answer.first_token_s)
        if shot.output_tokens > 1:
            tpot_s.append((answer.last_token_s - answer.first_token_s) / (shot.output_tokens - 1))
        if legs[0] is None or legs[1] is None:
            errors.append(f"request {shot.number}: no finished record of both legs")
            continue
        outside_s.append(answer.first_token_s - legs[1].first_token_s / plan.time_scale)
    return RunFigures(
        contender=contender.name,
        seed=seed,
        ttft_s=Latency.of(ttft_s),
        tpot_s=Latency.of(tpot_s),
        failures=len(errors),
        errors=tuple(errors[:5]),
        prefill_tokens=_by_rank(prefill, plan.prefill.total_ranks),
        decode_tokens=_by_rank(decode, plan.decode.total_ranks),
        explicit_ranks=sum(leg.explicit for leg in prefill.values()) / max(1, len(prefill)),
        outside_s=Latency.of(outside_s),
        late_p99_s=quantile(sorted(answer.late_s for answer in answers), 0.99),
        cpu_idle=None if used is None else used.idle,
        gateway_cpu_s=None if used is None else used.gateway_s,
        client_cpu_s=None if used is None else used.client_s,
        seconds=seconds,
    )


def _by_rank(legs: dict[int, _Leg], ranks: int) -> tuple[int, ...]:
    return tuple(sum(leg.tokens for leg in legs.values() if leg.rank == rank) for rank in range(ranks))
