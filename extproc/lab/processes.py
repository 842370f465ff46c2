"""Replicas as processes of one service: what one does to its table, the others' tables take over a moment later.

No I/O. The tables are told by `extproc.processes.replica`, as in the service.
"""

from collections.abc import Sequence
from functools import partial

from extproc.lab.clock import Clock
from extproc.lab.service import ScheduledService
from extproc.processes.messages import Event
from extproc.processes.replica import Replica


def connect(services: Sequence[ScheduledService], lag_s: float, clock: Clock) -> None:
    """Make one of them all."""
    replicas: list[Replica] = []

    def flush(number: int) -> None:
        clock.at(clock.now_s + lag_s, hear, (number, replicas[number].take()))

    def hear(told: tuple[int, list[Event]]) -> None:
        number, events = told
        for other in replicas:
            if other.process != number:
                other.apply(number, events)

    def flush_now(number: int) -> None:
        clock.at(clock.now_s, flush, number)  # after what else happens in this moment

    for number, service in enumerate(services):
        replica = Replica(
            number,
            service.table,
            blame=lambda *_: None,  # nothing fails here
            wake=partial(flush_now, number),
        )
        service.replica = replica
        replicas.append(replica)
