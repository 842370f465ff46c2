"""`cache_aware`: when the prefix decides, when the load does, and the rank."""

import random

import pytest
from fleets import Fleet, request, worker
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.model import Role
from extproc.policy import Choice
from extproc.policy.cache_aware import CacheAware


def text(seed: int, length: int = 640) -> bytes:
    return random.Random(seed).randbytes(length)


def load(fleet: Fleet, number: int, tokens: float, requests: int = 0) -> None:
    """Put tokens on each rank of a worker, and requests on the worker."""
    state = fleet.states[number]
    state.in_flight = requests
    for rank in state.ranks:
        rank.charged_tokens = rank.outstanding_tokens = tokens


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(2, 2, 2)


@pytest.fixture
def subject(fleet: Fleet) -> CacheAware:
    return CacheAware(fleet.context())


def picked(fleet: Fleet, subject: CacheAware, prompt: bytes) -> int:
    return fleet.states.index(subject.pick(fleet.states, request(prompt=prompt)).state)


def test_a_prompt_goes_where_its_beginning_is(fleet, subject):
    subject.placed(request(prompt=text(1)), fleet.states[1], 0)
    load(fleet, 1, 5_000, requests=4)  # more than the others, but not over the bound
    assert picked(fleet, subject, text(1) + text(2, 300)) == 1
    assert picked(fleet, subject, text(3)) != 1


@pytest.mark.parametrize(("more", "matches"), [(1_400, True), (1_600, False)])
def test_a_match_must_be_longer_than_the_threshold(fleet, subject, more, matches):
    """640 bytes match: 31 % of 2,040, 29 % of 2,240."""
    subject.placed(request(prompt=text(1)), fleet.states[2], 0)
    load(fleet, 2, 5_000)
    assert (picked(fleet, subject, text(1) + text(2, more)) == 2) is matches


@pytest.mark.parametrize(("requests", "stays"), [(11, True), (13, False)])
def test_affinity_gives_way_to_a_full_worker(fleet, subject, requests, stays):
    """With r on two ranks of six, the mean is r / 6, and the bound 4 above: reached where r / 2 - r / 6 = 4, r = 12."""
    subject.placed(request(prompt=text(1)), fleet.states[0], 0)
    load(fleet, 0, 100, requests)
    assert (picked(fleet, subject, text(1)) == 0) is stays


@pytest.mark.parametrize("settings", [{"balance_abs_threshold": 0}, {"balance_rel_threshold": 3.0}])
def test_the_bound_is_configured(settings):
    fleet = Fleet(2, 2, 2, **settings)
    subject = CacheAware(fleet.context())
    subject.placed(request(prompt=text(1)), fleet.states[0], 0)
    load(fleet, 0, 100, requests=2 if "balance_abs_threshold" in settings else 1_000)  # 3 x the mean, either way
    assert (picked(fleet, subject, text(1)) == 0) is ("balance_rel_threshold" in settings)


def test_of_several_holders_the_less_loaded_is_picked(fleet, subject):
    for number in (0, 2):
        subject.placed(request(prompt=text(1)), fleet.states[number], 0)
    load(fleet, 0, 300)
    load(fleet, 1, 0)
    load(fleet, 2, 200)
    assert picked(fleet, subject, text(1)) == 2


def test_the_next_shorter_match_counts_when_the_longest_is_away(fleet, subject):
    subject.placed(request(prompt=text(1)), fleet.states[1], 0)
    subject.placed(request(prompt=text(1) + text(2)), fleet.states[2], 0)
    load(fleet, 1, 5_000)
    assert picked(fleet, subject, text(1) + text(2)) == 2
    fleet.set_healthy(2, False)
    assert picked(fleet, subject, text(1) + text(2)) == 1


def test_without_a_match_and_with_equal_loads_the_emptiest_cache_is_picked(fleet, subject):
    for number in range(30):
        prompt = text(number)
        subject.placed(request(prompt=prompt), fleet.states[picked(fleet, subject, prompt)], 0)
    assert set(subject._tree.held_bytes.values()) == {10 * 640}


def test_an_adapter_has_a_cache_of_its_own(fleet, subject):
    subject.placed(request(prompt=text(1), model="base:one"), fleet.states[1], 0)
    load(fleet, 1, 500)
    assert subject.pick(fleet.states, request(prompt=text(1), model="base:one")).state is fleet.states[1]
    assert subject.pick(fleet.states, request(prompt=text(1), model="base:two")).state is not fleet.states[1]


def test_what_workers_held_that_left_is_dropped_after_two_intervals():
    fleet = Fleet(2, 2, 2, eviction_interval_secs=60)
    subject = CacheAware(fleet.context())
    names = [worker.name for worker in fleet.workers]
    for number in range(300):
        subject.placed(request(prompt=text(number)), fleet.states[number % 3], 0)
    fleet.set_healthy(1, False)
    for seconds in range(0, 200, 2):  # each request looks at 32 nodes of 301
        fleet.clock.now_s = float(seconds)
        prompt = request(prompt=text(1_000))
        choice = subject.pick(fleet.states, prompt)
        subject.placed(prompt, choice.state, 0)
        assert (names[1] in subject._tree.held_bytes) or seconds > 120
    assert names[1] not in subject._tree.held_bytes
    assert {names[0], names[2]} == set(subject._tree.held_bytes)
    assert len(subject._tree) == 201


def test_a_worker_that_is_back_in_time_keeps_its_prompts():
    fleet = Fleet(2, 2, eviction_interval_secs=60)
    subject = CacheAware(fleet.context())
    subject.placed(request(prompt=text(1)), fleet.states[1], 0)
    for seconds, healthy in ((0, True), (61, False), (110, True), (122, True), (190, True)):
        fleet.clock.now_s = float(seconds)
        fleet.set_healthy(1, healthy)
        other = request(prompt=text(2))
        subject.pick(fleet.states, other)
        subject.placed(other, fleet.states[0], 0)
    assert picked(fleet, subject, text(1)) == 1


class TestRanks:
    @pytest.fixture
    def fleet(self) -> Fleet:
        return Fleet(4, 4, cache_aware_rank=True)

    def test_the_prefix_prefers_its_rank(self, fleet, subject):
        subject.placed(request(prompt=text(1)), fleet.states[1], 3)
        assert subject.pick(fleet.states, request(prompt=text(1))) == Choice(fleet.states[1], 3)
        assert subject.pick(fleet.states, request(prompt=text(2))).dp_rank is None

    @pytest.mark.parametrize(("waiting", "rank"), [(90.0, 3), (110.0, None)])
    def test_waiting_must_cost_less_than_computing_again(self, fleet, subject, waiting, rank):
        """All of 100 tokens match, so it is worth to wait for 100 tokens more than on the least loaded rank."""
        subject.placed(request(prompt=text(1)), fleet.states[1], 3)
        own = fleet.states[1].ranks[3]
        own.charged_tokens = own.outstanding_tokens = waiting
        assert subject.pick(fleet.states, request(100, prompt=text(1))) == Choice(fleet.states[1], rank)

    def test_of_several_ranks_the_less_loaded_is_picked(self, fleet, subject):
        for dp_rank in (1, 2):
            subject.placed(request(prompt=text(1)), fleet.states[0], dp_rank)
        first = fleet.states[0].ranks[1]
        first.charged_tokens = first.outstanding_tokens = 10.0
        assert subject.pick(fleet.states, request(prompt=text(1))) == Choice(fleet.states[0], 2)

    def test_a_rank_that_is_no_more_is_not_asked_for(self, fleet, subject):
        subject.placed(request(prompt=text(1)), fleet.states[1], 3)
        fleet.table.worker_changed(worker(Role.PREFILL, 1, 2), True)  # it came back with two ranks
        assert subject.pick(fleet.states, request(prompt=text(1))).dp_rank is None

    def test_through_the_scheduler(self, fleet):
        scheduler = Fleet(4, 4, policy="cache_aware", cache_aware_rank=True)
        placed = scheduler.place(*(request(prompt=text(number % 5)) for number in range(5)))
        again = scheduler.place(*(request(prompt=text(number % 5)) for number in range(5)))
        assert [each.placement.prefill for each in again] == [each.placement.prefill for each in placed]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40), st.booleans())
@settings(max_examples=50)
def test_any_sequence_of_prompts_is_placed_within_the_size(prompts, by_rank):
    fleet = Fleet(2, 2, policy="cache_aware", cache_aware_rank=by_rank, max_tree_size=4_000)
    for seed, blocks in prompts:
        fleet.place(request(prompt=text(seed, 64 * blocks)))
    tree = fleet.scheduler._workers["prefill"]._tree
    assert tree.size_bytes <= 4_000
