"""What a modelled rank publishes about its load, and when. No I/O.

The figures and their lag are those of `extproc.sim.snapshot` (the engine's): a rank publishes at certain steps only,
so that a scrape sees the past. `metrics` stands for /metrics, `loads` for /v1/loads.
"""

import enum
from typing import NamedTuple

from extproc.model import RankLoad
from extproc.sim.gpu import GpuModel

ENGINE_EPOCH_S = 1_700_000_000.0
"""The engines' wall clock at virtual time 0: Unix seconds, so that nobody takes it for the service's own clock."""


class Page(enum.StrEnum):
    """Which page is scraped."""

    METRICS = "metrics"
    LOADS = "loads"


class Figures(NamedTuple):
    """One rank's load at one moment; `*_total` are counters since the start."""

    at_s: float = 0.0
    used_tokens: int = 0
    queued_tokens: int = 0
    """Prompt tokens of everything that waits, the bootstrap or preallocation queue included."""
    waiting_uncached_tokens: int = 0
    running_requests: int = 0
    waiting_requests: int = 0
    prefill_tokens_total: int = 0
    prefill_busy_s_total: float = 0.0
    output_tokens_per_s: float = 0.0


class Pages:
    """The two publications of one rank."""

    __slots__ = ("loads", "metrics")

    def __init__(self) -> None:
        self.loads = Figures()
        self.metrics = Figures()

    def stalled(self, figures: Figures, gpu: GpuModel, idle: bool) -> None:
        """No batch runs; `figures` are the true ones. `idle`: nothing waits either."""
        if figures.at_s - self.loads.at_s >= gpu.loads_stalled_s:
            self.loads = figures
        if idle and figures.at_s - self.metrics.at_s >= gpu.metrics_idle_s:
            self.metrics = figures


def rank_load(page: Page, pages: Pages, dp_rank: int, gpu: GpuModel) -> RankLoad:
    """What the service's parser makes of a rank's lines on a page: the fields that `loads_text` finds there."""
    if page is Page.METRICS:
        shown = pages.metrics
        return RankLoad(
            dp_rank,
            used_tokens=float(shown.used_tokens),
            max_total_tokens=float(gpu.kv_capacity_tokens),
            running_requests=float(shown.running_requests),
            queued_requests=float(shown.waiting_requests),
            token_usage_ratio=shown.used_tokens / gpu.kv_capacity_tokens,
            output_tokens_per_s=shown.output_tokens_per_s,
        )
    shown = pages.loads
    return RankLoad(
        dp_rank,
        used_tokens=float(shown.used_tokens),
        total_tokens=float(shown.used_tokens + shown.queued_tokens),
        waiting_uncached_tokens=float(shown.waiting_uncached_tokens),
        max_total_tokens=float(gpu.kv_capacity_tokens),
        running_requests=float(shown.running_requests),
        queued_requests=float(shown.waiting_requests),
        token_usage_ratio=shown.used_tokens / gpu.kv_capacity_tokens,
        output_tokens_per_s=shown.output_tokens_per_s,
        prefill_uncached_tokens_total=float(shown.prefill_tokens_total),
        prefill_busy_us_total=float(round(shown.prefill_busy_s_total * 1e6)),
        snapshot_s=ENGINE_EPOCH_S + shown.at_s,
    )
