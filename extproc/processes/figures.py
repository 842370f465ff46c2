"""One metrics page for all processes: counters and histograms are sums, as the followers report theirs to the leader.

Gauges of the load table need no sum: every process has the whole table. What a process counted before it ended stays in
the sum, so that no counter falls; what it counted after its last report is lost.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.samples import Sample as PageSample

from extproc.processes.messages import Figures, Sample

SUMMED = frozenset({"counter", "histogram"})
CREATED = "_created"
"""Ending of samples that say when a series began (OpenMetrics); nothing to add up."""
OPEN_EXCHANGES = "extproc_open_exchanges"

_Key = tuple[str, tuple[tuple[str, str], ...]]


def samples_of(registry: CollectorRegistry) -> dict[str, list[Sample]]:
    """A process's counters and histograms, by name, as it reports them."""
    return {
        metric.name: [
            (sample.name, sample.labels, sample.value)
            for sample in metric.samples
            if not sample.name.endswith(CREATED)
        ]
        for metric in registry.collect()
        if metric.type in SUMMED
    }  # fmt: skip


@dataclass(slots=True)
class _Series:
    """Sums by series, in the order in which they came: that of a histogram's buckets."""

    values: dict[str, dict[_Key, float]] = field(default_factory=dict)

    def add(self, samples: dict[str, list[Sample]]) -> None:
        for metric, series in samples.items():
            sums = self.values.setdefault(metric, {})
            for name, labels, value in series:
                key = name, tuple(sorted(labels.items()))
                sums[key] = sums.get(key, 0.0) + value


class SummedRegistry(CollectorRegistry):
    """The leader's own registry with what the followers counted added."""

    def __init__(self, own: CollectorRegistry) -> None:
        super().__init__()
        self._own = own
        self._ended = _Series()
        self._latest: dict[int, Figures] = {}
        self.lag_s = 0.0
        """The leader's own, as in `Figures`."""

    @property
    def open_streams(self) -> int:
        """Of the followers, by their last reports."""
        return sum(figures.open_streams for figures in self._latest.values())

    def begun(self, process: int) -> None:
        """A follower serves."""
        self._latest[process] = Figures(0, 0, 0.0, {})

    def reported(self, process: int, figures: Figures) -> None:
        """A follower's figures have come."""
        if process in self._latest:
            self._latest[process] = figures

    def ended(self, process: int) -> None:
        """A follower has ended."""
        figures = self._latest.pop(process, None)
        if figures is not None:
            self._ended.add(figures.samples)

    def collect(self) -> Iterable[Metric]:
        """The page."""
        others = _Series({name: dict(series) for name, series in self._ended.values.items()})
        for figures in self._latest.values():
            others.add(figures.samples)
        for metric in self._own.collect():
            if metric.type in SUMMED:
                yield _added(metric, others.values.get(metric.name, {}))
            elif metric.name == OPEN_EXCHANGES:
                exchanges = sum(figures.open_exchanges for figures in self._latest.values())
                metric.samples = [sample._replace(value=sample.value + exchanges) for sample in metric.samples]
                yield metric
            else:
                yield metric
        yield from self._processes()

    def _processes(self) -> Iterator[Metric]:
        running = GaugeMetricFamily("extproc_processes", "Processes that serve requests.")
        running.add_metric([], 1 + len(self._latest))
        yield running
        lag = GaugeMetricFamily(
            "extproc_replication_lag_seconds",
            "How long the latest changes of the load table were under way to a process.",
            labels=["process"],
        )
        lag.add_metric(["0"], self.lag_s)
        for process, figures in sorted(self._latest.items()):
            lag.add_metric([str(process)], figures.lag_s)
        yield lag


def _added(metric: Metric, others: dict[_Key, float]) -> Metric:
    rest = dict(others)
    summed = [
        sample._replace(value=sample.value + rest.pop((sample.name, tuple(sorted(sample.labels.items()))), 0.0))
        for sample in metric.samples
    ]
    metric.samples = summed + [PageSample(name, dict(labels), value) for (name, labels), value in rest.items()]
    return metric
