"""Headers and body of a client's request → what routing needs to know of it.

Pure. The body is checked as a whole (UTF-8, JSON, an object) but only the fields below are looked at, and most of them
stay raw bytes: a 20 MB prompt is scanned once and never turned into Python objects.
"""

import enum
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Raw

from extproc.errors import BadRequest, BodyTooLarge, UnknownModel


class Endpoint(enum.StrEnum):
    """The generation endpoints, by their path. Any other path is passed on untouched."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


ENDPOINTS: dict[str, Endpoint] = {endpoint.value: endpoint for endpoint in Endpoint}

ROUTING_FIELDS = (
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
)
"""Body fields that steer an engine (SGLang 0.5.23 `GenerateReqInput`). A client's own values are never honoured."""

ROUTING_KEY = "x-smg-routing-key"
"""Header with a client's routing key, as SGLang's gateway names it. It cannot name a worker, only keep one."""

BYTES_PER_TOKEN = 4.0
"""Rough size of a token of English text under a byte-pair vocabulary (OpenAI's rule of thumb: ~4 characters).

A rank's load is compared only with the estimate of other requests, so a common factor cancels out.
"""

DEFAULT_OUTPUT_TOKENS = 128
"""What a request is expected to generate when it sets no limit (SGLang's default `max_new_tokens`)."""


MAX_DEPTH = 256
"""Deepest nesting of a body. Tool schemas reach a few dozen; Python's own JSON parser, in the engine, fails near 1,000.
Ours would fail there too up to Python 3.11, and later on newer ones: so the limit is stated."""

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)


class _SamplingParams(msgspec.Struct):
    n: int | None = None
    max_new_tokens: Raw = Raw()


class _Body(msgspec.Struct):
    """The fields that routing needs; everything else is skipped, and stays in the bytes.

    A field holding `Raw` is only located, not decoded. All are optional: whether the request makes sense is for the
    engine to say, whether it can be *placed* is for us.
    """

    model: str | None = None
    n: int | None = None
    sampling_params: Raw = Raw()
    max_tokens: Raw = Raw()
    max_completion_tokens: Raw = Raw()
    prompt: Raw = Raw()
    text: Raw = Raw()
    input_ids: Raw = Raw()
    messages: Raw = Raw()
    bootstrap_host: Raw = Raw()
    bootstrap_port: Raw = Raw()
    bootstrap_room: Raw = Raw()
    routed_dp_rank: Raw = Raw()
    disagg_prefill_dp_rank: Raw = Raw()
    data_parallel_rank: Raw = Raw()


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_sampling = msgspec.json.Decoder(_SamplingParams | list[_SamplingParams] | None).decode
_decode_strings = msgspec.json.Decoder(list[str]).decode
_decode_raws = msgspec.json.Decoder(list[Raw]).decode


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One generation request, as far as placing it goes."""

    endpoint: Endpoint
    model: str | None
    batch_size: int
    """Prompts in it, at least 1; the engine uses one bootstrap room for each."""
    prompt_tokens: float
    """Estimated, all prompts together; exact for `input_ids`."""
    max_output_tokens: float
    """What it may generate at most, all prompts together, or the default where it sets no limit."""
    client_fields: tuple[str, ...] = ()
    """Those of ROUTING_FIELDS that the client set, to be overridden."""
    prompt: memoryview = field(default=memoryview(b""), compare=False, repr=False)
    """The prompt or messages as they stand in the body: JSON, undecoded. Equal prompts have equal bytes."""
    routing_key: str = ""
    """What the client wants requests of a kind to stick by (header ROUTING_KEY); empty: nothing."""


def split_path(target: str) -> str:
    """The path of an HTTP request target, without query or fragment."""
    return target.partition("?")[0].partition("#")[0]


def check_length(length: int, limit: int) -> None:
    """Raise BodyTooLarge when a body of `length` bytes exceeds the limit."""
    if length > limit:
        raise BodyTooLarge(f"the request body has {length} bytes, more than the limit of {limit}: send a smaller one")


def parse(endpoint: Endpoint, body: bytes, *, models: Sequence[str] = (), routing_key: str = "") -> GenerationRequest:
    """Parse a body. `models`: the served names that a request must choose from; empty: any name goes.

    Raises BadRequest or UnknownModel with a message that says which field is wrong and what was expected.
    """
    if not body:
        raise BadRequest("the request body is empty: send a JSON object")
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look into the strings that it skips
        fields = _decode_body(body)
        _check_depth(body)
        sampling = _decode_sampling(fields.sampling_params) if fields.sampling_params else None
    except UnicodeDecodeError as error:
        raise BadRequest(f"the request body is not valid UTF-8 (byte {error.start}): send JSON in UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request body does not have the right shape: {error}") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from None

    per_prompt = sampling if isinstance(sampling, list) else [sampling] if sampling else []
    if any((n or 1) > 1 for n in (fields.n, *(params.n for params in per_prompt))):
        raise BadRequest(
            "n > 1 is not supported with prefill/decode disaggregation (all samples would share one bootstrap room): "
            "send n separate requests",
            param="n",
        )
    if models:
        _check_model(endpoint, fields.model, models)
    batch_size, prompt_tokens = _measure(endpoint, fields)
    limits = [fields.max_completion_tokens, fields.max_tokens, *(params.max_new_tokens for params in per_prompt)]
    output_tokens = next((number for raw in limits if (number := _number(raw)) is not None), DEFAULT_OUTPUT_TOKENS)
    return GenerationRequest(
        endpoint=endpoint,
        model=fields.model,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        max_output_tokens=output_tokens * batch_size,
        client_fields=tuple(name for name in ROUTING_FIELDS if getattr(fields, name)),
        prompt=memoryview(_prompt(endpoint, fields)),
        routing_key=routing_key,
    )


def _check_depth(body: bytes) -> None:
    """Raise BadRequest for a valid document that is nested more than MAX_DEPTH deep."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:  # nearly all; the scan below costs 8 ns a byte
        return
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep()
        elif first in b"]}":
            depth -= 1


def _too_deep() -> BadRequest:
    return BadRequest(f"the request body is nested too deeply: expected at most {MAX_DEPTH} levels")


def _check_model(endpoint: Endpoint, model: str | None, models: Sequence[str]) -> None:
    if model is None:
        if endpoint is Endpoint.GENERATE:  # has no such field in SGLang's own API
            return
        raise BadRequest(f"the field 'model' is missing: expected one of {', '.join(models)}", param="model")
    # SGLang reads `base:adapter` as a LoRA adapter of the base model.
    if model not in models and model.partition(":")[0] not in models:
        raise UnknownModel(
            f"the model {model[:200]!r} is not served here: use one of {', '.join(models)}", param="model"
        )


def _prompt(endpoint: Endpoint, fields: _Body) -> Raw:
    if endpoint is Endpoint.CHAT:
        return fields.messages
    if endpoint is Endpoint.COMPLETIONS:
        return fields.prompt
    return fields.input_ids if fields.input_ids and bytes(fields.input_ids) != b"null" else fields.text


def _measure(endpoint: Endpoint, fields: _Body) -> tuple[int, float]:
    """Number of prompts, and their tokens in all."""
    prompt = _prompt(endpoint, fields)
    if endpoint is Endpoint.CHAT:
        return 1, max(1.0, len(bytes(prompt)) / BYTES_PER_TOKEN)
    name = "prompt" if endpoint is Endpoint.COMPLETIONS else "input_ids" if prompt is fields.input_ids else "text"
    return _measure_prompt(name, prompt)


def _measure_prompt(name: str, raw: Raw) -> tuple[int, float]:
    """One prompt (a string, or token ids), or a list of either. An absent one counts as one: the engine will object."""
    value = bytes(raw)
    if not value.startswith(b"["):
        return 1, max(1.0, (len(value) - 2) / BYTES_PER_TOKEN)
    first = value[1:].lstrip(b" \t\r\n")[:1]
    if first == b"]":
        raise BadRequest(f"the field {name!r} is an empty list: expected at least one prompt", param=name)
    try:
        if first == b'"':
            prompts = _decode_strings(value)
            return len(prompts), sum(max(1.0, len(prompt.encode()) / BYTES_PER_TOKEN) for prompt in prompts)
        if first == b"[":
            lists = [bytes(ids) for ids in _decode_raws(value)]
            return len(lists), float(sum(map(_count_ids, lists)))
    except msgspec.ValidationError as error:
        raise BadRequest(f"the field {name!r} does not have the right shape: {error}", param=name) from None
    return 1, float(_count_ids(value))


def _count_ids(value: bytes) -> int:
    """Elements of a JSON list of numbers."""
    return value.count(b",") + (value.strip(b"[] \t\r\n") != b"")


def _number(raw: Raw) -> float | None:
    """A JSON number of at least 0, or None for anything else: the engine judges those."""
    try:
        number = float(bytes(raw))
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
