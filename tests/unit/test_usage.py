"""Counts in engines' answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.usage import MAX_ANSWER_BYTES, counted_tokens, is_readable


def whole(*answers: object) -> bytes:
    return json.dumps(answers[0] if len(answers) == 1 else answers).encode()


def stream(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def generated(tokens: int | None, index: int | None = None) -> dict[str, object]:
    return {"text": "a", "meta_info": {"prompt_tokens": tokens}} | ({} if index is None else {"index": index})


USAGE = {"id": "1", "choices": [], "usage": {"prompt_tokens": 7, "total_tokens": 8}}


@pytest.mark.parametrize(
    ("body", "prompts", "tokens"),
    [
        (whole(USAGE), 1, 7),
        (whole(USAGE), 3, 7),  # OpenAI's figure is for all prompts
        (whole(generated(5)), 1, 5),
        (whole(generated(5), generated(6)), 2, 11),
        (whole([generated(5)]), 1, 5),
        (whole(generated(5), generated(6)), 3, None),
        (whole(generated(5), generated(None)), 2, None),
        (whole({"usage": None}), 1, None),
        (whole({"error": "no"}), 1, None),
        (stream({"choices": [1], "usage": None}, USAGE), 1, 7),
        (stream({"choices": [1], "usage": None}), 1, None),
        (stream(generated(5), generated(5)), 1, 5),
        (stream(generated(5, 0), generated(6, 1), generated(6, 1)), 2, 11),
        (stream(generated(5, 0)), 2, None),
        (stream(generated(5))[:-30], 1, None),
        (b"\n" + stream(USAGE), 1, 7),
        (b"", 1, None),
        (b"data: ", 1, None),
        (b'{"usage": {"prompt_tokens": "many"}}', 1, None),
        (b'{"usage": {"prompt_tokens": 7', 1, None),
        (b"[" * 100_000, 1, None),
        (b"data: " + b"[" * 100_000, 1, None),
    ],
)
def test_counts(body, prompts, tokens):
    assert counted_tokens(body, prompts) == tokens


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: b"data: " + data), st.integers(1, 3))
def test_any_bytes_have_a_count_or_none(body, prompts):
    tokens = counted_tokens(body, prompts)
    assert tokens is None or tokens > 0


@pytest.mark.parametrize(
    ("headers", "readable"),
    [
        ({"content-length": "500"}, True),
        ({"content-length": str(MAX_ANSWER_BYTES + 1)}, False),
        ({"content-length": "x"}, False),
        ({"content-type": "text/event-stream; charset=utf-8"}, True),
        ({"content-type": "text/event-stream", "content-encoding": "gzip"}, False),
        ({"content-type": "application/json"}, False),  # of unknown length
        ({}, False),
    ],
)
def test_what_may_be_asked_for(headers, readable):
    assert is_readable(headers) is readable
