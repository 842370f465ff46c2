"""How long prefill takes, with or without the growth of attention over long prompts. No I/O.

Without: `GpuModel.prefill_s`, every token costs the same, as in the simulated engines. With: a token costs more the
later it stands in its prompt. The slope comes from the measurements of the LMSYS blog that GpuModel is calibrated by
(https://lmsys.org/blog/2025-05-05-large-scale-ep, prefill on 4 nodes, EP32): 57,674, 54,543 and 50,302 tokens/s a node
of 8 ranks for prompts of 1K, 2K and 4K tokens, i.e. 138.7, 146.7 and 159.0 us a token and rank. It is far beyond its
measured range for prompts of 100K tokens, but so is a constant cost.
"""

from extproc.sim.gpu import GpuModel

ATTENTION_S = (8 / 50_302 - 8 / 57_674) / (2_048 - 512)
"""Seconds for a token and each token before it (13.2 ns): from 1K to 4K prompts the mean position grows by 1,536."""
NEUTRAL_POSITION = 1_000
"""Mean position at GpuModel's calibration point, prompts of 2,000 tokens: there both models agree."""


class PrefillCost:
    """Work in seconds of one rank."""

    __slots__ = ("_overhead_s", "_slope_s", "_token_s")

    def __init__(self, gpu: GpuModel, attention: bool) -> None:
        self._token_s = 1.0 / gpu.prefill_tokens_per_s
        self._overhead_s = gpu.prefill_batch_overhead_ms / 1e3
        self._slope_s = ATTENTION_S if attention else 0.0

    def work_s(self, first: int, tokens: int) -> float:
        """Computing `tokens` of a prompt from position `first` on."""
        return tokens * (self._token_s + self._slope_s * (first + tokens / 2 - NEUTRAL_POSITION))

    def batch_s(self, work_s: float) -> float:
        """A batch with that much work in it."""
        return self._overhead_s + work_s
