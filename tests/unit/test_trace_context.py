"""W3C Trace Context, level 1: what is valid, and what goes on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.trace_context import MOST_MEMBERS, TraceContext, is_tracestate, parse_traceparent, placed, received

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = TraceContext(int(TRACE, 16), int(SPAN, 16), True)
VALID = f"00-{TRACE}-{SPAN}-01"
OWN = TraceContext(int(TRACE, 16), 0xABC, True)


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (VALID, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),  # flags that level 1 does not know
        (f"00-{TRACE}-{SPAN}-fe", False),
        (f"01-{TRACE}-{SPAN}-01", True),  # later versions
        (f"fe-{TRACE}-{SPAN}-00", False),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-then", True),
    ],
)
def test_valid(text, sampled):
    assert parse_traceparent(text) == TraceContext(PARENT.trace_id, PARENT.span_id, sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        VALID[:-1],
        VALID + "-",
        VALID + "-01",
        VALID + "0",
        VALID + "\n",
        " " + VALID,
        VALID.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.what-comes-then",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-zz",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}{SPAN}-01",
        f"00-{TRACE[:-1]}\u0661-{SPAN}-01",  # a digit, but not of ours
        "00-{}-{}-01".format("f" * 33, SPAN[1:]),
    ],
)
def test_not_valid(text):
    assert parse_traceparent(text) is None


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans())
def test_what_is_sent_can_be_read(trace_id, span_id, sampled):
    context = TraceContext(trace_id, span_id, sampled)
    assert len(context.traceparent) == 55
    assert parse_traceparent(context.traceparent) == context


@given(st.text())
def test_no_text_raises(text):
    received({"traceparent": text, "tracestate": text})
    received({"traceparent": VALID, "tracestate": text})


@pytest.mark.parametrize(
    "text",
    [
        "a=1",
        "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE",
        "a=1 ,\tb=2",
        "a=1,,b=2,",
        "0tenant@vendor=x",
        "a_b-c*d/e=!\"#$%&'()*+-./:;<>?@[]^_`{|}~",
        "a=b c",
        "a" * 256 + "=" + "v" * 256,
        ",".join(f"k{i}=v" for i in range(MOST_MEMBERS)),
    ],
)
def test_tracestate(text):
    assert is_tracestate(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ",",
        "a",
        "a=",
        "=1",
        "A=1",
        "a=1,a=2",
        "0a=1",
        "a=b=c",
        "a =1",
        "a=\u00e9",
        "a=\x01",
        "a@0v=1",
        "t@" + "v" * 15 + "=1",
        "a" * 257 + "=1",
        "a=" + "v" * 257,
        ",".join(f"k{i}=v" for i in range(MOST_MEMBERS + 1)),
    ],
)
def test_not_a_tracestate(text):
    assert not is_tracestate(text)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (None, "")),
        ({"traceparent": VALID}, (PARENT, "")),
        ({"traceparent": VALID, "tracestate": "a=1"}, (PARENT, "a=1")),
        ({"traceparent": VALID, "tracestate": "A=1"}, (PARENT, "")),
        ({"traceparent": "nonsense", "tracestate": "a=1"}, (None, "")),
        ({"tracestate": "a=1"}, (None, "")),
    ],
)
def test_what_a_request_brings(headers, expected):
    assert received(headers) == expected


@pytest.mark.parametrize(
    ("before", "state", "set_too", "removed"),
    [
        (None, "", (), ()),
        ("a=1", "a=1", (), ()),  # left as it is: there may be more headers of the name than the service sees
        ("a=1", "", (), ("tracestate",)),
        ("a=1", "s=2,a=1", (("tracestate", "s=2,a=1"),), ()),
        (None, "s=2", (("tracestate", "s=2"),), ()),
    ],
)
def test_what_goes_on(before, state, set_too, removed):
    headers = {} if before is None else {"tracestate": before}
    trace = placed(headers, OWN, PARENT, state)
    assert trace.set_headers == (("traceparent", f"00-{TRACE}-0000000000000abc-01"), *set_too)
    assert trace.remove_headers == removed


@pytest.mark.parametrize(("method", "kept"), [("POST", "POST"), ("SECRET", "_OTHER"), ("post", "_OTHER")])
def test_a_method_is_a_known_one(method, kept):
    assert placed({":method": method}, OWN, None, "").method == kept
