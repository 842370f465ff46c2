"""The load table: every worker and DP rank with what is charged to it and what it reported.

The only shared mutable state of the service. No I/O, no clock of its own; one event loop and no `await` inside, so no
locks: a pick and its charge are one step. Only writers: `worker_changed` (health, discovery), `set_draining`
(operators), `observe` (scrapes), `charge`, `release` and `judge` (exchanges), and the `apply_…` methods, by which
`extproc.processes` says what the exchanges of another process did.
"""

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from extproc.circuit import CLOSED, NO_LIMITS, Circuit, CircuitLimits
from extproc.model import RankLoad, Role, Worker
from extproc.values import Thing

LEARN: Final = 0.05
"""Weight of the latest of many like figures: about the last 20 count."""

KEEP: Final = 1 - LEARN
"""Weight that is left of what was known."""

LEARN_SPEED: Final = 0.25
"""The same for a decode rank's speed, which changes with its batch: the last few scrapes count."""

DEFAULT_OUTPUT_TOKENS: Final = 128
"""Output of a prompt while nothing is known of it (SGLang's default `max_new_tokens`)."""

FIRST_LIFETIME_S: Final = 1.0
"""A lease's lifetime before there was any, in the order of a short request's."""

MAX_CHANGES: Final = 512
"""Changes of a rank's ledger that are kept, those of 256 requests: more than come to a rank between the moment an
engine takes its figures and their arrival. 8 KB a rank, which stay where they are: in a heap that is full of prompts,
blocks that grow and shrink leave gaps of ten times that."""

CLOCK_DRIFT: Final = 1e-4
"""Seconds a second that two hosts' clocks may drift apart; NTP keeps them within 500 ppm, usually far better."""


@dataclass(slots=True, eq=False)
class RankState:
    """One DP rank of one worker."""

    dp_rank: int
    role: Role
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
    oldest: "Lease | None" = None
    """The first of them."""
    serving_since_s: float = 0.0
    """When the oldest lease can have come to be served: its charge, or the release of the one before."""
    changes: "array[float]" = field(default_factory=lambda: array("d"))
    """The ledger's recent changes, when and tokens by turns: what it was at an earlier moment can be told from them. A
    ring: when it is full, the next one takes the place of the oldest."""
    changes_made: int = 0
    """Ever; modulo MAX_CHANGES, where the next one goes."""
    tokens_per_s: float | None = None
    """Measured speed: by the engine's counters where it has them, else by the ledger; None while not known."""
    counted: bool = False
    """The speed is the engine's own."""
    request_tokens_per_s: float | None = None
    """Decode: what one request of the batch gets, by the engine's figures; None while not known."""
    work_tokens: float = 0.0
    busy_s: float = 0.0
    """What the ledger has seen done, and in what time, the latest counting most."""
    lifetime_s: float = FIRST_LIFETIME_S
    """How long a lease is held, on average of the latest."""
    foreign_tokens: float = 0.0
    """Tokens beyond the ledger that the engine had at `news_at_s`: sent by others, or estimated too low."""
    news_at_s: float | None = None
    """When the engine took the last figures that said something new, on the service's clock; None: no such figures."""

    def done_tokens(self, now_s: float) -> float:
        """What a prefill rank has done of its oldest prompt; not more than that prompt: it would have been answered."""
        if self.oldest is None or self.tokens_per_s is None or self.role is not Role.PREFILL:
            return 0.0
        return min(self.oldest.tokens, self.tokens_per_s * (now_s - self.serving_since_s))

    def news_weight(self, now_s: float) -> float:
        """How much of what the engine last reported is still there, from 1 to 0."""
        return 0.0 if self.news_at_s is None else math.exp(-max(0.0, now_s - self.news_at_s) / self.lifetime_s)

    def outstanding_at(self, then_s: float) -> float:
        """What the ledger was at an earlier moment, in tokens; of moments too long ago, the oldest known."""
        tokens, changes = self.outstanding_tokens, self.changes
        for number in range(self.changes_made - 1, max(0, self.changes_made - MAX_CHANGES) - 1, -1):
            at = 2 * (number % MAX_CHANGES)
            if changes[at] <= then_s:
                break
            tokens -= changes[at + 1]
        return tokens

    @property
    def changed_at_s(self) -> float:
        """When the ledger was last changed."""
        return self.changes[2 * ((self.changes_made - 1) % MAX_CHANGES)] if self.changes_made else -math.inf

    def note_change(self, at_s: float, tokens: float) -> None:
        """Remember that the ledger was changed by so much."""
        changes, at = self.changes, 2 * (self.changes_made % MAX_CHANGES)
        if at == len(changes):
            changes.append(at_s)
            changes.append(tokens)
        else:
            changes[at] = at_s
            changes[at + 1] = tokens
        self.changes_made += 1


@dataclass(slots=True, eq=False)
class WorkerState:
    """One worker, with its ranks."""

    worker: Worker
    circuit: Circuit
    healthy: bool = False
    draining: bool = False
    """An operator wants it to get no new requests. Stays until that is undone, whatever becomes of the worker."""
    ranks: list[RankState] = field(default_factory=list)
    in_flight: int = 0
    """Legs on this worker that have not ended."""
    engine_clock_s: float | None = None
    """What to add to the engine's clock to get the service's; the delay of the fastest scrape is in it."""


class Lease(Thing, eq=False):
    """A charge on a rank. Held by one exchange, released exactly once by `LoadTable.release`."""

    state: WorkerState
    rank: RankState
    tokens: float
    charged_at_s: float
    released_at_s: float | None = None
    after: "Lease | None" = None
    """Decode: the prefill leg's lease, whose release is about when the first token is out."""
    max_output: float = math.inf
    judged: bool = False
    """The worker's circuit has heard of it."""

    @property
    def released(self) -> bool:
        return self.released_at_s is not None


class Observer(Protocol):
    """Hears of what this process's own exchanges do to the table, as it is done."""

    def charged(self, lease: Lease, prompt_tokens: float, output_tokens: float) -> None:
        """A lease was made."""

    def released(self, lease: Lease, failed: bool | None, judged: bool) -> None:
        """It was given back; `judged`: the circuit has been told in the same step."""

    def judged(self, lease: Lease, failed: bool | None) -> None:
        """The circuit was told later."""


class LoadTable:
    """All workers' states. Made once, passed in everywhere."""

    def __init__(
        self, workers: Sequence[Worker], clock: Callable[[], float], limits: CircuitLimits = NO_LIMITS
    ) -> None:
        """`clock`: seconds from any origin, the one that scrapes are timed with. `limits`: of the circuit breakers."""
        self.clock = clock
        self._limits = limits
        self._states = {worker.name: self._new_state(worker) for worker in workers}
        self._tripped: set[WorkerState] = set()
        """Workers whose circuit is not closed."""
        self._eligible: dict[Role, list[WorkerState]] = {role: [] for role in Role}
        self.in_flight = dict.fromkeys(Role, 0)
        """Legs of each role that have not ended."""
        self.output_tokens: float | None = None
        """Mean output of a prompt, learned; None while nothing is."""
        self.observer: Observer | None = None
        self.catch_up: Callable[[], None] | None = None
        """Is called before a placement, so that what other processes did is known to it, and whom they blame."""

    def __repr__(self) -> str:
        """One line a rank; what a person wants to see in a failing test."""
        lines = [
            f"{state.worker.role} {name}/{rank.dp_rank} {'up' if state.healthy else 'down'}"
            f"{' draining' if state.draining else ''}"
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

    def state(self, worker_name: str) -> WorkerState | None:
        """A worker by its name."""
        return self._states.get(worker_name)

    def eligible(self, role: Role) -> Sequence[WorkerState]:
        """The workers of a role that may be picked: healthy, not draining, address known, circuit not open.

        The same list object until that changes.
        """
        states = self._eligible[role]
        if not self._tripped:
            return states
        now_s = self.clock()
        return [state for state in states if state.circuit.allows(now_s)]

    def worker_changed(self, worker: Worker, healthy: bool, reason: str | None = None) -> None:
        """Take over what discovery found out, and whether the worker may be picked."""
        state = self._states.get(worker.name)
        if state is None:
            state = self._states[worker.name] = self._new_state(worker)
        if healthy and not state.healthy:  # perhaps another process, on another host
            state.engine_clock_s = None
        state.worker, state.healthy = worker, healthy
        # Ranks that remain keep their charges; leases on vanished ranks release into nothing.
        del state.ranks[worker.rank_count :]
        state.ranks.extend(RankState(dp_rank, worker.role) for dp_rank in range(len(state.ranks), worker.rank_count))
        self._refresh_eligible(worker.role)

    def set_draining(self, worker_name: str, draining: bool) -> WorkerState:
        """Let a worker get no new requests, or get them again; what runs goes on. Raises KeyError if there is none."""
        state = self._states[worker_name]
        state.draining = draining
        self._refresh_eligible(state.worker.role)
        return state

    def _refresh_eligible(self, role: Role) -> None:
        self._eligible[role] = [
            state
            for state in self._states.values()
            if state.worker.role is role and state.healthy and not state.draining and state.worker.endpoint
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
        if load == rank.scraped:
            return  # no news: an engine's gauges may stand for long after it has changed
        taken_at_s = at_s
        if load.snapshot_s is not None:
            # The fastest scrape so far tells the clocks apart best; it fades, as clocks drift.
            known_s = math.inf if state.engine_clock_s is None else state.engine_clock_s
            known_s += CLOCK_DRIFT * (at_s - (rank.scraped_at_s or at_s))
            state.engine_clock_s = min(known_s, at_s - load.snapshot_s)
            taken_at_s = load.snapshot_s + state.engine_clock_s
        expected = rank.outstanding_at(taken_at_s)
        if load.total_tokens is not None:
            rank.foreign_tokens = load.total_tokens - expected
        else:  # without what is queued it only tells what there is at least
            rank.foreign_tokens = max(0.0, (load.used_tokens or 0.0) - expected)
        rank.news_at_s = taken_at_s

    @staticmethod
    def _measure(rank: RankState, load: RankLoad) -> None:
        """The rank's speeds: of a decode request by the engine's own word, of prefill by its counters since then."""
        if load.output_tokens_per_s and load.running_requests:
            speed = load.output_tokens_per_s / load.running_requests
            known = rank.request_tokens_per_s
            rank.request_tokens_per_s = speed if known is None else known + LEARN_SPEED * (speed - known)
        before = rank.scraped
        if before is None or load.prefill_busy_us_total is None or load.prefill_uncached_tokens_total is None:
            return
        busy_us = load.prefill_busy_us_total - (before.prefill_busy_us_total or 0.0)
        tokens = load.prefill_uncached_tokens_total - (before.prefill_uncached_tokens_total or 0.0)
        if busy_us > 0 and tokens > 0:
            speed = tokens / busy_us * 1e6
            known = rank.tokens_per_s
            rank.tokens_per_s = speed if known is None or not rank.counted else known + LEARN * (speed - known)
            rank.counted = True

    def charge(
        self,
        state: WorkerState,
        dp_rank: int,
        prompt_tokens: float,
        output_tokens: float = 0.0,
        *,
        after: Lease | None = None,
        max_output: float = math.inf,
    ) -> Lease:
        """Charge a request to a rank, in the same step as the pick.

        `after`: the lease of the leg that this one begins with the end of; its output is then learned from.
        """
        tokens = prompt_tokens + output_tokens
        lease = Lease(state, state.ranks[dp_rank], tokens, self.clock(), None, after, max_output)
        self._charge(lease, prompt_tokens)
        if self.observer is not None:
            self.observer.charged(lease, prompt_tokens, output_tokens)
        return lease

    def apply_charge(self, lease: Lease, prompt_tokens: float) -> None:
        """Enter a lease of another process. Its rank need not be one of the worker's (any more)."""
        lease.charged_at_s = _not_before(lease.rank, lease.charged_at_s)
        lease.state.circuit.allows(lease.charged_at_s)  # there it was asked; it may have become half open by that
        self._charge(lease, prompt_tokens)

    def _charge(self, lease: Lease, prompt_tokens: float) -> None:
        rank, state, at_s = lease.rank, lease.state, lease.charged_at_s
        if rank.oldest is None:
            rank.oldest, rank.serving_since_s = lease, at_s
        rank.leases[lease] = None
        rank.charged_tokens += prompt_tokens
        rank.outstanding_tokens += lease.tokens
        rank.outstanding_requests += 1
        rank.note_change(at_s, lease.tokens)
        state.in_flight += 1
        self.in_flight[state.worker.role] += 1
        if self._tripped:  # to a closed one it means nothing
            state.circuit.sent()

    def release(self, lease: Lease, failed: bool | None = False, *, judge: bool = True) -> None:
        """Give a lease back; a second time does nothing.

        `failed`: the worker's own failure, which its circuit breaker counts; None: neither that nor work done (the
        client left, the other leg failed, the request was rejected). Without `judge` the verdict is still to come.
        """
        if lease.released_at_s is not None:
            return
        self._release(lease, failed, judge, self.clock())
        if self.observer is not None:
            self.observer.released(lease, failed, judge)

    def apply_release(self, lease: Lease, failed: bool | None, judge: bool, at_s: float) -> None:
        """The same for a lease of another process, which released it at `at_s`."""
        self._release(lease, failed, judge, _not_before(lease.rank, at_s))

    def _release(self, lease: Lease, failed: bool | None, judge: bool, now_s: float) -> None:
        lease.released_at_s = now_s
        state, rank, leases = lease.state, lease.rank, lease.rank.leases
        if judge:
            self.apply_judgement(lease, failed, now_s)
        if lease.after is not None:
            if failed is False:
                self._learn_output(lease, lease.after.released_at_s)
            lease.after = None
        rank.lifetime_s += LEARN * (now_s - lease.charged_at_s - rank.lifetime_s)
        del leases[lease]
        if rank.oldest is lease:
            if failed is False:
                rank.busy_s = KEEP * rank.busy_s + now_s - rank.serving_since_s
                rank.work_tokens = KEEP * rank.work_tokens + lease.tokens
                if not rank.counted and rank.busy_s > 0:
                    rank.tokens_per_s = rank.work_tokens / rank.busy_s
            rank.oldest, rank.serving_since_s = next(iter(leases), None), now_s
        rank.outstanding_requests -= 1
        # Float sums of the same terms in another order can leave a remainder: an idle rank has exactly 0.
        tokens = rank.outstanding_tokens - lease.tokens
        rank.outstanding_tokens = tokens if tokens > 0 and leases else 0.0
        rank.note_change(now_s, -lease.tokens)
        state.in_flight -= 1
        self.in_flight[state.worker.role] -= 1

    def judge(self, lease: Lease, failed: bool | None) -> None:
        """Tell the worker's circuit breaker how a leg ended; a second time does nothing."""
        if lease.judged:
            return
        self.apply_judgement(lease, failed, self.clock())
        if self.observer is not None:
            self.observer.judged(lease, failed)

    def apply_judgement(self, lease: Lease, failed: bool | None, at_s: float) -> None:
        """The same for a lease of another process, or as part of a release."""
        if lease.judged:
            return
        lease.judged = True
        lease.state.circuit.ended(failed, at_s)
        if failed or self._tripped:  # a closed one stays so but for a failure
            self.circuit_changed(lease.state)

    def circuit_changed(self, state: WorkerState) -> None:
        """Look whether a worker's circuit is closed."""
        if state.circuit.state is CLOSED:
            self._tripped.discard(state)
        else:
            self._tripped.add(state)

    def expected_output(self, max_output_tokens: float, prompts: int) -> float:
        """What a request is likely to generate, all its prompts together, when it may generate so much at most."""
        mean = DEFAULT_OUTPUT_TOKENS if self.output_tokens is None else self.output_tokens
        usual = mean * prompts
        return usual if usual < max_output_tokens else max_output_tokens

    def _learn_output(self, lease: Lease, began_s: float | None) -> None:
        """A decode leg has ended: time since its first token x speed of a request on that rank = its output."""
        speed, ended_s = lease.rank.request_tokens_per_s, lease.released_at_s
        if began_s is None or ended_s is None or not speed:
            return
        tokens = min(speed * (ended_s - began_s), lease.max_output)
        if tokens >= 1:  # less was not an output but a failure
            known = self.output_tokens
            self.output_tokens = tokens if known is None else known + LEARN * (tokens - known)

    def _new_state(self, worker: Worker) -> WorkerState:
        ranks = [RankState(dp_rank, worker.role) for dp_rank in range(worker.rank_count)]
        return WorkerState(worker, Circuit(self._limits), ranks=ranks)


def _not_before(rank: RankState, at_s: float) -> float:
    """A moment in another process, or that of the ledger's latest change, which is microseconds to milliseconds later:
    changes are looked up by time, so they have to be in order."""
    return max(at_s, rank.changed_at_s)
