"""What is published, and how late."""

from itertools import pairwise

import pytest

from extproc.lab.clock import Clock
from extproc.lab.cluster import Cluster
from extproc.lab.decode import DecodeGroup, DecodeRank
from extproc.lab.pages import ENGINE_EPOCH_S, Page, Pages, rank_load
from extproc.lab.request import Flight, TraceRequest
from extproc.lab.service import ScheduledService
from extproc.lab.settings import Settings, Shape
from extproc.sim.gpu import GpuModel

GPU = GpuModel()
PROMPT = 1_000


class Nothing:
    def allocated(self, flight):
        pass

    def finished(self, flight):
        pass


@pytest.fixture
def decoding():
    """A rank that has just begun 200 steps with one request."""
    clock = Clock()
    rank = DecodeRank(0, 0, GPU)
    group = DecodeGroup([rank], GPU, clock, Nothing())
    flight = Flight(TraceRequest(0.0, PROMPT, 201), 0.0)
    group.submit(rank, flight)
    group.received(rank, flight)
    return clock, rank, group


def after_steps(steps):
    """Seconds that many steps take."""
    return sum(GPU.decode_s(1, PROMPT + 1 + done) for done in range(steps))


@pytest.mark.parametrize(
    ("steps", "loads", "metrics"), [(14, None, None), (15, 15, None), (39, 30, None), (97, 90, 80)]
)
def test_decode_publishes_every_15_and_every_40_steps(decoding, steps, loads, metrics):
    clock, rank, group = decoding
    clock.now_s = after_steps(steps) + 1e-6
    group.refresh()
    for shown, published in ((rank.pages.loads, loads), (rank.pages.metrics, metrics)):
        assert shown.used_tokens == (PROMPT + 1 + published if published else 0)
        assert shown.at_s == pytest.approx(after_steps(published) if published else 0.0)


def test_idle_rank_shows_old_metrics_for_30_s_and_fresh_loads(decoding):
    clock, rank, group = decoding
    clock.run(until=lambda: False)
    ended_s = clock.now_s
    assert rank.pages.metrics.used_tokens == 0  # step 200 is the last, and is published
    rank.pages.metrics = rank.pages.metrics._replace(used_tokens=7)
    clock.now_s = ended_s + 29.9
    group.refresh()
    assert rank.pages.metrics.used_tokens == 7
    assert rank.pages.loads.at_s == clock.now_s
    clock.now_s = ended_s + 30.1
    group.refresh()
    assert rank.pages.metrics.used_tokens == 0


def test_pages_have_the_fields_of_the_real_ones():
    pages = Pages()
    metrics, loads = (rank_load(page, pages, 3, GPU) for page in (Page.METRICS, Page.LOADS))
    assert (metrics.dp_rank, loads.dp_rank) == (3, 3)
    assert metrics.snapshot_s is None
    assert metrics.total_tokens is None
    assert metrics.prefill_uncached_tokens_total is None
    assert loads.snapshot_s == ENGINE_EPOCH_S
    assert None not in {loads.total_tokens, loads.waiting_uncached_tokens, loads.prefill_busy_us_total}


class Noting(ScheduledService):
    """Notes every scrape that reaches the service."""

    def observe(self, role, worker, loads, at_s):
        self.scrapes.append((role, worker, at_s, loads))


def scrapes_of(settings, monkeypatch):
    monkeypatch.setattr(Noting, "scrapes", scrapes := [], raising=False)
    monkeypatch.setattr("extproc.lab.cluster.ScheduledService", Noting)
    requests = [TraceRequest(float(number), 10_000, 50) for number in range(50)]
    result = Cluster("scraped", settings, 0, requests).run()
    return scrapes, result.ended_s


@pytest.mark.parametrize("interval_s", [1.0, 10.0])
def test_every_worker_is_scraped_at_the_interval(monkeypatch, interval_s):
    settings = Settings(prefill=Shape(2, 2), decode=Shape(1, 2), scrape_interval_s=interval_s)
    scrapes, ended_s = scrapes_of(settings, monkeypatch)
    for role, worker in {(role, worker) for role, worker, _, _ in scrapes}:
        moments = [at_s for *who, at_s, _ in scrapes if who == [role, worker]]
        assert moments[0] <= 1.0
        assert all(b - a == pytest.approx(interval_s) for a, b in pairwise(moments))
        assert len(moments) >= int(ended_s / interval_s) - 1
    assert {len(loads) for *_, loads in scrapes} == {2}
    assert len({(role, worker) for role, worker, _, _ in scrapes}) == 3


def test_scrapes_fail_as_often_as_told_or_do_not_happen(monkeypatch):
    all_of_them, _ = scrapes_of(Settings(), monkeypatch)
    half, _ = scrapes_of(Settings(scrape_failure_ratio=0.5), monkeypatch)
    assert 0.3 < len(half) / len(all_of_them) < 0.7  # 100 scrapes: 4 standard errors
    assert scrapes_of(Settings(scrape_failure_ratio=1.0), monkeypatch)[0] == []
    assert scrapes_of(Settings(scrape_interval_s=None), monkeypatch)[0] == []
