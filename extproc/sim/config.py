"""How one simulated engine is set up."""

from dataclasses import dataclass, field

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role
from extproc.sim.model import BOOTSTRAP_TIMEOUT_S, WAITING_TIMEOUT_S


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """`*_s` are virtual seconds unless the comment says otherwise; divide by `time_scale` for what a client sees."""

    role: Role = Role.NULL
    host: str = "127.0.0.1"
    port: int = 0
    """0: any free port."""
    bootstrap_port: int = 0
    """Prefill only. 0: any free port. The real engine's default is 8998."""
    dp_size: int = 1
    model: str = "sim-model"
    time_scale: float = 1.0
    """How many times faster than the modelled GPU the engine runs in real time."""
    gpu: GpuModel = field(default_factory=GpuModel)
    context_tokens: int = 131_072
    """Longest prompt that is accepted."""
    chat_output_tokens: int = 128
    """Length of a chat answer without a limit, where a real model would stop by itself."""
    bootstrap_timeout_s: float = BOOTSTRAP_TIMEOUT_S
    waiting_timeout_s: float = WAITING_TIMEOUT_S
    bootstrap_retries: int = 20
    """How often decode asks a bootstrap server that does not answer (`_max_ensure_retries`)."""
    bootstrap_retry_s: float = 1.0
    heartbeat_loss_s: float = 10.0
    """From a lost prefill engine to decode's notice: 2 heartbeats of 5 s
    (`SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE`, `SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL`)."""
    header_overrides: bool = False
    """`SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES`: read `x-override-*` headers on /generate and chat."""
    stream_interval: int = 1
    """Tokens in one streamed chunk, at least (`--stream-interval`)."""
    api_key: str | None = field(default=None, repr=False)
    """With it requests need `Authorization: Bearer KEY`."""
    faults: tuple[str, ...] = ()
    """What goes wrong on purpose; `faults` has the syntax."""
    fault_seed: int = 0
    keepalive_s: float = 75.0
    """Real seconds before an idle client connection is closed. The real engine takes 5 (`SGLANG_TIMEOUT_KEEP_ALIVE`),
    at the price that a request can meet the close."""
    max_body_bytes: int = 256 * 1024 * 1024
    keep_records: int = 10_000
    """Requests remembered; older ones are forgotten."""
    keep_body_bytes: int = 1024 * 1024
    """Longest body remembered as it came; of longer ones only length and SHA-256 are kept."""
    tick_s: float = 0.001
    """Real seconds between two looks at the model, at least."""
