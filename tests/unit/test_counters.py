"""Our counters and histograms say what those of Prometheus's client library say of the same events."""

import time

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from extproc.counters import Counted, Counts, Histogram
from extproc.events import Outcome

BOUNDS = (20e-6, 0.5, 1, 2.5, 1e7)
OUTCOME = st.tuples(st.sampled_from(Outcome), st.sampled_from([0, 200, 503]))
WORKER = st.tuples(st.sampled_from(["p:1", "p:2", 'odd "\\\n name']))
VALUE = st.sampled_from(BOUNDS) | st.floats(-1, allow_nan=False)


class Ours:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ends = Counts("ends", "Ends,\nby outcome.", ["outcome", "status"])
        self.legs = Histogram("leg_seconds", "Legs.", ["worker"], BOUNDS)
        self.decision = Histogram("decision_seconds", "Decisions.", [], BOUNDS)
        self.registry.register(Counted(self.ends, self.legs, self.decision))

    def end(self, labels) -> None:
        self.ends[labels] += 1

    def leg(self, labels, value) -> None:
        self.legs[labels].observe(value)

    def decide(self, value) -> None:
        self.decision[()].observe(value)


class Theirs:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        options = {"registry": self.registry}
        self.ends = prometheus_client.Counter("ends", "Ends,\nby outcome.", ["outcome", "status"], **options)
        self.legs = prometheus_client.Histogram("leg_seconds", "Legs.", ["worker"], buckets=BOUNDS, **options)
        self.decision = prometheus_client.Histogram("decision_seconds", "Decisions.", buckets=BOUNDS, **options)

    def end(self, labels) -> None:
        self.ends.labels(*labels).inc()

    def leg(self, labels, value) -> None:
        self.legs.labels(*labels).observe(value)

    def decide(self, value) -> None:
        self.decision.observe(value)


def timeless(registry):
    """All metrics, and with each `_created` sample a 0 for its time; those times."""
    times = []
    metrics = list(registry.collect())
    for metric in metrics:
        created = [sample for sample in metric.samples if sample.name.endswith("_created")]
        times += [sample.value for sample in created]
        metric.samples = [sample._replace(value=0) if sample in created else sample for sample in metric.samples]
    return metrics, times


@given(
    st.lists(
        st.tuples(st.just("end"), OUTCOME)
        | st.tuples(st.just("leg"), WORKER, VALUE)
        | st.tuples(st.just("decide"), VALUE)
    )
)
def test_the_page_is_that_of_the_library(events):
    began_s = time.time()
    ours, theirs = Ours(), Theirs()
    for name, *arguments in events:
        getattr(ours, name)(*arguments)
        getattr(theirs, name)(*arguments)
    metrics, times = timeless(ours.registry)
    assert metrics == timeless(theirs.registry)[0]
    assert all(began_s <= each <= time.time() for each in times)
    assert times  # a histogram without labels is there from the start


@pytest.fixture
def _without_created():
    prometheus_client.disable_created_metrics()
    yield
    prometheus_client.enable_created_metrics()


@pytest.mark.usefixtures("_without_created")
def test_created_samples_can_be_switched_off_as_in_the_library():
    ours, theirs = Ours(), Theirs()
    for each in (ours, theirs):
        each.end((Outcome.OK, 200))
        each.leg(("p:1",), 0.25)
        each.decide(1)
    page = generate_latest(ours.registry)
    assert page == generate_latest(theirs.registry)
    assert b"_created" not in page


def test_a_look_changes_nothing_and_is_not_changed_afterwards():
    ours = Ours()
    ours.end((Outcome.OK, 200))
    ours.leg(("p:1",), 0.25)
    before = list(ours.registry.collect())
    assert before == list(ours.registry.collect())
    ours.end((Outcome.OK, 200))
    ours.leg(("p:1",), 0.25)
    first, later = (
        {sample.name: sample.value for metric in metrics for sample in metric.samples}
        for metrics in (before, ours.registry.collect())
    )
    assert (first["ends_total"], later["ends_total"]) == (1, 2)
    assert (first["leg_seconds_sum"], later["leg_seconds_sum"]) == (0.25, 0.5)
