"""What `extproc top` and the status page show, from what the metrics port says: one model for two pictures.

Pure. Reads the shapes of `table_view` and `decisions_view`, as JSON or as they are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from extproc.decisions_view import RUNNING
from extproc.histogram import Buckets, Totals, Window

DROWNING = 2.0
"""A rank is marked when it has this many times what the others of its role have on average, and more than those even
without its largest request: a single long one is no choice that a policy could have made better."""

FULL_BAR_TOKENS = 1000.0
"""A bar is full for the largest load of the role, but not for less than this: a single short request is not much."""

FINE_OUTCOMES = frozenset({"ok", RUNNING})
CLIENT_OUTCOMES = frozenset({"refused", "engine_rejected", "aborted"})
"""Not the gateway's failure, nor a worker's."""


# What the metrics port says


class Settings(msgspec.Struct, frozen=True):
    """The part of the settings that is shown."""

    load_model: str
    prefill_policy: str
    decode_policy: str
    prefill_rank_policy: str
    decode_rank_policy: str


class Scraped(msgspec.Struct, frozen=True):
    """An engine's own figures of a rank."""

    used_tokens: float | None = None
    queued_requests: float | None = None


class Rank(msgspec.Struct, frozen=True):
    """One DP rank."""

    dp_rank: int
    load_tokens: float
    outstanding_tokens: float
    outstanding_requests: int
    charged_tokens: float
    largest_tokens: float
    scrape_age_s: float | None = None
    scraped: Scraped | None = None


class Worker(msgspec.Struct, frozen=True):
    """One worker."""

    worker: str
    role: str
    healthy: bool
    draining: bool
    circuit: str
    in_flight: int
    ranks: tuple[Rank, ...]


class Loads(msgspec.Struct, frozen=True):
    """`GET /debug/loads`."""

    settings: Settings
    workers: tuple[Worker, ...]


class Pick(msgspec.Struct, frozen=True):
    """One leg's destination; without a rank, the engine chose it."""

    worker: str
    dp_rank: int | None = None

    def __str__(self) -> str:
        return f"{self.worker}/{'-' if self.dp_rank is None else self.dp_rank}"


class Decision(msgspec.Struct, frozen=True):
    """One attempt at a request."""

    age_s: float
    request_id: str
    attempt: int
    endpoint: str
    outcome: str
    duration_s: float
    status: int | None = None
    reason: str | None = None
    prefill: Pick | None = None
    decode: Pick | None = None
    room: str | None = None
    prompt_tokens: float | None = None
    counted_tokens: int | None = None
    response_headers_s: float | None = None

    @property
    def first_token_s(self) -> float | None:
        """Time to the response's headers, where those are not of an error."""
        return self.response_headers_s if self.outcome in FINE_OUTCOMES else None


class Decisions(msgspec.Struct, frozen=True):
    """`GET /debug/decisions`."""

    decisions: tuple[Decision, ...]


# What is shown


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Of how many observations, and their median and 99th percentile in seconds; None: there was none."""

    count: int
    p50_s: float | None
    p99_s: float | None


@dataclass(frozen=True, slots=True)
class RankRow:
    """One rank."""

    dp_rank: int
    load_tokens: float
    """What the policy compares by."""
    share: float
    """Length of its bar, from 0 to 1."""
    times_others: float | None
    """Its load over the mean of the role's other ranks, infinite if those have none; None: not drowning."""
    sent_tokens: float
    requests: int
    engine_tokens: float | None
    queued: float | None
    age_s: float | None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker."""

    name: str
    state: str
    """`up`, `draining`, `down`, `circuit open`, `circuit half open`; several with commas."""
    usable: bool
    """It may be picked."""
    in_flight: int
    prefill_leg: Quantiles | None
    """None: no prefill worker."""
    ranks: tuple[RankRow, ...]


@dataclass(frozen=True, slots=True)
class RoleRows:
    """All workers of one role."""

    role: str
    policy: str
    """`WORKER_POLICY/RANK_POLICY`."""
    workers: tuple[WorkerRow, ...]


@dataclass(frozen=True, slots=True)
class Overview:
    """All of it."""

    not_ready: str
    """Why no requests should come; empty: they may."""
    load_model: str
    roles: tuple[RoleRows, ...]
    open_requests: int
    outcomes: tuple[tuple[str, int], ...]
    """Attempts since the service's start, the frequent outcomes first."""
    retries: int
    """Of those attempts, the ones beyond the first at a request."""
    window_s: float | None
    """What the rate and the times are of; None: since the service's start."""
    rate_per_s: float | None
    response_headers: Quantiles
    decisions: tuple[Decision, ...]


def make_overview(loads: Loads, decisions: Decisions, window: Window, not_ready: str) -> Overview:
    """Put it together. `window` has to have a look in it."""
    last, length_s = window.looks[-1][1], window.length_s
    recent = window.totals
    settings = loads.settings
    policies = {
        "prefill": f"{settings.prefill_policy}/{settings.prefill_rank_policy}",
        "decode": f"{settings.decode_policy}/{settings.decode_rank_policy}",
    }
    return Overview(
        not_ready=not_ready,
        load_model=settings.load_model,
        roles=tuple(_role(role, policy, loads, recent) for role, policy in policies.items()),
        open_requests=round(last.open_exchanges),
        outcomes=tuple(sorted(((name, round(count)) for name, count in last.attempts.items()), key=lambda it: -it[1])),
        retries=round(last.retries),
        window_s=length_s,
        rate_per_s=sum(recent.attempts.values()) / length_s if length_s else None,
        response_headers=_quantiles(recent.response_headers),
        decisions=decisions.decisions,
    )


def _role(role: str, policy: str, loads: Loads, recent: Totals) -> RoleRows:
    workers = [worker for worker in loads.workers if worker.role == role]
    compared = [rank.load_tokens for worker in workers if is_usable(worker) for rank in worker.ranks]
    full = max([FULL_BAR_TOKENS, *(rank.load_tokens for worker in workers for rank in worker.ranks)])
    by_charge = loads.settings.load_model == "scraped"
    return RoleRows(
        role,
        policy,
        tuple(
            WorkerRow(
                worker.worker,
                _state(worker),
                is_usable(worker),
                worker.in_flight,
                _quantiles(recent.prefill.get(worker.worker, Buckets())) if role == "prefill" else None,
                tuple(
                    RankRow(
                        rank.dp_rank,
                        rank.load_tokens,
                        rank.load_tokens / full,
                        _times_others(rank, compared) if is_usable(worker) else None,
                        rank.charged_tokens if by_charge else rank.outstanding_tokens,
                        rank.outstanding_requests,
                        rank.scraped.used_tokens if rank.scraped else None,
                        rank.scraped.queued_requests if rank.scraped else None,
                        rank.scrape_age_s,
                    )
                    for rank in worker.ranks
                ),
            )
            for worker in workers
        ),
    )


def is_usable(worker: Worker) -> bool:
    """Whether the worker may be picked, as far as can be told from here."""
    return worker.healthy and not worker.draining and worker.circuit == "closed"


def _state(worker: Worker) -> str:
    circuit = "" if worker.circuit == "closed" else f"circuit {worker.circuit.replace('_', ' ')}"
    words = ["" if worker.healthy else "down", "draining" if worker.draining else "", circuit]
    return ", ".join(word for word in words if word) or "up"


def _times_others(rank: Rank, compared: Sequence[float]) -> float | None:
    """How many times the others' mean, if that is too much; `compared` are all loads, this one included."""
    if len(compared) < 2 or rank.load_tokens < FULL_BAR_TOKENS:
        return None
    others = (sum(compared) - rank.load_tokens) / (len(compared) - 1)
    ratio = rank.load_tokens / others if others > 0 else math.inf
    # What a long prompt has been worked off by now is off the load, but others still wait behind it.
    rest = max(rank.load_tokens, rank.outstanding_tokens) - rank.largest_tokens
    return ratio if ratio >= DROWNING and rest > others else None


def _quantiles(buckets: Buckets) -> Quantiles:
    return Quantiles(round(buckets.total), buckets.quantile(0.5), buckets.quantile(0.99))
