"""Asks a running service's metrics port for all that is shown. I/O, and nothing of the picture."""

import time
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from extproc.histogram import Window, read_totals
from extproc.overview import Decisions, Loads, Overview, make_overview

T = TypeVar("T")

TIMEOUT_S = 5.0
"""For one answer; the service has them at hand."""


class Away(Exception):
    """There is no picture to be had now; the message says why."""


class Poller:
    """One service, asked again and again."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False)
        self._window = Window()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def look(self) -> Overview:
        """The service as it is now. Raises Away."""
        loads = self._json("/debug/loads", Loads)
        decisions = self._json("/debug/decisions", Decisions)
        ready = self._get("/ready", fine=(200, 503))
        page = self._get("/metrics").text
        try:
            totals = read_totals(text_string_to_metric_families(page))
        except (ValueError, KeyError) as error:
            raise self._stranger("/metrics", error) from None
        self._window.add(time.monotonic(), totals)
        return make_overview(loads, decisions, self._window, ready.text.strip() if ready.status_code == 503 else "")

    def _json(self, path: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._get(path).content, type=kind)
        except msgspec.MsgspecError as error:
            raise self._stranger(path, error) from None

    def _get(self, path: str, fine: tuple[int, ...] = (200,)) -> httpx.Response:
        try:
            answer = self._client.get(self.url.rstrip("/") + path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Away(f"cannot ask {self.url}: {error or type(error).__name__}") from None
        if answer.status_code not in fine:
            raise Away(f"{self.url} is no metrics port of this version: {path} answers {answer.status_code}")
        return answer

    def _stranger(self, path: str, error: Exception) -> Away:
        return Away(f"{self.url} is no metrics port of this version: {path}: {error}")
