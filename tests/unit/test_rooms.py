"""Rooms: in range, unique, congruent, uniform."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from extproc.rooms import ROOM_LIMIT, Rooms

DRAWS = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 64), st.integers(0, 63)), min_size=1, max_size=50)


@given(st.randoms(use_true_random=False), DRAWS)
def test_rooms_are_in_range_unique_and_congruent(rng, draws):
    rooms = Rooms(rng)
    seen = set()
    for count, modulus, residue in draws:
        first = rooms.draw(count, modulus=modulus, residue=residue % modulus)
        assert first % modulus == residue % modulus
        batch = range(first, first + count)
        assert batch[0] >= 0
        assert batch[-1] < ROOM_LIMIT
        assert seen.isdisjoint(batch)
        seen.update(batch)


def test_wraps_around_at_the_end():
    rng = random.Random(1)
    rng.randrange = lambda limit: limit - 10  # the start
    rng.random = lambda: 0.0
    rooms = Rooms(rng)
    first = rooms.draw(4, modulus=4, residue=3)
    assert first % 4 == 3
    assert first + 4 <= ROOM_LIMIT
    again = rooms.draw(16, modulus=4, residue=3)
    assert again == 3


def test_an_engine_that_decides_by_the_room_sees_uniform_ranks():
    rooms = Rooms(random.Random(7))
    counts = Counter(rooms.draw() % 8 for _ in range(8_000))
    # Binomial(8000, 1/8): sd 29.6; five of them.
    assert all(abs(count - 1_000) < 150 for count in counts.values())
