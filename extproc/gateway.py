"""What exchanges share: the configuration, the scheduler, and which of them are open. No I/O."""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Protocol

from extproc.config import Config
from extproc.direct import DirectPaths
from extproc.errors import ConfigError
from extproc.estimate import TokenEstimator
from extproc.events import Effect, Event, Finished
from extproc.load import LoadTable
from extproc.mutation import Headers
from extproc.number import number
from extproc.request import Endpoint
from extproc.schedule import Scheduler
from extproc.trace_context import Begin

Clock = Callable[[], float]

MAX_REMEMBERED_FAILURES: Final = 4096
"""Requests whose failed workers are remembered for their next attempt, which comes within milliseconds."""


class Attempt(Protocol):
    """One attempt at a request, as everybody but itself sees it; it is an `Exchange`."""

    @property
    def awaits_prefill(self) -> bool:
        """Its prefill stream is still to come."""

    def route(self, event: Event) -> list[Effect]:
        """Take one event of the route stream."""

    def prefill(self, event: Event) -> list[Effect]:
        """Take one event of the prefill stream."""

    def record(self) -> Finished:
        """The attempt as far as it is known."""


class Gateway:
    """What exchanges share: configuration, scheduler, and the exchanges that are open, by room."""

    def __init__(
        self,
        config: Config,
        table: LoadTable,
        scheduler: Scheduler,
        clock: Clock,
        estimator: TokenEstimator | None = None,
        *,
        begin_trace: Begin | None = None,
    ) -> None:
        """`begin_trace` gives every attempt its place in a trace; None: there are no traces."""
        self.config = config
        self.estimator = estimator or TokenEstimator()
        self.table = table
        self.scheduler = scheduler
        self.clock = clock
        self.begin_trace = begin_trace
        self.marks: Headers = ()
        """Request headers that every placed request gets."""
        self.tell_blame: Callable[[str, str], None] | None = None
        """Lets other processes know whom a request blames."""
        self.models = config.models()
        self.direct_paths = DirectPaths(config.direct_paths)
        self.opaque = _opaque_endpoints(config, scheduler)
        """Endpoints whose bodies are not read."""
        self._open: dict[int, Attempt] = {}
        self._failed_workers: OrderedDict[str, set[str]] = OrderedDict()

    @property
    def open_rooms(self) -> int:
        """Placed exchanges that have not finished."""
        return len(self._open)

    @property
    def expecting(self) -> bool:
        """Whether a placed request's prefill stream is still to come."""
        return any(exchange.awaits_prefill for exchange in self._open.values())

    def find(self, room: str) -> Attempt | None:
        """The exchange a new prefill stream belongs to, by the room that it names; None: refuse it."""
        exchange = self._open.get(number(room) or -1)
        return exchange if exchange and exchange.awaits_prefill else None

    def broken(self, room: int) -> Attempt | None:
        """The exchange that an entry of the access log is about, if it is open."""
        return self._open.get(room)

    def opened(self, room: int, exchange: Attempt) -> None:
        """Enter a placed exchange."""
        self._open[room] = exchange

    def closed(self, room: int) -> None:
        """Forget an exchange that has finished."""
        del self._open[room]

    def blame(self, request_id: str, worker_name: str) -> None:
        """Remember a worker that failed a request, for the request's next attempt."""
        if request_id and self.tell_blame is not None:
            self.tell_blame(request_id, worker_name)
        self.apply_blame(request_id, worker_name)

    def apply_blame(self, request_id: str, worker_name: str) -> None:
        """The same for what another process told."""
        if request_id:
            self._failed_workers.setdefault(request_id, set()).add(worker_name)
            if len(self._failed_workers) > MAX_REMEMBERED_FAILURES:
                self._failed_workers.popitem(last=False)

    def blamed(self, request_id: str) -> set[str]:
        """Workers that failed earlier attempts of a request."""
        return self._failed_workers.get(request_id, set())

    def running(self, limit: int) -> list[Finished]:
        """What is known by now of the placed exchanges that have not finished, the latest first; for people to look at.

        Their `outcome` says nothing yet.
        """
        return [exchange.record() for exchange in itertools.islice(reversed(self._open.values()), limit)]


def _opaque_endpoints(config: Config, scheduler: Scheduler) -> frozenset[Endpoint]:
    """Where placements travel in headers. Raises ConfigError when they are to, and a policy needs the body."""
    honoured = frozenset({Endpoint.GENERATE, Endpoint.CHAT})  # SGLang 0.5.23 reads them on these two
    needs_body = scheduler.reads_prompts or config.tokenizer_path is not None
    if config.injection == "headers":
        if needs_body:
            raise ConfigError("injection: headers: the policy or tokenizer_path needs prompts: use auto or body")
        return honoured
    able = all(worker.header_overrides for worker in (*config.prefill, *config.decode))
    return honoured if config.injection == "auto" and able and not needs_body else frozenset()
