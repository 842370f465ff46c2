"""What happens to a request inside: the two ext_proc filters, and the way to each leg by what the service answered."""

import json
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType

from envoy_data_plane.envoy.config.core.v3 import (
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    RetryPolicy,
    RetryPolicyRetryHostPredicate,
)
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    Route,
    RouteAction,
    RouteActionRequestMirrorPolicy,
    RouteMatch,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    HeaderForwardingRules,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.retry.host.previous_hosts.v3 import PreviousHostsPredicate
from envoy_data_plane.envoy.type.matcher.v3 import ListStringMatcher, StringMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config
from extproc.envoy_config.names import (
    DECODE_CLUSTER,
    MODE_DIRECT,
    MODE_PD,
    MODE_PREFILL,
    PREFILL_CLUSTER,
    SERVICE_CLUSTER,
)
from extproc.events import Leg
from extproc.exchange import EXTENSION_S, READ_HEADERS
from extproc.mutation import MODE, PROCESS, RESERVED_NAMES, RESERVED_PREFIXES, ROOM

PREFILL_READ_HEADERS = (ROOM, ":status", "content-encoding", "content-length", "content-type")
"""What is looked at on the prefill leg: whose it is, how it was answered, and whether the answer can be read
(`usage.is_readable`). No `:method`: by that the service knows which of the two filters asks."""
MESSAGE_TIMEOUT_S = 10
"""How long ext_proc waits for one answer; then the request goes on unmarked and gets a 503. Envoy's default of 200 ms
is too short for a 64 MiB body over gRPC beside other work; this long, only a hung service reaches it."""
RETRY_AFTER_S = 1
"""What clients are told while nobody schedules; a service restart takes about this long."""
NOBODY_SCHEDULES = "the PD scheduler is not answering; try again"

_GUARD = f"""\
function envoy_on_request(request)
  if request:headers():get("{MODE}") ~= "{MODE_PREFILL}" then
    request:respond({{[":status"] = "503"}}, "{NOBODY_SCHEDULES}")
  end
end
"""


def route_filter(config: Config) -> HttpFilter:
    """The ext_proc filter of `il_pd`: reads the whole request, then only response headers and the end."""
    # Headers that decode sends before prefill is done wait for prefill; the service asks for that much time.
    longest = timedelta(seconds=config.prefill_timeout_secs + EXTENSION_S)
    return _ext_proc_filter(
        Leg.ROUTE,
        _service(SERVICE_CLUSTER, retry_policy=_another_process(config.processes - 1)),
        request_body=ProcessingModeBodySendMode.BUFFERED,
        forwarded=_names(*READ_HEADERS, *sorted(RESERVED_NAMES)) + _prefixes(*RESERVED_PREFIXES),
        max_message_timeout=longest,
    )


def prefill_filter(config: Config, service_cluster: str = SERVICE_CLUSTER) -> HttpFilter:
    """The ext_proc filter in the prefill engines' cluster: the service answers the headers with a body of its own, so
    none is sent to it."""
    # A refused connection resets the stream before grpcio has looked at its first message, so that the gRPC call itself
    # has to name the room. The lean transport reads both, and a call that looks like all others costs it less.
    named = {ROOM: f"%REQ({ROOM})%"} if config.transport == "grpcio" else {}
    return _ext_proc_filter(
        Leg.PREFILL,
        _service(service_cluster, metadata=named),
        request_body=ProcessingModeBodySendMode.NONE,
        forwarded=_names(*PREFILL_READ_HEADERS),
    )


def prefill_guard() -> HttpFilter:
    """Behind that filter: only what the service answered on this leg goes to a prefill engine. The mirror comes with
    decode's body: should the service fail just now, that body must not reach prefill."""
    return HttpFilter(
        name="extproc.prefill_guard",
        typed_config=Any.pack(Lua(default_source_code=DataSource(inline_string=_GUARD))),
    )


def _ext_proc_filter(
    leg: Leg,
    service: GrpcService,
    *,
    request_body: ProcessingModeBodySendMode,
    forwarded: list[StringMatcher],
    max_message_timeout: timedelta | None = None,
) -> HttpFilter:
    return HttpFilter(
        name=f"extproc.{leg}",
        typed_config=Any.pack(
            ExternalProcessor(
                grpc_service=service,
                stat_prefix=leg.value,
                processing_mode=ProcessingMode(
                    request_header_mode=ProcessingModeHeaderSendMode.SEND,
                    request_body_mode=request_body,
                    request_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
                    response_header_mode=ProcessingModeHeaderSendMode.SEND,
                    response_body_mode=ProcessingModeBodySendMode.NONE,
                    # A gRPC engine's status; no message where there are no trailers. Either way the stream stays open
                    # until the HTTP request ends: that is how the service learns of the end.
                    response_trailer_mode=ProcessingModeHeaderSendMode.SEND,
                ),
                allow_mode_override=True,
                # Running streams survive a dead service; new requests come out unmarked and get the 503 route.
                failure_mode_allow=True,
                message_timeout=timedelta(seconds=MESSAGE_TIMEOUT_S),
                max_message_timeout=max_message_timeout,
                forward_rules=HeaderForwardingRules(allowed_headers=ListStringMatcher(patterns=forwarded)),
            )
        ),
    )


def _service(
    cluster: str, *, metadata: Mapping[str, str] = MappingProxyType({}), retry_policy: RetryPolicy | None = None
) -> GrpcService:
    return GrpcService(
        # x-envoy-internal and x-forwarded-for tell a service on the same host nothing.
        envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=cluster, skip_envoy_headers=True),
        initial_metadata=[HeaderValue(key=name, value=value) for name, value in metadata.items()],
        retry_policy=retry_policy,
    )


def _another_process(others: int) -> RetryPolicy | None:
    """Of a stream that got no answer at all: its process is not there, or died. Nothing was placed then."""
    if not others:
        return None
    previous_hosts = RetryPolicyRetryHostPredicate(
        name="envoy.retry_host_predicates.previous_hosts", typed_config=Any.pack(PreviousHostsPredicate())
    )
    return RetryPolicy(
        retry_on="connect-failure,refused-stream,reset",
        num_retries=others,
        retry_host_predicate=[previous_hosts],
        host_selection_retry_max_attempts=3,
    )


def _names(*names: str) -> list[StringMatcher]:
    return [StringMatcher(exact=name) for name in names]


def _prefixes(*prefixes: str) -> list[StringMatcher]:
    return [StringMatcher(prefix=prefix) for prefix in prefixes]


def pd_routes(config: Config) -> list[Route]:
    """Where a request of `il_pd` goes by what the service wrote into `x-pd-mode`. Nothing is retried here: a room
    belongs to one attempt of both legs, so only the pair can be retried, by whoever sent the request here."""
    forever = timedelta(0)
    return [
        Route(
            name="pd",
            match=_when_mode(MODE_PD),
            route=RouteAction(
                cluster=DECODE_CLUSTER,
                timeout=forever,
                request_mirror_policies=[_mirror(config)],
            ),
        ),
        Route(
            name="direct",
            match=_when_mode(MODE_DIRECT),
            route=RouteAction(cluster=DECODE_CLUSTER, timeout=forever),
        ),
        Route(
            name="unscheduled",
            match=RouteMatch(prefix="/"),
            direct_response=_json_reply(503, NOBODY_SCHEDULES, "service_unavailable"),
            response_headers_to_add=[
                set_header("content-type", "application/json"),
                set_header("retry-after", str(RETRY_AFTER_S)),
            ],
        ),
    ]


def _mirror(config: Config) -> RouteActionRequestMirrorPolicy:
    """The way to prefill; of several processes of the service, to the filter that asks the one which has placed the
    request."""
    several = config.processes > 1
    return RouteActionRequestMirrorPolicy(
        cluster="" if several else PREFILL_CLUSTER,
        cluster_header=PROCESS if several else "",
        disable_shadow_host_suffix_append=True,
    )


def _when_mode(mode: str) -> RouteMatch:
    return RouteMatch(prefix="/", headers=[HeaderMatcher(name=MODE, string_match=StringMatcher(exact=mode))])


def _json_reply(status: int, message: str, kind: str) -> DirectResponseAction:
    """An OpenAI-style error body."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return DirectResponseAction(status=status, body=DataSource(inline_string=json.dumps({"error": error})))


def set_header(name: str, value: str) -> HeaderValueOption:
    """A header with this value alone."""
    return HeaderValueOption(
        header=HeaderValue(key=name, value=value),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
