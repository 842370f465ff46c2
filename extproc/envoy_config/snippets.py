"""The parts of the configuration that somebody pastes into an Envoy of their own: which there are, and where each goes.

`docs/attach.md` says which of them make a whole; `envoy/filters/` has them printed, `envoy/examples/` in their places.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import betterproto2
import yaml
from betterproto2 import Casing
from envoy_data_plane.envoy.config.core.v3 import TypedExtensionConfig
from envoy_data_plane.envoy.extensions.bootstrap.internal_listener.v3 import InternalListener
from envoy_data_plane.google.protobuf import Any

from extproc.config import Config
from extproc.envoy_config.clusters import clusters
from extproc.envoy_config.comments import with_comments
from extproc.envoy_config.edge import edge_cluster, edge_route
from extproc.envoy_config.listeners import pd_route, pd_virtual_host, route_listener
from extproc.envoy_config.per_route import off_by_default, pd_routes_by_themselves
from extproc.envoy_config.replies import broken_requests
from extproc.envoy_config.stripping import strip_from_clients

PREFIX = "/v1/"
"""Of the paths that a printed route takes: OpenAI's."""


@dataclass(frozen=True, slots=True)
class Variables:
    """What a snippet may depend on; as for `bootstrap`."""

    config: Config
    grpc_target: str | None = None
    access_log: str | None = None
    secrets: PurePosixPath | None = None
    domain: str = "*"
    """Of a virtual host."""
    prefix: str = PREFIX
    """Of the paths of routes."""


@dataclass(frozen=True, slots=True)
class Snippet:
    """One thing to paste in one place."""

    name: str
    goes_to: str
    about: str
    parts: Callable[[Variables], Sequence[betterproto2.Message]]


SNIPPETS = (
    Snippet(
        "bootstrap",
        "`bootstrap_extensions`, at the top level of the bootstrap",
        "Makes internal listeners possible: connections to il_pd stay inside the process.",
        lambda _: [internal_listeners()],
    ),
    Snippet(
        "clusters",
        "`static_resources.clusters`",
        "The hop to il_pd, the engines, the service; its address (--grpc-target) is in the last one. Workers need no "
        "clusters. The way to prefill asks the service about each request that is mirrored there.",
        lambda v: clusters(v.config, grpc_target=v.grpc_target, secrets=v.secrets),
    ),
    Snippet(
        "listeners",
        "`static_resources.listeners`, beside your own; it takes no port",
        "il_pd answers what is sent to the cluster il_pd, by one attempt with one pair. It removes headers that "
        "clients must not set, whatever listener they came by. Needs `bootstrap` and `clusters`.",
        lambda v: [route_listener(v.config, access_log=v.access_log)],
    ),
    Snippet(
        "virtual-host",
        "`route_config.virtual_hosts` of your HttpConnectionManager",
        "Sends every request of its domain (--domain) through il_pd. Needs `listeners`.",
        lambda v: [pd_virtual_host(v.config, "pd", v.domain)],
    ),
    Snippet(
        "route",
        "`routes` of a virtual host of yours, before what would match sooner",
        "Sends paths that begin with --prefix through il_pd. Set `include_request_attempt_count: true` in the virtual "
        "host, too: else a retry can meet the workers that have just failed. Needs `listeners`.",
        lambda v: [pd_route(v.config, v.prefix)],
    ),
    Snippet(
        "strip",
        "`early_header_mutation_extensions` of the HttpConnectionManager that clients reach",
        "NOT OPTIONAL with `per-route-routes`: the engines' clusters connect to what x-pd-… headers say. With "
        "`virtual-host` and `route` il_pd removes those, and this keeps clients from your own router's knobs "
        "(x-envoy-retry-on, x-envoy-max-retries, …). It is for all requests of the listener: where trusted peers set "
        "x-envoy-… headers, leave that line out.",
        lambda _: [strip_from_clients()],
    ),
    Snippet(
        "per-route-filter",
        "`http_filters` of your HttpConnectionManager: after what may refuse a request, before the router",
        "Asks the service in your own filter chain instead of in il_pd, for routes that turn it on; nothing retries "
        "with another pair then. Needs `strip`, `per-route-routes`, and `clusters`.",
        lambda v: [off_by_default(v.config)],
    ),
    Snippet(
        "per-route-routes",
        "`routes` of a virtual host of yours; after your own routes for paths below the prefix, if any",
        "For paths that begin with --prefix. The service writes x-pd-mode and clears the route cache; then the first "
        "of these that matches is taken. NOT SAFE WITHOUT `strip`: a client's own x-pd-… headers would say where Envoy "
        "connects to.",
        lambda v: pd_routes_by_themselves(v.config, v.prefix),
    ),
    Snippet(
        "per-route-access-log",
        "`access_log` of your HttpConnectionManager",
        "Tells the service why a request broke off. Only of requests that it has placed.",
        lambda v: broken_requests(v.config),
    ),
    Snippet(
        "edge-cluster",
        "`static_resources.clusters` of an edge Envoy in front of a whole gateway",
        "The gateway, at --host and --port, its health at --prometheus-port. Further gateways are further "
        "`lb_endpoints`.",
        lambda v: [edge_cluster(v.config)],
    ),
    Snippet(
        "edge-route",
        "`routes` of a virtual host of the edge Envoy",
        "Sends paths that begin with --prefix to the gateway. Needs `edge-cluster`.",
        lambda v: [edge_route(v.config, v.prefix)],
    ),
)

BY_NAME = {snippet.name: snippet for snippet in SNIPPETS}


def internal_listeners() -> TypedExtensionConfig:
    """The bootstrap extension for `il_pd`."""
    return TypedExtensionConfig(name="envoy.bootstrap.internal_listener", typed_config=Any.pack(InternalListener()))


def snippet_text(name: str, variables: Variables) -> str:
    """What to paste, as commented YAML with a head that says where. Raises ConfigError as `bootstrap` does."""
    snippet = BY_NAME[name]
    parts = [part.to_dict(casing=Casing.SNAKE) for part in snippet.parts(variables)]
    # Long lines stay whole: a comment inserted into a folded one would break it.
    text = yaml.safe_dump(parts, sort_keys=False, width=10_000)
    head = _commented(f"Goes to: {snippet.goes_to}.") + "#\n" + _commented(snippet.about)
    return f"{head}\n{with_comments(text)}"


def list_of_snippets() -> str:
    """Names, places and purposes, for people to read."""
    return "\n".join(
        f"{snippet.name}\n"
        + textwrap.fill(f"goes to {snippet.goes_to}", 100, initial_indent="    ", subsequent_indent="    ")
        + "\n"
        + textwrap.fill(snippet.about, 100, initial_indent="    ", subsequent_indent="    ")
        + "\n"
        for snippet in SNIPPETS
    )


def _commented(words: str) -> str:
    return textwrap.fill(words, 120, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
