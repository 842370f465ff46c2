"""What an engine says about itself, and how that goes together with what the configuration says.

Pure. `/server_info` (older engines: `/get_server_info`) answers the engine's resolved start-up arguments as one flat
object, with `version` and a list `internal_states` (one object a DP rank, which repeats the arguments); `/model_info`
(older: `/get_model_info`) answers a few of them. Field names as in SGLang's `entrypoints/http_server.py` and
`server_args.py`, 0.4.6 to 0.5.23. Everything may be missing, and nothing that is read here raises.

`/server_info` also holds the engine's `api_key`: never log such an answer.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from extproc.config import WorkerConfig
from extproc.model import Role, Worker

SERVER_INFO_PATHS = ("/server_info", "/get_server_info")
MODEL_INFO_PATHS = ("/model_info", "/get_model_info")

DEFAULT_BOOTSTRAP_PORT = 8998
"""SGLang's default of `--disaggregation-bootstrap-port`."""

MAX_DP_SIZE = 4096
"""Above this a dp_size is taken for garbage, as a table of loads is made by it. Each rank needs a GPU of its own."""

MODES = ("null", "prefill", "decode")
"""Values of `--disaggregation-mode`; null: the engine does both and knows nothing of PD."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What an engine said; None where it did not, or said nonsense."""

    mode: str | None = None
    """One of `MODES`."""
    dp_size: int | None = None
    model: str | None = None
    """`served_model_name`, or the model's path, which is SGLang's default for it."""
    bootstrap_port: int | None = None
    metrics: bool | None = None
    """Whether `/metrics` is served (`--enable-metrics`)."""
    load_balance_method: str | None = None
    """How the engine spreads requests that name no rank."""
    version: str | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was said."""
        return self == WorkerInfo()

    def completed_by(self, other: "WorkerInfo") -> "WorkerInfo":
        """This, with `other`'s word where this has none."""
        missing = {
            field.name: getattr(other, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        return dataclasses.replace(self, **missing)


def parse_info(body: bytes) -> WorkerInfo:
    """Reads the answer of any of the four endpoints; empty when it is not what they answer."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return WorkerInfo()
    info = WorkerInfo()
    for source in _sources(answer):
        info = info.completed_by(_read(source))
    return info


def merge(worker: Worker, config: WorkerConfig, info: WorkerInfo) -> Worker:
    """The worker as it is now: its configuration, completed by what the engine said.

    Discovered values of an earlier life of the engine are dropped: it may have come back with other flags.
    """
    prefill = worker.role is Role.PREFILL
    return dataclasses.replace(
        worker,
        dp_size=config.dp_size or info.dp_size,
        model=config.model or info.model,
        bootstrap_port=(config.bootstrap_port or info.bootstrap_port or DEFAULT_BOOTSTRAP_PORT) if prefill else None,
    )


def role_conflict(role: Role, info: WorkerInfo) -> str | None:
    """Why the worker must not get requests of this role, if it must not: the engine was started for the other one."""
    if info.mode not in (Role.PREFILL, Role.DECODE) or info.mode == role:
        return None
    return (
        f"is configured under {role}, but the engine was started with --disaggregation-mode {info.mode}: "
        f"move it to {info.mode}, or restart it with --disaggregation-mode {role}"
    )


def problems(worker: Worker, config: WorkerConfig, info: WorkerInfo) -> tuple[str, ...]:
    """What does not fit together, in words that say what to do; to be read after the worker's name."""
    if info.empty:
        return (
            f"did not say what it is ({' and '.join(SERVER_INFO_PATHS)} gave nothing usable): "
            "set dp_size, model and, for prefill, bootstrap_port in the configuration",
        )
    return tuple(filter(None, (role_conflict(worker.role, info), *_advice(worker, config, info))))


def _advice(worker: Worker, config: WorkerConfig, info: WorkerInfo) -> Iterator[str]:
    if info.mode == "null":
        yield (
            "runs without PD disaggregation, so it will do all of a request's work: "
            f"restart it with --disaggregation-mode {worker.role}"
        )
    for name, configured, said in (
        ("dp_size", config.dp_size, info.dp_size),
        ("model", config.model, info.model),
        ("bootstrap_port", config.bootstrap_port, info.bootstrap_port if worker.role is Role.PREFILL else None),
    ):
        if configured is not None and said is not None and configured != said:
            yield (
                f"has {name} {configured} in the configuration, which is used, but the engine says {said}: "
                "correct or remove the setting"
            )
    if (config.dp_size or info.dp_size) is None:
        yield "has an unknown dp_size, so no DP rank is chosen for it: set dp_size in the configuration"
    if worker.role is Role.PREFILL and (config.bootstrap_port or info.bootstrap_port) is None:
        yield (
            f"has an unknown bootstrap port, {DEFAULT_BOOTSTRAP_PORT} is assumed: "
            "set bootstrap_port in the configuration if it is another"
        )
    if info.metrics is False and config.metrics_urls is None:
        yield (
            "serves no /metrics, its load can only come from /v1/loads, which older engines lack: "
            "restart it with --enable-metrics"
        )


def _sources(answer: Any) -> Iterator[Mapping[str, Any]]:
    """Where the arguments can be: the answer itself, then the ranks' states, each of them an object."""
    if not isinstance(answer, dict):
        return
    yield answer
    states = answer.get("internal_states")
    for state in states if isinstance(states, list) else ():
        if isinstance(state, dict):
            yield state


def _read(source: Mapping[str, Any]) -> WorkerInfo:
    mode = source.get("disaggregation_mode")
    return WorkerInfo(
        mode=mode if isinstance(mode, str) and mode in MODES else None,
        dp_size=_integer(source.get("dp_size"), MAX_DP_SIZE),
        model=_text(source.get("served_model_name")) or _text(source.get("model_path")),
        bootstrap_port=_integer(source.get("disaggregation_bootstrap_port"), 65535),
        metrics=_flag(source.get("enable_metrics")),
        load_balance_method=_text(source.get("load_balance_method")),
        version=_text(source.get("version")),
    )


def _integer(value: Any, highest: int) -> int | None:
    """A number in [1, highest], also when it came as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= len(str(highest)):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= highest else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _flag(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None
