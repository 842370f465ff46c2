"""Bodies → GenerationRequest, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import BadRequest, BodyTooLarge, RequestError, UnknownModel
from extproc.estimate import BYTES_PER_TOKEN
from extproc.parse import MAX_DEPTH, check_length, parse, split_path
from extproc.request import ROUTING_FIELDS, Endpoint


@pytest.mark.parametrize(
    ("endpoint", "body", "batch_size", "tokens"),
    [
        (Endpoint.GENERATE, {"text": "x" * 400}, 1, 400 / BYTES_PER_TOKEN),
        (Endpoint.GENERATE, {"text": ["x" * 40, "y" * 80]}, 2, 120 / BYTES_PER_TOKEN),
        (Endpoint.GENERATE, {"input_ids": [1, 2, 3]}, 1, 3),
        (Endpoint.GENERATE, {"input_ids": [[1, 2, 3], [4]]}, 2, 4),
        (Endpoint.GENERATE, {"input_ids": None, "text": "x" * 8}, 1, 8 / BYTES_PER_TOKEN),
        (Endpoint.COMPLETIONS, {"prompt": "x" * 40}, 1, 40 / BYTES_PER_TOKEN),
        (Endpoint.COMPLETIONS, {"prompt": ["x" * 40] * 3}, 3, 120 / BYTES_PER_TOKEN),
        (Endpoint.COMPLETIONS, {"prompt": [7] * 5}, 1, 5),
        (Endpoint.COMPLETIONS, {"prompt": [[7] * 5, [8] * 6]}, 2, 11),
        (Endpoint.COMPLETIONS, {}, 1, 1),
    ],
)
def test_counts_prompts_and_tokens(endpoint, body, batch_size, tokens):
    request = parse(endpoint, json.dumps(body).encode())
    assert (request.batch_size, request.prompt_tokens) == (batch_size, tokens)


def test_spaces_in_lists_do_not_matter():
    request = parse(Endpoint.GENERATE, b'{"input_ids" : [ [ 1 , 2 ] , [ ] , [ 3 ] ] }')
    assert (request.batch_size, request.prompt_tokens) == (3, 3)


def test_a_chat_is_one_prompt_of_its_messages():
    messages = [{"role": "user", "content": "x" * 4000}]
    request = parse(Endpoint.CHAT, json.dumps({"messages": messages}).encode())
    assert request.batch_size == 1
    assert 4000 / BYTES_PER_TOKEN <= request.prompt_tokens <= 1.05 * 4000 / BYTES_PER_TOKEN


@pytest.mark.parametrize(
    ("endpoint", "body", "output"),
    [
        (Endpoint.CHAT, {"max_tokens": 5}, 5),
        (Endpoint.CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7),
        (Endpoint.GENERATE, {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 9}}, 18),
        (Endpoint.CHAT, {"max_tokens": -5}, 128),
        (Endpoint.CHAT, {"max_tokens": None}, 128),
        (Endpoint.CHAT, {"max_tokens": "many"}, 128),
        (Endpoint.CHAT, {}, 128),
    ],
)
def test_expected_output(endpoint, body, output):
    assert parse(endpoint, json.dumps(body).encode()).max_output_tokens == output


NOT_JSON = [
    b"",
    b"hello",
    b"{",
    b'{"prompt": "x"',
    b'{"prompt": "x"} and more',
    b"[]",
    b"null",
    b'"text"',
    b"7",
    b'{"prompt": "\xff\xfe"}',
    b'{"anything": "\xff\xfe"}',
    b"\xef\xbb\xbf{}",
    b'{"x": ' + b"[" * 1_000 + b"]" * 1_000 + b"}",
    b'{"x": ' + b'{"x":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"x": NaN}',
]


@pytest.mark.parametrize("body", NOT_JSON, ids=lambda body: repr(body[:20]))
@pytest.mark.parametrize("endpoint", Endpoint)
def test_refuses_what_is_not_a_json_object(endpoint, body):
    with pytest.raises(BadRequest, match="request body") as raised:
        parse(endpoint, body)
    assert raised.value.status == 400


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"x":', "}")])
def test_depth_limit(opening, closing):
    def nested(levels: int) -> bytes:
        brackets_in_text = json.dumps('\\"[{' * 300)
        return f'{{"t":{brackets_in_text},"a":[[],[]],"x":{opening * levels}1{closing * levels}}}'.encode()

    assert parse(Endpoint.CHAT, nested(MAX_DEPTH - 1))
    with pytest.raises(BadRequest, match="at most 256 levels"):
        parse(Endpoint.CHAT, nested(MAX_DEPTH))


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (Endpoint.CHAT, {"n": 2}, "n"),
        (Endpoint.COMPLETIONS, {"prompt": "x", "n": 3}, "n"),
        (Endpoint.GENERATE, {"text": "x", "sampling_params": {"n": 2}}, "n"),
        (Endpoint.GENERATE, {"text": ["x", "y"], "sampling_params": [{}, {"n": 2}]}, "n"),
        (Endpoint.COMPLETIONS, {"prompt": []}, "prompt"),
        (Endpoint.COMPLETIONS, {"prompt": ["x", 1]}, "prompt"),
        (Endpoint.GENERATE, {"input_ids": [[1], "x", "y"]}, None),
    ],
)
def test_refuses_what_cannot_be_placed(endpoint, body, param):
    if param is None:  # nonsense that keeps its shape is left to the engine
        assert parse(endpoint, json.dumps(body).encode()).batch_size == 3
        return
    with pytest.raises(BadRequest) as raised:
        parse(endpoint, json.dumps(body).encode())
    assert raised.value.param == param


@pytest.mark.parametrize("n", [None, 1])
def test_one_sample_is_fine(n):
    assert parse(Endpoint.CHAT, json.dumps({"n": n, "sampling_params": {"n": n}}).encode()).batch_size == 1


def test_models():
    body = b'{"model": "base:adapter"}'
    assert parse(Endpoint.CHAT, body, models=["base"]).model == "base:adapter"
    with pytest.raises(UnknownModel, match="use one of other"):
        parse(Endpoint.CHAT, body, models=["other"])
    with pytest.raises(BadRequest, match="'model' is missing"):
        parse(Endpoint.CHAT, b"{}", models=["base"])
    assert parse(Endpoint.GENERATE, b"{}", models=["base"]).model is None


@pytest.mark.parametrize("name", ROUTING_FIELDS)
@pytest.mark.parametrize("spelling", [lambda name: name, lambda name: name.replace("o", "\\u006f")])
def test_notices_routing_fields_of_the_client(name, spelling):
    assert parse(Endpoint.GENERATE, b'{"text": "x", "%s": 1}' % spelling(name).encode()).client_fields == (name,)


def test_length_limit():
    check_length(10, 10)
    with pytest.raises(BodyTooLarge, match="11 bytes, more than the limit of 10"):
        check_length(11, 10)


def test_path():
    assert split_path("/generate?x=/v1/completions#y") == "/generate"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
KNOWN = ["model", "n", "sampling_params", "max_tokens", "prompt", "text", "input_ids", "messages", *ROUTING_FIELDS]


@given(st.sampled_from(Endpoint), st.dictionaries(st.sampled_from(KNOWN) | st.text(), json_values, max_size=6))
def test_any_object_is_placed_or_refused_with_a_reason(endpoint, content):
    try:
        request = parse(endpoint, json.dumps(content).encode())
    except RequestError as error:
        assert 400 <= error.status < 500
        assert len(error.message) > 20
    else:
        assert request.batch_size >= 1
        assert 0 <= request.prompt_tokens < float("inf")
        assert 0 <= request.max_output_tokens < float("inf")
        assert request.client_fields == tuple(name for name in ROUTING_FIELDS if name in content)


@given(st.sampled_from(Endpoint), st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(endpoint, body):
    try:
        parse(endpoint, body)
    except RequestError as error:
        assert 400 <= error.status < 500
