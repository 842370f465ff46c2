"""`minimum_tokens`: the DP rank with the fewest tokens.

Source: `DPRankLoadPolicy` / `--dp-minimum-tokens-scheduler` of SGLang's gateway; ties go to the lowest rank there.
"""

from extproc.load import WorkerState
from extproc.policy.base import PolicyContext


class MinimumTokens:
    """Looks at the load model's figures only; that the charge follows in the same step spreads a burst."""

    def __init__(self, context: PolicyContext) -> None:
        self._loads = context.loads

    def select_dp_rank(self, state: WorkerState, tokens: float) -> int | None:
        """The least loaded rank, the lowest of equals."""
        loads = self._loads.rank_tokens(state.ranks)
        return loads.index(min(loads))
