"""`manual`: keys stay, go back, idle out, and never fill the memory."""

from collections import Counter

import pytest
from fleets import Fleet, request
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.policy.manual import Manual


def pick(fleet: Fleet, subject: Manual, key: str) -> str:
    return subject.pick(fleet.states, request(key=key)).state.worker.name


def test_a_key_stays_when_workers_join():
    fleet = Fleet(1, 1, 1, 1)
    fleet.set_healthy(3, False)
    subject = Manual(fleet.context())
    keys = [f"user {number}" for number in range(200)]
    before = [pick(fleet, subject, key) for key in keys]
    assert len(set(before)) == 3
    fleet.set_healthy(3, True)
    assert [pick(fleet, subject, key) for key in keys] == before


def test_a_key_gets_another_worker_while_its_own_is_away_and_then_goes_back():
    fleet = Fleet(1, 1, 1)
    subject = Manual(fleet.context())
    first = pick(fleet, subject, "key")
    number = next(number for number, worker in enumerate(fleet.workers) if worker.name == first)
    fleet.set_healthy(number, False)
    second = {pick(fleet, subject, "key") for _ in range(10)}
    assert len(second) == 1
    assert first not in second
    fleet.set_healthy(number, True)
    assert pick(fleet, subject, "key") == first


def test_an_idle_key_is_forgotten():
    fleet = Fleet(1, 1, max_idle_secs=100)
    subject = Manual(fleet.context())
    pick(fleet, subject, "old")
    fleet.clock.now_s = 60.0
    pick(fleet, subject, "used")
    fleet.clock.now_s = 101.0
    pick(fleet, subject, "new")
    assert len(subject) == 2
    fleet.clock.now_s = 160.0  # 'used' was used 100 s ago: just not too long
    pick(fleet, subject, "new")
    assert len(subject) == 2


def test_an_overloaded_worker_gets_no_more_of_its_keys_for_a_while():
    fleet = Fleet(1, 1, 1)
    subject = Manual(fleet.context())
    own = subject.pick(fleet.states, request(key="key")).state
    own.in_flight = 50
    assert pick(fleet, subject, "key") != own.worker.name
    own.in_flight = 0
    assert pick(fleet, subject, "key") == own.worker.name


@pytest.mark.parametrize("mode", ["random", "min_load", "min_group"])
def test_how_a_new_key_gets_its_worker(mode):
    fleet = Fleet(1, 1, 1, assignment_mode=mode)
    subject = Manual(fleet.context())
    fleet.states[0].ranks[0].charged_tokens = fleet.states[0].ranks[0].outstanding_tokens = 1_000
    picks = Counter(pick(fleet, subject, f"user {number}") for number in range(300))
    if mode == "min_load":  # nothing is charged here, so the loads stay
        assert picks[fleet.workers[0].name] == 0
    elif mode == "min_group":
        assert set(picks.values()) == {100}
    else:
        assert all(abs(count - 100) <= 5 * 8.2 for count in picks.values())  # binomial


@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.floats(0, 60), st.sets(st.integers(0, 2), max_size=2)),  # key, pause, away
        max_size=60,
    )
)
@settings(max_examples=60)
def test_the_map_is_bounded_and_its_counts_are_right(steps):
    fleet = Fleet(1, 1, 1, max_idle_secs=100)
    subject = Manual(fleet.context(), max_keys=5)
    for key, pause_s, away in steps:
        fleet.clock.now_s += pause_s
        for number in range(3):
            fleet.set_healthy(number, number not in away)
        assert pick(fleet, subject, f"user {key}") in {state.worker.name for state in fleet.states}
        assert len(subject) <= 5
        assert subject._groups == Counter(name for sticky in subject._keys.values() for name in sticky.workers)
        assert all(1 <= len(set(sticky.workers)) == len(sticky.workers) <= 2 for sticky in subject._keys.values())
        used = [sticky.used_s for sticky in subject._keys.values()]
        assert used == sorted(used)
        assert fleet.clock() - used[0] <= 100


def test_a_long_key_takes_no_more_room_than_a_short_one():
    fleet = Fleet(1)
    subject = Manual(fleet.context())
    pick(fleet, subject, "k" * 60_000)
    assert {len(digest) for digest in subject._keys} == {16}
