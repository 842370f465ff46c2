"""What is peculiar to the smaller policies, and to what all share."""

import math
import random
from collections import Counter

import pytest
from fleets import Clock, Fleet, request, unlike
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import ConfigError
from extproc.load_model import RankLoads
from extproc.policy import PolicyContext, make_rank_policy, make_worker_policy
from extproc.policy.bucket import Bucket, split_evenly
from extproc.policy.fleet import COMPARE_ALL
from extproc.policy.fleet import Fleet as Seen
from extproc.policy.least_load import LeastLoad
from extproc.policy.rank_round_robin import MAX_WORKERS, RankRoundRobin


def set_tokens(fleet: Fleet, *tokens: float) -> None:
    """Put tokens on each rank of each worker."""
    for state, each in zip(fleet.states, tokens, strict=True):
        for rank in state.ranks:
            rank.charged_tokens = rank.outstanding_tokens = each


class TestFleet:
    def test_the_least_loaded_goes_by_tokens_per_rank_then_requests_then_chance(self):
        fleet = Fleet(1, 8, 2, 2)
        seen = Seen(fleet.context())
        set_tokens(fleet, 100, 90, 80, 80)
        fleet.states[2].in_flight = 1
        assert seen.least_loaded(fleet.states) is fleet.states[3]
        fleet.states[2].in_flight = 0
        picks = Counter(id(seen.least_loaded(fleet.states)) for _ in range(400))
        assert set(picks) == {id(fleet.states[2]), id(fleet.states[3])}
        assert min(picks.values()) >= 150  # binomial: 200, sd 10

    def test_of_many_a_few_are_compared(self):
        """The best of 4 draws is in the best quarter with 1 - (3/4)^4 = 68 %, 5 sd of 1,000 draws are 7 %."""
        fleet = Fleet(*[1] * 40)
        assert len(fleet.states) > COMPARE_ALL
        seen = Seen(fleet.context())
        set_tokens(fleet, *range(40))
        best = sum(fleet.states.index(seen.least_loaded(fleet.states)) < 10 for _ in range(1_000))
        assert abs(best / 1_000 - 0.684) <= 0.074

    def test_the_mean_is_that_of_the_ranks_and_at_most_a_few_picks_old(self):
        fleet = Fleet(*[2] * 64)
        seen = Seen(fleet.context())
        states = fleet.table.eligible(fleet.workers[0].role)
        seen.see(states)
        assert seen.mean == 0
        for state in states:
            state.in_flight = 4
        for _ in range(2):  # 64 workers / 32
            seen.see(states)
        assert seen.mean == 2

    def test_a_change_of_membership_is_seen(self):
        fleet = Fleet(1, 1)
        seen = Seen(fleet.context())
        states = fleet.table.eligible(fleet.workers[0].role)
        assert seen.see(states)
        assert not seen.see(states)
        fleet.set_healthy(1, False)
        assert seen.see(fleet.table.eligible(fleet.workers[0].role))
        assert set(seen.by_name) == {fleet.workers[0].name}

    @given(st.lists(st.integers(0, 400), min_size=1, max_size=6))
    def test_somebody_is_always_within_the_bound(self, in_flight):
        fleet = Fleet(*[2] * len(in_flight))
        for state, requests in zip(fleet.states, in_flight, strict=True):
            state.in_flight = requests
        seen = Seen(fleet.context())
        seen.see(fleet.states)
        over = [state.in_flight / 2 for state in fleet.states if seen.over_balance(state)]
        assert len(over) < len(in_flight)
        assert all(load > 1.5 * seen.mean for load in over)
        assert all(load > seen.mean + min(64, max(4, 2 * math.sqrt(seen.mean))) for load in over)


class Speeds:
    """A load model that knows speeds: each worker's drain time is given."""

    def __init__(self, *drain_s: float) -> None:
        self._drain_s = drain_s

    def rank_loads(self, states):
        return RankLoads([[1.0] * len(state.ranks) for state in states], final=True)

    def drain_s(self, states, tokens):
        return [self._drain_s[int(state.worker.name.removeprefix("prefill")[0])] for state in states]


def test_least_load_goes_by_drain_time_where_it_is_known():
    fleet = Fleet(2, 2, 2)
    context = PolicyContext(fleet.config, Speeds(3.0, 0.5, 2.0), random.Random(1), Clock())
    assert LeastLoad(context).pick(fleet.states, request()).state is fleet.states[1]


def test_ranks_take_turns_on_each_worker():
    fleet = Fleet(3, 2)
    policy = RankRoundRobin()
    picks = [policy.select_dp_rank(fleet.states[number % 2], 1.0) for number in range(12)]
    assert picks[::2] == [0, 1, 2, 0, 1, 2]
    assert picks[1::2] == [0, 1, 0, 1, 0, 1]


def test_turns_are_not_kept_for_ever():
    fleet = Fleet(2)
    policy = RankRoundRobin()
    policy._picks = {f"gone {number}": 1 for number in range(MAX_WORKERS)}
    assert policy.select_dp_rank(fleet.states[0], 1.0) == 0
    assert len(policy._picks) == 1


class TestBucket:
    def test_lengths_part_the_workers(self):
        fleet = Fleet(1, 1, bucket_adjust_interval_secs=5)
        subject = Bucket(fleet.context())
        for number in range(110):  # as many tokens in 100 short ones as in 10 long ones
            subject.pick(fleet.states, request(100 if number < 100 else 1_000))
        assert subject.boundaries == []
        fleet.clock.now_s = 5.0
        subject.pick(fleet.states, request(100))
        assert subject.boundaries == [100]
        picks = {tokens: subject.pick(fleet.states, request(tokens)).state for tokens in (50, 1_000, 101)}
        assert [fleet.states.index(state) for state in picks.values()] == [0, 1, 1]

    def test_boundaries_follow_the_traffic(self):
        fleet = Fleet(1, 1, bucket_adjust_interval_secs=5)
        subject = Bucket(fleet.context())
        seen = []
        for round_ in range(1, 4):
            for number in range(100):
                subject.pick(fleet.states, request(round_ * (1 + number)))
            fleet.clock.now_s = 5.0 * round_
            subject.pick(fleet.states, request(1))
            seen += subject.boundaries
        assert seen == [71, 142, 213]  # half of the sum of 1..100 is reached at 71

    def test_a_full_worker_is_relieved(self):
        fleet = Fleet(1, 1, bucket_adjust_interval_secs=5)
        subject = Bucket(fleet.context())
        for tokens in (100, 100, 1_000, 100):
            fleet.clock.now_s += 1.25
            subject.pick(fleet.states, request(tokens))
        assert subject.boundaries == [1_000]
        for tokens, number in ((0, 1), (64, 1), (65, 0)):  # `balance_abs_threshold` is 64
            set_tokens(fleet, 0, tokens)
            assert subject.pick(fleet.states, request(2_000)).state is fleet.states[number]

    def test_equal_lengths_are_shared(self):
        fleet = Fleet(1, 1, 1, policy="bucket", bucket_adjust_interval_secs=5)
        for _ in range(2):
            fleet.place(*(request(100) for _ in range(30)))
            fleet.clock.now_s += 5.0
        assert fleet.scheduler._workers["prefill"].boundaries == [100, 100]
        assert fleet.in_flight == [20, 20, 20]

    def test_a_joining_worker_gets_a_bucket_at_once(self):
        fleet = Fleet(1, 1, 1, bucket_adjust_interval_secs=5)
        fleet.set_healthy(2, False)
        subject = Bucket(fleet.context())
        for number in range(100):
            subject.pick(fleet.states, request(number))
        fleet.clock.now_s = 5.0
        subject.pick(fleet.states, request(1))
        assert len(subject.boundaries) == 1
        fleet.set_healthy(2, True)
        subject.pick(fleet.states, request(1))
        assert len(subject.boundaries) == 2

    @given(st.lists(st.floats(1, 1e5), min_size=1, max_size=100), st.lists(st.integers(1, 8), min_size=1, max_size=6))
    def test_the_parts_are_even(self, lengths, weights):
        """Each boundary is where its share of the sum is reached: off by no more than the lengths that equal it."""
        lengths.sort()
        boundaries = split_evenly(lengths, weights)
        assert len(boundaries) == len(weights) - 1
        assert boundaries == sorted(boundaries)
        for number, boundary in enumerate(boundaries, 1):
            share = sum(lengths) * sum(weights[:number]) / sum(weights)
            below = sum(length for length in lengths if length < boundary)
            reached = sum(length for length in lengths if length <= boundary)
            assert below <= share * (1 + 1e-9)
            assert reached >= share * (1 - 1e-9)


@pytest.mark.parametrize("make", [make_worker_policy, make_rank_policy])
def test_unknown_names_are_named(make):
    with pytest.raises(ConfigError, match=r"'best', expected one of \w+"):
        make("best", Fleet(1).context())


def test_power_of_two_prefers_the_less_loaded():
    fleet = Fleet(2, 2, policy="power_of_two")
    set_tokens(fleet, 9_000, 0)
    assert {each.prefill.state for each in fleet.place(*(unlike() for _ in range(50)))} == {fleet.states[1]}
