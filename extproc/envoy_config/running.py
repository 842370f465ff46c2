"""A running Envoy's configuration, as its admin interface prints it: what of it is ours, and where it is.

No I/O. `/config_dump` has static and dynamic resources (xDS) alike; both are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any as Json

from extproc.events import Leg

EXT_PROC = "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"


@dataclass(frozen=True, slots=True)
class HttpListener:
    """One HttpConnectionManager and the listener that it is in."""

    name: str
    """The listener's."""
    listener: Json
    manager: Json
    virtual_hosts: list[Json]
    """Its own, or those of the route configuration that it gets by name."""

    def routes(self) -> Iterator[tuple[Json, Json]]:
        """Every route, with its virtual host."""
        for host in self.virtual_hosts:
            for route in host.get("routes", []):
                yield host, route

    @property
    def ext_proc(self) -> Json | None:
        """The filter that asks the service about route legs."""
        return _ext_proc(self.manager.get("http_filters", []), Leg.ROUTE)


@dataclass(frozen=True, slots=True)
class PrefillCluster:
    """A cluster that asks the service about prefill legs."""

    name: str
    cluster: Json
    ext_proc: Json

    @property
    def guards(self) -> list[Json]:
        """The filters behind it."""
        filters = _http_options(self.cluster)["http_filters"]
        return list(filters[filters.index(self.ext_proc) + 1 :])

    @property
    def max_stream_duration_s(self) -> float | None:
        """How long a request may take; None: for ever."""
        options = _http_options(self.cluster).get("common_http_protocol_options", {})
        return seconds(options.get("max_stream_duration"))


@dataclass(frozen=True, slots=True)
class RunningEnvoy:
    """What its admin interface says."""

    version: str
    state: str
    """LIVE when it serves."""
    listeners: list[HttpListener]
    clusters: dict[str, Json]
    hosts: dict[str, list[Json]] = field(default_factory=dict)
    """The status of each host, by cluster."""

    @classmethod
    def of(cls, server_info: Json, config_dump: Json, clusters: Json) -> "RunningEnvoy":
        """From `/server_info`, `/config_dump` and `/clusters?format=json`.

        Raises KeyError, TypeError, IndexError or AttributeError for what is none of those."""
        dumps = {part["@type"].rpartition(".")[2]: part for part in config_dump["configs"]}
        by_name = {routes["name"]: routes for routes in _resources(dumps, "RoutesConfigDump", "route_config")}
        return cls(
            version=server_info["version"].split("/")[1],
            state=server_info["state"],
            listeners=[
                http for part in _resources(dumps, "ListenersConfigDump", "listener") for http in _http(part, by_name)
            ],
            clusters={part["name"]: part for part in _resources(dumps, "ClustersConfigDump", "cluster")},
            hosts={part["name"]: part.get("host_statuses", []) for part in clusters.get("cluster_statuses", [])},
        )

    @property
    def route_legs(self) -> list[HttpListener]:
        """Where the service is asked about route legs."""
        return [listener for listener in self.listeners if listener.ext_proc]

    @property
    def prefill_legs(self) -> list[PrefillCluster]:
        """Where it is asked about prefill legs."""
        found = {
            name: _ext_proc(_http_options(cluster).get("http_filters", []), Leg.PREFILL)
            for name, cluster in self.clusters.items()
        }
        return [PrefillCluster(name, self.clusters[name], part) for name, part in found.items() if part]

    def leads_to(self, cluster: str) -> str | None:
        """The internal listener that a cluster leads to."""
        for endpoint in _endpoints(self.clusters.get(cluster, {})):
            internal = endpoint.get("address", {}).get("envoy_internal_address", {})
            if name := internal.get("server_listener_name"):
                return str(name)
        return None

    def addresses(self, cluster: str) -> list[str]:
        """`host:port` or `unix:PATH` of each endpoint in a cluster's configuration."""
        found = []
        for endpoint in _endpoints(self.clusters.get(cluster, {})):
            address = endpoint.get("address", {})
            if "pipe" in address:
                found.append(f"unix:{address['pipe']['path']}")
            elif socket := address.get("socket_address"):
                found.append(f"{socket['address']}:{socket['port_value']}")
        return found


def seconds(duration: str | None) -> float | None:
    """A protobuf duration as JSON has it; None stays None."""
    return None if duration is None else float(duration.removesuffix("s"))


def _resources(dumps: dict[str, Json], dump: str, key: str) -> Iterator[Json]:
    """Every resource in a dump, wherever in it the kind of resource is kept."""
    for name, entries in dumps.get(dump, {}).items():
        if name.startswith(("static_", "dynamic_")) and isinstance(entries, list):
            for entry in entries:
                found = entry.get("active_state", entry).get(key)
                if found:
                    yield found


def _http(listener: Json, by_name: dict[str, Json]) -> Iterator[HttpListener]:
    chains = [*listener.get("filter_chains", []), *filter(None, [listener.get("default_filter_chain")])]
    for chain in chains:
        for network_filter in chain.get("filters", []):
            manager = network_filter.get("typed_config", {})
            if _is(manager, MANAGER):
                rds = by_name.get(manager.get("rds", {}).get("route_config_name", ""), {})
                hosts = manager.get("route_config", rds).get("virtual_hosts", [])
                yield HttpListener(listener["name"], listener, manager, hosts)


def _ext_proc(http_filters: list[Json], leg: Leg) -> Json | None:
    for http_filter in http_filters:
        config = http_filter.get("typed_config", {})
        if _is(config, EXT_PROC) and config.get("stat_prefix") == leg:
            return http_filter
    return None


def _http_options(cluster: Json) -> Json:
    return cluster.get("typed_extension_protocol_options", {}).get(HTTP_OPTIONS, {})


def _endpoints(cluster: Json) -> Iterator[Json]:
    for locality in cluster.get("load_assignment", {}).get("endpoints", []):
        for host in locality.get("lb_endpoints", []):
            yield host.get("endpoint", {})


def _is(config: Json, message: str) -> bool:
    return str(config.get("@type", "")).endswith(message)
