"""This gateway as an upstream of an Envoy that is the edge already: a cluster, and a route to it.

Nothing of PD is in there. The gateway behind it is whole: `extproc up`, or `extproc serve` with an Envoy of its own.
"""

import ipaddress
from datetime import timedelta

from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType
from envoy_data_plane.envoy.config.core.v3 import HealthCheck, HealthCheckHttpHealthCheck, Http2ProtocolOptions
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    Endpoint,
    EndpointHealthCheckConfig,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.config.route.v3 import RetryPolicy, Route, RouteAction, RouteMatch
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptionsExplicitHttpConfig

from extproc.config import Config, is_ip
from extproc.envoy_config.addresses import bracketed, socket_address
from extproc.envoy_config.clusters import no_circuit_breaker, upstream_protocol
from extproc.envoy_config.names import GATEWAY_CLUSTER

CONNECT_TIMEOUT_S = 1
HEALTH_INTERVAL_S = 1
HEALTH_FAILURES = 2
"""A gateway that drains is left after 2 s; it goes on serving for `shutdown_drain_delay_secs` (5)."""
SLACK_S = 5
"""The gateway's own 504 comes first, and says why."""
RETRY_ON = "connect-failure,refused-stream,reset-before-request"
"""What no gateway has begun to work on. The rest it has retried itself, with other workers."""


def edge_cluster(config: Config) -> Cluster:
    """The gateway, asked for its health on its metrics port. HTTP/2, as one that drains says so there (GOAWAY)."""
    host = config.host
    if is_ip(host) and ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    health = EndpointHealthCheckConfig(port_value=config.prometheus_port)
    endpoint = Endpoint(address=socket_address(f"{bracketed(host)}:{config.port}", "host"), health_check_config=health)
    return Cluster(
        name=GATEWAY_CLUSTER,
        type=ClusterDiscoveryType.STATIC if is_ip(host) else ClusterDiscoveryType.STRICT_DNS,
        connect_timeout=timedelta(seconds=CONNECT_TIMEOUT_S),
        circuit_breakers=no_circuit_breaker(),
        health_checks=[
            HealthCheck(
                timeout=timedelta(seconds=HEALTH_INTERVAL_S),
                interval=timedelta(seconds=HEALTH_INTERVAL_S),
                unhealthy_threshold=HEALTH_FAILURES,
                healthy_threshold=1,
                http_health_check=HealthCheckHttpHealthCheck(path="/ready"),
            )
        ],
        typed_extension_protocol_options=upstream_protocol(
            HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=Http2ProtocolOptions())
        ),
        load_assignment=ClusterLoadAssignment(
            cluster_name=GATEWAY_CLUSTER,
            endpoints=[LocalityLbEndpoints(lb_endpoints=[LbEndpoint(endpoint=endpoint)])],
        ),
    )


def edge_route(config: Config, prefix: str) -> Route:
    """Requests for the gateway."""
    limit = timedelta(seconds=config.request_timeout_secs + SLACK_S)
    return Route(
        name="llm",
        match=RouteMatch(prefix=prefix),
        route=RouteAction(
            cluster=GATEWAY_CLUSTER,
            timeout=limit,
            idle_timeout=limit,
            retry_policy=RetryPolicy(retry_on=RETRY_ON, num_retries=1),
        ),
    )
