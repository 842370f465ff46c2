"""Flags that set the configuration: each is a key of `Config` with dashes, and beats the file.

Names and meaning as in `sglang_router`.
"""

import argparse
from pathlib import Path

from extproc.config import Config, build, read_file
from extproc.errors import ConfigError
from extproc.load_model import LOAD_MODELS
from extproc.policy import RANK_POLICIES, WORKER_POLICIES

ALIASES = {"load_monitor_interval": "worker_load_check_interval"}
"""Other gateways' names for the same setting: smg 1.13 renamed the interval."""


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and every setting. A flag that is not given is absent from the namespace."""
    defaults = Config()
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file; every flag below is a key in it")
    workers = parser.add_argument_group("workers")
    workers.add_argument(
        "--prefill",
        nargs="+",
        action="append",
        default=argparse.SUPPRESS,
        metavar=("URL", "BOOTSTRAP_PORT"),
        help="a prefill engine and its bootstrap port (a number, or 'none'; default: what the engine says, else 8998)",
    )
    workers.add_argument(
        "--decode", action="append", default=argparse.SUPPRESS, metavar="URL", help="a decode engine; may be repeated"
    )

    def add(group: argparse._ArgumentGroup, name: str, kind: type = str, *, text: str, **options: object) -> None:
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default:g})" if kind is float else f" (default: {default})"
        flags = [
            f"--{spelling.replace('_', '-')}" for spelling in (name, *(a for a, n in ALIASES.items() if n == name))
        ]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
            options.setdefault("metavar", "N" if kind is int else "SECONDS" if kind is float else None)
        if options.get("choices"):
            del options["metavar"]
        group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, help=text + shown, **options)  # type: ignore[arg-type]

    routing = parser.add_argument_group("routing")
    policies, ranks = list(WORKER_POLICIES), list(RANK_POLICIES)
    add(routing, "policy", choices=policies, text="how workers are picked, prefill and decode")
    add(routing, "prefill_policy", choices=policies, text="the same for prefill only")
    add(routing, "decode_policy", choices=policies, text="the same for decode only")
    add(
        routing,
        "dp_minimum_tokens_scheduler",
        bool,
        text="send each request to the DP rank with the fewest tokens; off: the engine decides",
    )
    add(routing, "prefill_rank_policy", choices=ranks, text="how the DP rank of a prefill worker is picked")
    add(routing, "decode_rank_policy", choices=ranks, text="how the DP rank of a decode worker is picked")
    add(routing, "load_model", choices=list(LOAD_MODELS), text="what the load of a rank is")
    add(routing, "injection", choices=["body", "headers", "auto"], text="where routing fields go; headers: body unread")
    add(routing, "max_payload_size", int, metavar="BYTES", text="largest request body; above it: 413")
    add(routing, "retry_max_retries", int, text="further attempts with another pair")
    add(routing, "request_timeout_secs", float, text="longest time for one request, stream included")
    add(
        routing,
        "tokenizer_path",
        metavar="PATH",
        text="count prompts with the model's tokenizer.json, a file or the folder it is in (extra [tokenizer])",
    )
    add(routing, "explain", bool, text="tell clients and the log by what loads ranks were picked (x-pd-*-loads)")
    add(routing, "shutdown_drain_delay_secs", float, text="after SIGTERM: serve new requests for so long, not ready")
    add(routing, "shutdown_grace_period_secs", float, text="longest time for requests to finish after that")
    add(routing, "response_headers", bool, text="tell clients the picked workers in x-pd-* response headers")

    options = parser.add_argument_group("options of policies")
    add(options, "cache_threshold", float, metavar="SHARE", text="cache_aware: least share of a prompt that must match")
    add(options, "cache_aware_rank", bool, text="cache_aware: the same prefix prefers the same DP rank, too")
    add(options, "max_tree_size", int, metavar="BYTES", text="cache_aware: memory of each role's prefix tree")
    add(options, "eviction_interval_secs", float, text="cache_aware: how long text of a worker that left is kept")
    add(
        options,
        "balance_abs_threshold",
        int,
        text="affinity gives way above this many requests per rank over the mean (bucket: tokens over the least)",
    )
    add(options, "balance_rel_threshold", float, metavar="FACTOR", text="and above this multiple of it")
    add(options, "bucket_adjust_interval_secs", float, text="bucket: time between adjustments of the boundaries")
    add(options, "prefix_token_count", int, text="prefix_hash: tokens at the beginning that count (4 bytes each)")
    add(options, "prefix_hash_load_factor", float, metavar="FACTOR", text="prefix_hash: bound, as multiple of the mean")
    add(options, "prefix_hash_balance_abs_threshold", int, text="prefix_hash: and requests per rank above the mean")
    add(options, "max_idle_secs", float, text="manual: a routing key unused for so long is forgotten")
    add(
        options,
        "assignment_mode",
        choices=["random", "min_load", "min_group"],
        text="manual: which worker a new routing key gets",
    )

    keys = parser.add_argument_group("credentials")
    add(keys, "api_key_file", metavar="FILE", text="file with the engines' API key, for checks and scrapes")
    add(keys, "api_key_env", metavar="NAME", text="environment variable with the engines' API key")
    keys.add_argument("--api-key", action=_RefusedKey, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add(keys, "grpc_tls_cert", metavar="FILE", text="the service's certificate chain (PEM): TLS on the gRPC port")
    add(keys, "grpc_tls_key", metavar="FILE", text="its key (PEM)")
    add(keys, "grpc_tls_client_ca", metavar="FILE", text="clients need a certificate that this one has signed (mTLS)")
    add(keys, "envoy_tls_ca", metavar="FILE", text="Envoy: who signs the service's certificate (PEM); turns TLS on")
    add(keys, "envoy_tls_cert", metavar="FILE", text="Envoy: its own certificate chain for the service (PEM)")
    add(keys, "envoy_tls_key", metavar="FILE", text="Envoy: its key (PEM)")
    add(
        keys,
        "envoy_tls_server_name",
        metavar="NAME",
        text="Envoy: what the service's certificate must be for (default: the host it connects to)",
    )

    checks = parser.add_argument_group("loads and health")
    add(checks, "worker_load_check_interval", float, text="time between scrapes of a worker's loads")
    add(checks, "worker_load_check_timeout", float, text="longest time for one scrape")
    add(checks, "worker_startup_check_interval", float, text="time between checks of a worker that is not up yet")
    add(checks, "worker_startup_timeout_secs", float, text="after this, a worker that did not come up is an error")
    add(checks, "health_check_endpoint", metavar="PATH", text="path that answers 200 while an engine is well")
    add(checks, "health_check_interval_secs", float, text="time between health checks")
    add(checks, "health_check_timeout_secs", float, text="longest time for one health check")
    add(checks, "health_failure_threshold", int, text="failed checks in a row that make a worker unhealthy")
    add(checks, "health_success_threshold", int, text="good checks in a row that make it healthy again")

    faults = parser.add_argument_group("faults and overload")
    add(faults, "prefill_timeout_secs", float, text="longest time for a prefill leg, queueing included; then 504")
    add(faults, "max_worker_requests", int, text="most requests in flight on a worker; when all have that many: 429")
    add(faults, "max_rank_tokens", int, text="most tokens on a rank; beyond that: 429")
    add(faults, "max_concurrent_requests", int, text="most requests in flight altogether, -1: any; beyond that: 429")
    add(faults, "max_connections", int, text="most connections of clients; more are closed at once")
    add(faults, "envoy_max_heap_bytes", int, metavar="BYTES", text="memory for Envoy; nearly used up: 503")
    add(faults, "cb_failure_threshold", int, text="failed requests in a row that open a worker's circuit")
    add(faults, "cb_success_threshold", int, text="good ones in a row that close it again")
    add(faults, "cb_timeout_duration_secs", float, text="time before an open circuit is tried again")
    add(faults, "cb_window_duration_secs", float, text="failures further apart than this are not in a row")
    add(faults, "disable_circuit_breaker", bool, text="judge workers by their health checks alone")

    addresses = parser.add_argument_group("addresses")
    add(addresses, "host", text="the gateway's address, for clients")
    add(addresses, "port", int, text="the gateway's port, for clients")
    add(addresses, "transport", choices=["lean", "grpcio"], text="what serves the ext_proc service's port")
    add(addresses, "grpc_host", text="the ext_proc service's address, for Envoy")
    add(addresses, "grpc_port", int, text="the ext_proc service's port, for Envoy")
    add(addresses, "grpc_uds", metavar="PATH", text="a unix socket for Envoy instead of that port")
    add(addresses, "processes", int, text="processes of the service, one for each core it may use (docs/processes.md)")
    add(addresses, "prometheus_host", text="address of the service's own metrics")
    add(addresses, "prometheus_port", int, text="port of the service's own metrics")
    add(addresses, "otel", bool, text="export OpenTelemetry traces, set up by OTEL_* variables (extra [otel])")
    add(addresses, "log_level", choices=["debug", "info", "warn", "error"], text="least severe messages to log")


class _RefusedKey(argparse.Action):
    """`sglang_router` takes the key itself; every user of the machine can then read it in the list of processes."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error("--api-key would show the key to others: use --api-key-file FILE or --api-key-env NAME")


def config_from(args: argparse.Namespace, *, need_workers: bool = True) -> Config:
    """The configuration from the file, if any, and the flags. Raises ConfigError."""
    keys = read_file(args.config) if args.config else {}
    flags = {name: value for name, value in vars(args).items() if name in Config.__struct_fields__}
    if "prefill" in flags:
        flags["prefill"] = [_prefill(words) for words in flags["prefill"]]
    if "decode" in flags:
        flags["decode"] = [{"url": url} for url in flags["decode"]]
    config = build(keys, flags, source=str(args.config))
    if need_workers and not (config.prefill and config.decode):
        raise ConfigError("no workers: give at least one --prefill URL [BOOTSTRAP_PORT] and one --decode URL")
    return config


def _prefill(words: list[str]) -> dict[str, object]:
    """`URL [BOOTSTRAP_PORT]`; 'none' and nothing mean that the engine is asked."""
    if len(words) > 2:
        raise ConfigError(f"--prefill {' '.join(words)}: expected URL [BOOTSTRAP_PORT]")
    entry: dict[str, object] = {"url": words[0]}
    if len(words) == 2 and words[1].lower() != "none":
        if not words[1].isdecimal():
            raise ConfigError(f"--prefill {' '.join(words)}: BOOTSTRAP_PORT must be a number or 'none'")
        entry["bootstrap_port"] = int(words[1])
    return entry
