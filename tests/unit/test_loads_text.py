"""loads_text: real engine pages to the digit, equality with prometheus_client, and no page that can hurt it."""

import math
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from extproc.loads_text import LOADS_FIELDS, METRICS_FIELDS, parse_loads
from extproc.model import RankLoad

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs ../shared/golden (real engine output)")


def page(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def used(*lines: str) -> dict[int, float | None]:
    return {load.dp_rank: load.used_tokens for load in parse_loads(page(*lines))}


# --- real pages


@golden
@pytest.mark.parametrize(("role", "speed"), [("prefill", 0), ("decode", 812.5)])
def test_metrics_page_of_two_ranks(role, speed):
    assert parse_loads((GOLDEN / f"sglang-0.5.23-metrics-{role}-dp2.prom").read_bytes()) == (
        RankLoad(0, 12034, running_requests=3, queued_requests=1, token_usage_ratio=0.0301, output_tokens_per_s=speed),
        RankLoad(1, 43034, running_requests=7, queued_requests=6, token_usage_ratio=0.1076, output_tokens_per_s=speed),
    )


@golden
def test_metrics_page_without_dp_rank_is_rank_0():
    assert parse_loads((GOLDEN / "sglang-0.5.23-metrics-decode-dp1.prom").read_bytes()) == (
        RankLoad(0, 12034, running_requests=3, queued_requests=1, token_usage_ratio=0.0301, output_tokens_per_s=812.5),
    )


@golden
@pytest.mark.parametrize(
    ("role", "total", "uncached", "prefilled", "busy_us"),
    [
        ("prefill", (14734, 57734), (2048, 11048), (5_000_000, 5_100_000), (412_000_000, 421_000_000)),
        ("decode", (13534, 44534), (0, 0), (0, 0), (0, 0)),
    ],
)
def test_loads_page(role, total, uncached, prefilled, busy_us):
    common = [
        {"used_tokens": 12034, "running_requests": 3, "queued_requests": 1, "token_usage_ratio": 0.0301},
        {"used_tokens": 43034, "running_requests": 7, "queued_requests": 6, "token_usage_ratio": 0.1076},
    ]
    assert parse_loads((GOLDEN / f"sglang-0.5.23-v1-loads-{role}-dp2.prom").read_bytes()) == tuple(
        RankLoad(
            rank,
            **common[rank],
            total_tokens=total[rank],
            waiting_uncached_tokens=uncached[rank],
            max_total_tokens=400_000,
            output_tokens_per_s={"prefill": 0, "decode": 812.5}[role],
            prefill_uncached_tokens_total=prefilled[rank],
            prefill_busy_us_total=busy_us[rank],
            snapshot_s=(1763800000.25, 1763800000.263)[rank],
        )
        for rank in (0, 1)
    )


@golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.prom")), ids=lambda path: path.stem)
def test_cut_anywhere_a_page_never_invents_a_figure(path):
    """Every figure read off a truncated page is one of the whole page."""
    whole = path.read_bytes()
    truth = {load.dp_rank: load for load in parse_loads(whole)}
    for end in range(0, len(whole), 7):
        for load in parse_loads(whole[:end]):
            for field in RankLoad.__struct_fields__:
                figure = getattr(load, field)
                assert figure is None or figure == getattr(truth[load.dp_rank], field), (end, field)


# --- one rule a test


def test_ranks_are_ordered_by_number():
    names = [f'sglang:num_used_tokens{{dp_rank="{rank}"}} {rank}' for rank in (10, 2, 0)]
    assert list(used(*names)) == [0, 2, 10]


def test_schedulers_of_a_rank_are_not_summed_the_lowest_speaks():
    lines = [
        'sglang:num_used_tokens{dp_rank="0",pp_rank="1",tp_rank="0"} 900',
        'sglang:num_used_tokens{dp_rank="0",pp_rank="0",tp_rank="10"} 800',
        'sglang:num_used_tokens{dp_rank="0",pp_rank="0",tp_rank="2",moe_ep_rank="1"} 700',
        'sglang:num_used_tokens{dp_rank="0",pp_rank="0",tp_rank="2",moe_ep_rank="0"} 100',
    ]
    assert used(*lines) == used(*reversed(lines)) == {0: 100}


def test_two_series_of_one_scheduler_the_higher_wins():
    lines = [
        'sglang:num_used_tokens{dp_rank="0",model_name="a"} 5',
        'sglang:num_used_tokens{dp_rank="0",model_name="b"} 7',
    ]
    assert used(*lines) == used(*reversed(lines)) == {0: 7}


def test_a_scheduler_that_says_nothing_is_spoken_for_by_the_next():
    assert used(
        'sglang:num_used_tokens{dp_rank="0",tp_rank="0"} NaN', 'sglang:num_used_tokens{dp_rank="0",tp_rank="1"} 5'
    ) == {0: 5}


def test_empty_priority_is_the_total():
    assert used(
        'sglang:num_used_tokens{dp_rank="0",priority="1"} 30',
        'sglang:num_used_tokens{dp_rank="0",priority=""} 50',
        'sglang:num_used_tokens{dp_rank="1",priority="0"} 20',
    ) == {0: 50}


def test_lines_without_dp_rank_count_only_when_no_line_has_it():
    assert used('sglang:num_used_tokens{dp_rank=""} 5') == {0: 5}
    assert used('sglang:num_used_tokens{tp_rank="0"} 9', 'sglang:num_used_tokens{dp_rank="1"} 5') == {1: 5}


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf", "-1", "1e999", "1_000", "twelve", "", "12 34 56", "12 x"])
def test_what_is_no_figure_was_not_said(value):
    assert used(f'sglang:num_used_tokens{{dp_rank="0"}} {value}') == {}
    loads = parse_loads(page(f"sglang:num_used_tokens {value}", "sglang:num_running_reqs 0"))
    assert loads == (RankLoad(0, used_tokens=None, running_requests=0),)


@pytest.mark.parametrize(
    "line",
    [
        'sglang:num_used_tokens{dp_rank="1"} 12034.0 1763800000250',
        'sglang:num_used_tokens{dp_rank="1"} 1.2034e+04',
        'sglang:num_used_tokens{dp_rank="1"} 12034\r',
        '  \tsglang:num_used_tokens {dp_rank="1"}\t 12034 \t',
        'sglang:num_used_tokens\t{ dp_rank = "1" , }12034',
        'sglang:num_used_tokens{model_name="a\\"} 7 {\\\\",dp_rank="1",x="\\n,dp_rank=\\"3\\""} 12034',
        'sglang:num_used_tokens{tp_rank="4",dp_rank="1",engine_type="déçode ✓"} 12034',
    ],
)
def test_ways_to_write_a_line(line):
    assert used("# HELP sglang:num_used_tokens tokens", line) == {1: 12034}


@pytest.mark.parametrize(
    "line",
    [
        "# HELP sglang:num_used_tokens 5",
        "# sglang:num_used_tokens 5",
        "other sglang:num_used_tokens 5",
        'other{x="sglang:num_used_tokens 5"} 5',
        "xsglang:num_used_tokens 5",
        "sglang:num_used_tokens_total 5",
        "sglang:num_used_tokens:sum 5",
        "vllm:num_used_tokens 5",
        'sglang:num_used_tokens{dp_rank="0" 5',
        'sglang:num_used_tokens dp_rank="0"} 5',
        "sglang:num_used_tokens{dp_rank=0} 5",
        'sglang:num_used_tokens{dp_rank="0} 5',
        'sglang:num_used_tokens{dp_rank="0"x="1"} 5',
        'sglang:num_used_tokens{dp_rank="0",dp_rank="0"} 5',
        'sglang:num_used_tokens{dp_rank="zero"} 5',
        'sglang:num_used_tokens{dp_rank="-1"} 5',
        'sglang:num_used_tokens{dp_rank="1.0"} 5',
        'sglang:num_used_tokens{dp_rank="99999999999999999999"} 5',
        'sglang:num_used_tokens{dp_rank="0",tp_rank="x"} 5',
        "sglang:num_used_tokens5",
        "sglang:num_used_tokens",
    ],
)
def test_lines_that_are_not_ours_or_not_readable_say_nothing(line):
    assert used(line) == {}
    assert used(line, "sglang:num_used_tokens 7", line) == {0: 7}


def test_an_unterminated_last_line_is_not_read():
    whole = b"sglang:num_running_reqs 3\nsglang:num_used_tokens 12034"
    assert parse_loads(whole) == (RankLoad(0, running_requests=3),)
    assert parse_loads(b"sglang:num_used_tokens 12034") == ()


def test_the_metrics_page_wins_when_both_dialects_are_on_one_page():
    assert used("sglang_num_used_tokens 5", "sglang:num_used_tokens 7") == {0: 7}


def test_waiting_and_queue_are_one_figure():
    assert parse_loads(b"sglang:num_queue_reqs 4\n")[0].queued_requests == 4
    assert parse_loads(b"sglang_num_waiting_reqs 4\n")[0].queued_requests == 4


@pytest.mark.parametrize("junk", [b"", b"\n\n", b"<html><body>502</body></html>\n", b"\xff\xfe\x00" * 99, b"{}\n"])
def test_other_pages_say_nothing(junk):
    assert parse_loads(junk) == ()


def test_hostile_pages_cost_linear_time():
    """Quadratic work on these would take hours; the suite would not end."""
    n = 1 << 20
    assert parse_loads(b"sglang:num_used_tokens{" * (n // 23)) == ()
    assert parse_loads(b"sglang:num_used_tokens{" * (n // 23) + b"\n") == ()
    assert parse_loads(b" " * n + b"sglang:num_used_tokens 5\n") == (RankLoad(0, used_tokens=5),)
    assert parse_loads(b"sglang:num_used_tokens{" + b'a="\\\\",' * (n // 7) + b"} 5\n") == ()
    assert parse_loads(b'sglang:num_used_tokens{a="' + b"\\" * n + b'"} 5\n') == (RankLoad(0, used_tokens=5),)


# --- properties

PLAIN = st.characters(codec="utf-8", exclude_characters="\n\r")
PIECES = st.sampled_from(['"', "\\", "\n", "{", "}", ",", "=", " ", "sglang:num_used_tokens "])
VALUES = st.lists(st.text(PLAIN, max_size=2) | PIECES, max_size=6).map("".join)
BLANKS = st.text(" \t", max_size=2)
NUMBERS = (
    st.integers(0, 10**9).map(str)
    | st.floats(0, 1e15).map(repr)
    | st.sampled_from(["NaN", "+Inf", "-Inf", "-1", "1e400", "0", "-0.0", "1.5E3"])
)
RANKS = st.sampled_from(["", "0", "1", "2", "7", "10"])
OTHER_NAMES = st.sampled_from(["sglang:num_used_tokens_total", "sglang:cache_hit_rate", "up", "vllm:num_used_tokens"])
LABELS = st.fixed_dictionaries(
    {},
    optional={
        "dp_rank": RANKS,
        "tp_rank": RANKS,
        "pp_rank": RANKS,
        "moe_ep_rank": RANKS,
        "priority": st.sampled_from(["", "", "1"]),
        "model_name": VALUES,
        "engine_type": VALUES,
        "dp_rank_": VALUES,
    },
)


@st.composite
def sample_lines(draw, names) -> str:
    labels = list(draw(LABELS).items())
    labels = draw(st.permutations(labels))
    written = []
    for name, value in labels:
        escaped = value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
        written.append(f'{draw(BLANKS)}{name}{draw(BLANKS)}={draw(BLANKS)}"{escaped}"{draw(BLANKS)}')
    block = "{" + ",".join(written) + draw(st.sampled_from(["", ","] if written else [""])) + "}" if written else ""
    if not written and draw(st.booleans()):
        block = "{}"
    between = draw(BLANKS) if block else ""
    # prometheus_client splits value and timestamp at spaces, or else at tabs, so never mix them here.
    timestamp = draw(st.sampled_from(["", "", " 1763800000250"]))
    end = draw(st.sampled_from(["", " ", "\r"]))
    return f"{draw(BLANKS)}{draw(names)}{between}{block} {draw(NUMBERS)}{timestamp}{end}"


@st.composite
def pages(draw) -> str:
    names = st.sampled_from([name.decode() for name in draw(st.sampled_from([METRICS_FIELDS, LOADS_FIELDS]))])
    lines = draw(
        st.lists(
            sample_lines(names)
            | sample_lines(OTHER_NAMES)
            | st.sampled_from(["", "# HELP sglang:num_used_tokens KV sglang:num_used_tokens 5", "# a comment", " \t"]),
            max_size=25,
        )
    )
    return "".join(f"{line}\n" for line in lines)


def read_with_prometheus_client(text: str) -> tuple[RankLoad, ...]:
    """The same rules, on the samples that the reference parser reads."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for fields in (METRICS_FIELDS, LOADS_FIELDS):
        said = defaultdict[int | None, dict[str, dict[tuple[int, ...], list[float]]]](lambda: defaultdict(dict))
        for sample in samples:
            field = fields.get(sample.name.encode())
            if field is None or sample.labels.get("priority") or not 0 <= sample.value < math.inf:
                continue
            rank = sample.labels.get("dp_rank")
            scheduler = tuple(int(sample.labels.get(name) or 0) for name in ("pp_rank", "tp_rank", "moe_ep_rank"))
            said[int(rank) if rank else None][field].setdefault(scheduler, []).append(float(sample.value))
        ranks = [rank for rank in said if rank is not None] or list(said)
        loads = tuple(
            RankLoad(rank or 0, **{field: max(by[min(by)]) for field, by in said[rank].items()})
            for rank in sorted(ranks, key=lambda rank: rank or 0)
        )
        if loads:
            return loads
    return ()


@given(pages())
def test_equal_to_prometheus_client_on_the_lines_needed(text):
    assert parse_loads(text.encode()) == read_with_prometheus_client(text)


@golden
@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.prom")), ids=lambda path: path.stem)
def test_equal_to_prometheus_client_on_real_pages(path):
    text = path.read_text()
    assert parse_loads(text.encode()) == read_with_prometheus_client(text) != ()


FRAGMENTS = st.sampled_from(
    [*METRICS_FIELDS, *LOADS_FIELDS, b"{", b"}", b'dp_rank="', b'"', b"\\", b",", b"=", b" ", b"\n", b"\r", b"1", b"-"]
)


@given(st.binary() | st.lists(FRAGMENTS | st.binary(max_size=3), max_size=40).map(b"".join))
def test_no_bytes_make_it_raise_or_lie(junk):
    loads = parse_loads(junk)
    assert [load.dp_rank for load in loads] == sorted({load.dp_rank for load in loads})
    for load in loads:
        figures = [getattr(load, field) for field in RankLoad.__struct_fields__[1:]]
        said = [figure for figure in figures if figure is not None]
        assert said
        assert all(0 <= figure < math.inf for figure in said)
