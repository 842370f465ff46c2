"""`/v1/loads` as SGLang 0.5.23 answers it, JSON and Prometheus text. No I/O.

`timestamp` is the wall clock at which the figures were taken. Speeds and busy time are in real time, i.e. those of a
GPU that is `time_scale` times faster than the modelled one, so that a reader's own clock fits to them.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Role
from extproc.sim.snapshot import Figures

VERSION = "0.5.23"
"""The version of SGLang whose answers these are."""

SECTIONS = {"memory": "memory", "disagg": "disaggregation", "queues": "queues"}
"""Values of `?include=` and the part of the answer that each adds to `core`; `all` is the default."""

PREFIXES = {"memory": "memory", "disaggregation": "disagg", "queues": "queues"}


class LoadsText:
    """Builds the answer for one engine. `start_unix` is the wall clock at virtual time 0."""

    def __init__(self, role: Role, gpu: GpuModel, time_scale: float, start_unix: float) -> None:
        self._role = role
        self._gpu = gpu
        self._time_scale = time_scale
        self._start_unix = start_unix

    def answer(self, figures: Sequence[Figures], now_s: float, include: str = "all", rank: int | None = None) -> Any:
        """The JSON answer for all ranks, or for one."""
        now = datetime.fromtimestamp(self._unix(now_s), UTC)
        wanted = {part.strip() for part in include.split(",")}
        loads = [self._load(i, f, wanted) for i, f in enumerate(figures) if rank is None or i == rank]
        return {
            "timestamp": now.isoformat(),
            "version": VERSION,
            "accelerator": "simulated",
            "num_accelerators": len(figures),
            "loads": loads,
        }

    def old_answer(self, figures: Sequence[Figures]) -> Any:
        """The answer of `/get_load`, of older engines."""
        return [
            {
                "dp_rank": rank,
                "num_reqs": f.running_reqs + f.waiting_reqs,
                "num_waiting_reqs": f.waiting_reqs,
                "num_tokens": f.used_tokens + f.queued_tokens,
            }
            for rank, f in enumerate(figures)
        ]

    def prometheus(self, answer: Any) -> str:
        """The same figures as text."""
        lines: list[str] = []
        loads = answer["loads"]
        if not loads:
            return ""
        for key, value in loads[0].items():
            if key in ("dp_rank", "decode_moments"):
                continue
            if isinstance(value, dict):
                for inner in value:
                    if inner != "mode":
                        name = f"sglang_{PREFIXES[key]}_{inner}"
                        _family(lines, name, [(load["dp_rank"], load[key][inner]) for load in loads])
            else:
                _family(lines, f"sglang_{key}", [(load["dp_rank"], load[key]) for load in loads])
        return "\n".join(lines) + "\n"

    def _unix(self, at_s: float) -> float:
        return self._start_unix + at_s / self._time_scale

    def _load(self, rank: int, f: Figures, wanted: set[str]) -> dict[str, Any]:
        gpu = self._gpu
        total = f.used_tokens + f.queued_tokens
        load: dict[str, Any] = {
            "timestamp": self._unix(f.at_s),
            "dp_rank": rank,
            "num_running_reqs": f.running_reqs,
            "num_waiting_reqs": f.waiting_reqs,
            "num_waiting_uncached_tokens": f.waiting_uncached_tokens,
            "num_used_tokens": f.used_tokens,
            "num_total_tokens": total,
            "num_active_tokens": f.used_tokens if self._role is Role.DECODE else total,
            "num_prealloc_ready_tokens": 0,
            "max_total_num_tokens": gpu.kv_capacity_tokens,
            "max_running_requests": gpu.max_running_requests,
            "token_usage": round(f.used_tokens / gpu.kv_capacity_tokens, 4),
            "gen_throughput": round(f.output_tokens_per_s * self._time_scale, 2),
            "cache_hit_rate": 0.0,
            "utilization": round(f.running_reqs / gpu.max_running_requests, 4),
            "total_prefill_uncached_tokens": f.prefill_tokens_total,
            "total_prefill_busy_us": round(f.prefill_busy_s_total / self._time_scale * 1e6),
            "decode_moments": None,
        }
        parts: dict[str, Any] = {
            "memory": {
                "weight_gb": 80.0,
                "kv_cache_gb": round(gpu.kv_capacity_tokens * gpu.kv_bytes_per_token / 1e9, 2),
                "graph_gb": 1.0,
                "token_capacity": gpu.kv_capacity_tokens,
            },
            "disaggregation": {
                "mode": self._role.value,
                "prefill_bootstrap_queue_reqs": f.bootstrap_reqs,
                "prefill_inflight_queue_reqs": f.inflight_reqs,
                "decode_prealloc_queue_reqs": f.prealloc_reqs,
                "decode_transfer_queue_reqs": f.transfer_reqs,
                "decode_retracted_queue_reqs": f.retracted_reqs,
                "kv_transfer_speed_gb_s": 0.0 if self._role is Role.PREFILL else gpu.kv_transfer_gb_per_s,
                "kv_transfer_latency_ms": 0.0 if self._role is Role.PREFILL else gpu.kv_transfer_base_ms,
            },
            "queues": {
                "waiting": f.waiting_reqs,
                "grammar": 0,
                "paused": 0,
                "retracted": f.retracted_reqs,
                "prealloc_ready": 0,
            },
        }
        for asked, part in SECTIONS.items():
            if asked in wanted or "all" in wanted:
                load[part] = parts[part]
        return load


def _family(lines: list[str], name: str, values: list[tuple[int, Any]]) -> None:
    lines.append(f"# TYPE {name} gauge")
    lines.extend(f'{name}{{dp_rank="{rank}"}} {value}' for rank, value in values)
