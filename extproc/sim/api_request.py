"""What a generation request asks for: HTTP path, headers and body → prompts, lengths, routing fields. No I/O.

Defaults and messages are SGLang's (`managers/io_struct.py`, `entrypoints/openai/protocol.py`, `serving_*.py`), as are
the two shapes of error: `/generate` answers its own 400s with `{"error": {"message": …}}`, everything else is flat.
"""

import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

BYTES_PER_TOKEN = 4
"""The simulated tokenizer: a token for every 4 bytes of UTF-8, at least one for a prompt."""
MAX_ROOM = 2**63 - 1


class Api(Enum):
    """The three ways to ask; the value is the path."""

    GENERATE = "/generate"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class ApiError(Exception):
    """An error answer. `native`: the shape that only `/generate` uses."""

    def __init__(self, status: int, message: str, kind: str, native: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.native = native

    def body(self) -> dict[str, Any]:
        """The JSON answer."""
        if self.native:
            return {"error": {"message": self.message}}
        return {"object": "error", "message": self.message, "type": self.kind, "param": None, "code": self.status}


def bad_request(api: Api, message: str) -> ApiError:
    """A request that the engine understood and refuses."""
    return ApiError(400, message, "BadRequestError", native=api is Api.GENERATE)


def invalid_body(message: str) -> ApiError:
    """A body that does not fit the schema; same shape on every path (`validation_exception_handler`)."""
    return ApiError(400, message, "Bad Request")


@dataclass(slots=True)
class Prompt:
    """One prompt of a request."""

    tokens: int
    output_tokens: int
    rid: str
    bootstrap_host: str | None = None
    bootstrap_port: int | None = None
    room: int | None = None


@dataclass(slots=True)
class ApiRequest:
    """A parsed request. `prompts` has one entry for each choice of the answer."""

    api: Api
    stream: bool
    batch: bool
    """`/generate` answers a batch with a list."""
    prompts: list[Prompt]
    model: str
    ends_by_itself: bool
    """No length was asked for: finish reason `stop`, not `length`."""
    choices_per_prompt: int = 1
    include_usage: bool = False
    return_logprob: bool = False
    logprob_start: int = -1
    routed_dp_rank: int | None = None
    disagg_prefill_dp_rank: int | None = None


OVERRIDES: dict[str, type] = {
    "rid": str,
    "bootstrap_host": str,
    "bootstrap_port": int,
    "bootstrap_room": int,
    "routed_dp_rank": int,
    "disagg_prefill_dp_rank": int,
}
"""Fields that `x-override-…` headers set where the engine allows it (`entrypoints/request_headers.py`)."""


def decode_body(body: bytes) -> dict[str, Any]:
    """Parse the JSON object. Raises `ApiError`."""
    try:
        fields = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise invalid_body(f"JSON decode error: {error}") from None
    except RecursionError:
        raise invalid_body("JSON decode error: nested too deeply") from None
    if not isinstance(fields, dict):
        raise invalid_body("Input should be a valid dictionary or object")
    return fields


def apply_headers(api: Api, fields: dict[str, Any], headers: Mapping[str, str], overrides: bool) -> None:
    """Let the headers that the engine reads replace body fields."""
    if api is not Api.GENERATE and (rank := headers.get("x-data-parallel-rank")) is not None:
        try:
            fields["routed_dp_rank"] = int(rank)
        except ValueError:
            raise bad_request(api, f"Invalid X-Data-Parallel-Rank header: must be an integer, got {rank!r}") from None
    if overrides and api is not Api.COMPLETIONS:
        for name, kind in OVERRIDES.items():
            text = headers.get("x-override-" + name.replace("_", "-"))
            if text is None:
                continue
            try:
                fields[name] = kind(text)
            except ValueError:
                raise bad_request(api, f"Invalid x-override-{name.replace('_', '-')} header: {text!r}") from None


def parse(api: Api, fields: dict[str, Any], default_output: int) -> ApiRequest:
    """Work out the prompts. `default_output`: length of a chat answer without a limit. Raises `ApiError`."""
    if api is Api.GENERATE:
        request = _parse_generate(fields)
    elif api is Api.CHAT:
        request = _parse_chat(fields, default_output)
    else:
        request = _parse_completions(fields)
    request.stream = bool(fields.get("stream"))
    rank = _integer(fields, "routed_dp_rank")
    request.routed_dp_rank = rank if rank is not None else _integer(fields, "data_parallel_rank")
    request.disagg_prefill_dp_rank = _integer(fields, "disagg_prefill_dp_rank")
    _set_bootstrap(request, fields)
    return request


def _parse_generate(fields: dict[str, Any]) -> ApiRequest:
    text, ids = fields.get("text"), fields.get("input_ids")
    if text is None and ids is None:
        raise bad_request(Api.GENERATE, "Either text, input_ids or input_embeds should be provided.")
    if text is not None and ids is not None:
        raise bad_request(Api.GENERATE, "text, input_ids and input_embeds are mutually exclusive. Provide only one.")
    lengths, batch = _lengths(text if text is not None else ids, "text" if text is not None else "input_ids")
    if not lengths:
        raise bad_request(Api.GENERATE, "The input prompt list is empty.")
    sampling = fields.get("sampling_params") or {}
    each = sampling if isinstance(sampling, list) else [sampling] * len(lengths)
    if len(each) != len(lengths) or not all(isinstance(one, dict) for one in each):
        raise bad_request(Api.GENERATE, "sampling_params must be an object, or a list with one object for each prompt.")
    outputs = [_length_limit(Api.GENERATE, one, "max_new_tokens", 128) for one in each]
    choices = _integer(each[0], "n") or 1
    request = ApiRequest(Api.GENERATE, False, batch or choices > 1, [], "", False, choices)
    request.prompts = _prompts(fields, lengths, outputs, choices)
    request.return_logprob = bool(fields.get("return_logprob"))
    start = fields.get("logprob_start_len")
    request.logprob_start = start if isinstance(start, int) else -1
    return request


def _parse_chat(fields: dict[str, Any], default_output: int) -> ApiRequest:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        raise invalid_body("messages: Field required" if messages is None else "messages: Input should be a valid list")
    if not messages:
        raise bad_request(Api.CHAT, "Messages cannot be empty.")
    length = tokens_in("".join(_content(message) for message in messages))
    limit = fields.get("max_completion_tokens")
    name = "max_completion_tokens" if limit is not None else "max_tokens"
    output = _length_limit(Api.CHAT, fields, name, default_output)
    choices = _integer(fields, "n") or 1
    request = ApiRequest(Api.CHAT, False, False, [], _model(fields), fields.get(name) is None, choices)
    request.prompts = _prompts(fields, [length], [output], choices)
    request.include_usage = _include_usage(fields)
    return request


def _parse_completions(fields: dict[str, Any]) -> ApiRequest:
    prompt = fields.get("prompt")
    if prompt is None:
        raise invalid_body("prompt: Field required")
    if prompt in ("", []):
        raise bad_request(Api.COMPLETIONS, "Prompt cannot be empty")
    lengths, batch = _lengths(prompt, "prompt")
    output = _length_limit(Api.COMPLETIONS, fields, "max_tokens", 16)
    choices = _integer(fields, "n") or 1
    request = ApiRequest(Api.COMPLETIONS, False, batch, [], _model(fields), False, choices)
    request.prompts = _prompts(fields, lengths, [output] * len(lengths), choices)
    request.include_usage = _include_usage(fields)
    return request


def tokens_in(text: str) -> int:
    """What the simulated tokenizer makes of a text."""
    return max(1, math.ceil(len(text.encode()) / BYTES_PER_TOKEN))


def _lengths(prompt: Any, name: str) -> tuple[list[int], bool]:
    """Prompt lengths in tokens, and whether it is a batch: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [tokens_in(prompt)], False
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return [len(prompt)], False
        if all(isinstance(one, str) for one in prompt):
            return [tokens_in(one) for one in prompt], True
        if all(isinstance(one, list) and all(isinstance(token, int) for token in one) for one in prompt):
            return [max(1, len(one)) for one in prompt], True
    if prompt == []:
        return [], True
    raise invalid_body(f"{name}: Input should be a string, a list of token ids, or a list of either")


def _content(message: Any) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise invalid_body("messages: each message should be an object with a role")
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def _prompts(fields: dict[str, Any], lengths: list[int], outputs: list[int], choices: int) -> list[Prompt]:
    rid = fields.get("rid")
    rids = rid if isinstance(rid, list) and len(rid) == len(lengths) else None
    prompts = []
    for i, (length, output) in enumerate(zip(lengths, outputs, strict=True)):
        for _ in range(choices):
            if rids is not None:
                name = str(rids[i])
            elif isinstance(rid, str) and len(lengths) * choices == 1:
                name = rid
            else:
                name = uuid.uuid4().hex
            prompts.append(Prompt(length, output, name))
    return prompts


def _set_bootstrap(request: ApiRequest, fields: dict[str, Any]) -> None:
    """Give each prompt its bootstrap fields: a scalar room grows by one a prompt, a list is used as it is.

    The copies that `n > 1` makes share their prompt's room, which is why the engine cannot do that in PD mode.
    """
    count = len(request.prompts) // request.choices_per_prompt
    rooms = fields.get("bootstrap_room")
    if rooms is not None and not isinstance(rooms, list):
        if not isinstance(rooms, int) or isinstance(rooms, bool):
            raise invalid_body("bootstrap_room: Input should be a valid integer")
        rooms = [rooms + i for i in range(count)]
    hosts, ports = _per_prompt(fields, "bootstrap_host", count), _per_prompt(fields, "bootstrap_port", count)
    if rooms is not None and len(rooms) != count:
        raise bad_request(request.api, f"The length of bootstrap_room should be equal to the batch size {count}.")
    for i, prompt in enumerate(request.prompts):
        at = i // request.choices_per_prompt
        room = rooms[at] if rooms is not None else None
        if room is not None and (not isinstance(room, int) or not 0 <= room <= MAX_ROOM):
            raise invalid_body("bootstrap_room: Input should be an integer in [0, 2^63-1]")
        prompt.room, prompt.bootstrap_host, prompt.bootstrap_port = room, hosts[at], ports[at]


def _per_prompt(fields: dict[str, Any], name: str, count: int) -> list[Any]:
    value = fields.get(name)
    if isinstance(value, list):
        if len(value) != count:
            raise invalid_body(f"{name}: expected one entry for each of the {count} prompts")
        return value
    return [value] * count


def _length_limit(api: Api, fields: dict[str, Any], name: str, default: int) -> int:
    limit = _integer(fields, name)
    if limit is None:
        return default
    if limit < 0:
        raise bad_request(api, f"max_new_tokens must be at least 0, got {limit}.")
    return max(1, limit)


def _integer(fields: dict[str, Any], name: str) -> int | None:
    value = fields.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise invalid_body(f"{name}: Input should be a valid integer")


def _model(fields: dict[str, Any]) -> str:
    model = fields.get("model")
    return model if isinstance(model, str) else "default"


def _include_usage(fields: dict[str, Any]) -> bool:
    options = fields.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))
