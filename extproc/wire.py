"""Envoy's ext_proc messages ↔ events and effects; the only module that imports `envoy.*` and protobuf.

Messages: `envoy.service.ext_proc.v3.ProcessingRequest` and `ProcessingResponse`, upb classes from `xds-protos`, which
cost 1-10 us a message (docs/decisions.md). Bytes in, bytes out, so that any transport can sit in front.
"""

import re
from collections.abc import Iterable

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from envoy.service.ext_proc.v3.external_processor_pb2 import (
    BodyMutation,
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
from extproc.mutation import ROOM, Headers
from extproc.number import number

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
METHOD = f"/{SERVICE}/Process"
ACCESS_LOG_SERVICE = "envoy.service.accesslog.v3.AccessLogService"

CLIENT_FLAGS = {"downstream_connection_termination": "DC", "downstream_protocol_error": "DPE"}
"""Response flags that say that the client broke off; fields of `envoy.data.accesslog.v3.ResponseFlags`."""
WORKER_FLAGS = {
    "upstream_connection_termination": "UC",
    "upstream_remote_reset": "UR",
    "upstream_protocol_error": "UPE",
    "upstream_connection_failure": "UF",
    "upstream_request_timeout": "UT",
    "local_reset": "LR",
}
"""Flags that say that the decode worker did, or that Envoy gave it up."""

_STATUS = re.compile("[0-9]{1,3}")

_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class WireError(Exception):
    """Bytes that are not a ProcessingRequest, or one of a kind this service does not know."""


def decode(data: bytes) -> Event:
    """One ProcessingRequest as an event. Raises WireError."""
    try:
        message = ProcessingRequest.FromString(data)
    except DecodeError as error:
        raise WireError(f"not a ProcessingRequest: {error}") from None
    match message.WhichOneof("request"):
        case "request_headers":
            return RequestHeaders(_headers(message.request_headers), message.request_headers.end_of_stream)
        case "request_body":
            return RequestBody(message.request_body.body)
        case "response_headers":
            headers = _headers(message.response_headers)
            if not _STATUS.fullmatch(headers.get(":status", "0")):
                raise WireError("the :status of a response is no number")
            return ResponseHeaders(headers)
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
        case Immediate():
            message = _immediate(reply)
        case Extend():
            message = ProcessingResponse(override_message_timeout=_duration(reply.seconds))
        case Answer():
            message = _answer(reply)
    data: bytes = message.SerializeToString()
    return data


def _duration(seconds: float) -> Duration:
    whole = int(seconds)
    return Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _headers(message: HttpHeaders) -> dict[str, str]:
    """Names to values; of a repeated name, the first value. Envoy fills `raw_value`, older ones `value`."""
    headers: dict[str, str] = {}
    for header in message.headers.headers:
        headers.setdefault(header.key, header.raw_value.decode("latin-1") or header.value)
    return headers


def _answer(answer: Answer) -> ProcessingResponse:
    set_headers: Headers = answer.set_headers
    if answer.body is not None:
        set_headers = (*set_headers, ("content-length", str(len(answer.body))))
    common = CommonResponse(
        header_mutation=_mutation(set_headers, answer.remove_headers) if set_headers or answer.remove_headers else None,
        clear_route_cache=answer.pick_route_again,
    )
    if answer.body is not None:
        common.body_mutation.CopyFrom(BodyMutation(body=answer.body))
    match answer.phase:
        case Phase.REQUEST_HEADERS:
            if answer.body is not None:
                common.status = CommonResponse.CONTINUE_AND_REPLACE
            response = ProcessingResponse(request_headers=HeadersResponse(response=common))
        case Phase.RESPONSE_HEADERS:
            response = ProcessingResponse(response_headers=HeadersResponse(response=common))
        case Phase.REQUEST_BODY:
            response = ProcessingResponse(request_body=BodyResponse(response=common))
        case Phase.RESPONSE_BODY:
            response = ProcessingResponse(response_body=BodyResponse(response=common))
        case Phase.REQUEST_TRAILERS:
            response = ProcessingResponse(request_trailers=TrailersResponse())
        case Phase.RESPONSE_TRAILERS:
            response = ProcessingResponse(response_trailers=TrailersResponse())
    if answer.skip_request_body:
        response.mode_override.CopyFrom(_SKIP_REQUEST_BODY)
    if answer.want_response_body:
        response.mode_override.CopyFrom(_WANT_RESPONSE_BODY)
    return response


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
            HeaderValueOption(header=HeaderValue(key=name, raw_value=value.encode()), append_action=_OVERWRITE)
            for name, value in set_headers
        ],
        remove_headers=remove_headers,
    )


# An override replaces the whole mode, so each states all that is still to come.
_SKIP_REQUEST_BODY = ProcessingMode(
    request_header_mode=ProcessingMode.SEND,
    request_body_mode=ProcessingMode.NONE,
    request_trailer_mode=ProcessingMode.SKIP,
    response_header_mode=ProcessingMode.SEND,
    response_body_mode=ProcessingMode.NONE,
    response_trailer_mode=ProcessingMode.SEND,
)
_WANT_RESPONSE_BODY = ProcessingMode(
    request_header_mode=ProcessingMode.SEND,
    request_body_mode=ProcessingMode.NONE,
    request_trailer_mode=ProcessingMode.SKIP,
    response_header_mode=ProcessingMode.SEND,
    # Partial: a body beyond Envoy's buffer (1 MiB) comes cut off, and goes on as it is; BUFFERED would make it a 500.
    response_body_mode=ProcessingMode.BUFFERED_PARTIAL,
    response_trailer_mode=ProcessingMode.SEND,
)
