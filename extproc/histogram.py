"""Counters and histograms of a Prometheus page, and what they say about the last seconds: differences and quantiles.

Pure. Names are those of `extproc.telemetry`.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client import Metric

WINDOW_S = 10.0
"""What "now" means: long enough for a few requests, short enough to see a change."""

FORGOTTEN_S = 60.0
"""After a pause this long, nobody has looked, or the service was away: what was before is no window any more."""


@dataclass(slots=True)
class Buckets:
    """One histogram: upper bounds in seconds, each with the observations up to it."""

    counts: dict[float, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """All observations."""
        return self.counts.get(math.inf, 0.0)

    def add(self, bound: float, count: float) -> None:
        """Add one bucket; of several series with the same bounds, the sum."""
        self.counts[bound] = self.counts.get(bound, 0.0) + count

    def since(self, before: "Buckets") -> "Buckets":
        """The observations after an earlier look at the same histogram."""
        return Buckets({bound: count - before.counts.get(bound, 0.0) for bound, count in self.counts.items()})

    def quantile(self, share: float) -> float | None:
        """In seconds, straight between a bucket's bounds as in PromQL; infinite beyond the last; None: no observation.

        Source: https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile
        """
        wanted = share * self.total
        if not wanted > 0:
            return None
        lower, below = 0.0, 0.0
        for bound, count in sorted(self.counts.items()):
            if count >= wanted:
                if math.isinf(bound):
                    return math.inf
                return lower + (bound - lower) * (wanted - below) / (count - below)
            lower, below = bound, count
        return math.inf


@dataclass(slots=True)
class Totals:
    """What the service has counted since its start."""

    attempts: dict[str, float] = field(default_factory=dict)
    """By outcome."""
    retries: float = 0.0
    open_exchanges: float = 0.0
    response_headers: Buckets = field(default_factory=Buckets)
    prefill: dict[str, Buckets] = field(default_factory=dict)
    """By worker."""

    def since(self, before: "Totals") -> "Totals":
        """What came after an earlier look."""
        return Totals(
            {outcome: count - before.attempts.get(outcome, 0.0) for outcome, count in self.attempts.items()},
            self.retries - before.retries,
            self.open_exchanges,
            self.response_headers.since(before.response_headers),
            {worker: buckets.since(before.prefill.get(worker, Buckets())) for worker, buckets in self.prefill.items()},
        )


def read_totals(page: Iterable[Metric]) -> Totals:
    """The counters and histograms of one look at the metrics."""
    totals = Totals()
    for metric in page:
        for sample in metric.samples:
            labels, value = sample.labels, sample.value
            match sample.name:
                case "extproc_attempts_total":
                    totals.attempts[labels["outcome"]] = totals.attempts.get(labels["outcome"], 0.0) + value
                case "extproc_retries_total":
                    totals.retries += value
                case "extproc_open_exchanges":
                    totals.open_exchanges = value
                case "extproc_response_headers_seconds_bucket":
                    totals.response_headers.add(float(labels["le"]), value)
                case "extproc_prefill_leg_seconds_bucket":
                    totals.prefill.setdefault(labels["worker"], Buckets()).add(float(labels["le"]), value)
    return totals


@dataclass(slots=True)
class Window:
    """Looks at the metrics over the last `WINDOW_S` seconds, or the last two looks where those are further apart."""

    looks: deque[tuple[float, Totals]] = field(default_factory=deque)
    """(when, what), oldest first."""

    def add(self, at_s: float, totals: Totals) -> None:
        """Take a look. Counters that have gone back are those of another process: what was before is forgotten."""
        if self.looks:
            last_s, last = self.looks[-1]
            restarted = sum(last.attempts.values()) > sum(totals.attempts.values())
            if restarted or at_s - last_s > FORGOTTEN_S:
                self.looks.clear()
        self.looks.append((at_s, totals))
        while len(self.looks) > 2 and at_s - self.looks[1][0] >= WINDOW_S:
            self.looks.popleft()

    @property
    def length_s(self) -> float | None:
        """Seconds that `totals` are of; None: since the service's start, as there was only one look."""
        return self.looks[-1][0] - self.looks[0][0] if len(self.looks) > 1 else None

    @property
    def totals(self) -> Totals:
        """What was counted in the window. There has to be a look."""
        last = self.looks[-1][1]
        return last if len(self.looks) == 1 else last.since(self.looks[0][1])
