"""Counters and histograms that cost little to count with: plain numbers by labels, made into metrics when asked for.

For one thread, that of the event loop. Prometheus's client library locks every number by itself, walks through buckets
and takes several calls to find a series: about 1 µs for a count, and a request has seven. Only the counting is done
here; a page says what it would say with the library's own, `_created` samples included.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from prometheus_client import Counter, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

Labels = tuple[object, ...]
"""Values in the order of their names. `str` makes them what is printed; until then what is not equal is told apart."""


class Counts(dict[Labels, float]):
    """A counter: `counts[labels] += 1`."""

    def __init__(self, name: str, documentation: str, label_names: Sequence[str]) -> None:
        """`name`: without `_total`."""
        self._about = name, documentation
        self._label_names = label_names
        self._created_s: dict[Labels, float] = {}

    def __missing__(self, labels: Labels) -> float:
        self._created_s[labels] = time.time()
        return 0.0

    def metric(self, with_created: bool) -> Metric:
        """What it has counted by now."""
        family = CounterMetricFamily(*self._about, labels=self._label_names)
        for labels, count in self.items():
            family.add_metric(_printed(labels), count, self._created_s[labels] if with_created else None)
        return family


class Series:
    """The observations of a histogram that have the same labels."""

    __slots__ = ("_bounds", "counts", "created_s", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0.0] * (len(bounds) + 1)
        """By bucket, each for itself; the last one's are above all bounds."""
        self.sum = 0.0
        self.created_s = time.time()

    def observe(self, value: float) -> None:
        """Add one, any number but NaN. A bucket's bound belongs to it."""
        self.counts[bisect_left(self._bounds, value)] += 1.0
        self.sum += value


class Histogram(dict[Labels, Series]):
    """A histogram: `histogram[labels].observe(value)`."""

    def __init__(self, name: str, documentation: str, label_names: Sequence[str], bounds: Sequence[float]) -> None:
        """`bounds`: of the buckets, the greatest values; ascending, above 0, without the infinite one."""
        self._about = name, documentation
        self._label_names = label_names
        self._bounds = bounds
        self._bound_names = [floatToGoString(bound) for bound in (*bounds, math.inf)]  # type: ignore[no-untyped-call]
        if not label_names:
            self[()] = Series(bounds)  # there is only one, and it can be 0

    def __missing__(self, labels: Labels) -> Series:
        series = self[labels] = Series(self._bounds)
        return series

    def metric(self, with_created: bool) -> Metric:
        """What it has observed by now."""
        family = HistogramMetricFamily(*self._about, labels=self._label_names)
        for labels, series in self.items():
            values = _printed(labels)
            family.add_metric(values, list(zip(self._bound_names, accumulate(series.counts), strict=True)), series.sum)
            if with_created:  # the library's family has no way to say it
                said = dict(zip(self._label_names, values, strict=True))
                family.samples.append(Sample(f"{family.name}_created", said, series.created_s))
        return family


class Counted(Collector):
    """Counters and histograms for a registry, in this order."""

    def __init__(self, *families: Counts | Histogram) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """All of them, as they are now."""
        # PROMETHEUS_DISABLE_CREATED_SERIES is the library's to read: look at what it does with a counter of its own.
        ((probe),) = Counter("probe", "", registry=None).collect()
        with_created = len(probe.samples) > 1
        return [family.metric(with_created) for family in self._families]


def _printed(labels: Labels) -> list[str]:
    return [str(label) for label in labels]
