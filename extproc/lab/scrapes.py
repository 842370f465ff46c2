"""When which worker's page is read, by which replica of the service. No I/O.

As `extproc.scraper` does it: every worker on its own, from start to start, the first time within a second.
"""

import random
from collections.abc import Callable, Sequence

from extproc.lab.clock import Clock
from extproc.lab.service import Service
from extproc.lab.settings import Settings
from extproc.model import RankLoad, Role
from extproc.scraper import FIRST_SCRAPE_WITHIN_S

ReadPage = Callable[[], Sequence[RankLoad]]


class ScrapeLoop:
    """One worker, scraped by one service."""

    def __init__(
        self,
        service: Service,
        role: Role,
        worker: int,
        read: ReadPage,
        *,
        settings: Settings,
        rng: random.Random,
        clock: Clock,
    ) -> None:
        """`rng` decides the first moment and which scrapes fail. Starts at once, and never ends."""
        self._service = service
        self._role = role
        self._worker = worker
        self._read = read
        self._failure_ratio = settings.scrape_failure_ratio
        self._latency_s = settings.scrape_latency_s
        self._rng = rng
        self._clock = clock
        if settings.scrape_interval_s is not None:
            self._interval_s = settings.scrape_interval_s
            clock.at(rng.uniform(0, min(FIRST_SCRAPE_WITHIN_S, self._interval_s)), self._ask)

    def _ask(self, _: None) -> None:
        now_s = self._clock.now_s
        self._clock.at(now_s + self._interval_s, self._ask)
        if self._rng.random() >= self._failure_ratio:
            self._clock.at(now_s + self._latency_s / 2, self._answer, now_s)

    def _answer(self, asked_s: float) -> None:
        loads = self._read()
        self._clock.at(asked_s + self._latency_s, self._know, (loads, asked_s))

    def _know(self, answer: tuple[Sequence[RankLoad], float]) -> None:
        loads, asked_s = answer
        self._service.observe(self._role, self._worker, loads, asked_s)
