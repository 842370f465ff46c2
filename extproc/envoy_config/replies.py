"""Envoy's own errors, in the shape of the service's; and the access log."""

from typing import Any as Json

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog, AccessLogFilter, ExtensionFilter
from envoy_data_plane.envoy.config.core.v3 import DataSource, HeaderValue, HeaderValueOption, SubstitutionFormatString
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.google.protobuf import Any, Struct

from extproc.config import Config
from extproc.mutation import DECODE_ENDPOINT, MODE, PREFILL_ENDPOINT, RETRY, ROOM


def json_local_replies(config: Config, *, retry_503: bool = False) -> LocalReplyConfig:
    """Envoy's own errors (413, 431, 503, 504…) in the shape of the service's. An immediate response of the service is a
    local reply too and has its body already; so has a `direct_response`.

    With `retry_503` Envoy marks its own 503 for a retry: an engine refused or broke the connection before it answered.
    Envoy 1.40 shows these to the service as well, 1.36 does not."""
    too_large = f"the request body exceeds the limit of {config.max_payload_size} bytes"
    broken = "the decode worker failed: it refused or broke off the connection"
    when = "response.code == 503"
    retry = [_json_error_when(when, "service_unavailable", message=broken, mark=RETRY)] if retry_503 else []
    return LocalReplyConfig(
        mappers=[
            *retry,
            _json_error_when("response.code == 413", "invalid_request_error", message=too_large),
            _json_error_when("response.code >= 400 && response.code < 500", "invalid_request_error"),
            _json_error_when("response.code >= 500", "service_unavailable"),
        ]
    )


def _json_error_when(
    condition: str, kind: str, *, message: str | None = None, mark: str | None = None
) -> ResponseMapper:
    # Whoever has said what the body is, the service or a `direct_response`, has written it for the client.
    expression = ExpressionFilter(expression=f'{condition} && !("content-type" in response.headers)')
    name = "envoy.access_loggers.extension_filters.cel"
    error = {"message": "%LOCAL_REPLY_BODY%", "type": kind, "param": None, "code": "%RESPONSE_CODE%"}
    return ResponseMapper(
        filter=AccessLogFilter(extension_filter=ExtensionFilter(name=name, typed_config=Any.pack(expression))),
        body=DataSource(inline_string=message) if message else None,
        headers_to_add=[HeaderValueOption(header=HeaderValue(key=mark, value="envoy"))] if mark else [],
        body_format_override=SubstitutionFormatString(json_format=_struct({"error": error})),
    )


def access_log_of(path: str | None, listener: str) -> list[AccessLog]:
    """One JSON line per request into a file; nothing without a path."""
    if path is None:
        return []
    fields: dict[str, Json] = {
        "time": "%START_TIME%",
        "listener": listener,
        "request_id": "%REQ(x-request-id)%",
        "attempt": "%REQ(x-envoy-attempt-count)%",
        "method": "%REQ(:method)%",
        "path": "%PATH(NQ)%",
        "status": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "duration_ms": "%DURATION%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "mode": f"%REQ({MODE})%",
        "room": f"%REQ({ROOM})%",
        "prefill": f"%REQ({PREFILL_ENDPOINT})%",
        "decode": f"%REQ({DECODE_ENDPOINT})%",
    }
    file = FileAccessLog(path=path, log_format=SubstitutionFormatString(json_format=_struct(fields)))
    return [AccessLog(name="envoy.access_loggers.file", typed_config=Any.pack(file))]


def _struct(value: dict[str, Json]) -> Struct:
    struct: Struct = Struct.from_dict(value)
    return struct
