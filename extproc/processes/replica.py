"""The load table's changes, out and in: what makes the tables of all processes one.

Pure. Every table takes every change once, own or another's, and learns from each lease once: whatever the order in
which changes of different processes meet, all tables hold the same leases when all have been told. What a process did
comes in the order in which it did it; so does what its leader says between.
"""

from collections.abc import Callable, Iterable

from extproc.load import Lease, LoadTable, RankState
from extproc.processes.messages import (
    Blamed,
    Charged,
    Draining,
    Event,
    Gone,
    Judged,
    Observed,
    Released,
    WorkerChanged,
)


class Replica:
    """The table of one process as one of several. Is the table's observer."""

    def __init__(
        self,
        process: int,
        table: LoadTable,
        *,
        blame: Callable[[str, str], None],
        workers_changed: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`blame(request_id, worker)`: tells this process's exchanges; `workers_changed`: which may be picked is to be
        looked at again; `wake`: there is something to take, where there was nothing."""
        self.process = process
        self.table = table
        self._blame = blame
        self._workers_changed = workers_changed
        self._wake = wake
        self._changes: list[Event] = []
        self._numbers = 0
        self._own: dict[Lease, int] = {}
        """Leases made here that others have not heard all of."""
        self._others: dict[int, dict[int, Lease]] = {}
        """Those made elsewhere, by process and number."""
        table.observer = self

    @property
    def leases_of_others(self) -> int:
        """Leases of other processes that something is still to be heard of."""
        return sum(map(len, self._others.values()))

    # Out

    def charged(self, lease: Lease, prompt_tokens: float, output_tokens: float) -> None:
        """See `load.Observer`."""
        self._numbers = number = self._numbers + 1
        self._own[lease] = number
        after = self._own.get(lease.after, 0) if lease.after is not None else 0
        worker, rank = lease.state.worker.name, lease.rank.dp_rank
        self.tell(
            Charged(
                number, worker, rank, prompt_tokens, output_tokens, lease.charged_at_s, after, lease.max_output
            )
        )  # fmt: skip

    def released(self, lease: Lease, failed: bool | None, judged: bool) -> None:
        """See `load.Observer`."""
        number = self._own.pop(lease) if lease.judged else self._own[lease]
        assert lease.released_at_s is not None  # noqa: S101 - just now
        self.tell(Released(number, failed, judged, lease.released_at_s))

    def judged(self, lease: Lease, failed: bool | None) -> None:
        """See `load.Observer`."""
        number = self._own.pop(lease) if lease.released else self._own[lease]
        self.tell(Judged(number, failed, self.table.clock()))

    def blamed(self, request_id: str, worker_name: str) -> None:
        """An exchange of this process blames a worker."""
        self.tell(Blamed(request_id, worker_name))

    def tell(self, event: Event) -> None:
        """Let the others know."""
        self._changes.append(event)
        if len(self._changes) == 1:
            self._wake()

    def take(self) -> list[Event]:
        """What the others have not been told yet."""
        changes, self._changes = self._changes, []
        return changes

    # In

    def apply(self, process: int, events: Iterable[Event]) -> None:
        """Take over what another process did."""
        leases = self._others.setdefault(process, {})
        for event in events:
            match event:
                case Charged():
                    self._charge(leases, event)
                case Released(number, failed, judged, at_s):
                    lease = leases.get(number)
                    if lease is not None:
                        self.table.apply_release(lease, failed, judged, at_s)
                        if lease.judged:
                            del leases[number]
                case Judged(number, failed, at_s):
                    lease = leases.get(number)
                    if lease is not None:
                        self.table.apply_judgement(lease, failed, at_s)
                        if lease.released:
                            del leases[number]
                case Blamed(request_id, worker_name):
                    self._blame(request_id, worker_name)
                case Observed(worker_name, loads, at_s):
                    self.table.observe(worker_name, loads, at_s)
                case WorkerChanged(worker, healthy):
                    self.table.worker_changed(worker, healthy)
                    self._workers_changed()
                case Draining(worker_name, draining):
                    self.table.set_draining(worker_name, draining)
                    self._workers_changed()
                case Gone(ended):
                    self.forget(ended)

    def forget(self, process: int) -> int:
        """A process has ended: give its leases back, nobody being to blame. Returns how many were open."""
        now_s, open_leases = self.table.clock(), 0
        for lease in self._others.pop(process, {}).values():
            if lease.released:
                self.table.apply_judgement(lease, None, now_s)
            else:
                open_leases += 1
                self.table.apply_release(lease, None, True, now_s)
        return open_leases

    def open_leases(self) -> list[tuple[int, dict[int, Lease]]]:
        """All leases that are not released, by process and number; oldest first."""
        everyone = [(self.process, {number: lease for lease, number in self._own.items()}), *self._others.items()]
        return [
            (process, {number: lease for number, lease in leases.items() if not lease.released})
            for process, leases in everyone
        ]

    def _charge(self, leases: dict[int, Lease], event: Charged) -> None:
        state = self.table.state(event.worker)
        if state is None:
            return
        ranks = state.ranks
        # One that the leader has just found to be no more: as when a rank vanishes under a lease.
        rank = ranks[event.dp_rank] if event.dp_rank < len(ranks) else RankState(event.dp_rank, state.worker.role)
        lease = Lease(
            state,
            rank,
            event.prompt_tokens + event.output_tokens,
            event.at_s,
            after=leases.get(event.after),
            max_output=event.max_output,
        )
        leases[event.lease] = lease
        self.table.apply_charge(lease, event.prompt_tokens)
