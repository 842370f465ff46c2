"""The two choices a policy makes, and what a policy is made from."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.config import Config
from extproc.load import WorkerState
from extproc.load_model import LoadModel
from extproc.request import GenerationRequest
from extproc.values import Value


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may use. Its parameters are keys of the configuration."""

    config: Config
    loads: LoadModel
    rng: random.Random
    clock: Callable[[], float]
    """Seconds from any origin."""


class Choice(Value, frozen=True):
    """A worker, and perhaps a rank on it."""

    state: WorkerState
    dp_rank: int | None = None
    """None leaves the rank to the rank policy."""
    rank_tokens: Sequence[float] | None = None
    """The loads of its ranks, where they are known already: of the pick that this is the outcome of."""


class WorkerPolicy(ABC):
    """Picks the worker of one role; each role has an instance of its own."""

    reads_prompts = False
    """It picks by the text of prompts."""

    @abstractmethod
    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """One of `states` (at least one, all eligible). `request` is None where there is nothing to generate."""

    def placed(self, request: GenerationRequest, state: WorkerState, dp_rank: int) -> None:  # noqa: B027 - most need it not
        """A request was placed there; called after each pick, with the rank it is charged to."""


class RankPolicy(Protocol):
    """Picks the DP rank on a worker; the counterpart of `DPRankLoadPolicy` in SGLang's gateway."""

    def select_dp_rank(
        self, state: WorkerState, tokens: float, rank_tokens: Sequence[float] | None = None
    ) -> int | None:
        """The rank for a request of `tokens`; None leaves it to the engine. Called for workers with 2 ranks or more.

        `rank_tokens`: the loads of the ranks as of now, where they are known already.
        The caller charges the tokens in the same step, so the next call sees them.
        """
