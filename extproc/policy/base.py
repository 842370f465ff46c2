"""The two choices a policy makes."""

from collections.abc import Sequence
from typing import Protocol

from extproc.load import WorkerState
from extproc.request import GenerationRequest


class WorkerPolicy(Protocol):
    """Picks the worker of one role."""

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> WorkerState:
        """One of `states` (at least one, all eligible). `request` is None where there is nothing to generate."""


class RankPolicy(Protocol):
    """Picks the DP rank on a worker; the counterpart of `DPRankLoadPolicy` in SGLang's gateway."""

    def select_dp_rank(self, state: WorkerState, tokens: float) -> int | None:
        """The rank for a request of `tokens`; None leaves it to the engine. Called for workers with 2 ranks or more.

        The caller charges the tokens in the same step, so the next call sees them.
        """
