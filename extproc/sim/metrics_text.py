"""`/metrics` as SGLang 0.5.23 writes it: names, labels and their order as in the engine's own output. No I/O.

Gauges that the model has no figure for are there with the value the engine gives them before anything happens.
"""

import math
from collections.abc import Callable, Sequence

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role
from extproc.sim.snapshot import Figures

ZERO_GAUGES = (
    "num_paused_reqs",
    "num_grammar_queue_reqs",
    "cache_hit_rate",
    "swa_token_usage",
    "mamba_usage",
    "kv_evictable_tokens",
    "swa_available_tokens",
    "swa_evictable_tokens",
    "swa_used_tokens",
    "mamba_available_tokens",
    "mamba_evictable_tokens",
    "mamba_used_tokens",
    "spec_accept_length",
    "spec_accept_rate",
    "spec_cap_length",
    "spec_block_accept_length",
    "spec_num_steps",
    "spec_num_draft_tokens",
    "num_decode_host_receive_queue_reqs",
    "num_decode_deferred_kv_release_reqs",
    "pending_prealloc_token_usage",
    "prealloc_full_token_usage",
    "prealloc_swa_token_usage",
    "new_token_ratio",
    "is_cuda_graph",
    "num_unique_running_routing_keys",
)

PER_PROCESS_GAUGES = frozenset({"num_retracted_reqs", "num_paused_reqs"})
"""These carry a `pid` label."""

HELP = {
    "num_running_reqs": "The number of running requests.",
    "num_queue_reqs": "The number of requests in the waiting queue.",
    "num_used_tokens": "The number of used tokens.",
    "token_usage": "The token usage.",
    "gen_throughput": "The generation throughput (token/s).",
}


def gauges(gpu: GpuModel, time_scale: float) -> dict[str, Callable[[Figures], float]]:
    """Each gauge with what it shows of a rank's published figures, in real time units."""
    capacity = gpu.kv_capacity_tokens
    shown: dict[str, Callable[[Figures], float]] = {
        "num_retracted_reqs": lambda f: f.retracted_reqs,
        "num_running_reqs": lambda f: f.running_reqs,
        "num_queue_reqs": lambda f: f.waiting_reqs,
        "gen_throughput": lambda f: f.output_tokens_per_s * time_scale,
        "decode_sum_seq_lens": lambda f: f.used_tokens if f.running_reqs else 0,
        "token_usage": lambda f: f.used_tokens / capacity,
        "full_token_usage": lambda f: f.used_tokens / capacity,
        "num_used_tokens": lambda f: f.used_tokens,
        "kv_available_tokens": lambda f: capacity - f.used_tokens,
        "kv_used_tokens": lambda f: f.used_tokens,
        "num_prefill_bootstrap_queue_reqs": lambda f: f.bootstrap_reqs,
        "num_prefill_inflight_queue_reqs": lambda f: f.inflight_reqs,
        "num_decode_prealloc_queue_reqs": lambda f: f.prealloc_reqs,
        "num_decode_transfer_queue_reqs": lambda f: f.transfer_reqs,
        "utilization": lambda f: f.running_reqs / gpu.max_running_requests,
        "fwd_occupancy": lambda f: math.nan,
    }
    for name in ZERO_GAUGES:
        shown[name] = lambda f: 0
    return shown


class MetricsText:
    """Writes the page for one engine."""

    def __init__(self, role: Role, dp_size: int, model: str, gpu: GpuModel, time_scale: float) -> None:
        self._gauges = gauges(gpu, time_scale)
        name = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._labels: list[Callable[[str, str], str]] = []
        for rank in range(dp_size):
            dp = f'dp_rank="{rank}",' if dp_size > 1 else ""
            before = f'{dp}engine_type="{role.engine_type}",'
            after = f'model_name="{name}",moe_ep_rank="{rank}",'
            # The first process of the engine is the server; the schedulers follow.
            self._labels.append(_labels(before, after, f'pp_rank="0",tp_rank="{rank}"', pid=1000 + rank))

    def write(self, figures: Sequence[Figures]) -> str:
        """The whole page, from each rank's published figures."""
        lines: list[str] = []
        for name, value_of in self._gauges.items():
            lines.append(f"# HELP sglang:{name} {HELP.get(name, name)}")
            lines.append(f"# TYPE sglang:{name} gauge")
            for labels, rank_figures in zip(self._labels, figures, strict=True):
                pid = "pid" if name in PER_PROCESS_GAUGES else ""
                value = float(value_of(rank_figures))
                lines.append(f"sglang:{name}{labels('', pid)} {'NaN' if math.isnan(value) else repr(value)}")
        name = "prefill_effective_tokens_total"
        lines.append(f"# HELP sglang:{name} The number of prompt tokens, by where their KV cache came from.")
        lines.append(f"# TYPE sglang:{name} counter")
        for labels, rank_figures in zip(self._labels, figures, strict=True):
            for mode in ("input", "device_hit", "host_hit", "storage_hit"):
                tokens = rank_figures.prefill_tokens_total if mode == "input" else 0
                label = f'mode="{mode}",'
                lines.append(f"sglang:{name}{labels(label, '')} {float(tokens)!r}")
        return "\n".join(lines) + "\n"


def _labels(before: str, after: str, last: str, pid: int) -> Callable[[str, str], str]:
    """Labels in alphabetical order, with room for one more before `model_name` and for `pid`."""

    def text(extra: str, with_pid: str) -> str:
        pid_label = f'pid="{pid}",' if with_pid else ""
        return "{" + before + extra + after + pid_label + last + "}"

    return text
