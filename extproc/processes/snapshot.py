"""The whole load table for a process that begins: it places as the others do from its first request on.

Pure. What is not in it: the ledger's recent changes (a scrape of before the start is compared with the ledger as it is
then) and which workers failed requests whose next attempt is under way.
"""

from extproc.load import Lease, RankState
from extproc.processes.messages import Charged, RankSnapshot, TableSnapshot, WorkerSnapshot
from extproc.processes.replica import Replica

_RANK_FIELDS = RankSnapshot.__struct_fields__


def take(replica: Replica) -> TableSnapshot:
    """The table as it is. What the replica has not given out yet has to be given out before, and not to the new one."""
    table = replica.table
    workers = tuple(
        WorkerSnapshot(
            state.worker,
            state.healthy,
            state.draining,
            state.engine_clock_s,
            state.circuit,
            tuple(RankSnapshot(*(getattr(rank, name) for name in _RANK_FIELDS)) for rank in state.ranks),
        )
        for state in table.states
    )
    leases = tuple(
        (process, tuple(_charged(number, lease) for number, lease in leases.items()))
        for process, leases in replica.open_leases()
    )
    return TableSnapshot(workers, leases, table.output_tokens)


def restore(replica: Replica, snapshot: TableSnapshot) -> None:
    """Make a table that nothing was charged to like the one that the snapshot is of."""
    table = replica.table
    for seen in snapshot.workers:
        table.worker_changed(seen.worker, seen.healthy)
        table.set_draining(seen.worker.name, seen.draining)
    for process, leases in snapshot.leases:
        replica.apply(process, leases)
    table.output_tokens = snapshot.output_tokens
    for seen in snapshot.workers:
        state = table.state(seen.worker.name)
        assert state is not None  # noqa: S101 - just entered
        state.engine_clock_s = seen.engine_clock_s
        state.circuit = seen.circuit
        table.circuit_changed(state)
        for rank, figures in zip(state.ranks, seen.ranks, strict=True):
            _restore_rank(rank, figures)


def _restore_rank(rank: RankState, figures: RankSnapshot) -> None:
    for name in _RANK_FIELDS:
        setattr(rank, name, getattr(figures, name))


def _charged(number: int, lease: Lease) -> Charged:
    tokens, at_s = lease.tokens, lease.charged_at_s
    return Charged(number, lease.state.worker.name, lease.rank.dp_rank, tokens, 0.0, at_s, max_output=lease.max_output)
