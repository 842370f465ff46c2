"""A client's body → what routing needs to know of it.

from typing import Final
Pure. The body is checked as a whole (UTF-8, JSON, an object) but only the fields of `request.Body` are looked at, and
most of them stay raw bytes: a 20 MB prompt is scanned once and never turned into Python objects.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Raw

from extproc.errors import BadRequest, BodyTooLarge, UnknownModel
from extproc.estimate import Prompt, TokenEstimator
from extproc.request import (
    CHAT,
    COMPLETIONS,
    GENERATE,
    ROUTING_FIELDS,
    Body,
    Endpoint,
    GenerationRequest,
    Message,
    SamplingParams,
)

MESSAGE_TOKENS: Final = 4
"""What a chat template puts around each message, where a tokenizer counts the text itself: `<|im_start|>`, role, end
(OpenAI's cookbook, "How to count tokens": 3 a message and 1 for the role)."""

MAX_DATA_URL_START: Final = 256
"""Where `;base64,` must stand in a `data:` URL: behind the media type, which has some 10 to 40 characters."""

DEFAULT_OUTPUT_TOKENS: Final = 128
"""What a request is expected to generate when it sets no limit (SGLang's default `max_new_tokens`)."""

MAX_DEPTH: Final = 256
"""Deepest nesting of a body. Tool schemas reach a few dozen; Python's own JSON parser, in the engine, fails near 1,000.
Ours would fail there too up to Python 3.11, and later on newer ones: so the limit is stated."""

_STRING_OR_BRACKET: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{}]', re.DOTALL)


_routing_fields: Final = operator.attrgetter(*ROUTING_FIELDS)
_decode_body: Final = msgspec.json.Decoder(Body).decode
_decode_sampling: Final = msgspec.json.Decoder(SamplingParams | list[SamplingParams] | None).decode
_decode_strings: Final = msgspec.json.Decoder(list[str]).decode
_decode_raws: Final = msgspec.json.Decoder(list[Raw]).decode
_decode_texts: Final = msgspec.json.Decoder(str | list[str]).decode
_decode_messages: Final = msgspec.json.Decoder(list[Message]).decode


def split_path(target: str) -> str:
    """The path of an HTTP request target, without query or fragment."""
    return target.partition("?")[0].partition("#")[0]


def check_length(length: int, limit: int) -> None:
    """Raise BodyTooLarge when a body of `length` bytes exceeds the limit."""
    if length > limit:
        raise BodyTooLarge(f"the request body has {length} bytes, more than the limit of {limit}: send a smaller one")


_NOTHING_LEARNED: Final = TokenEstimator()


def parse(
    endpoint: Endpoint,
    body: bytes,
    *,
    models: Sequence[str] = (),
    routing_key: str = "",
    estimator: TokenEstimator = _NOTHING_LEARNED,
) -> GenerationRequest:
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

    per_prompt = sampling if isinstance(sampling, list) else (sampling,) if sampling else ()
    if (fields.n or 1) > 1 or (per_prompt and any((params.n or 1) > 1 for params in per_prompt)):
        raise BadRequest(
            "n > 1 is not supported with prefill/decode disaggregation (all samples would share one bootstrap room): "
            "send n separate requests",
            param="n",
        )
    if models:
        _check_model(endpoint, fields.model, models)
    prompt = _prompt(endpoint, fields)
    tokens, measured = _measure(endpoint, fields, prompt)
    if tokens is None and estimator.count and measured.text_bytes <= estimator.max_count_bytes and not measured.media:
        tokens = _count(fields, prompt, estimator.count)
    if tokens is None:
        tokens = estimator.tokens(endpoint, fields.model, measured)
    output_tokens = None
    limits: tuple[Raw, ...] = fields.max_completion_tokens, fields.max_tokens
    if per_prompt:
        limits += tuple(params.max_new_tokens for params in per_prompt)
    for limit in limits:
        if limit and output_tokens is None:
            output_tokens = _number(limit)
    return GenerationRequest(
        endpoint=endpoint,
        model=fields.model,
        batch_size=measured.prompts,
        prompt_tokens=tokens,
        max_output_tokens=(DEFAULT_OUTPUT_TOKENS if output_tokens is None else output_tokens) * measured.prompts,
        streams=bool(fields.stream) and bytes(fields.stream) not in {b"false", b"null"},
        client_fields=_client_fields(fields),
        prompt=memoryview(prompt),
        routing_key=routing_key,
        measured=measured if measured.text_bytes else None,
    )


def unread(endpoint: Endpoint, length: int, routing_key: str, estimator: TokenEstimator) -> GenerationRequest:
    """A request whose body of `length` bytes goes on unread: one prompt, as far as anybody knows."""
    measured = Prompt(length)
    return GenerationRequest(
        endpoint=endpoint,
        model=None,
        batch_size=1,
        prompt_tokens=estimator.tokens(endpoint, None, measured),
        max_output_tokens=DEFAULT_OUTPUT_TOKENS,
        routing_key=routing_key,
        measured=measured,
        opaque=True,
    )


def _client_fields(fields: Body) -> tuple[str, ...]:
    values = _routing_fields(fields)
    return tuple(name for name, value in zip(ROUTING_FIELDS, values, strict=True) if value) if any(values) else ()


def _check_depth(body: bytes) -> None:
    """Raise BadRequest for a valid document that is nested more than MAX_DEPTH deep."""
    # What `replace` leaves out tells how many there are, in a fifth of the time or less: it looks for the next one with
    # memchr, `count` at one byte after the other.
    lists = len(body) - len(body.replace(b"[", b"", MAX_DEPTH + 1))
    objects = len(body) - len(body.replace(b"{", b"", MAX_DEPTH + 1))
    if lists + objects <= MAX_DEPTH:  # nearly all; the scan below costs 8 ns a byte
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
        if endpoint is GENERATE:  # has no such field in SGLang's own API
            return
        raise BadRequest(f"the field 'model' is missing: expected one of {', '.join(models)}", param="model")
    # SGLang reads `base:adapter` as a LoRA adapter of the base model.
    if model not in models and model.partition(":")[0] not in models:
        raise UnknownModel(
            f"the model {model[:200]!r} is not served here: use one of {', '.join(models)}", param="model"
        )


def _prompt(endpoint: Endpoint, fields: Body) -> Raw:
    if endpoint is CHAT:
        return fields.messages
    if endpoint is COMPLETIONS:
        return fields.prompt
    return fields.input_ids if fields.input_ids and bytes(fields.input_ids) != b"null" else fields.text


def _measure(endpoint: Endpoint, fields: Body, prompt: Raw) -> tuple[float | None, Prompt]:
    """The tokens, where the client sent tokens, and what the prompts measure."""
    if endpoint is CHAT:
        messages = bytes(prompt)
        media, media_bytes = _media(messages)
        return None, Prompt(len(messages) + len(bytes(fields.tools)) - media_bytes, media)
    name = "prompt" if endpoint is COMPLETIONS else "input_ids" if prompt is fields.input_ids else "text"
    return _measure_prompt(name, prompt)


def _media(messages: bytes) -> tuple[int, int]:
    """Images, videos and sounds in a chat, and the bytes of those that stand in it themselves, as `data:` URLs."""
    if messages.find(b"[", 1) < 0:  # nearly all; media stand in a list of parts. A twentieth of the next line's cost
        return 0, 0
    mentions = messages.count(b'_url"')  # a quote within a text is escaped: these are `"type": "image_url"` and the key
    if not mentions:
        return 0, 0
    embedded, end = 0, 0
    while (start := messages.find(b'"data:', end)) >= 0:
        end = messages.find(b'"', start + 1)
        if messages.find(b";base64,", start, min(end, start + MAX_DATA_URL_START)) >= 0:
            embedded += end - start
    return (mentions + 1) // 2, embedded


def _measure_prompt(name: str, raw: Raw) -> tuple[float | None, Prompt]:
    """One prompt (a string, or token ids), or a list of either. An absent one counts as one: the engine will object."""
    value = bytes(raw)
    if not value.startswith(b"["):
        return None, Prompt(max(0, len(value) - 2))
    first = value[1:].lstrip(b" \t\r\n")[:1]
    if first == b"]":
        raise BadRequest(f"the field {name!r} is an empty list: expected at least one prompt", param=name)
    try:
        if first == b'"':
            prompts = _decode_strings(value)
            return None, Prompt(sum(len(prompt.encode()) for prompt in prompts), prompts=len(prompts))
        if first == b"[":
            lists = [bytes(ids) for ids in _decode_raws(value)]
            return float(sum(map(_count_ids, lists))), Prompt(0, prompts=len(lists))
    except msgspec.ValidationError as error:
        raise BadRequest(f"the field {name!r} does not have the right shape: {error}", param=name) from None
    return float(_count_ids(value)), Prompt(0)


def _count(fields: Body, prompt: Raw, count: Callable[[str], int]) -> float | None:
    """Tokens by the model's tokenizer; None where the prompt has no text, or a shape that the engine will refuse."""
    try:
        if prompt is not fields.messages:
            texts = _decode_texts(prompt)
            return float(sum(map(count, [texts] if isinstance(texts, str) else texts)))
        tokens = count(bytes(fields.tools).decode()) if bytes(fields.tools) else 0
        for message in _decode_messages(prompt):
            parts = message.content or ""
            text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
            tokens += MESSAGE_TOKENS + count(text)
    except msgspec.DecodeError:
        return None
    return float(tokens)


def _count_ids(value: bytes) -> int:
    """Elements of a JSON list of numbers."""
    return value.count(b",") + (value.strip(b"[] \t\r\n") != b"")


def _number(raw: Raw) -> float | None:
    """A JSON number of at least 0, or None for anything else: the engine judges those."""
    text = bytes(raw)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None
