"""The clusters: the internal hop, the two engine roles, the service."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import PurePosixPath

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterDnsLookupFamily,
    ClusterLbPolicy,
    ClusterOriginalDstLbConfig,
    OutlierDetection,
    UpstreamConnectionOptions,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    EnvoyInternalAddress,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    HttpProtocolOptions,
    TcpKeepalive,
)
from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions as UpstreamHttpProtocolOptions
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptionsExplicitHttpConfig
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config, target_of
from extproc.envoy_config.addresses import default_target, target_address, target_host
from extproc.envoy_config.names import (
    DECODE_CLUSTER,
    PREFILL_CLUSTER,
    PROCESS_CLUSTER,
    ROUTE_LISTENER,
    SERVICE_CLUSTER,
)
from extproc.envoy_config.routing import prefill_filter, prefill_guard
from extproc.envoy_config.service_tls import transport_socket, uses_tls
from extproc.exchange import EXTENSION_S
from extproc.mutation import DECODE_ENDPOINT, PREFILL_ENDPOINT, process_mark

SERVICE_CONNECT_TIMEOUT_S = 1
"""The service is on the same host or network; while it is down each request waits at most this long for its 503."""
ENGINE_CONNECT_TIMEOUT_S = 3
"""Covers one lost SYN (Linux sends it again after 1 s); a dead host is then another pair's chance, not a long wait."""
ENGINE_IDLE_TIMEOUT_S = 4
"""Below the keep-alive of uvicorn in SGLang (5 s: `SGLANG_TIMEOUT_KEEP_ALIVE`, sgl-project/sglang#19847): with a longer
one Envoy now and then sends a request on a connection the engine is just closing."""
ORIGINAL_DST_CLEANUP_S = 60
"""Endpoints that no request named for this long are forgotten, with their pooled connections."""
UNLIMITED = 1_000_000
"""Circuit breaker threshold that is never reached: the default of 1024 would refuse requests that wait in engines'
queues as designed. Admission is the service's decision."""

_HTTP1 = HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=Http1ProtocolOptions())

SERVICE_BUFFER_BYTES = (1 << 32) - 1
"""What may wait on a connection to the service before Envoy holds its streams back: the most that can be said, as Envoy
crashes when it does so to a stream of a cluster's filter (docs/decisions.md). Nothing is lost by it: a body is in
memory before, and goes in one message. `envoy_max_heap_bytes` bounds all of them."""

KEEPALIVE = TcpKeepalive(keepalive_probes=3, keepalive_time=30, keepalive_interval=10)
"""A peer that vanished without a FIN is noticed after a minute, also in the middle of a long prefill."""


def clusters(config: Config, *, grpc_target: str | None = None, secrets: PurePosixPath | None = None) -> list[Cluster]:
    """The internal hop, the two engine roles, and the service. Raises ConfigError.

    `secrets`: the folder that Envoy is to watch for certificates.
    """
    return [
        _internal_cluster(ROUTE_LISTENER),
        _engine_cluster(DECODE_CLUSTER, DECODE_ENDPOINT),
        *_prefill_clusters(config),
        *_service_clusters(config, grpc_target or default_target(config), secrets),
    ]


def _internal_cluster(listener: str) -> Cluster:
    """HTTP/1.1: each request has a (user-space) connection to itself, so one that stalls holds up no other, and bodies
    may be as long as the listener's buffer (over HTTP/2 only as long as the stream's window)."""
    address = Address(envoy_internal_address=EnvoyInternalAddress(server_listener_name=listener))
    return Cluster(
        name=listener,
        type=ClusterDiscoveryType.STATIC,
        circuit_breakers=no_circuit_breaker(),
        typed_extension_protocol_options=upstream_protocol(_HTTP1),
        load_assignment=_endpoints(listener, address),
    )


def _prefill_clusters(config: Config) -> list[Cluster]:
    """The way to prefill engines, through the filter that asks the service; where that has several processes, a way for
    what each of them has placed."""
    of_processes = {process_mark(process): PROCESS_CLUSTER.format(process) for process in range(config.processes)}
    asked = of_processes if config.processes > 1 else {PREFILL_CLUSTER: SERVICE_CLUSTER}
    # Frees what an engine that neither reads nor answers would hold forever; later than the service itself would.
    longest = timedelta(seconds=config.prefill_timeout_secs + EXTENSION_S)
    return [
        _engine_cluster(
            name,
            PREFILL_ENDPOINT,
            http_filters=[prefill_filter(config, service), prefill_guard(), _to_the_connection()],
            max_stream_duration=longest,
        )
        for name, service in asked.items()
    ]


def _to_the_connection() -> HttpFilter:
    """The last of a cluster's filters."""
    return HttpFilter(name="envoy.filters.http.upstream_codec", typed_config=Any.pack(UpstreamCodec()))


def _engine_cluster(
    name: str,
    header: str,
    *,
    http_filters: Sequence[HttpFilter] = (),
    max_stream_duration: timedelta | None = None,
) -> Cluster:
    """Dials whatever `ip:port` the service wrote into `header`; hence the public listener strips it from clients."""
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=ClusterLbPolicy.CLUSTER_PROVIDED,
        original_dst_lb_config=ClusterOriginalDstLbConfig(use_http_header=True, http_header_name=header),
        connect_timeout=timedelta(seconds=ENGINE_CONNECT_TIMEOUT_S),
        cleanup_interval=timedelta(seconds=ORIGINAL_DST_CLEANUP_S),
        circuit_breakers=no_circuit_breaker(),
        upstream_connection_options=UpstreamConnectionOptions(tcp_keepalive=KEEPALIVE),
        typed_extension_protocol_options=upstream_protocol(
            _HTTP1,
            HttpProtocolOptions(
                idle_timeout=timedelta(seconds=ENGINE_IDLE_TIMEOUT_S), max_stream_duration=max_stream_duration
            ),
            http_filters,
        ),
    )


def _service_clusters(config: Config, target: str, secrets: PurePosixPath | None) -> list[Cluster]:
    """One for route legs, with each process of the service in turn; of several, each has one for its prefill legs."""
    targets = [target_of(target, process, config.processes) for process in range(config.processes)]
    of_processes = {PROCESS_CLUSTER.format(number): [one] for number, one in enumerate(targets)} if targets[1:] else {}
    named = {SERVICE_CLUSTER: targets} | of_processes
    return [_service_cluster(config, name, those, secrets) for name, those in named.items()]


def _service_cluster(config: Config, name: str, targets: Sequence[str], secrets: PurePosixPath | None) -> Cluster:
    """No active health check: a refused connection fails open at once, and a check that a busy service answers late
    would turn every request away."""
    target, (_, by_name) = targets[0], target_address(targets[0])
    return Cluster(
        name=name,
        type=ClusterDiscoveryType.STRICT_DNS if by_name else ClusterDiscoveryType.STATIC,
        dns_lookup_family=ClusterDnsLookupFamily.V4_PREFERRED if by_name else ClusterDnsLookupFamily.AUTO,
        connect_timeout=timedelta(seconds=SERVICE_CONNECT_TIMEOUT_S),
        per_connection_buffer_limit_bytes=SERVICE_BUFFER_BYTES,
        circuit_breakers=no_circuit_breaker(),
        upstream_connection_options=UpstreamConnectionOptions(tcp_keepalive=KEEPALIVE),
        transport_socket=transport_socket(config, target_host(target), secrets) if uses_tls(config, target) else None,
        typed_extension_protocol_options=upstream_protocol(
            HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions())
        ),
        outlier_detection=_without_dead_processes() if len(targets) > 1 else None,
        load_assignment=_endpoints(name, *(target_address(one)[0] for one in targets)),
    )


def _without_dead_processes() -> OutlierDetection:
    """A process that cannot be connected to is passed over for a second; so is one that fails five streams in a row
    (Envoy's default), which only a bug does."""
    return OutlierDetection(
        split_external_local_origin_errors=True,
        consecutive_local_origin_failure=1,
        enforcing_consecutive_local_origin_failure=100,
        enforcing_local_origin_success_rate=0,
        enforcing_success_rate=0,
        interval=timedelta(seconds=1),
        base_ejection_time=timedelta(seconds=1),
        max_ejection_time=timedelta(seconds=1),
        max_ejection_percent=50,
    )


def upstream_protocol(
    protocol: HttpProtocolOptionsExplicitHttpConfig,
    options_of_all: HttpProtocolOptions | None = None,
    http_filters: Sequence[HttpFilter] = (),
) -> dict[str, Any]:
    """A cluster's `typed_extension_protocol_options`."""
    options = UpstreamHttpProtocolOptions(
        explicit_http_config=protocol,
        common_http_protocol_options=options_of_all,
        http_filters=list(http_filters),
    )
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": Any.pack(options)}


def no_circuit_breaker() -> CircuitBreakers:
    """Thresholds that are never reached."""
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=UNLIMITED, max_pending_requests=UNLIMITED, max_requests=UNLIMITED, max_retries=UNLIMITED
            )
        ]
    )


def _endpoints(cluster: str, *addresses: Address) -> ClusterLoadAssignment:
    endpoints = [LbEndpoint(endpoint=Endpoint(address=address)) for address in addresses]
    return ClusterLoadAssignment(cluster_name=cluster, endpoints=[LocalityLbEndpoints(lb_endpoints=endpoints)])
