"""The configuration: one typed tree, read from YAML, completed by flags.

Pure but for `read_file`. Every key of the file is a field here under the same name; a flag is the same name with
dashes. Names and defaults follow `sglang_router` (0.3.2) where it has the setting.
"""

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta

from extproc.circuit import NO_LIMITS, CircuitLimits
from extproc.errors import ConfigError
from extproc.model import Role, Worker

Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Delay = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Factor = Annotated[float, Meta(ge=1)]

MIB = 1 << 20


LogLevel = Literal["debug", "info", "warn", "error"]
TransportName = Literal["lean", "grpcio"]
Injection = Literal["body", "headers", "auto"]
AssignmentMode = Literal["random", "min_load", "min_group"]


class WorkerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One engine. Everything but `url` is discovered from the engine when absent, and wins over it when set."""

    url: str
    bootstrap_port: Port | None = None
    bootstrap_host: str | None = None
    dp_size: Count | None = None
    model: str | None = None
    header_overrides: bool = False
    """It was started with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1 (`injection: auto`)."""
    metrics_urls: tuple[str, ...] | None = None
    """Where to scrape, in order of preference; a path is relative to `url`. Default: `Config.metrics_paths`."""
    api_key_file: str | None = None
    api_key_env: str | None = None
    """Where the engine's key is, for checks and scrapes; default: as for all (`Config.api_key_file`)."""
    draining: bool = False
    """Begin with no new requests for it; `extproc drain` changes that while the service runs."""

    def to_worker(self, role: Role) -> Worker:
        """The worker as far as the configuration knows it (not resolved, nothing discovered).

        Raises ConfigError when the URL is not `http://host[:port]`.
        """
        parts = urlsplit(self.url)
        extras = parts.path.strip("/") or parts.query or parts.username
        if parts.scheme != "http" or not parts.hostname or extras:
            raise ConfigError(f"{role} worker url {self.url!r}: expected http://HOST[:PORT] and nothing after it")
        try:
            port = parts.port or 80
        except ValueError as error:
            raise ConfigError(f"{role} worker url {self.url!r}: {error}") from None
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        prefill = role is Role.PREFILL
        return Worker(
            name=f"{host}:{port}",
            role=role,
            url=f"http://{host}:{port}",
            endpoint=f"{host}:{port}" if is_ip(parts.hostname) else None,
            bootstrap_host=(self.bootstrap_host or parts.hostname) if prefill else None,
            bootstrap_port=self.bootstrap_port if prefill else None,
            dp_size=self.dp_size,
            model=self.model,
        )


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that can be set. Times are in seconds, sizes in bytes."""

    prefill: tuple[WorkerConfig, ...] = ()
    decode: tuple[WorkerConfig, ...] = ()

    host: str = "0.0.0.0"  # noqa: S104 - the gateway's public address, as sglang_router's default
    port: Port = 30000
    transport: TransportName = "lean"
    """What serves the gRPC port: our own HTTP/2, or grpcio at five times the CPU (docs/performance.md)."""
    grpc_host: str = "127.0.0.1"
    grpc_port: Port = 9002
    """Envoy asks here. 9002 is the reference port of the endpoint-picker protocol."""
    grpc_uds: str | None = None
    """Path of a unix socket to ask at instead."""
    grpc_tls_cert: str | None = None
    grpc_tls_key: str | None = None
    """PEM files: the service's certificate chain and key. With them the gRPC port takes TLS only."""
    grpc_tls_client_ca: str | None = None
    """PEM file: who must have signed the certificates of clients (mTLS)."""
    envoy_tls_ca: str | None = None
    """PEM file, as Envoy finds it: who must have signed the service's certificate. With it Envoy uses TLS."""
    envoy_tls_cert: str | None = None
    envoy_tls_key: str | None = None
    """PEM files, as Envoy finds them: its own certificate chain and key for the service."""
    envoy_tls_server_name: str | None = None
    """What the service's certificate must be for: DNS name, IP address or URI. Default: the host Envoy connects to."""
    processes: Count = 1
    """Processes that serve Envoy, each on an address of its own: see `target_of` and docs/processes.md."""
    prometheus_host: str = "127.0.0.1"
    prometheus_port: Port = 29000
    log_level: LogLevel = "info"

    policy: str = "least_load"
    """Within 1 % of a clairvoyant rule's time to first token in the lab, for few ranks and many (docs/lab.md)."""
    prefill_policy: str | None = None
    decode_policy: str | None = None
    dp_minimum_tokens_scheduler: bool = True
    prefill_rank_policy: str | None = None
    decode_rank_policy: str | None = None
    """Per-role choice of the DP rank; default `minimum_tokens`, or `bootstrap_room` when the scheduler is off."""
    load_model: str = "live"
    """`live`: the service's own ledger, corrected by scrapes; `scraped`: the existing gateway's rule."""

    # Options of policies; each file in `policy/` says which it uses. `prefix_hash`: defaults of smg 1.13.
    cache_threshold: Share = 0.3
    cache_aware_rank: bool = False
    balance_abs_threshold: NotNegative = 64
    balance_rel_threshold: Factor = 1.5
    eviction_interval_secs: Seconds = 60
    max_tree_size: Count = 64 * MIB
    """Memory of each role's prefix tree in bytes, objects included (there: characters of each worker's text)."""
    bucket_adjust_interval_secs: Seconds = 5
    prefix_token_count: Count = 256
    prefix_hash_load_factor: Factor = 1.25
    prefix_hash_balance_abs_threshold: NotNegative = 10
    max_idle_secs: Seconds = 4 * 3600
    assignment_mode: AssignmentMode = "random"

    worker_load_check_interval: Seconds = 10
    worker_load_check_timeout: Seconds = 5
    metrics_paths: tuple[str, ...] = ("/v1/loads?include=core", "/metrics")
    """Tried in this order until one gives per-rank loads, as JSON or Prometheus text. `/v1/loads` first: a fortieth of
    the size, always on, with what is queued and when it was taken, and fresher: gauges on `/metrics` may stand for 30 s
    on an idle rank."""

    worker_startup_check_interval: Seconds = 30
    worker_startup_timeout_secs: Seconds = 1800
    health_check_endpoint: str = "/health"
    health_check_interval_secs: Seconds = 5
    health_check_timeout_secs: Seconds = 5
    health_failure_threshold: Count = 3
    health_success_threshold: Count = 1

    cb_failure_threshold: Count = 10
    cb_success_threshold: Count = 3
    cb_timeout_duration_secs: Seconds = 60
    cb_window_duration_secs: Seconds = 120
    disable_circuit_breaker: bool = False

    api_key_file: str | None = None
    api_key_env: str | None = None
    """File or environment variable with the key (`--api-key`) of engines that have none of their own."""

    prefill_timeout_secs: Seconds = 600
    """Longest time from dispatch to the end of the prefill leg, queueing included; then 504."""
    max_worker_requests: Count | None = None
    """Most legs in flight on a worker; when all have that many: 429."""
    max_rank_tokens: Count | None = None
    """Most tokens on a rank, by the load model; a request that would exceed it on the picked rank: 429."""
    max_concurrent_requests: Annotated[int, Meta(ge=-1)] = -1
    """Most generation requests in flight in the whole gateway; beyond that: 429. 0 or less: no limit."""
    max_connections: Count = 50_000
    """Most connections of clients; more are closed at once. The figure is that of Envoy's example of an edge proxy."""
    envoy_max_heap_bytes: Count = 2 << 30
    """Memory for Envoy, as in the same example: when it is nearly used up, requests and uploads get 503."""

    direct_paths: tuple[str, ...] = (
        "GET /health",
        "GET /health_generate",
        "GET /v1/models",
        "GET /v1/models/*",
        "GET /model_info",
        "GET /get_model_info",
        "POST /tokenize",
        "POST /detokenize",
        "POST /v1/tokenize",
        "POST /v1/detokenize",
    )
    """Requests passed on to a decode worker as they are, `METHOD PATH`; every other path but the generation endpoints
    gets 404. An engine's other paths are for its operator, or generate without a pair."""

    max_payload_size: Count = 64 * MIB
    injection: Injection = "body"
    """Where routing fields go. `body`: into the JSON body. `headers`: into `x-override-*` headers, and the body is not
    read (engines started with SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES=1; `/generate` and chat only; docs/injection.md).
    `auto`: headers where all workers have `header_overrides` and no policy looks at prompts."""
    response_headers: bool = False
    """Name the picked workers to the client. Off: they are internal addresses."""
    explain: bool = False
    """Tell clients (`x-pd-prefill-loads`, `x-pd-decode-loads`) and the log what loads a pick was made by."""
    otel: bool = False
    """Make OpenTelemetry traces and export them, as the environment's OTEL_* variables say (docs/otel.md)."""
    tokenizer_path: str | None = None
    """The model's `tokenizer.json`, or the folder it is in: prompts up to 8 KiB are then counted, not estimated."""
    retry_max_retries: Annotated[int, Meta(ge=0)] = 2
    """Further attempts with another pair, while the client has got nothing."""
    request_timeout_secs: Seconds = 1800
    shutdown_drain_delay_secs: Delay = 5
    """How long new requests are still served after SIGINT or SIGTERM, while health checks already send them elsewhere.
    Kubernetes needs up to seconds to tell every node that a pod is leaving (Istio's proxies go on for 5 s as well:
    `terminationDrainDuration`); a load balancer that probes needs its interval times its failure threshold."""
    shutdown_grace_period_secs: Seconds = 180
    """How long requests may go on after that."""

    def workers(self) -> list[Worker]:
        """All workers of both roles, in the order given. Raises ConfigError for a bad URL or one listed twice."""
        workers = [entry.to_worker(role) for role in Role for entry in getattr(self, role)]
        seen = set[str]()
        for worker in workers:
            if worker.name in seen:
                raise ConfigError(f"worker {worker.name} is listed twice")
            seen.add(worker.name)
        return workers

    def models(self) -> tuple[str, ...]:
        """The model that requests must name; empty when none is configured: then any name goes to the engines.

        Raises ConfigError for more than one: a gateway does not tell workers of different models apart.
        """
        models = sorted({entry.model for entry in (*self.prefill, *self.decode) if entry.model})
        if len(models) > 1:
            raise ConfigError(f"workers of different models ({', '.join(models)}): run one gateway for each model")
        return tuple(models)

    def check_credentials(self) -> None:
        """Whether the settings of TLS, the unix socket and API keys go together; files are not looked at.

        Raises ConfigError.
        """
        for cert, key in (("grpc_tls_cert", "grpc_tls_key"), ("envoy_tls_cert", "envoy_tls_key")):
            if (getattr(self, cert) is None) != (getattr(self, key) is None):
                given, missing = (cert, key) if getattr(self, cert) else (key, cert)
                raise ConfigError(f"{given} without {missing}: set both, or neither")
        if self.grpc_tls_client_ca and not self.grpc_tls_cert:
            raise ConfigError("grpc_tls_client_ca needs TLS: set grpc_tls_cert and grpc_tls_key, too")
        if self.grpc_uds and self.grpc_tls_cert:
            raise ConfigError("grpc_uds and grpc_tls_cert: a unix socket takes no TLS, set one of them only")
        for name in ("envoy_tls_cert", "envoy_tls_server_name"):
            if getattr(self, name) and not self.envoy_tls_ca:
                raise ConfigError(f"{name} needs TLS: set envoy_tls_ca, too, by which Envoy knows the service")
        places: dict[str, Config | WorkerConfig] = {"": self}
        places |= {f"{role}[{i}].": entry for role in Role for i, entry in enumerate(getattr(self, role))}
        for place, keys in places.items():
            if keys.api_key_file is not None and keys.api_key_env is not None:
                raise ConfigError(f"{place}api_key_file and {place}api_key_env: set one of them only")

    def check_processes(self) -> None:
        """Whether the settings allow for several processes. Raises ConfigError."""
        if self.processes == 1:
            return
        if "manual" in {self.worker_policy(role) for role in Role}:
            raise ConfigError("processes: the policy manual remembers its keys in one process: set processes: 1")
        if self.grpc_port + self.processes - 1 > 65535:
            raise ConfigError(f"processes: each takes a port from grpc_port {self.grpc_port} on: there are not so many")

    def circuit_limits(self) -> CircuitLimits:
        """Of the workers' circuit breakers."""
        if self.disable_circuit_breaker:
            return NO_LIMITS
        return CircuitLimits(
            self.cb_failure_threshold,
            self.cb_success_threshold,
            self.cb_timeout_duration_secs,
            self.cb_window_duration_secs,
        )

    def worker_policy(self, role: Role) -> str:
        """Name of the policy that picks the worker of a role."""
        return (self.prefill_policy if role is Role.PREFILL else self.decode_policy) or self.policy

    def rank_policy(self, role: Role) -> str:
        """Name of the policy that picks the DP rank on the worker of a role."""
        chosen = self.prefill_rank_policy if role is Role.PREFILL else self.decode_rank_policy
        return chosen or ("minimum_tokens" if self.dp_minimum_tokens_scheduler else "bootstrap_room")


def target_of(target: str, process: int, processes: int) -> str:
    """Where one of the service's processes serves, by where the service does (`host:port` or `unix:PATH`).

    One process: right there. Several: the port counted on, or the path with the process's number behind it.
    """
    if processes == 1:
        return target
    if target.startswith("unix:"):
        return f"{target}.{process}"
    host, _, port = target.rpartition(":")
    return f"{host}:{int(port) + process}"


def read_file(path: Path) -> dict[str, object]:
    """The keys of a YAML file. Raises ConfigError when it cannot be read or is not a mapping."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of settings at the top")
    return content


def build(file_keys: Mapping[str, object], flags: Mapping[str, object], source: str = "configuration") -> Config:
    """The configuration from a file's keys and the flags given; flags win. Raises ConfigError that names the key."""
    try:
        msgspec.convert(dict(file_keys), Config)  # alone, so that an error says where it comes from
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_readable(error)}") from None
    try:
        config = msgspec.convert({**file_keys, **flags}, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"flags: {_readable(error)}") from None
    config.workers()
    config.models()
    config.check_credentials()
    config.check_processes()
    return config


def _readable(error: msgspec.ValidationError) -> str:
    """msgspec's message with the key in front: `prefill[0].url: Expected ...`."""
    message, _, path = str(error).partition(" - at `$.")
    return f"{path.rstrip('`')}: {message}" if path else message


def is_ip(host: str) -> bool:
    """Whether a host (without brackets) is an IP address literal."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
