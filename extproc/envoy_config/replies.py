"""Envoy's own errors, in the shape of the service's; and the access log."""

from typing import Any as Json

from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLog,
    AccessLogFilter,
    AndFilter,
    ExtensionFilter,
    HeaderFilter,
    ResponseFlagFilter,
)
from envoy_data_plane.envoy.config.core.v3 import (
    ApiVersion,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    SubstitutionFormatString,
)
from envoy_data_plane.envoy.config.route.v3 import HeaderMatcher
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 import (
    CommonGrpcAccessLogConfig,
    HttpGrpcAccessLogConfig,
)
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any, Struct

from extproc.config import Config
from extproc.envoy_config.names import PROCESS_CLUSTER, ROUTE_LISTENER, SERVICE_CLUSTER
from extproc.mutation import (
    DECODE_ENDPOINT,
    DECODE_RANK,
    MODE,
    PREFILL_ENDPOINT,
    PREFILL_RANK,
    PROCESS,
    RETRY,
    ROOM,
    process_mark,
)

BROKEN = "(response.code == 502 || response.code == 503)"
"""What Envoy answers for a worker that refused or reset (503), or closed the connection in mid-answer (502)."""
OVERLOADED = 'response.code_details == "overload"'
"""What the overload manager refuses. Envoy answers 503 to a new request, but 500 in the middle of an upload."""
NO_MEMORY = "the gateway is short of memory for requests: try again later"
OVERLOAD_RETRY_AFTER_S = 1
"""In whole seconds, the header's smallest step."""


def json_local_replies(config: Config, *, mark_retry: bool = False) -> LocalReplyConfig:
    """Envoy's own errors (413, 431, 503, 504…) in the shape of the service's. An immediate response of the service is a
    local reply too and has its body already; so has a `direct_response`.

    With `mark_retry` Envoy marks its own 503 for a retry: an engine refused or broke the connection before it answered.
    Envoy 1.40 shows these to the service as well, 1.36 does not. Without it, it is the overload manager's to refuse."""
    too_large = f"the request body exceeds the limit of {config.max_payload_size} bytes"
    broken = "the decode worker failed: it refused or broke off the connection"
    if mark_retry:
        first = _json_error_when(BROKEN, "service_unavailable", message=broken, header=(RETRY, "envoy"))
    else:
        again = ("retry-after", str(OVERLOAD_RETRY_AFTER_S))
        first = _json_error_when(OVERLOADED, "service_unavailable", message=NO_MEMORY, header=again, status=503)
    return LocalReplyConfig(
        mappers=[
            first,
            _json_error_when("response.code == 413", "invalid_request_error", message=too_large),
            _json_error_when("response.code >= 400 && response.code < 500", "invalid_request_error"),
            _json_error_when("response.code >= 500", "service_unavailable"),
        ]
    )


def _json_error_when(
    condition: str,
    kind: str,
    *,
    message: str | None = None,
    header: tuple[str, str] | None = None,
    status: int | None = None,
) -> ResponseMapper:
    # Whoever has said what the body is, the service or a `direct_response`, has written it for the client.
    expression = ExpressionFilter(expression=f'{condition} && !("content-type" in response.headers)')
    name = "envoy.access_loggers.extension_filters.cel"
    error = {"message": "%LOCAL_REPLY_BODY%", "type": kind, "param": None, "code": "%RESPONSE_CODE%"}
    return ResponseMapper(
        filter=AccessLogFilter(extension_filter=ExtensionFilter(name=name, typed_config=Any.pack(expression))),
        body=DataSource(inline_string=message) if message else None,
        headers_to_add=[HeaderValueOption(header=HeaderValue(key=header[0], value=header[1]))] if header else [],
        status_code=status,
        body_format_override=SubstitutionFormatString(json_format=_struct({"error": error})),
    )


def access_log_of(path: str | None, listener: str) -> list[AccessLog]:
    """One JSON line per request into a file; nothing without a path.

    A request has a line of each listener it went by: `public` (the client's view), `il_pd` for each attempt with one
    pair. `request_id` joins them. What is not known at a listener is null. Of prefill legs the service's log tells."""
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
        # Which leg failed, when the attempt may be retried: prefill, decode, or envoy (it did not reach decode).
        "retry": f"%RESP({RETRY})%",
        "upstream_failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
        "duration_ms": "%DURATION%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "received_bytes": "%BYTES_RECEIVED%",
        "sent_bytes": "%BYTES_SENT%",
        "mode": f"%REQ({MODE})%",
        "room": f"%REQ({ROOM})%",
        "prefill": f"%REQ({PREFILL_ENDPOINT})%",
        "prefill_rank": f"%REQ({PREFILL_RANK})%",
        "decode": f"%REQ({DECODE_ENDPOINT})%",
        "decode_rank": f"%REQ({DECODE_RANK})%",
    }
    file = FileAccessLog(path=path, log_format=SubstitutionFormatString(json_format=_struct(fields)))
    return [AccessLog(name="envoy.access_loggers.file", typed_config=Any.pack(file))]


def broken_requests(config: Config) -> list[AccessLog]:
    """Tells the service which requests broke off, and by whom: the ends of ext_proc streams do not. Of several
    processes, each hears of what it has placed."""
    if config.processes == 1:
        return [_broken_requests(SERVICE_CLUSTER, HeaderMatcher(name=ROOM, present_match=True))]
    return [
        _broken_requests(
            PROCESS_CLUSTER.format(process),
            HeaderMatcher(name=PROCESS, string_match=StringMatcher(exact=process_mark(process))),
        )
        for process in range(config.processes)
    ]


def _broken_requests(cluster: str, placed: HeaderMatcher) -> AccessLog:
    return AccessLog(
        name="envoy.access_loggers.http_grpc",
        # Any flag, as normal ends cost nothing then; and only what the service has placed, which matters in a listener
        # that has other requests, too.
        filter=AccessLogFilter(
            and_filter=AndFilter(
                filters=[
                    AccessLogFilter(response_flag_filter=ResponseFlagFilter()),
                    AccessLogFilter(header_filter=HeaderFilter(header=placed)),
                ]
            )
        ),
        typed_config=Any.pack(
            HttpGrpcAccessLogConfig(
                common_config=CommonGrpcAccessLogConfig(
                    log_name=ROUTE_LISTENER,
                    grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=cluster)),
                    transport_api_version=ApiVersion.V3,
                    buffer_size_bytes=0,  # each at once
                ),
                additional_request_headers_to_log=[ROOM],
            )
        ),
    )


def _struct(value: dict[str, Json]) -> Struct:
    struct: Struct = Struct.from_dict(value)
    return struct
