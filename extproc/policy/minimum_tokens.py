"""`minimum_tokens`: the DP rank with the fewest tokens.

Source: `DPRankLoadPolicy` / `--dp-minimum-tokens-scheduler` of SGLang's gateway. Ties go to the lowest rank there, and
here with the `scraped` load model, which is that gateway's rule; else to any, so that several services do not all
begin with rank 0.
"""

from collections.abc import Sequence

from extproc.load import WorkerState
from extproc.policy.base import PolicyContext


class MinimumTokens:
    """Looks at the load model's figures only; that the charge follows in the same step spreads a burst."""

    def __init__(self, context: PolicyContext) -> None:
        self._loads = context.loads
        self._uniform = context.rng.random
        self._lowest_of_equals = context.config.load_model == "scraped"

    def select_dp_rank(
        self, state: WorkerState, tokens: float, rank_tokens: Sequence[float] | None = None
    ) -> int | None:
        """The least loaded rank."""
        loads = self._loads.rank_loads((state,)).tokens[0] if rank_tokens is None else rank_tokens
        least = min(loads)
        equals = loads.count(least)
        if equals == 1 or self._lowest_of_equals:
            return loads.index(least)
        number = int(self._uniform() * equals)
        if equals == len(loads):  # an idle worker
            return number
        return [dp_rank for dp_rank, load in enumerate(loads) if load == least][number]
