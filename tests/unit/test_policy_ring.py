"""The ring: balance, minimal movement, and the walk; and the two policies on it."""

import math
import subprocess
import sys
from collections import Counter

import pytest
from fleets import Fleet, request
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.policy import fleet as policy_fleet
from extproc.policy.consistent_hashing import ConsistentHashing
from extproc.policy.prefix_hash import PrefixHash
from extproc.policy.ring import MAX_STEPS, POINTS, Ring, bounded, key_point

KEYS = [key_point(b"key %d" % number) for number in range(4_000)]


def ring_of(*names: str) -> Ring:
    ring = Ring()
    ring.update(names)
    return ring


def owners(ring: Ring, skip: str | None = None) -> list[str]:
    return [next(name for name in ring.walk(key) if name != skip) for key in KEYS]


names = st.lists(st.text("abcdef0123456789.:", min_size=1, max_size=20), min_size=2, max_size=12, unique=True)


@given(names)
@settings(max_examples=30)
def test_keys_spread_evenly(names):
    """A share of the ring has a deviation of 1/sqrt(POINTS), the keys in it that of a binomial. Five of both."""
    mean = len(KEYS) / len(names)
    tolerance = 5 * math.hypot(mean / math.sqrt(POINTS), math.sqrt(mean))
    counts = Counter(owners(ring_of(*names)))
    assert all(abs(counts[name] - mean) <= tolerance for name in names)


@given(names)
@settings(max_examples=30)
def test_only_the_keys_of_who_comes_or_goes_move(names):
    *others, last = names
    before, after = owners(ring_of(*others)), owners(ring_of(*names))
    assert {new for old, new in zip(before, after, strict=True) if old != new} <= {last}
    assert owners(ring_of(*names), skip=last) == before  # leaving is skipping


@given(names, st.integers(0, 2**64 - 1))
@settings(max_examples=30)
def test_a_walk_meets_everybody_once(names, point):
    assert sorted(ring_of(*names).walk(point)) == sorted(names)


@given(names)
@settings(max_examples=10)
def test_the_order_of_arrival_does_not_matter(names):
    one_by_one = Ring()
    for number in range(len(names)):
        one_by_one.update(names[-number - 1 :])
    assert owners(one_by_one) == owners(ring_of(*names))


def test_names_that_are_gone_do_not_stay_for_ever():
    ring = Ring()
    for number in range(100):
        ring.update([f"w{number}", f"w{number + 1}"])
        assert len(ring) <= 2 * 2 + 1
    assert {"w99", "w100"} <= set(ring.walk(0))


def test_every_process_has_the_same_ring():
    code = "from extproc.policy.ring import *; r = Ring(); r.update(['a', 'b', 'c']); print(*r.walk(key_point(b'k')))"
    outputs = {
        subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}) for seed in ("1", "2")
    }
    assert outputs == {" ".join(ring_of("a", "b", "c").walk(key_point(b"k"))).encode() + b"\n"}


STICKY = {
    ConsistentHashing: lambda number: request(key=f"user {number}"),
    PrefixHash: lambda number: request(prompt=b"%04d" % number * 300),
}


@pytest.mark.parametrize("policy", STICKY)
def test_alike_requests_go_to_one_worker(policy):
    fleet = Fleet(2, 2, 2, 2)
    subject = policy(fleet.context())
    for number in range(100):
        picks = {subject.pick(fleet.states, STICKY[policy](number)).state for _ in range(3)}
        assert len(picks) == 1


@pytest.mark.parametrize("policy", STICKY)
def test_an_overloaded_worker_is_passed_by_and_the_rest_of_its_keys_keep_together(policy):
    fleet = Fleet(2, 2, 2, 2)
    subject = policy(fleet.context())
    first = subject.pick(fleet.states, STICKY[policy](1)).state
    first.in_flight = 100  # the mean is 12.5 a rank, this worker has 50
    passed = {subject.pick(fleet.states, STICKY[policy](1)).state for _ in range(10)}
    assert len(passed) == 1
    assert first not in passed


@pytest.mark.parametrize(
    ("settings", "requests", "stays"),
    [
        ({}, 20, True),  # 10 a rank, the mean is 2.5: not 10 above
        ({}, 27, False),  # 13.5 a rank, the mean is 3.4
        ({"prefix_hash_balance_abs_threshold": 0}, 1, False),
        ({"prefix_hash_balance_abs_threshold": 0, "prefix_hash_load_factor": 4}, 27, True),  # never above 4 x
    ],
)
def test_the_bound_of_prefix_hash_is_configured(settings, requests, stays):
    fleet = Fleet(2, 2, 2, 2, **settings)
    subject = PrefixHash(fleet.context())
    first = subject.pick(fleet.states, STICKY[PrefixHash](1)).state
    first.in_flight = requests
    assert (subject.pick(fleet.states, STICKY[PrefixHash](1)).state is first) is stays


def test_only_the_first_tokens_count():
    fleet = Fleet(*[1] * 32, prefix_token_count=16)
    subject = PrefixHash(fleet.context())
    picks = [
        [subject.pick(fleet.states, request(prompt=b"p" * same + b"%02d" % number)).state for number in range(20)]
        for same in (64, 60)
    ]
    assert len(set(picks[0])) == 1  # all differ behind the 64th byte
    assert len(set(picks[1])) > 1


@pytest.mark.parametrize("policy", STICKY)
def test_without_anything_to_hash_the_least_loaded_is_picked(policy):
    fleet = Fleet(1, 1, 1)
    for scheduled in fleet.place(*[request()] * 3):
        scheduled.prefill.rank.charged_tokens = 500
    fleet.states[1].ranks[0].charged_tokens = 0
    fleet.states[1].ranks[0].outstanding_tokens = 0
    subject = policy(fleet.context())
    assert all(subject.pick(fleet.states, ask).state is fleet.states[1] for ask in (None, request()))


def test_the_walk_is_bounded():
    fleet = Fleet(*[1] * (MAX_STEPS + 4))
    workers, ring = policy_fleet.Fleet(fleet.context()), Ring()
    workers.see(fleet.states)
    ring.update(workers.by_name)
    over = []
    assert bounded(ring, workers, 0, lambda state: over.append(state) or True) is None
    assert len(over) == MAX_STEPS
