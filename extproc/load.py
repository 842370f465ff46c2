"""The load table: every worker and DP rank with what is charged to it and what it reported.

The only shared mutable state of the service. No I/O, no clock of its own; one event loop and no `await` inside, so no
locks: a pick and its charge are one step. Only writers: `worker_changed` (health, discovery), `observe` (scrapes),
`charge` and `release` (exchanges).
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from extproc.model import RankLoad, Role, Worker


@dataclass(slots=True, eq=False)
class RankState:
    """One DP rank of one worker."""

    dp_rank: int
    scraped: RankLoad | None = None
    """The last figures the engine gave; None until there are some."""
    scraped_at_s: float | None = None
    charged_tokens: float = 0.0
    """Prompt tokens sent here since the last scrape (the `scraped` model's increments)."""
    outstanding_tokens: float = 0.0
    """The ledger: tokens of leases not yet released."""
    outstanding_requests: int = 0
    leases: "dict[Lease, None]" = field(default_factory=dict)
    """The open leases, oldest first (a dict keeps the order and removes in O(1))."""
    serving_since_s: float = 0.0
    """When the oldest lease can have come to be served: its charge, or the release of the one before."""
    changes: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=MAX_CHANGES))
    """The ledger's recent changes, (when, tokens): what it was at an earlier moment can be told from them."""
    tokens_per_s: float | None = None
    """Prefill only: measured speed; None while it is not known."""
    foreign_tokens: float = 0.0
    """Tokens beyond the ledger that the engine had at `news_at_s`: sent by others, or estimated too low."""
    news_at_s: float | None = None
    """When the engine took the last figures that said something new, on the service's clock; None: no such figures."""

    def outstanding_at(self, then_s: float) -> float:
        """What the ledger was at an earlier moment, in tokens; of moments too long ago, the oldest known."""
        tokens = self.outstanding_tokens
        for when_s, change in reversed(self.changes):
            if when_s <= then_s:
                break
            tokens -= change
        return tokens


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker, with its ranks."""

    worker: Worker
    healthy: bool = False
    ranks: list[RankState] = field(default_factory=list)
    in_flight: int = 0
    """Legs on this worker that have not ended."""
    engine_clock_s: float | None = None
    """What to add to the engine's clock to get the service's; the delay of the fastest scrape is in it."""


@dataclass(slots=True, eq=False)
class Lease:
    """A charge on a rank. Held by one exchange, released exactly once by `LoadTable.release`."""

    state: WorkerState
    rank: RankState
    tokens: float
    charged_at_s: float
    released: bool = False


MAX_CHANGES = 4096
"""Changes of a rank's ledger that are kept: more than come between two scrapes of a rank, and 200 KB at most."""

CLOCK_DRIFT = 1e-4
"""Seconds a second that two hosts' clocks may drift apart; NTP keeps them within 500 ppm, usually far better."""


class LoadTable:
    """All workers' states. Made once, passed in everywhere."""

    def __init__(self, workers: Sequence[Worker], clock: Callable[[], float]) -> None:
        """`clock`: seconds from any origin, the one that scrapes are timed with."""
        self.clock = clock
        self._states = {worker.name: _new_state(worker) for worker in workers}
        self._eligible: dict[Role, list[WorkerState]] = {role: [] for role in Role}

    def __repr__(self) -> str:
        """One line a rank; what a person wants to see in a failing test."""
        lines = [
            f"{state.worker.role} {name}/{rank.dp_rank} {'up' if state.healthy else 'down'}"
            f" scraped={rank.scraped and rank.scraped.used_tokens} charged={rank.charged_tokens:g}"
            f" outstanding={rank.outstanding_tokens:g}/{rank.outstanding_requests}"
            for name, state in self._states.items()
            for rank in state.ranks
        ]
        return "\n".join(["LoadTable:", *lines])

    @property
    def states(self) -> Sequence[WorkerState]:
        """Every worker, healthy or not."""
        return list(self._states.values())

    def eligible(self, role: Role) -> Sequence[WorkerState]:
        """The workers of a role that may be picked: healthy, and their address is known."""
        return self._eligible[role]

    def worker_changed(self, worker: Worker, healthy: bool, reason: str | None = None) -> None:
        """Take over what discovery found out, and whether the worker may be picked."""
        state = self._states.get(worker.name)
        if state is None:
            state = self._states[worker.name] = _new_state(worker)
        if healthy and not state.healthy:  # perhaps another process, on another host
            state.engine_clock_s = None
        state.worker, state.healthy = worker, healthy
        # Ranks that remain keep their charges; leases on vanished ranks release into nothing.
        del state.ranks[worker.rank_count :]
        state.ranks.extend(RankState(dp_rank) for dp_rank in range(len(state.ranks), worker.rank_count))
        role = worker.role
        self._eligible[role] = [
            other
            for other in self._states.values()
            if other.worker.role is role and other.healthy and other.worker.endpoint
        ]

    def observe(self, worker_name: str, loads: Sequence[RankLoad], at_s: float) -> None:
        """Take over one scrape of a worker. `at_s`: when it was asked, on the service's clock.

        As in the existing gateway, new figures erase the increments since the last ones. A rank that the scrape does
        not mention keeps what it has.
        """
        state = self._states.get(worker_name)
        if state is None:
            return
        for load in loads:
            if load.dp_rank < len(state.ranks) and load.used_tokens is not None:
                rank = state.ranks[load.dp_rank]
                self._reconcile(state, rank, load, at_s)
                self._measure(rank, load)
                rank.scraped, rank.scraped_at_s, rank.charged_tokens = load, at_s, 0.0

    def _reconcile(self, state: WorkerState, rank: RankState, load: RankLoad, at_s: float) -> None:
        """Compare the engine's figures with what the ledger was when it took them."""
        if rank.scraped is not None and replace(load, snapshot_s=rank.scraped.snapshot_s) == rank.scraped:
            return  # the same figures again are no news: an engine may publish long after it has changed
        taken_at_s = at_s
        if load.snapshot_s is not None:
            # The fastest scrape so far tells the clocks apart best; it fades, as clocks drift.
            known_s = math.inf if state.engine_clock_s is None else state.engine_clock_s
            known_s += CLOCK_DRIFT * (at_s - (rank.scraped_at_s or at_s))
            state.engine_clock_s = min(known_s, at_s - load.snapshot_s)
            taken_at_s = load.snapshot_s + state.engine_clock_s
        held = load.used_tokens if load.total_tokens is None else load.total_tokens
        rank.foreign_tokens = (held or 0.0) - rank.outstanding_at(taken_at_s)
        rank.news_at_s = taken_at_s

    @staticmethod
    def _measure(rank: RankState, load: RankLoad) -> None:
        """The rank's prefill speed, by the engine's own counters since the last scrape."""
        before = rank.scraped
        if before is None or None in (load.prefill_busy_us_total, before.prefill_busy_us_total):
            return
        busy_s = (load.prefill_busy_us_total - before.prefill_busy_us_total) / 1e6
        tokens = load.prefill_uncached_tokens_total - before.prefill_uncached_tokens_total
        if busy_s > 0 and tokens > 0:
            speed = tokens / busy_s
            rank.tokens_per_s = speed if rank.tokens_per_s is None else rank.tokens_per_s + 0.2 * (speed - rank.tokens_per_s)

    def charge(self, state: WorkerState, dp_rank: int, prompt_tokens: float, output_tokens: float = 0.0) -> Lease:
        """Charge a request to a rank, in the same step as the pick."""
        now_s = self.clock()
        rank = state.ranks[dp_rank]
        lease = Lease(state, rank, prompt_tokens + output_tokens, now_s)
        if not rank.leases:
            rank.serving_since_s = now_s
        rank.leases[lease] = None
        rank.charged_tokens += prompt_tokens
        rank.outstanding_tokens += lease.tokens
        rank.outstanding_requests += 1
        rank.changes.append((now_s, lease.tokens))
        state.in_flight += 1
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back; a second time does nothing."""
        if lease.released:
            return
        lease.released = True
        now_s = self.clock()
        rank = lease.rank
        if next(iter(rank.leases)) is lease:
            rank.serving_since_s = now_s
        del rank.leases[lease]
        rank.outstanding_requests -= 1
        # Float sums of the same terms in another order can leave a remainder: an idle rank has exactly 0.
        rank.outstanding_tokens = max(0.0, rank.outstanding_tokens - lease.tokens) if rank.leases else 0.0
        rank.changes.append((now_s, -lease.tokens))
        lease.state.in_flight -= 1


def _new_state(worker: Worker) -> WorkerState:
    return WorkerState(worker, ranks=[RankState(dp_rank) for dp_rank in range(worker.rank_count)])
