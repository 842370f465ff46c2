"""Why a pick fell as it did: the load of each candidate rank at that moment, and how old its figures were.

Pure, and in use only where `explain` is switched on: the recorder then stands between the policies and the load model,
and what they have compared is read off it after each pick. Policies know nothing of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from extproc.load import WorkerState
from extproc.load_model import LoadModel, RankLoads

MAX_LENGTH = 1024
"""Characters of an explanation: of a response's headers, which many clients limit to 8 KiB in all, an eighth."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Both legs' candidates, as `describe` writes them."""

    prefill: str
    decode: str


@dataclass(slots=True)
class Recorder:
    """A load model that remembers which workers it was asked about."""

    loads: LoadModel
    compared: list[WorkerState] = field(default_factory=list)

    def rank_loads(self, states: Sequence[WorkerState]) -> RankLoads:
        """Load of each worker's ranks."""
        self.compared.extend(states)
        return self.loads.rank_loads(states)

    def drain_s(self, states: Sequence[WorkerState], tokens: Sequence[Sequence[float]]) -> list[float]:
        """How long a request would wait on each worker."""
        return self.loads.drain_s(states, tokens)

    def take(self) -> list[WorkerState]:
        """What was compared since the last time."""
        compared, self.compared = self.compared, []
        return compared


def describe(loads: LoadModel, chosen: tuple[WorkerState, int], compared: Sequence[WorkerState], now_s: float) -> str:
    """`WORKER/RANK=TOKENS@AGE` of each rank of the chosen worker and of those it was compared with; `*`: chosen.

    TOKENS by the load model, before this request's own; AGE in seconds since the engine took the last figures that
    said something new, `-` where it never gave any. What does not fit is counted: `...+12`.
    """
    state, dp_rank = chosen
    states = list(dict.fromkeys((state, *compared)))
    ranks = [(each, rank) for each in states for rank in each.ranks]
    tokens = chain.from_iterable(loads.rank_loads(states).tokens)
    text = ""
    for number, ((of_worker, rank), load) in enumerate(zip(ranks, tokens, strict=True)):
        mark = "*" if of_worker is state and rank.dp_rank == dp_rank else ""
        age = "-" if rank.news_at_s is None else f"{max(0.0, now_s - rank.news_at_s):.1f}"
        item = f"{', ' if text else ''}{of_worker.worker.name}/{rank.dp_rank}{mark}={load:.0f}@{age}"
        if len(text) + len(item) > MAX_LENGTH - 12:
            return f"{text}, ...+{len(ranks) - number}"
        text += item
    return text
