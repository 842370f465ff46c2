"""PD in somebody's own filter chain, without the hop to `il_pd`: the filter is off but for routes that turn it on.

Costs one listener less per request, and the retry: nothing sends the request again with another pair.
"""

from datetime import timedelta

from envoy_data_plane.envoy.config.route.v3 import Route, RouteAction
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ExtProcOverrides, ExtProcPerRoute
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config
from extproc.envoy_config.listeners import buffer_limit_bytes
from extproc.envoy_config.routing import RETRY_AFTER_S, pd_routes, route_filter, set_header
from extproc.mutation import RETRY

NOBODY = "x-pd-unscheduled"
"""Names no cluster, as nothing sets this header: such requests get 503, with an empty body."""


def off_by_default(config: Config) -> HttpFilter:
    """The ext_proc filter of the route leg; other routes never meet it."""
    chosen = route_filter(config)
    chosen.disabled = True
    return chosen


def pd_routes_by_themselves(config: Config, prefix: str) -> list[Route]:
    """The routes of `il_pd` for some paths, with all that its listener and the public one do for them there.

    Every route turns the filter on: the one that matches first decides, before the service has answered.
    """
    limit = timedelta(seconds=config.request_timeout_secs)
    *placed, unscheduled = pd_routes(config)
    # How much of a body may be held is up to the first match, and a `direct_response` has no say in that.
    unscheduled.direct_response = None
    unscheduled.route = RouteAction(cluster_header=NOBODY)
    unscheduled.response_headers_to_add = [set_header("retry-after", str(RETRY_AFTER_S))]
    for route in (routes := [*placed, unscheduled]):
        assert route.match is not None  # noqa: S101 - each has one
        assert route.route is not None  # noqa: S101
        route.match.prefix = prefix
        route.route.timeout = route.route.idle_timeout = limit
        route.typed_per_filter_config = {
            route_filter(config).name: Any.pack(ExtProcPerRoute(overrides=ExtProcOverrides()))
        }
        route.response_headers_to_remove = [RETRY]
        route.request_body_buffer_limit = buffer_limit_bytes(config)
    return routes
