"""Reads every worker's load in the background, and hands what it read to a sink.

Shell. One loop a worker, so that a slow worker delays nobody but itself. The scraper keeps no figures: a scrape that
failed is reported as failed, and what was known before stays known to whoever keeps it.
"""

import asyncio
import functools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from extproc import loads_json, loads_text
from extproc.config import Config, WorkerConfig
from extproc.discovery.fetch import Client, FetchError, fetch
from extproc.discovery.tasks import WorkerTasks
from extproc.model import RankLoad, Role, Worker

log = logging.getLogger(__name__)

FIRST_SCRAPE_WITHIN_S = 1.0
"""First scrapes are spread over this time (or one interval, if shorter): soon, but not all workers in one instant."""

KEPT_URLS = 8192
"""URLs whose host is remembered: one or two a worker."""

Headers = Callable[[str], Mapping[str, str]]
"""Worker name -> headers for requests to its host (a bearer token, say)."""


class LoadSink(Protocol):
    """Who wants to know. Called on the event loop, so it must be quick; it must not raise."""

    def observe(self, worker_name: str, loads: Sequence[RankLoad], at_s: float, duration_s: float) -> None:
        """A scrape gave figures (never an empty sequence).

        `at_s` is the scraper's clock when the request was sent: what was charged later may be missing from the
        figures. (The engine may have taken them earlier still: `RankLoad.snapshot_s` is its own word on that.)
        """

    def scrape_failed(self, worker_name: str, reason: str, duration_s: float) -> None:
        """A scrape gave nothing. Called for every such scrape; figures known before are not touched."""


@dataclass(frozen=True, slots=True)
class ScrapeTarget:
    """Where one worker's load can be read; the URLs are in order of preference."""

    name: str
    urls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scrape:
    """One page with figures on it."""

    url: str
    loads: tuple[RankLoad, ...]
    at_s: float

    @property
    def complete(self) -> bool:
        """Whether it has the figure that everything is decided by."""
        return any(load.used_tokens is not None for load in self.loads)


def scrape_target(worker: Worker, entry: WorkerConfig, config: Config) -> ScrapeTarget:
    """Where to scrape a worker: `metrics_urls` of its entry, else `metrics_paths`; paths are relative to its URL."""
    places = config.metrics_paths if entry.metrics_urls is None else entry.metrics_urls
    return ScrapeTarget(worker.name, tuple(_absolute(worker.url, place) for place in places))


def scrape_targets(config: Config) -> list[ScrapeTarget]:
    """The targets of all configured workers."""
    return [
        scrape_target(entry.to_worker(role), entry, config)
        for role in Role
        for entry in (config.prefill if role is Role.PREFILL else config.decode)
    ]


class Scraper:
    """Scrapes each worker every `interval_s`, counted from start to start, never twice at once.

    `clock` counts seconds from any origin; `sleep` goes with it.
    """

    def __init__(
        self,
        client: Client,
        sink: LoadSink,
        *,
        interval_s: float,
        timeout_s: float,
        headers: Headers = lambda _: {},
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._client = client
        self._sink = sink
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._headers = headers
        self._clock = clock
        self._sleep = sleep
        self._random = rng or random.Random()
        self._tasks = WorkerTasks(self._loop)

    def __repr__(self) -> str:
        return f"<Scraper every {self._interval_s:g} s, {self._tasks!r}>"

    def set_workers(self, targets: Iterable[ScrapeTarget]) -> None:
        """Makes these the workers to scrape, any time. A worker that stays is not disturbed."""
        self._tasks.set({target.name: target for target in targets})

    async def run(self) -> None:
        """Scrapes until cancelled."""
        await self._tasks.run()

    async def _loop(self, target: ScrapeTarget) -> None:
        preferred: str | None = None
        failing = False
        await self._sleep(self._random.uniform(0, min(FIRST_SCRAPE_WITHIN_S, self._interval_s)))
        while True:
            started_s = self._clock()
            try:
                scrape = await self._scrape(target, preferred)
            except FetchError as error:
                preferred = None
                self._sink.scrape_failed(target.name, str(error), self._clock() - started_s)
                if not failing:
                    log.warning(
                        "load of worker %s is not known until it can be scraped again: %s (tried every %g s)",
                        target.name,
                        error,
                        self._interval_s,
                    )
                failing = True
            else:
                # Without the used tokens another page may say more, and this one may once the engine has work.
                preferred = scrape.url if scrape.complete else None
                self._sink.observe(target.name, scrape.loads, scrape.at_s, self._clock() - started_s)
                if failing:
                    log.info("load of worker %s is known again, from %s", target.name, scrape.url)
                failing = False
            await self._sleep(max(0.0, started_s + self._interval_s - self._clock()))

    async def _scrape(self, target: ScrapeTarget, preferred: str | None) -> Scrape:
        """The URL that worked last; when it fails, and on the first scrape, all of them in order."""
        headers = self._headers(target.name)
        if preferred is not None:
            try:
                return await self._read(target, (preferred,), headers)
            except FetchError as error:
                others = tuple(url for url in target.urls if url != preferred)
                if not others:
                    raise
                try:
                    return await self._read(target, others, headers)
                except FetchError as more:
                    raise FetchError(f"{error}; {more}") from more
        return await self._read(target, target.urls, headers)

    async def _read(self, target: ScrapeTarget, urls: Iterable[str], headers: Mapping[str, str]) -> Scrape:
        return await read_loads(
            self._client, urls, timeout_s=self._timeout_s, worker=target.name, headers=headers, clock=self._clock
        )


async def read_loads(
    client: Client,
    urls: Iterable[str],
    *,
    timeout_s: float,
    worker: str = "",
    headers: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Scrape:
    """The first page of `urls` that has used tokens; else the first that has any figures.

    Each URL gets `timeout_s` of its own. `headers` go to the host of `worker` (`host:port`) only: a key is for the
    engine, not for whoever else keeps its figures. Raises FetchError, naming what was wrong with each, when none has
    figures.
    """
    partial: Scrape | None = None
    wrong = list[str]()
    for url in urls:
        at_s = clock()
        try:
            own = headers if _is_at(url, worker) else None
            scrape = Scrape(url, await _loads_at(client, url, timeout_s, own), at_s)
        except FetchError as error:
            wrong.append(f"{url}: {error}")
            continue
        if scrape.complete:
            return scrape
        partial = partial or scrape
    if partial is None:
        raise FetchError("; ".join(wrong) or "no metrics URL is configured")
    return partial


async def _loads_at(
    client: Client, url: str, timeout_s: float, headers: Mapping[str, str] | None
) -> tuple[RankLoad, ...]:
    answer = await fetch(client, url, timeout_s=timeout_s, headers=headers)
    if answer.status != 200:
        raise FetchError(f"status {answer.status}")
    if answer.content_type == "text/html":
        raise FetchError("an HTML page, not metrics")
    is_json = answer.content_type == "application/json"
    loads = loads_json.parse_loads(answer.body) if is_json else loads_text.parse_loads(answer.body)
    if not loads:
        raise FetchError("no SGLang load figures on the page")
    return loads


@functools.lru_cache(maxsize=KEPT_URLS)
def _is_at(url: str, worker: str) -> bool:
    """Whether a URL leads to the host of a worker (`host:port`)."""
    return urlsplit(url).hostname == urlsplit(f"//{worker}").hostname


def _absolute(base_url: str, place: str) -> str:
    if place.startswith(("http://", "https://")):
        return place
    return f"{base_url}/{place.removeprefix('/')}"
