"""The listeners: public, and the internal one where ext_proc runs."""

from datetime import timedelta

from envoy_data_plane.envoy.config.core.v3 import (
    Http2ProtocolOptions,
    HttpProtocolOptions,
    HttpProtocolOptionsHeadersWithUnderscoresAction,
    TrafficDirection,
)
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener, ListenerInternalListenerConfig
from envoy_data_plane.envoy.config.route.v3 import (
    HeaderMatcher,
    RetryPolicy,
    RetryPolicyRetryBackOff,
    Route,
    RouteAction,
    RouteConfiguration,
    RouteMatch,
    VirtualHost,
)
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerServerHeaderTransformation,
    HttpFilter,
)
from envoy_data_plane.google.protobuf import Any

from extproc.config import MIB, Config
from extproc.envoy_config.addresses import bracketed, socket_address
from extproc.envoy_config.names import PUBLIC, ROUTE_LISTENER
from extproc.envoy_config.replies import access_log_of, broken_requests, json_local_replies
from extproc.envoy_config.routing import pd_routes, route_filter
from extproc.envoy_config.stripping import strip_between_listeners, strip_from_clients
from extproc.errors import ConfigError
from extproc.mutation import RETRY

BODY_SLACK_BYTES = MIB
"""Room above the largest client body for what the service splices in: about 200 bytes, and 20 per room of a batch."""
MAX_BUFFER_BYTES = 2**31 - 1
"""A gRPC message of Python's grpcio is at most this long, and the whole body is one message."""
DELAYED_CLOSE = timedelta(milliseconds=20)
PUBLIC_DELAYED_CLOSE = timedelta(milliseconds=250)
"""How long Envoy leaves a connection open on which it answered early or broke off, so that the answer is read; a broken
stream is known to be so that much later, first between the listeners, then to the client. With 0 between the
listeners a 413 in the middle of an upload was lost in 5 of 12 cases, with 5 to 200 ms in none; towards clients a round
trip has to fit in. Envoy's default is 1 s for each."""
RETRY_BACK_OFF = RetryPolicyRetryBackOff(
    base_interval=timedelta(milliseconds=1), max_interval=timedelta(milliseconds=10)
)
"""The next attempt goes to another pair, so there is nothing to wait for; Envoy's default of 25 ms took 18 to 27 ms of
the time to the next attempt, this takes 4 to 8 (medians)."""
MAX_HEADERS = 100
MAX_HEADERS_KIB = 60
"""Of a client's request; beyond that: 431. Envoy's defaults."""
MAX_INTERNAL_HEADERS = 2 * MAX_HEADERS
MAX_INTERNAL_HEADERS_KIB = MAX_HEADERS_KIB + 36
"""Between the listeners, where Envoy and the service add a dozen: a mirrored request that was refused for them would
leave decode waiting for a prefill that never comes."""
MAX_STREAMS = 1000
"""Requests at once on one HTTP/2 connection, as clients are told. A client that keeps one connection, as
most libraries do, has a gateway's worth of requests on it: ten times Envoy's figure for an edge proxy."""
REQUEST_HEADERS_TIMEOUT_S = 10
REQUEST_UPLOAD_TIMEOUT_S = 300
"""Slow clients hold buffers. 64 MiB in 300 s is 1.8 Mbit/s."""


def public_listener(config: Config, *, access_log: str | None = None) -> Listener:
    """Where clients come in: cleans the request, then hands it to `il_pd`, again with another pair if that fails."""
    timeout = timedelta(seconds=config.request_timeout_secs)
    manager = HttpConnectionManager(
        stat_prefix=PUBLIC,
        access_log=access_log_of(access_log, PUBLIC),
        use_remote_address=True,
        # A client's own request id is worth more than a fresh one when it asks about a request.
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
        normalize_path=True,
        merge_slashes=True,
        # Engines (ASGI) unescape the path, so the service must see what they will see.
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.UNESCAPE_AND_FORWARD,
        max_request_headers_kb=MAX_HEADERS_KIB,
        common_http_protocol_options=HttpProtocolOptions(
            max_headers_count=MAX_HEADERS,
            headers_with_underscores_action=HttpProtocolOptionsHeadersWithUnderscoresAction.DROP_HEADER,
        ),
        http2_protocol_options=Http2ProtocolOptions(
            max_concurrent_streams=MAX_STREAMS,
            # 20 MB prompts should not wait a round trip per 64 KiB; a connection may hold 16 such streams.
            initial_stream_window_size=MIB,
            initial_connection_window_size=16 * MIB,
        ),
        request_headers_timeout=timedelta(seconds=REQUEST_HEADERS_TIMEOUT_S),
        request_timeout=min(timeout, timedelta(seconds=REQUEST_UPLOAD_TIMEOUT_S)),
        delayed_close_timeout=PUBLIC_DELAYED_CLOSE,
        # A prompt may wait in an engine's queue for as long as the whole request may take.
        stream_idle_timeout=timeout,
        early_header_mutation_extensions=[strip_from_clients()],
        local_reply_config=json_local_replies(config),
        http_filters=[_router_filter()],
        route_config=RouteConfiguration(name=PUBLIC, virtual_hosts=[pd_virtual_host(config, PUBLIC)]),
    )
    return Listener(
        name=PUBLIC,
        traffic_direction=TrafficDirection.INBOUND,  # what `drain_listeners?inboundonly` closes
        address=socket_address(f"{bracketed(config.host)}:{config.port}", "host"),
        filter_chains=[_http_chain(manager)],
    )


def pd_virtual_host(config: Config, name: str, domain: str = "*") -> VirtualHost:
    """Every request of a domain through `il_pd`."""
    return VirtualHost(
        name=name,
        domains=[domain],
        include_request_attempt_count=True,
        response_headers_to_remove=[RETRY],
        # What a retry can send again. Not the connection's limit: that would also let each slow reader of a
        # stream hold as much, and over HTTP/2 the flow-control window is the limit that counts instead.
        request_body_buffer_limit=buffer_limit_bytes(config),
        routes=[Route(match=RouteMatch(prefix="/"), route=_to_a_pair(config))],
    )


def pd_route(config: Config, prefix: str) -> Route:
    """The same for some paths of a virtual host, which should count attempts (`include_request_attempt_count`)."""
    return Route(
        name="pd",
        match=RouteMatch(prefix=prefix),
        response_headers_to_remove=[RETRY],
        request_body_buffer_limit=buffer_limit_bytes(config),
        route=_to_a_pair(config),
    )


def _to_a_pair(config: Config) -> RouteAction:
    """All attempts together have this long; a route's `idle_timeout` wins over its listener's `stream_idle_timeout`."""
    timeout = timedelta(seconds=config.request_timeout_secs)
    return RouteAction(cluster=ROUTE_LISTENER, timeout=timeout, idle_timeout=timeout, retry_policy=_pair_retry(config))


def route_listener(config: Config, *, access_log: str | None = None) -> Listener:
    """`il_pd`: one attempt with one pair. The service picks it, decode answers, the mirror goes to prefill."""
    return _internal_listener(
        ROUTE_LISTENER,
        # The body is collected here for the service; what exceeds the limit gets 413.
        buffer_limit_bytes=buffer_limit_bytes(config),
        manager=HttpConnectionManager(
            stat_prefix=ROUTE_LISTENER,
            max_request_headers_kb=MAX_INTERNAL_HEADERS_KIB,
            common_http_protocol_options=HttpProtocolOptions(max_headers_count=MAX_INTERNAL_HEADERS),
            access_log=[*access_log_of(access_log, ROUTE_LISTENER), *broken_requests(config)],
            # The public listener's timers watch the request; a second set could only disagree with them.
            stream_idle_timeout=timedelta(0),
            delayed_close_timeout=DELAYED_CLOSE,
            server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
            generate_request_id=False,  # it has one, of the listener that clients reach
            early_header_mutation_extensions=[strip_between_listeners()],
            local_reply_config=json_local_replies(config, mark_retry=True),
            http_filters=[route_filter(config), _router_filter()],
            route_config=RouteConfiguration(
                name=ROUTE_LISTENER,
                virtual_hosts=[VirtualHost(name=ROUTE_LISTENER, domains=["*"], routes=pd_routes(config))],
            ),
        ),
    )


def buffer_limit_bytes(config: Config) -> int:
    """Bytes that may be held of one request body. Raises ConfigError when that is more than one gRPC message."""
    limit = config.max_payload_size + BODY_SLACK_BYTES
    if limit > MAX_BUFFER_BYTES:
        raise ConfigError(f"max_payload_size: at most {MAX_BUFFER_BYTES - BODY_SLACK_BYTES} bytes, as one gRPC message")
    return limit


def _internal_listener(name: str, *, manager: HttpConnectionManager, buffer_limit_bytes: int | None = None) -> Listener:
    return Listener(
        name=name,
        internal_listener=ListenerInternalListenerConfig(),
        # What the public listener has let in is not refused half-way, nor is an internal connection a client's.
        bypass_overload_manager=True,
        ignore_global_conn_limit=True,
        per_connection_buffer_limit_bytes=buffer_limit_bytes,
        filter_chains=[_http_chain(manager)],
    )


def _http_chain(manager: HttpConnectionManager) -> FilterChain:
    name = "envoy.filters.network.http_connection_manager"
    return FilterChain(filters=[Filter(name=name, typed_config=Any.pack(manager))])


def _router_filter() -> HttpFilter:
    router = Router(
        # Engines and clients have no use for x-envoy-expected-rq-timeout-ms and the like. The attempt count stays.
        suppress_envoy_headers=True,
        # Of clusters by status and time: each listener counts the same of what it answers, once and not twice.
        dynamic_stats=False,
    )
    return HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(router))


def _pair_retry(config: Config) -> RetryPolicy:
    """Another attempt with another pair, while the client has got nothing.

    The answers for which that makes sense are marked, by the service and by `il_pd` when decode's connection failed:
    not every 502 and 503 (no worker, the service not there) is asked for again."""
    return RetryPolicy(
        retry_on="connect-failure,refused-stream,reset,retriable-headers",
        retriable_headers=[HeaderMatcher(name=RETRY, present_match=True)],
        num_retries=config.retry_max_retries,
        retry_back_off=RETRY_BACK_OFF,
    )
