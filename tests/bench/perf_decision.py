"""What a decision costs, alone in a process: parse, pick and charge, mutate. CPU time, so that other work counts less.

Pick and charge: a worker and a rank of it for both legs, a room, two leases. Mutate: headers and both bodies. Leases
are given back outside of what is timed, so that as many requests are in flight as in a batch.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from perf_load import NUMBER, body_of

from extproc.config import Config, build
from extproc.load import LoadTable
from extproc.model import RankLoad, Role
from extproc.mutation import mutate
from extproc.parse import parse
from extproc.policy import WORKER_POLICIES
from extproc.request import Endpoint, GenerationRequest
from extproc.schedule import Scheduled, Scheduler

Result = TypeVar("Result")

RANKS = 8
BATCH = 64
"""Requests in flight, about as in the benchmarks of the gateways."""
SIZES = (2, 10, 100, 1000)
"""Workers, half of them prefill."""
WARM_UP_BATCHES = 3
POLICY = "power_of_two"
"""The one whose cost must not grow with the number of workers."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Medians over the batches, microseconds of CPU a request."""

    policy: str
    workers: int
    body: str
    parse_us: float
    place_us: float
    """Pick and charge."""
    mutate_us: float

    @property
    def decision_us(self) -> float:
        """Without parsing: pick, charge, mutate."""
        return self.place_us + self.mutate_us


def policies() -> list[str]:
    """Every worker policy."""
    return list(WORKER_POLICIES)


def decide(policy: str, workers: int, body: str, batches: int) -> Decision:
    """Time `batches` of `BATCH` requests, each with a prompt of its own."""
    scheduler, table = make_scheduler(policy, workers)
    text = body_of(body)
    timings: list[tuple[float, float, float]] = []
    for number in range(WARM_UP_BATCHES + batches):
        bodies = [text.replace(NUMBER.encode(), b"%08d" % (number * BATCH + i)) for i in range(BATCH)]
        requests, parse_us = _timed(lambda bodies=bodies: [_parse(body) for body in bodies])
        placed, place_us = _timed(lambda requests=requests: [scheduler.place(request) for request in requests])
        _, mutate_us = _timed(
            lambda requests=requests, placed=placed, bodies=bodies: [
                mutate(request, one.placement, body)
                for request, one, body in zip(requests, placed, bodies, strict=True)
            ]
        )
        release(table, placed)
        timings.append((parse_us, place_us, mutate_us))
    medians = [statistics.median(column) / BATCH for column in zip(*timings[WARM_UP_BATCHES:], strict=True)]
    return Decision(policy, workers, body, *medians)


def make_scheduler(policy: str, workers: int, **settings: object) -> tuple[Scheduler, LoadTable]:
    """A scheduler over healthy workers that have been scraped."""
    config = _config(policy, workers, settings)
    table = LoadTable(config.workers(), time.monotonic, config.circuit_limits())
    rng = random.Random(1)
    for worker in config.workers():
        table.worker_changed(replace(worker, endpoint=worker.name), healthy=True)
        figures = [RankLoad(rank, used_tokens=float(rng.randrange(50_000))) for rank in range(RANKS)]
        table.observe(worker.name, figures, time.monotonic())
    return Scheduler(config, table, rng), table


def release(table: LoadTable, placed: Sequence[Scheduled]) -> None:
    """End both legs of each."""
    for one in placed:
        table.release(one.prefill)
        table.release(one.decode)


def _config(policy: str, workers: int, settings: dict[str, object]) -> Config:
    half = max(1, workers // 2)
    urls = [f"http://10.{role}.{number >> 8}.{number & 255}:30000" for role in (0, 1) for number in range(half)]
    keys: dict[str, object] = {
        Role.PREFILL.value: [{"url": url, "dp_size": RANKS, "bootstrap_port": 8998} for url in urls[:half]],
        Role.DECODE.value: [{"url": url, "dp_size": RANKS} for url in urls[half:]],
        "policy": policy,
        **settings,
    }
    return build(keys, {})


def _parse(body: bytes) -> GenerationRequest:
    return parse(Endpoint.CHAT, body)


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    """The result, and microseconds of this thread's CPU time."""
    began_ns = time.thread_time_ns()
    result = work()
    return result, (time.thread_time_ns() - began_ns) / 1000
