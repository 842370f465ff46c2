"""loads_json: the same figures as the text of the same answer, and no page that can hurt it."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import loads_text
from extproc.loads_json import MAX_RANK, parse_loads
from extproc.model import RankLoad

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden (real engine output)")
FIGURES = {name.removeprefix(b"sglang_").decode(): field for name, field in loads_text.LOADS_FIELDS.items()}
"""Name in the answer -> field of `RankLoad`: text and JSON differ in the prefix only."""


def page(*loads, **beside):
    return json.dumps({**beside, "loads": list(loads)}).encode()


@golden
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_real_answers_say_the_same_as_text(role):
    real = (GOLDEN / f"sglang-0.5.23-v1-loads-{role}-dp2.json").read_bytes()
    text = (GOLDEN / f"sglang-0.5.23-v1-loads-{role}-dp2.prom").read_bytes()
    loads = parse_loads(real)
    assert loads == loads_text.parse_loads(text)
    assert [load.dp_rank for load in loads] == [0, 1]
    assert all(getattr(load, field) is not None for load in loads for field in FIGURES.values())


@golden
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_without_the_sections_beside_them_the_figures_are_the_same(role):
    """`?include=core`: `LoadSnapshot.to_dict` leaves out what is itself an object."""
    real = (GOLDEN / f"sglang-0.5.23-v1-loads-{role}-dp2.json").read_bytes()
    core = [
        {name: value for name, value in load.items() if not isinstance(value, dict)}
        for load in json.loads(real)["loads"]
    ]
    assert parse_loads(page(*core)) == parse_loads(real)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_by_its_name(name):
    [load] = parse_loads(page({"dp_rank": 3, name: 5}))
    assert load == RankLoad(3, **{FIGURES[name]: 5.0})
    assert isinstance(getattr(load, FIGURES[name]), float)


def test_an_older_engine_says_less():
    """0.5.8: neither time nor counters, and sums beside the ranks."""
    load = {"dp_rank": 0, "num_running_reqs": 24, "num_used_tokens": 382910, "token_usage": 0.73, "num_total_reqs": 27}
    answer = page(load, timestamp="2026-01-01T00:00:00+00:00", dp_rank_count=1, aggregate={"total_reqs": 27})
    assert parse_loads(answer) == (RankLoad(0, 382910, running_requests=24, token_usage_ratio=0.73),)


def test_ranks_are_ordered_and_the_last_of_equals_counts():
    loads = parse_loads(page(*({"dp_rank": rank, "num_used_tokens": n} for n, rank in enumerate((2, 0, 10, 0)))))
    assert [(load.dp_rank, load.used_tokens) for load in loads] == [(0, 3), (2, 0), (10, 2)]


@pytest.mark.parametrize(
    "value",
    ["null", "-1", "-0.5", "true", '"5"', "[5]", "{}", "1" + "0" * 400, "-1e300", "99999999999999999999999e300"],
)
def test_what_is_no_figure_was_not_said(value):
    entry = f'{{"loads": [{{"dp_rank": 1, "num_running_reqs": 3, "num_used_tokens": {value}}}]}}'
    assert parse_loads(entry.encode()) in ((RankLoad(1, running_requests=3),), ())
    beside = f'{{"loads": [{{"dp_rank": 1, "num_running_reqs": 3, "num_queued": {value}}}]}}'
    assert parse_loads(beside.encode()) in ((RankLoad(1, running_requests=3),), ())


@pytest.mark.parametrize(
    "entry",
    [
        {"num_used_tokens": 5},
        {"dp_rank": -1, "num_used_tokens": 5},
        {"dp_rank": MAX_RANK + 1, "num_used_tokens": 5},
        {"dp_rank": 1.5, "num_used_tokens": 5},
        {"dp_rank": "1", "num_used_tokens": 5},
        {"dp_rank": True, "num_used_tokens": 5},
        {"dp_rank": None, "num_used_tokens": 5},
        {"dp_rank": 1},
        {"dp_rank": 1, "num_used_tokens": None},
        None,
        5,
        [],
    ],
)
def test_an_entry_that_says_nothing_leaves_the_others_as_they_are(entry):
    assert parse_loads(page(entry)) == ()
    good = {"dp_rank": 4, "num_used_tokens": 7}
    assert parse_loads(page(good, entry, good)) == (RankLoad(4, 7),)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"5", b"[]", b"{}", b"{", b"\xff", b"<html>", b'{"loads": null}', b'{"loads": 5}'),
        *(b'{"loads": {}}', b'{"loads": []}', b'{"loads": [{"dp_rank": 0, "num_used_tokens": 5}', b"[" * 100_000),
        b'{"loads":' * 100_000,
        b'{"loads": [{"dp_rank": 0, "num_used_tokens": NaN}]}',
        b'{"loads": [{"dp_rank": 0, "num_used_tokens": 5}]} x',
    ],
)  # fmt: skip
def test_other_pages_say_nothing(body):
    assert parse_loads(body) == ()


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["loads", "dp_rank", *FIGURES]),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["loads", "dp_rank", *FIGURES, "x"]), inner),
        max_leaves=20,
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_answer_makes_it_raise_or_lie(body):
    loads = parse_loads(body)
    assert [load.dp_rank for load in loads] == sorted({load.dp_rank for load in loads})
    for load in loads:
        figures = [figure for field in FIGURES.values() if (figure := getattr(load, field)) is not None]
        assert figures
        assert all(isinstance(figure, float) and 0 <= figure < math.inf for figure in figures)
