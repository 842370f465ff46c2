"""Envoy's ext_proc messages ↔ events and effects; the only module that imports `envoy.*` and protobuf.

Messages: `envoy.service.ext_proc.v3.ProcessingRequest` and `ProcessingResponse`, upb classes from `xds-protos`, which
cost 1-10 us a message (docs/decisions.md). Bytes in, bytes out, so that any transport can sit in front.
"""

import functools
import re
from collections.abc import Iterable
from typing import Final

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyResponse,
    CommonResponse,
    HeaderMutation,
    HeadersResponse,
    HttpHeaders,
    ImmediateResponse,
    ProcessingRequest,
    ProcessingResponse,
    TrailersResponse,
)
from envoy.type.v3.http_status_pb2 import HttpStatus
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError

from extproc.events import (
    Answer,
    Broken,
    Event,
    Extend,
    Immediate,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Trailers,
)
from extproc.mutation import OVERRIDE, ROOM
from extproc.number import number

SERVICE: Final = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD: Final = f"/{SERVICE}/Process"
ACCESS_LOG_SERVICE: Final = "envoy.service.accesslog.v3.AccessLogService"

CLIENT_FLAGS: Final = {"downstream_connection_termination": "DC", "downstream_protocol_error": "DPE"}
"""Response flags that say that the client broke off; fields of `envoy.data.accesslog.v3.ResponseFlags`."""
WORKER_FLAGS: Final = {
    "upstream_connection_termination": "UC",
    "upstream_remote_reset": "UR",
    "upstream_protocol_error": "UPE",
    "upstream_connection_failure": "UF",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
}
"""Flags that say that the decode worker did, or that Envoy gave it up."""

_STATUS: Final = re.compile("[0-9]{1,3}")


class WireError(Exception):
    """Bytes that are not a ProcessingRequest, or one of a kind this service does not know."""


def decode(data: bytes) -> Event:
    """One ProcessingRequest as an event. Raises WireError."""
    if data[:1] == _RESPONSE_HEADERS and len(data) <= MAX_KEPT_BYTES:
        return _decode_kept(data)
    return _decode(data)


def _decode(data: bytes) -> Event:
    try:
        message = ProcessingRequest.FromString(data)
    except DecodeError as error:
        raise WireError(f"not a ProcessingRequest: {error}") from None
    match message.WhichOneof("request"):
        case "request_headers":
            headers = message.request_headers
            return RequestHeaders(_headers(headers), headers.end_of_stream)
        case "request_body":
            return RequestBody(message.request_body.body)
        case "response_headers":
            response = ResponseHeaders(_headers(message.response_headers))
            if not _STATUS.fullmatch(response.headers.get(":status", "0")):
                raise WireError("the :status of a response is no number")
            return response
        case "response_body":
            return ResponseBody(message.response_body.body)
        case "request_trailers":
            return Trailers(Phase.REQUEST_TRAILERS)
        case "response_trailers":
            return Trailers(Phase.RESPONSE_TRAILERS)
        case other:
            raise WireError(f"unknown kind of ProcessingRequest: {other}")


def decode_access_log(data: bytes) -> list[tuple[int, Broken]]:
    """The broken requests of one StreamAccessLogsMessage, by their rooms. Raises WireError."""
    try:
        message = StreamAccessLogsMessage.FromString(data)
    except DecodeError as error:
        raise WireError(f"not a StreamAccessLogsMessage: {error}") from None
    broken = list[tuple[int, Broken]]()
    for entry in message.http_logs.log_entry:
        room = number(entry.request.request_headers.get(ROOM, ""))
        flags = entry.common_properties.response_flags
        by_client = [short for name, short in CLIENT_FLAGS.items() if getattr(flags, name)]
        by_worker = [short for name, short in WORKER_FLAGS.items() if getattr(flags, name)]
        if room is not None and (by_client or by_worker):
            broken.append((room, Broken(bool(by_client), ",".join(by_client + by_worker))))
    return broken


def encode(reply: Reply) -> bytes:
    """A reply as a ProcessingResponse."""
    match reply:
        case Answer():
            return _answer(reply)
        case Immediate():
            message = _immediate(reply)
        case Extend():
            message = ProcessingResponse(override_message_timeout=_duration(reply.seconds))
    data: bytes = message.SerializeToString()
    return data


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _headers(message: HttpHeaders) -> dict[str, str]:
    """Names to values; of a repeated name, the first value. Envoy fills `raw_value`, older ones `value`."""
    headers = dict[str, str]()
    for header in message.headers.headers:
        name: str = header.key
        if name not in headers:
            raw: bytes = header.raw_value
            headers[name] = raw.decode("latin-1") or header.value
    return headers


_RESPONSE_HEADERS: Final = bytes((ProcessingRequest.DESCRIPTOR.fields_by_name["response_headers"].number << 3 | 2,))
"""What a message with response headers begins with; those are much the same for all requests: status, type, length."""
MAX_KEPT_BYTES: Final = 256
_decode_kept: Final = functools.lru_cache(maxsize=1024)(_decode)


# Answers are put together by hand, from parts that repeat: a fifth of the time that message objects take.


def _answer(answer: Answer) -> bytes:
    phase, body, set_headers = answer.phase, answer.body, answer.set_headers
    if not set_headers and answer == _PLAIN_ANSWERS[phase]:
        return _PLAIN[phase]
    if phase in _TRAILERS:
        return _PLAIN[phase]
    mutation = [_option(header) for header in set_headers]
    if body is not None:
        mutation.append(_option(("content-length", str(len(body)))))
    if answer.remove_headers:
        mutation += [_field(2, name.encode()) for name in answer.remove_headers]
    before = list[bytes]()
    if body is not None and phase is Phase.REQUEST_HEADERS:
        before.append(_CONTINUE_AND_REPLACE)
    if mutation:
        changes = b"".join(mutation)
        before += (b"\x12", _varint(len(changes)), changes)
    if body is not None:
        size = _varint(len(body))
        before += (b"\x1a", _varint(1 + len(size) + len(body)), b"\x0a", size)
    # From here on every part is joined once: bodies can be large.
    common = b"".join(before), body or b"", _CLEAR_ROUTE_CACHE if answer.pick_route_again else b""
    inner = len(common[0]) + len(common[1]) + len(common[2])
    size = _varint(inner)
    mode = _SKIP_REQUEST_BODY if answer.skip_request_body else _WANT_RESPONSE_BODY if answer.want_response_body else b""
    return b"".join((_TAGS[phase], _varint(1 + len(size) + inner), b"\x0a", size, *common, mode))


def _varint(value: int) -> bytes:
    if value < 0x80:
        return _BYTES[value]
    if value < 0x4000:
        return (value & 0x7F | 0x80 | value >> 7 << 8).to_bytes(2, "little")
    return (value & 0x7F | 0x80).to_bytes(1, "little") + _varint(value >> 7)


def _field(number: int, content: bytes) -> bytes:
    """A field of kind bytes, string or message; `number` up to 15."""
    return b"".join((_BYTES[number << 3 | 2], _varint(len(content)), content))


def _option(header: tuple[str, str]) -> bytes:
    """One of HeaderMutation's `set_headers`. `raw_value` only: Envoy rejects a header that sets `value` as well."""
    option = _options.get(header)
    if option is None:
        name, value = header
        content = _field(1, name.encode()) + _field(3, value.encode())
        option = _field(1, _field(1, content) + _OVERWRITE)
        if name not in _CHANGING:
            if len(_options) >= MAX_OPTIONS:
                _options.clear()
            _options[header] = option
    return option


_CHANGING: Final = frozenset({ROOM, f"{OVERRIDE}bootstrap-room", "traceparent", "content-length"})
"""Headers that seldom have a value a second time."""
MAX_OPTIONS: Final = 4096
_options: Final[dict[tuple[str, str], bytes]] = {}
"""By header, those that repeat."""
_BYTES: Final = [bytes((value,)) for value in range(0x80)]
_OVERWRITE: Final = b"\x18" + _varint(HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
_CONTINUE_AND_REPLACE: Final = b"\x08" + _varint(CommonResponse.CONTINUE_AND_REPLACE)
_CLEAR_ROUTE_CACHE: Final = b"\x28\x01"
_TAGS: Final = {phase: _varint(ProcessingResponse.DESCRIPTOR.fields_by_name[phase].number << 3 | 2) for phase in Phase}
_TRAILERS: Final = (Phase.REQUEST_TRAILERS, Phase.RESPONSE_TRAILERS)
_PLAIN_ANSWERS: Final = {phase: Answer(phase) for phase in Phase}


def _immediate(immediate: Immediate) -> ProcessingResponse:
    return ProcessingResponse(
        immediate_response=ImmediateResponse(
            status=HttpStatus(code=immediate.status),
            headers=_mutation(immediate.headers, ()),
            body=immediate.body,
            details=immediate.details,
        )
    )


def _mutation(set_headers: Iterable[tuple[str, str]], remove_headers: Iterable[str]) -> HeaderMutation:
    return HeaderMutation(
        set_headers=[
            # raw_value only: Envoy rejects a header that sets `value` as well.
            HeaderValueOption(
                header=HeaderValue(key=name, raw_value=value.encode()),
                append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
            )
            for name, value in set_headers
        ],
        remove_headers=remove_headers,
    )


def _override(response_body_mode: ProcessingMode.BodySendMode) -> bytes:
    """A change of what Envoy sends. It replaces the whole mode, so it states all that is still to come."""
    mode = ProcessingMode(
        request_header_mode=ProcessingMode.SEND,
        request_body_mode=ProcessingMode.NONE,
        request_trailer_mode=ProcessingMode.SKIP,
        response_header_mode=ProcessingMode.SEND,
        response_body_mode=response_body_mode,
        response_trailer_mode=ProcessingMode.SEND,
    )
    data: bytes = ProcessingResponse(mode_override=mode).SerializeToString()
    return data


_SKIP_REQUEST_BODY: Final = _override(ProcessingMode.NONE)
_WANT_RESPONSE_BODY: Final = _override(ProcessingMode.BUFFERED_PARTIAL)
"""Partial: a body beyond Envoy's buffer (1 MiB) comes cut off and goes on as it is; BUFFERED makes it a 500."""
_plain_messages: Final = {
    Phase.REQUEST_HEADERS: ProcessingResponse(request_headers=HeadersResponse(response=CommonResponse())),
    Phase.REQUEST_BODY: ProcessingResponse(request_body=BodyResponse(response=CommonResponse())),
    Phase.REQUEST_TRAILERS: ProcessingResponse(request_trailers=TrailersResponse()),
    Phase.RESPONSE_HEADERS: ProcessingResponse(response_headers=HeadersResponse(response=CommonResponse())),
    Phase.RESPONSE_BODY: ProcessingResponse(response_body=BodyResponse(response=CommonResponse())),
    Phase.RESPONSE_TRAILERS: ProcessingResponse(response_trailers=TrailersResponse()),
}
_PLAIN: Final[dict[Phase, bytes]] = {phase: message.SerializeToString() for phase, message in _plain_messages.items()}
