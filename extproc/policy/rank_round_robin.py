"""`round_robin` of ranks: one DP rank after the other on each worker.

Source: SGLang's `--load-balance-method round_robin`, which a DP controller does by itself outside PD mode. A baseline.
"""

from collections.abc import Sequence
from typing import Final

from extproc.load import WorkerState

MAX_WORKERS: Final = 1 << 13
"""Counts kept. Workers that left are never reported here, so at this many all start again, which changes nothing but
the next rank."""


class RankRoundRobin:
    """Counts the picks on each worker: one count for all would alias with a worker policy that takes turns, too."""

    def __init__(self) -> None:
        self._picks: dict[str, int] = {}

    def select_dp_rank(
        self, state: WorkerState, tokens: float, rank_tokens: Sequence[float] | None = None
    ) -> int | None:
        """The rank after the last one on this worker."""
        if len(self._picks) >= MAX_WORKERS:
            self._picks.clear()
        picks = self._picks.get(state.worker.name, 0)
        self._picks[state.worker.name] = picks + 1
        return picks % len(state.ranks)
