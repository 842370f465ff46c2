"""What a rank says about its load, and when it says it. No I/O, no clocks.

A rank *publishes* figures at certain steps only, so readers see the past, as with the real engine. There are two
publications: the gauges of /metrics (per prefill batch, every 40 decode iterations, every 30 s when idle) and the
snapshot of /v1/loads (per prefill batch, every 15 decode iterations, at most 50 ms old while no batch runs).
"""

from collections.abc import Callable
from dataclasses import dataclass

from extproc.sim.gpu import GpuModel


@dataclass(frozen=True, slots=True)
class Figures:
    """One rank's load at one moment. Times are virtual seconds; `*_total` are counters since the start."""

    at_s: float = 0.0
    running_reqs: int = 0
    waiting_reqs: int = 0
    waiting_uncached_tokens: int = 0
    """Prompt tokens still to compute, without the bootstrap queue."""
    used_tokens: int = 0
    """Tokens whose KV cache is allocated; queued prompts do not count."""
    queued_tokens: int = 0
    """Prompt tokens of everything that waits, the bootstrap or preallocation queue included."""
    bootstrap_reqs: int = 0
    inflight_reqs: int = 0
    prealloc_reqs: int = 0
    transfer_reqs: int = 0
    retracted_reqs: int = 0
    prefill_tokens_total: int = 0
    prefill_busy_s_total: float = 0.0
    output_tokens_total: int = 0
    output_tokens_per_s: float = 0.0
    """Since the previous publication of the same kind."""


class Publication:
    """The figures as last published, with the output speed since the time before."""

    __slots__ = ("figures",)

    def __init__(self) -> None:
        self.figures = Figures()

    def publish(self, measure: Callable[[float, float], Figures], at_s: float, output_tokens_total: int) -> None:
        """Replace the published figures. `measure` is called with the time and the output speed."""
        elapsed_s = at_s - self.figures.at_s
        made = output_tokens_total - self.figures.output_tokens_total
        self.figures = measure(at_s, made / elapsed_s if elapsed_s > 0 else 0.0)


class Publisher:
    """When a rank's figures become visible."""

    __slots__ = ("_gpu", "_iterations", "_measure", "loads", "metrics")

    def __init__(self, gpu: GpuModel, measure: Callable[[float, float], Figures]) -> None:
        self._gpu = gpu
        self._measure = measure
        self._iterations = 0
        self.metrics = Publication()
        self.loads = Publication()

    def prefill_batch(self, at_s: float, output_tokens_total: int) -> None:
        """A prefill batch ended."""
        self.metrics.publish(self._measure, at_s, output_tokens_total)
        self.loads.publish(self._measure, at_s, output_tokens_total)

    def decode_iteration(self, at_s: float, output_tokens_total: int) -> None:
        """A decode step ended."""
        self._iterations += 1
        if self._iterations % self._gpu.metrics_decode_interval == 0:
            self.metrics.publish(self._measure, at_s, output_tokens_total)
        if self._iterations % self._gpu.loads_decode_interval == 0:
            self.loads.publish(self._measure, at_s, output_tokens_total)

    def no_batch(self, now_s: float, output_tokens_total: int, idle: bool) -> None:
        """No batch runs at `now_s`; `idle`: nothing waits either. Called before figures are read."""
        if idle and now_s - self.metrics.figures.at_s >= self._gpu.metrics_idle_s:
            self.metrics.publish(self._measure, now_s, output_tokens_total)
        if now_s - self.loads.figures.at_s >= self._gpu.loads_stalled_s:
            self.loads.publish(self._measure, now_s, output_tokens_total)
