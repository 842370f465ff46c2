"""The `live` load model: the ledger, what is done of it, and what engines report, set against it by time."""

import math
import random

import msgspec
import pytest
from fleets import Clock, Fleet, request
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import ConfigError
from extproc.load import DEFAULT_OUTPUT_TOKENS, FIRST_LIFETIME_S, LoadTable, WorkerState
from extproc.load_model import STALE_WEIGHT, Live, make_load_model
from extproc.model import RankLoad, Role, Worker

ENGINE_EPOCH_S = 1.7e9
"""Engines' clocks have nothing to do with the service's."""


class Scene:
    """One worker with two ranks, a clock, and the model under test."""

    def __init__(self, role: Role = Role.PREFILL, dp_size: int = 2) -> None:
        self.clock = Clock()
        self.worker = Worker("w:1", role, "http://w:1", "127.0.0.1:1", dp_size=dp_size)
        self.table = LoadTable([self.worker], self.clock)
        self.table.worker_changed(self.worker, True)
        self.live = Live(self.clock)

    @property
    def state(self) -> WorkerState:
        return self.table.states[0]

    @property
    def loads(self) -> list[float]:
        (loads,) = self.live.rank_loads([self.state]).tokens
        return loads

    def charge(self, dp_rank: int, tokens: float):
        return self.table.charge(self.state, dp_rank, tokens)

    def at(self, now_s: float) -> None:
        self.clock.now_s = now_s

    def report(self, *totals: float, taken_s: float | None = None, skew_s: float = ENGINE_EPOCH_S) -> None:
        """A scrape that arrives now, of figures that were taken then; without a queue's figures where taken is None."""
        loads = [
            RankLoad(number, used_tokens=total)
            if taken_s is None
            else RankLoad(number, used_tokens=0.0, total_tokens=total, snapshot_s=taken_s + skew_s)
            for number, total in enumerate(totals)
        ]
        self.table.observe("w:1", loads, at_s=self.clock.now_s)


def test_the_ledger_is_what_was_sent_and_not_released():
    scene = Scene()
    first, second = scene.charge(0, 100), scene.charge(1, 70)
    scene.charge(1, 30)
    assert scene.loads == [100, 100]
    scene.table.release(second)
    assert scene.loads == [100, 30]
    scene.table.release(first)
    assert scene.loads == [0, 30]


def test_progress_is_taken_off_but_never_more_than_the_oldest_prompt():
    scene = Scene()
    lease = scene.charge(0, 1_000)
    scene.at(1.0)
    scene.table.release(lease)  # 1,000 tokens/s
    scene.charge(0, 500)
    scene.charge(0, 2_000)
    scene.at(1.3)
    assert scene.loads[0] == pytest.approx(2_200)
    scene.at(60.0)  # it has not been answered, so it is not done, and the next one was not begun
    assert scene.loads[0] == pytest.approx(2_000)


def test_a_decode_rank_works_on_all_at_once_so_nothing_is_taken_off():
    scene = Scene(Role.DECODE)
    scene.table.release(scene.charge(0, 10))
    scene.charge(0, 1_000)
    scene.at(5.0)
    assert scene.loads == [1_000, 0]


def test_the_engines_own_counters_beat_the_ledgers_guess_of_speed():
    scene = Scene()
    for at_s, tokens, busy_us in ((1.0, 0.0, 0.0), (2.0, 3_000.0, 500_000.0)):
        scene.at(at_s)
        load = RankLoad(0, 0.0, prefill_uncached_tokens_total=tokens, prefill_busy_us_total=busy_us)
        scene.table.observe("w:1", [load], at_s=at_s)
    assert scene.state.ranks[0].tokens_per_s == 6_000
    lease = scene.charge(0, 10)
    scene.at(10.0)
    scene.table.release(lease)
    assert scene.state.ranks[0].tokens_per_s == 6_000


@pytest.mark.parametrize("skew_s", [ENGINE_EPOCH_S, 0.0, -1e6])
def test_figures_are_compared_with_the_ledger_of_the_moment_they_were_taken(skew_s):
    """900 tokens were there at 1.0 s. What was sent and ended since then is the ledger's business."""
    scene = Scene()
    scene.report(0, 0, taken_s=0.0, skew_s=skew_s)  # tells the clocks apart
    scene.at(0.5)
    old = scene.charge(0, 600)
    scene.at(1.2)
    scene.charge(0, 5_000)
    scene.table.release(old)
    scene.at(1.5)
    scene.report(900, 0, taken_s=1.0, skew_s=skew_s)
    rank = scene.state.ranks[0]
    assert rank.foreign_tokens == pytest.approx(300, abs=1e-3)
    assert rank.news_at_s == pytest.approx(1.0, abs=1e-3)
    assert rank.news_weight(1.0) == pytest.approx(1.0, abs=1e-3)
    expected = 5_000 - rank.done_tokens(1.5) + 300 * rank.news_weight(1.5)
    assert scene.loads[0] == pytest.approx(expected, rel=1e-6)


def test_a_slow_scrape_does_not_move_the_engines_clock():
    scene = Scene()
    scene.report(0, 0, taken_s=0.0)
    scene.at(3.0)
    scene.report(5, 0, taken_s=1.0)  # 2 s late
    assert scene.state.ranks[0].news_at_s == pytest.approx(1.0, abs=1e-3)


def test_what_the_engine_had_besides_fades():
    scene = Scene()
    scene.report(0, 1_000, taken_s=0.0)
    assert scene.loads == pytest.approx([0, 1_000])
    scene.at(FIRST_LIFETIME_S)
    assert scene.loads == pytest.approx([0, 1_000 / math.e])


def test_unchanged_figures_are_no_news():
    scene = Scene()
    scene.report(0, 1_000, taken_s=0.0)
    for now_s in (1.0, 2.0):
        scene.at(now_s)
        scene.report(0, 1_000, taken_s=0.0)
    assert scene.state.ranks[1].news_at_s == 0.0
    assert scene.state.ranks[1].scraped_at_s == 2.0
    assert scene.loads[1] == pytest.approx(1_000 * math.exp(-2))


def test_while_one_rank_has_no_figures_or_old_ones_the_ledger_decides_for_all():
    scene = Scene()
    scene.charge(0, 10)
    scene.table.observe("w:1", [RankLoad(1, 0.0, 5_000.0, snapshot_s=1.0)], at_s=0.0)
    assert scene.loads == [10, 0]  # rank 0 has said nothing
    scene.table.observe("w:1", [RankLoad(0, 0.0, 10.0, snapshot_s=1.0)], at_s=0.0)
    assert scene.loads == [10, 5_000]
    scene.at(-FIRST_LIFETIME_S * math.log(STALE_WEIGHT) + 0.01)
    assert scene.loads == [10, 0]


def test_an_engine_that_has_less_than_the_ledger_lowers_it_but_not_below_zero():
    scene = Scene()
    scene.charge(0, 1_000)
    scene.report(400, 0, taken_s=0.0)
    assert scene.loads == [400, 0]
    scene.table.release(scene.charge(1, 1))
    scene.state.ranks[0].foreign_tokens = -5_000
    assert scene.loads[0] == 0


def test_used_tokens_alone_never_take_anything_off():
    """A queue is not in them: the rank may have all that was sent to it, waiting."""
    scene = Scene()
    scene.charge(0, 1_000)
    scene.report(0, 300)
    assert [rank.foreign_tokens for rank in scene.state.ranks] == [0, 300]
    assert scene.loads == [1_000, 300]


def test_a_failed_scrape_and_a_missing_figure_are_no_zero():
    scene = Scene()
    scene.charge(0, 1_000)
    scene.table.observe("w:1", [RankLoad(0), RankLoad(1, running_requests=3)], at_s=0.0)
    assert [rank.news_at_s for rank in scene.state.ranks] == [None, None]
    assert scene.loads == [1_000, 0]


def test_a_restarted_engine_has_another_clock():
    scene = Scene()
    scene.report(0, 0, taken_s=0.0)
    assert scene.state.engine_clock_s == -ENGINE_EPOCH_S
    scene.table.worker_changed(scene.worker, False)
    scene.table.worker_changed(scene.worker, True)
    assert scene.state.engine_clock_s is None
    scene.at(10.0)
    scene.report(7, 0, taken_s=9.0, skew_s=-50.0)
    assert scene.state.ranks[0].news_at_s == pytest.approx(10.0)


def test_counters_that_begin_anew_are_no_speed():
    scene = Scene()
    for at_s, tokens in ((1.0, 0.0), (2.0, 6_000.0), (3.0, 10.0)):
        load = RankLoad(0, tokens, prefill_uncached_tokens_total=tokens, prefill_busy_us_total=tokens * 100)
        scene.table.observe("w:1", [load], at_s=at_s)
    assert scene.state.ranks[0].tokens_per_s == 10_000


def test_a_worker_is_as_busy_as_its_least_loaded_rank():
    fleet = Fleet(2, 1)
    live = Live(fleet.clock)
    for state, loads in zip(fleet.states, ((900, 100), (300,)), strict=True):
        for rank, tokens in zip(state.ranks, loads, strict=True):
            rank.outstanding_tokens = tokens
    assert live.drain_s(fleet.states, live.rank_loads(fleet.states).tokens) == [100, 300]
    fleet.states[1].ranks[0].tokens_per_s = 1_000.0  # the others are taken for as fast
    assert live.drain_s(fleet.states, live.rank_loads(fleet.states).tokens) == pytest.approx([0.1, 0.3])


def test_an_unknown_model_is_named():
    with pytest.raises(ConfigError, match="expected one of scraped, live"):
        make_load_model("best", lambda: 0.0)


FIGURES = st.none() | st.floats(0, 1e7)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["charge", "release", "scrape", "wait"]), st.integers(0, 1), FIGURES, FIGURES, st.booleans()
        ),
        max_size=40,
    ),
    st.floats(-1e9, 1e9),
)
def test_no_load_is_ever_negative_or_no_number(steps, skew_s):
    scene = Scene()
    leases = []
    for what, dp_rank, one, other, timed in steps:
        if what == "charge":
            leases.append(scene.charge(dp_rank, one or 0.0))
        elif what == "release" and leases:
            scene.table.release(leases.pop(0))
        elif what == "scrape":
            snapshot_s = scene.clock.now_s + skew_s if timed else None
            load = RankLoad(dp_rank, one, other, snapshot_s=snapshot_s, output_tokens_per_s=other, running_requests=one)
            scene.table.observe("w:1", [load], at_s=scene.clock.now_s)
        else:
            scene.at(scene.clock.now_s + (one or 0.0) / 1e6)
        assert all(0 <= load < float("inf") for load in scene.loads)


class TestTies:
    def test_go_to_any_rank(self):
        fleet = Fleet(4)
        fleet.states[0].ranks[2].outstanding_tokens = 1
        picks = {fleet.scheduler._ranks[Role.PREFILL].select_dp_rank(fleet.states[0], 1) for _ in range(200)}
        assert picks == {0, 1, 3}

    def test_and_to_the_lowest_as_in_the_existing_gateway(self):
        fleet = Fleet(4, load_model="scraped")
        picks = {fleet.scheduler._ranks[Role.PREFILL].select_dp_rank(fleet.states[0], 1) for _ in range(200)}
        assert picks == {0}


class TestExpectedOutput:
    def serve(self, fleet: Fleet, output_tokens: float, *, limit: float = 1e6, speed: float = 50.0) -> None:
        """One request from its placement to its last token."""
        scheduled = fleet.scheduler.place(limited(limit))
        fleet.clock.now_s += 3.0  # prefill's time does not matter
        fleet.table.release(scheduled.prefill)
        fleet.clock.now_s += output_tokens / speed
        fleet.table.release(scheduled.decode)

    def fleet(self, *, speed: float = 50.0) -> Fleet:
        fleet = Fleet(2)
        decode = fleet.table.eligible(Role.DECODE)[0]
        figures = RankLoad(0, 0.0, output_tokens_per_s=8 * speed, running_requests=8)
        fleet.table.observe(decode.worker.name, [figures], at_s=0.0)
        return fleet

    def test_is_what_the_client_allows_while_nothing_is_known(self):
        table = Fleet(1).table
        assert table.expected_output(16, 1) == 16
        assert table.expected_output(5_000, 1) == DEFAULT_OUTPUT_TOKENS
        assert table.expected_output(5_000, 3) == 3 * DEFAULT_OUTPUT_TOKENS

    def test_is_learned_from_times_and_the_engines_speed(self):
        fleet = self.fleet()
        rng = random.Random(3)
        for _ in range(200):
            self.serve(fleet, rng.uniform(200, 400))
        assert fleet.table.output_tokens == pytest.approx(300, rel=0.1)
        assert fleet.table.expected_output(100, 1) == 100
        assert fleet.scheduler.place(limited(1e6)).decode.tokens == 100 + fleet.table.output_tokens

    def test_a_request_has_no_more_than_it_was_allowed(self):
        fleet = self.fleet()
        self.serve(fleet, 10_000, limit=64)
        assert fleet.table.output_tokens == 64

    def test_failures_and_unknown_speeds_teach_nothing(self):
        fleet = self.fleet()
        self.serve(fleet, 0.5)
        assert fleet.table.output_tokens is None
        scheduled = fleet.scheduler.place(limited(100))
        fleet.clock.now_s += 9
        fleet.table.release(scheduled.decode)  # its prefill has not ended
        fleet.table.release(scheduled.prefill)
        assert fleet.table.output_tokens is None
        blind = Fleet(2)
        self.serve(blind, 500)
        assert blind.table.output_tokens is None


def limited(max_output_tokens: float):
    return msgspec.structs.replace(request(), max_output_tokens=max_output_tokens)
