"""The load table: every worker and DP rank with what is charged to it and what it reported.

The only shared mutable state of the service. No I/O, no clock of its own; one event loop and no `await` inside, so no
locks: a pick and its charge are one step. Only writers: `worker_changed` (health, discovery), `observe` (scrapes),
`charge` and `release` (exchanges).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker, with its ranks."""

    worker: Worker
    healthy: bool = False
    ranks: list[RankState] = field(default_factory=list)
    in_flight: int = 0
    """Legs on this worker that have not ended."""


@dataclass(slots=True, eq=False)
class Lease:
    """A charge on a rank. Held by one exchange, released exactly once by `LoadTable.release`."""

    state: WorkerState
    rank: RankState
    tokens: float
    released: bool = False


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
                rank.scraped, rank.scraped_at_s, rank.charged_tokens = load, at_s, 0.0

    def charge(self, state: WorkerState, dp_rank: int, prompt_tokens: float, output_tokens: float = 0.0) -> Lease:
        """Charge a request to a rank, in the same step as the pick."""
        rank = state.ranks[dp_rank]
        lease = Lease(state, rank, prompt_tokens + output_tokens)
        rank.charged_tokens += prompt_tokens
        rank.outstanding_tokens += lease.tokens
        rank.outstanding_requests += 1
        state.in_flight += 1
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back; a second time does nothing."""
        if lease.released:
            return
        lease.released = True
        rank = lease.rank
        rank.outstanding_requests -= 1
        # Float sums of the same terms in another order can leave a remainder: an idle rank has exactly 0.
        rank.outstanding_tokens = max(0.0, rank.outstanding_tokens - lease.tokens) if rank.outstanding_requests else 0.0
        lease.state.in_flight -= 1


def _new_state(worker: Worker) -> WorkerState:
    return WorkerState(worker, ranks=[RankState(dp_rank) for dp_rank in range(worker.rank_count)])
