"""Targets `request` (any bytes as a body) and `splice` (odd but valid objects): parser and body mutation.

What the parser accepts is an object to Python's JSON parser, too, and says there what the parser understood. Both legs'
bodies hold every byte of the client's in its place; every decoder that reads the client's body reads from them the
client's object with our fields, whatever the client had under their names.
"""

import json
from collections.abc import Callable, Hashable
from typing import Any, NoReturn

import msgspec
import pydantic_core
from fuzz_json import Choices, json_object
from fuzz_target import Target

from extproc.errors import RequestError
from extproc.model import Pick, Placement, Role, Worker
from extproc.mutation import mutate
from extproc.parse import parse
from extproc.request import ROUTING_FIELDS, Endpoint, GenerationRequest

ENDPOINTS = tuple(Endpoint)

PREFILL = Worker("p:1", Role.PREFILL, "http://p:1", "10.0.0.1:1", "p.example", 8998, 4)
DECODE = Worker("d:2", Role.DECODE, "http://d:2", "10.0.0.2:2", dp_size=2)
PLACEMENTS = (
    Placement(Pick(PREFILL, 3), Pick(DECODE, 1), room=2**63 - 1),
    Placement(Pick(PREFILL, None), Pick(DECODE, None), room=5),
    Placement(Pick(PREFILL, None), Pick(DECODE, 0), room=0),
)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _json(body: bytes) -> Any:
    """Python's own parser, which engines use, without its `NaN` and `Infinity`."""
    return json.loads(body, parse_constant=_no_constant)


DECODERS: tuple[Callable[[bytes], Any], ...] = (_json, msgspec.json.decode, pydantic_core.from_json)
"""Three that share no code: C of CPython, C of msgspec, Rust of jiter."""


def check_request(data: bytes) -> Hashable:
    """First byte: endpoint and placement; the rest is the body."""
    choices = Choices(data[:1])
    return _check(choices.number(9), data[1:])


def check_splice(data: bytes) -> Hashable:
    """First byte: endpoint and placement; the rest: what the body is made by."""
    choices = Choices(data)
    return _check(choices.number(9), json_object(choices))


def _check(variant: int, body: bytes) -> Hashable:
    endpoint, placement = ENDPOINTS[variant % 3], PLACEMENTS[variant // 3]
    try:
        request = parse(endpoint, body)
    except RequestError as error:
        assert 400 <= error.status < 500
        assert len(error.message) > 20
        return (endpoint, "refused", error.param, error.message[:40])
    said = _json(body)
    assert isinstance(said, dict), "accepted what is no object"
    _check_understood(request, said)
    mutation = mutate(request, placement, body)
    shared = dict.fromkeys(request.client_fields) | {
        "bootstrap_host": "p.example",
        "bootstrap_port": 8998,
        "bootstrap_room": placement.room,
    }
    prefill, decode = placement.prefill.dp_rank, placement.decode.dp_rank
    ranks = {} if prefill is None else {"routed_dp_rank": prefill}
    # A prefill engine is never asked for a stream.
    streams = said.get("stream") is not None and said["stream"] is not False
    answer = {"stream": False, "stream_options": None} if streams else {}
    _check_spliced(body, mutation.prefill_body, shared | ranks | answer)
    ranks = {} if prefill is None else {"disagg_prefill_dp_rank": prefill}
    _check_spliced(body, mutation.decode_body, shared | ranks | ({} if decode is None else {"routed_dp_rank": decode}))
    media = request.measured.media if request.measured else None
    return (endpoint, min(request.batch_size, 3), request.client_fields, media, len(said) == 0)


def _check_understood(request: GenerationRequest, said: dict[str, Any]) -> None:
    assert request.model == said.get("model")
    assert request.client_fields == tuple(name for name in ROUTING_FIELDS if name in said)
    assert not _above_one(said.get("n"))
    sampling = said.get("sampling_params")
    for params in sampling if isinstance(sampling, list) else [sampling]:
        assert not (isinstance(params, dict) and _above_one(params.get("n")))
    assert 0 <= request.prompt_tokens < float("inf")
    assert 0 <= request.max_output_tokens < float("inf")
    prompt = _prompt(request.endpoint, said)
    assert request.batch_size == _batch_size(prompt) if request.endpoint is not Endpoint.CHAT else 1
    if isinstance(prompt, list) and prompt and all(type(each) is int for each in prompt):
        assert request.prompt_tokens == len(prompt)
        assert request.measured is None


def _above_one(value: object) -> bool:
    return isinstance(value, int) and value > 1


def _prompt(endpoint: Endpoint, said: dict[str, Any]) -> Any:
    if endpoint is Endpoint.CHAT:
        return None
    if endpoint is Endpoint.COMPLETIONS:
        return said.get("prompt")
    return said.get("text") if said.get("input_ids") is None else said["input_ids"]


def _batch_size(prompt: Any) -> int:
    """Prompts of a list are told by its first element."""
    return len(prompt) if isinstance(prompt, list) and isinstance(prompt[0], str | list) else 1


def _check_spliced(body: bytes, spliced: bytes, fields: dict[str, Any]) -> None:
    end = body.rindex(b"}")
    added = len(spliced) - len(body)
    assert added > 0
    assert spliced[:end] == body[:end]
    assert spliced[end + added :] == body[end:]
    for decode in DECODERS:
        try:
            before = decode(body)
        except ValueError:  # a decoder need not like lone surrogates, or numbers of any size
            continue
        assert decode(spliced) == before | fields


WORDS = (
    *(f'"{name}":'.encode() for name in (*ROUTING_FIELDS, "text", "prompt", "input_ids", "messages", "model", "n")),
    *(b'"sampling_params":', b'"max_new_tokens":', b'"\\u0062ootstrap_room":', b'"content":', b'"max_tokens":'),
    *(b'"stream":', b'"stream_options":{}', b"false"),
    *(b"{}", b"[]", b"[[", b"]]", b'"",', b"null", b"true", b",", b":", b'\\"', b"\\u007d", b"\\ud800", b"\xc3\xbc"),
    *(b'{"type":"image_url","image_url":{"url":"data:image/png;base64,AA"}}', b" ", b"\n", b"\xff", b'"x"', b"[1,2]"),
)
BODIES = (
    b'{"text": "hello", "sampling_params": {"max_new_tokens": 5}, "stream": true}',
    b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "n": 1}',
    b'{"model": "m", "prompt": ["a", "b"], "bootstrap_room": 1, "bootstrap_room": "x"}',
    b'{"input_ids": [[1, 2, 3], [4]], "routed_dp_rank": 1, "sampling_params": [{"n": 1}, {}]}',
    b' { "messages" : [ { "content" : [ { "type" : "text" , "text" : "\\u0041" } ] } ] } \n',
    b"{}",
)
MODULES = ("extproc.request", "extproc.mutation", "extproc.estimate")

TARGETS = (
    Target(
        "request",
        check_request,
        tuple(bytes([variant]) + body for variant in range(9) for body in BODIES),
        WORDS,
        share=0.25,
        modules=MODULES,
    ),
    Target("splice", check_splice, (bytes(range(64)), bytes(range(255, 128, -1)), b"\x02" * 40), (), share=0.25),
)
