"""The Envoy bootstrap for a `Config`, built from envoy-data-plane's typed messages and printed as YAML.

No I/O. Only what an operator may set varies: addresses, limits, timeouts. The list of workers is not in it: the service
names `ip:port` per request and the ORIGINAL_DST clusters dial that, so workers come and go without touching Envoy.
The commented twin of what this prints is `envoy/envoy.yaml`; `docs/` and `envoy/README.md` explain the topology.

Importing this module takes about a second (pydantic dataclasses), so import it only where a bootstrap is printed.
"""

import ipaddress
import json
from datetime import timedelta
from typing import Any as Json

import betterproto2
import yaml
from betterproto2 import Casing
from envoy_data_plane.envoy.config.accesslog.v3 import (
    AccessLog,
    AccessLogFilter,
    ExtensionFilter,
)
from envoy_data_plane.envoy.config.bootstrap.v3 import Admin, Bootstrap, BootstrapStaticResources
from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterDnsLookupFamily,
    ClusterLbPolicy,
    ClusterOriginalDstLbConfig,
    UpstreamConnectionOptions,
)
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import (
    HeaderMutation,
    HeaderMutationRemoveOnMatch,
    HeaderMutationRules,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    DataSource,
    EnvoyInternalAddress,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    HttpProtocolOptions,
    HttpProtocolOptionsHeadersWithUnderscoresAction,
    Pipe,
    SocketAddress,
    SubstitutionFormatString,
    TcpKeepalive,
    TypedExtensionConfig,
)
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    Endpoint,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.config.listener.v3 import (
    Filter,
    FilterChain,
    Listener,
    ListenerInternalListenerConfig,
)
from envoy_data_plane.envoy.config.route.v3 import (
    DirectResponseAction,
    HeaderMatcher,
    RetryPolicy,
    Route,
    RouteAction,
    RouteActionRequestMirrorPolicy,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.filters.cel.v3 import ExpressionFilter
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerServerHeaderTransformation,
    HttpFilter,
    LocalReplyConfig,
    ResponseMapper,
)
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions as UpstreamHttpProtocolOptions,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptionsExplicitHttpConfig
from envoy_data_plane.envoy.type.matcher.v3 import RegexMatcher, StringMatcher
from envoy_data_plane.google.protobuf import Any, Struct

from extproc.config import MIB, Config, is_ip
from extproc.errors import ConfigError

# The headers that the service and Envoy agree on. Names of the route leg's answer; see `extproc.mutation`.
MODE_HEADER = "x-pd-mode"
MODE_PD = "pd"
MODE_DIRECT = "direct"
ROOM_HEADER = "x-pd-room"
PREFILL_ENDPOINT_HEADER = "x-pd-prefill-endpoint"
DECODE_ENDPOINT_HEADER = "x-pd-decode-endpoint"
LEG_METADATA = "x-pd-leg"
"""gRPC metadata of an ext_proc stream: which filter opened it."""
LEG_ROUTE = "route"
LEG_PREFILL = "prefill"

NO_RETRY_HEADER = "x-envoy-ratelimited"
"""On a 502 or 503 of `il_pd`: another attempt is no use. The public listener obeys and removes it. The name is Envoy's
own, whose router retries no response that carries it unless `retry_on` says so."""

# Names of listeners and clusters; statistics, snippets and docs use them.
PUBLIC = "public"
ROUTE_LISTENER = "il_pd"
PREFILL_LISTENER = "il_p"
DECODE_CLUSTER = "decode"
PREFILL_CLUSTER = "prefill"
SERVICE_CLUSTER = "extproc"

STRIPPED_PREFIXES = ("x-pd-", "x-override-", "x-envoy-")
"""Headers no client may set: our contract, SGLang's request overrides, and Envoy's own knobs (timeouts, retries)."""
STRIPPED_HEADERS = ("x-data-parallel-rank", "x-gateway-destination-endpoint")
"""SGLang's rank header and the endpoint-picker protocol's destination."""

BODY_SLACK_BYTES = MIB
"""Room above the largest client body for what the service splices in: about 200 bytes, and 20 per room of a batch."""
MAX_BUFFER_BYTES = 2**31 - 1
"""A gRPC message of Python's grpcio is at most this long, and the whole body is one message."""
MESSAGE_TIMEOUT_S = 10
"""How long ext_proc waits for one answer; then the request goes on unmarked and gets a 503. Envoy's default of 200 ms
is too short for a 64 MiB body over gRPC beside other work; this long, only a hung service reaches it."""
SERVICE_CONNECT_TIMEOUT_S = 1
"""The service is on the same host or network; while it is down each request waits at most this long for its 503."""
ENGINE_CONNECT_TIMEOUT_S = 3
"""Covers one lost SYN (Linux sends it again after 1 s); a dead host is then another pair's chance, not a long wait."""
ENGINE_IDLE_TIMEOUT_S = 4
"""Below the keep-alive of uvicorn in SGLang (5 s: `SGLANG_TIMEOUT_KEEP_ALIVE`, sgl-project/sglang#19847): with a longer
one Envoy now and then sends a request on a connection the engine is just closing."""
ORIGINAL_DST_CLEANUP_S = 60
"""Endpoints that no request named for this long are forgotten, with their pooled connections."""
REQUEST_HEADERS_TIMEOUT_S = 10
REQUEST_UPLOAD_TIMEOUT_S = 300
"""Slow clients hold buffers. 64 MiB in 300 s is 1.8 Mbit/s."""
RETRY_AFTER_S = 1
"""What clients are told while nobody schedules; a service restart takes about this long."""
UNLIMITED = 1_000_000
"""Circuit breaker threshold that is never reached: the default of 1024 would refuse requests that wait in engines'
queues as designed. Admission is the service's decision."""
KEEPALIVE = TcpKeepalive(keepalive_probes=3, keepalive_time=30, keepalive_interval=10)
"""A peer that vanished without a FIN is noticed after a minute, also in the middle of a long prefill."""

NOBODY_SCHEDULES = "the PD scheduler is not answering; try again"


def bootstrap(
    config: Config, *, admin: str | None = None, grpc_target: str | None = None, access_log: str | None = None
) -> Bootstrap:
    """The whole bootstrap.

    `admin` is `host:port` of the admin interface (none when absent), `grpc_target` where Envoy finds the service
    (`host:port` or `unix:PATH`; default from the configuration), `access_log` a file for one JSON line per request
    and leg (`/dev/stdout` works). Raises ConfigError for what Envoy cannot express.
    """
    return Bootstrap(
        admin=Admin(address=_socket_address(admin, "admin")) if admin else None,
        bootstrap_extensions=[
            TypedExtensionConfig(name="envoy.bootstrap.internal_listener", typed_config=Any.pack(InternalListener()))
        ],
        static_resources=BootstrapStaticResources(
            listeners=[
                public_listener(config, access_log=access_log),
                route_listener(config, access_log=access_log),
                prefill_listener(config, access_log=access_log),
            ],
            clusters=clusters(config, grpc_target=grpc_target),
        ),
    )


def to_yaml(message: betterproto2.Message) -> str:
    """The message as YAML with proto field names, as Envoy's own documentation writes it."""
    return yaml.safe_dump(message.to_dict(casing=Casing.SNAKE), sort_keys=False, width=120)


def from_yaml(text: str) -> Bootstrap:
    """Parse a bootstrap. Raises ConfigError for anything that is not one (unknown fields included)."""
    try:
        return Bootstrap.from_dict(yaml.safe_load(text))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"not an Envoy bootstrap: {error}") from error


# -- listeners ----------------------------------------------------------------------------------------------------


def public_listener(config: Config, *, access_log: str | None = None) -> Listener:
    """Where clients come in: cleans the request, then hands it to `il_pd`, again with another pair if that fails."""
    timeout = timedelta(seconds=config.request_timeout_secs)
    manager = HttpConnectionManager(
        stat_prefix=PUBLIC,
        access_log=_access_log(access_log, PUBLIC),
        use_remote_address=True,
        # A client's own request id is worth more than a fresh one when it asks about a request.
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
        normalize_path=True,
        merge_slashes=True,
        # Engines (ASGI) unescape the path, so the service must see what they will see.
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.UNESCAPE_AND_FORWARD,
        common_http_protocol_options=HttpProtocolOptions(
            headers_with_underscores_action=HttpProtocolOptionsHeadersWithUnderscoresAction.DROP_HEADER,
        ),
        http2_protocol_options=Http2ProtocolOptions(
            max_concurrent_streams=1000,
            # 20 MB prompts should not wait a round trip per 64 KiB; a connection may hold 16 such streams.
            initial_stream_window_size=MIB,
            initial_connection_window_size=16 * MIB,
        ),
        request_headers_timeout=timedelta(seconds=REQUEST_HEADERS_TIMEOUT_S),
        request_timeout=min(timeout, timedelta(seconds=REQUEST_UPLOAD_TIMEOUT_S)),
        # A prompt may wait in an engine's queue for as long as the whole request may take.
        stream_idle_timeout=timeout,
        early_header_mutation_extensions=[
            TypedExtensionConfig(
                name="envoy.http.early_header_mutation.header_mutation",
                typed_config=Any.pack(EarlyHeaderMutation(mutations=_strip_client_headers())),
            )
        ],
        local_reply_config=_json_local_replies(config),
        http_filters=[_router_filter()],
        route_config=RouteConfiguration(
            name=PUBLIC,
            virtual_hosts=[
                VirtualHost(
                    name=PUBLIC,
                    domains=["*"],
                    include_request_attempt_count=True,
                    response_headers_to_remove=[NO_RETRY_HEADER],
                    routes=[
                        Route(
                            match=RouteMatch(prefix="/"),
                            route=RouteAction(
                                cluster=ROUTE_LISTENER, timeout=timeout, retry_policy=_pair_retry(config)
                            ),
                        )
                    ],
                )
            ],
        ),
    )
    return Listener(
        name=PUBLIC,
        address=_socket_address(f"{_bracketed(config.host)}:{config.port}", "host"),
        per_connection_buffer_limit_bytes=buffer_limit_bytes(config),
        filter_chains=[_http_chain(manager)],
    )


def route_listener(config: Config, *, access_log: str | None = None) -> Listener:
    """`il_pd`: one attempt with one pair. The service picks it, decode answers, the mirror goes to prefill."""
    return _internal_listener(
        ROUTE_LISTENER,
        config,
        HttpConnectionManager(
            stat_prefix=ROUTE_LISTENER,
            access_log=_access_log(access_log, ROUTE_LISTENER),
            # The public listener's timers watch the request; a second set could only disagree with them.
            stream_idle_timeout=timedelta(0),
            server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
            preserve_external_request_id=True,
            local_reply_config=_json_local_replies(config),
            http_filters=[route_filter(), _router_filter()],
            route_config=RouteConfiguration(
                name=ROUTE_LISTENER,
                virtual_hosts=[VirtualHost(name=ROUTE_LISTENER, domains=["*"], routes=pd_routes())],
            ),
        ),
    )


def prefill_listener(config: Config, *, access_log: str | None = None) -> Listener:
    """`il_p`: the mirrored request, with prefill's own body, watched by its own ext_proc stream."""
    return _internal_listener(
        PREFILL_LISTENER,
        config,
        HttpConnectionManager(
            stat_prefix=PREFILL_LISTENER,
            access_log=_access_log(access_log, PREFILL_LISTENER),
            stream_idle_timeout=timedelta(0),
            server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
            preserve_external_request_id=True,
            http_filters=[prefill_filter(), _router_filter()],
            route_config=RouteConfiguration(
                name=PREFILL_LISTENER,
                virtual_hosts=[VirtualHost(name=PREFILL_LISTENER, domains=["*"], routes=prefill_routes(config))],
            ),
        ),
    )


def buffer_limit_bytes(config: Config) -> int:
    """Bytes a listener may hold of one body. Raises ConfigError when that is more than one gRPC message."""
    limit = config.max_payload_size + BODY_SLACK_BYTES
    if limit > MAX_BUFFER_BYTES:
        raise ConfigError(f"max_payload_size: at most {MAX_BUFFER_BYTES - BODY_SLACK_BYTES} bytes, as one gRPC message")
    return limit


# -- filters ------------------------------------------------------------------------------------------------------


def route_filter() -> HttpFilter:
    """The ext_proc filter of `il_pd`: reads the whole request, then only response headers and the end."""
    return _ext_proc_filter(LEG_ROUTE, request_body=ProcessingModeBodySendMode.BUFFERED)


def prefill_filter() -> HttpFilter:
    """The ext_proc filter of `il_p`: the service answers the headers with a body of its own, so none is sent to it."""
    return _ext_proc_filter(LEG_PREFILL, request_body=ProcessingModeBodySendMode.NONE)


def _ext_proc_filter(leg: str, *, request_body: ProcessingModeBodySendMode) -> HttpFilter:
    return HttpFilter(
        name=f"extproc.{leg}",
        typed_config=Any.pack(
            ExternalProcessor(
                grpc_service=GrpcService(
                    envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SERVICE_CLUSTER),
                    initial_metadata=[HeaderValue(key=LEG_METADATA, value=leg)],
                ),
                stat_prefix=leg,
                processing_mode=ProcessingMode(
                    request_header_mode=ProcessingModeHeaderSendMode.SEND,
                    request_body_mode=request_body,
                    request_trailer_mode=ProcessingModeHeaderSendMode.SKIP,
                    response_header_mode=ProcessingModeHeaderSendMode.SEND,
                    response_body_mode=ProcessingModeBodySendMode.NONE,
                    # Keeps the gRPC stream open until the HTTP request ends: that is how the service learns of it.
                    response_trailer_mode=ProcessingModeHeaderSendMode.SEND,
                ),
                allow_mode_override=True,
                # Running streams survive a dead service; new requests come out unmarked and get the 503 route.
                failure_mode_allow=True,
                message_timeout=timedelta(seconds=MESSAGE_TIMEOUT_S),
                # On top of Envoy's default rules: all but `host`, `:method` and the like, and `x-envoy-*`.
                mutation_rules=HeaderMutationRules(allow_expression=RegexMatcher(regex=NO_RETRY_HEADER)),
            )
        ),
    )


def _router_filter() -> HttpFilter:
    # Engines and clients have no use for x-envoy-expected-rq-timeout-ms and the like. The attempt count stays.
    return HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(Router(suppress_envoy_headers=True)))


# -- routes -------------------------------------------------------------------------------------------------------


def pd_routes() -> list[Route]:
    """Where a request of `il_pd` goes by what the service wrote into `x-pd-mode`. Nothing is retried here: a room
    belongs to one attempt of both legs, so only the pair can be retried, by whoever sent the request here."""
    forever = timedelta(0)
    return [
        Route(
            name="pd",
            match=_when_header(MODE_HEADER, StringMatcher(exact=MODE_PD)),
            route=RouteAction(
                cluster=DECODE_CLUSTER,
                timeout=forever,
                request_mirror_policies=[
                    RouteActionRequestMirrorPolicy(cluster=PREFILL_LISTENER, disable_shadow_host_suffix_append=True)
                ],
            ),
        ),
        Route(
            name="direct",
            match=_when_header(MODE_HEADER, StringMatcher(exact=MODE_DIRECT)),
            route=RouteAction(cluster=DECODE_CLUSTER, timeout=forever),
        ),
        Route(
            name="unscheduled",
            match=RouteMatch(prefix="/"),
            direct_response=_json_reply(503, NOBODY_SCHEDULES, "service_unavailable"),
            response_headers_to_add=[
                _set_header("content-type", "application/json"),
                _set_header("retry-after", str(RETRY_AFTER_S)),
                _set_header(NO_RETRY_HEADER, "true"),
            ],
        ),
    ]


def prefill_routes(config: Config) -> list[Route]:
    """Only what the service marked with a room goes to a prefill engine: another body there would block it."""
    return [
        Route(
            name="prefill",
            match=_when_header(ROOM_HEADER),
            route=RouteAction(
                cluster=PREFILL_CLUSTER,
                timeout=timedelta(0),
                # A prefill engine that stops reading stalls the decode upload too; this frees it, `timeout` does not.
                idle_timeout=timedelta(seconds=config.request_timeout_secs),
            ),
        ),
        Route(
            name="unscheduled",
            match=RouteMatch(prefix="/"),
            direct_response=_json_reply(503, NOBODY_SCHEDULES, "service_unavailable"),
        ),
    ]


def _pair_retry(config: Config) -> RetryPolicy:
    """Another attempt with another pair, while the client has got nothing."""
    return RetryPolicy(
        retry_on="connect-failure,refused-stream,reset-before-request,retriable-status-codes",
        retriable_status_codes=[502, 503],
        num_retries=config.retry_max_retries,
    )


def _when_header(name: str, value: StringMatcher | None = None) -> RouteMatch:
    matcher = HeaderMatcher(name=name, string_match=value) if value else HeaderMatcher(name=name, present_match=True)
    return RouteMatch(prefix="/", headers=[matcher])


def _strip_client_headers() -> list[HeaderMutation]:
    by_prefix = [
        HeaderMutation(
            remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix, ignore_case=True))
        )
        for prefix in STRIPPED_PREFIXES
    ]
    return [*by_prefix, *(HeaderMutation(remove=name) for name in STRIPPED_HEADERS)]


# -- replies that Envoy makes itself ------------------------------------------------------------------------------


def _json_reply(status: int, message: str, kind: str) -> DirectResponseAction:
    """An OpenAI-style error body."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return DirectResponseAction(status=status, body=DataSource(inline_string=json.dumps({"error": error})))


def _json_local_replies(config: Config) -> LocalReplyConfig:
    """Envoy's own errors (413, 431, 503, 504…) in the shape of the service's. An immediate response of the service is a
    local reply too and has its body already; so has a `direct_response`."""
    too_large = f"the request body exceeds the limit of {config.max_payload_size} bytes"
    return LocalReplyConfig(
        mappers=[
            _json_error_when("response.code == 413", "invalid_request_error", message=too_large),
            _json_error_when("response.code >= 400 && response.code < 500", "invalid_request_error"),
            _json_error_when("response.code >= 500", "service_unavailable"),
        ]
    )


def _json_error_when(condition: str, kind: str, *, message: str | None = None) -> ResponseMapper:
    # Whoever has said what the body is, the service or a `direct_response`, has written it for the client.
    expression = ExpressionFilter(expression=f'{condition} && !("content-type" in response.headers)')
    name = "envoy.access_loggers.extension_filters.cel"
    error = {"message": "%LOCAL_REPLY_BODY%", "type": kind, "param": None, "code": "%RESPONSE_CODE%"}
    return ResponseMapper(
        filter=AccessLogFilter(extension_filter=ExtensionFilter(name=name, typed_config=Any.pack(expression))),
        body=DataSource(inline_string=message) if message else None,
        body_format_override=SubstitutionFormatString(json_format=_struct({"error": error})),
    )


# -- clusters -----------------------------------------------------------------------------------------------------


def clusters(config: Config, *, grpc_target: str | None = None) -> list[Cluster]:
    """The two internal hops, the two engine roles, and the service."""
    return [
        _internal_cluster(ROUTE_LISTENER),
        _internal_cluster(PREFILL_LISTENER),
        _engine_cluster(DECODE_CLUSTER, DECODE_ENDPOINT_HEADER),
        _engine_cluster(PREFILL_CLUSTER, PREFILL_ENDPOINT_HEADER),
        _service_cluster(grpc_target or _default_target(config)),
    ]


def _internal_cluster(listener: str) -> Cluster:
    """HTTP/1.1: each request has a (user-space) connection to itself, so one that stalls holds up no other."""
    address = Address(envoy_internal_address=EnvoyInternalAddress(server_listener_name=listener))
    return Cluster(
        name=listener,
        type=ClusterDiscoveryType.STATIC,
        circuit_breakers=_no_circuit_breaker(),
        typed_extension_protocol_options=_http1_upstream(),
        load_assignment=_one_endpoint(listener, address),
    )


def _engine_cluster(name: str, header: str) -> Cluster:
    """Dials whatever `ip:port` the service wrote into `header`; hence the public listener strips it from clients."""
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=ClusterLbPolicy.CLUSTER_PROVIDED,
        original_dst_lb_config=ClusterOriginalDstLbConfig(use_http_header=True, http_header_name=header),
        connect_timeout=timedelta(seconds=ENGINE_CONNECT_TIMEOUT_S),
        cleanup_interval=timedelta(seconds=ORIGINAL_DST_CLEANUP_S),
        circuit_breakers=_no_circuit_breaker(),
        upstream_connection_options=UpstreamConnectionOptions(tcp_keepalive=KEEPALIVE),
        typed_extension_protocol_options=_http1_upstream(idle_timeout=timedelta(seconds=ENGINE_IDLE_TIMEOUT_S)),
    )


def _service_cluster(target: str) -> Cluster:
    """No active health check: a refused connection fails open at once, and a check that a busy service answers late
    would turn every request away."""
    address, by_name = _target_address(target)
    return Cluster(
        name=SERVICE_CLUSTER,
        type=ClusterDiscoveryType.STRICT_DNS if by_name else ClusterDiscoveryType.STATIC,
        dns_lookup_family=ClusterDnsLookupFamily.V4_PREFERRED if by_name else ClusterDnsLookupFamily.AUTO,
        connect_timeout=timedelta(seconds=SERVICE_CONNECT_TIMEOUT_S),
        circuit_breakers=_no_circuit_breaker(),
        upstream_connection_options=UpstreamConnectionOptions(tcp_keepalive=KEEPALIVE),
        typed_extension_protocol_options=_upstream_protocol(
            HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions())
        ),
        load_assignment=_one_endpoint(SERVICE_CLUSTER, address),
    )


def _http1_upstream(idle_timeout: timedelta | None = None) -> dict[str, Any]:
    return _upstream_protocol(
        HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions()), idle_timeout
    )


def _upstream_protocol(
    protocol: HttpProtocolOptionsExplicitHttpConfig, idle_timeout: timedelta | None = None
) -> dict[str, Any]:
    options = UpstreamHttpProtocolOptions(
        explicit_http_config=protocol,
        common_http_protocol_options=HttpProtocolOptions(idle_timeout=idle_timeout) if idle_timeout else None,
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(options)}


def _no_circuit_breaker() -> CircuitBreakers:
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=UNLIMITED,
                max_pending_requests=UNLIMITED,
                max_requests=UNLIMITED,
                max_retries=UNLIMITED,
            )
        ]
    )


def _one_endpoint(cluster: str, address: Address) -> ClusterLoadAssignment:
    return ClusterLoadAssignment(
        cluster_name=cluster,
        endpoints=[LocalityLbEndpoints(lb_endpoints=[LbEndpoint(endpoint=Endpoint(address=address))])],
    )


# -- small parts --------------------------------------------------------------------------------------------------


def _internal_listener(name: str, config: Config, manager: HttpConnectionManager) -> Listener:
    return Listener(
        name=name,
        internal_listener=ListenerInternalListenerConfig(),
        per_connection_buffer_limit_bytes=buffer_limit_bytes(config),
        filter_chains=[_http_chain(manager)],
    )


def _http_chain(manager: HttpConnectionManager) -> FilterChain:
    name = "envoy.filters.network.http_connection_manager"
    return FilterChain(filters=[Filter(name=name, typed_config=Any.pack(manager))])


def _access_log(path: str | None, listener: str) -> list[AccessLog]:
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
        "mode": f"%REQ({MODE_HEADER})%",
        "room": f"%REQ({ROOM_HEADER})%",
        "prefill": f"%REQ({PREFILL_ENDPOINT_HEADER})%",
        "decode": f"%REQ({DECODE_ENDPOINT_HEADER})%",
    }
    file = FileAccessLog(path=path, log_format=SubstitutionFormatString(json_format=_struct(fields)))
    return [AccessLog(name="envoy.access_loggers.file", typed_config=Any.pack(file))]


def _struct(value: dict[str, Json]) -> Struct:
    struct: Struct = Struct.from_dict(value)
    return struct


def _socket_address(address: str, what: str) -> Address:
    """`host:port` (IPv6 in brackets). Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{what}: expected HOST:PORT, got {address!r}")
    return Address(socket_address=SocketAddress(address=host.strip("[]"), port_value=int(port)))


def _target_address(target: str) -> tuple[Address, bool]:
    """The address of the service, and whether it has to be resolved."""
    if target.startswith("unix:"):
        return Address(pipe=Pipe(path=target.removeprefix("unix:"))), False
    address = _socket_address(target, "grpc_target")
    host = target.rpartition(":")[0].strip("[]")
    return address, not is_ip(host)


def _default_target(config: Config) -> str:
    """The configured gRPC address; the loopback when the service listens on all interfaces."""
    host = config.grpc_host
    if is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{_bracketed(host)}:{config.grpc_port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _set_header(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(
        header=HeaderValue(key=name, value=value),
        append_action=HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD,
    )
