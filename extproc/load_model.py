"""What "load" means: from a table row to a number of tokens that ranks and workers are compared by.

Reads the load table, never writes. `scraped` is the rule of the existing gateway, for parity and as a baseline.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from extproc.errors import ConfigError
from extproc.load import RankState, WorkerState


class LoadModel(Protocol):
    """Tokens on each of several candidates. They are rated together, since they must be comparable."""

    def rank_tokens(self, ranks: Sequence[RankState]) -> list[float]:
        """Load of each rank, in tokens."""

    def worker_tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Load of each worker, in tokens: the sum over its ranks."""


class Scraped:
    """Scraped `num_used_tokens` plus what was sent since that scrape; nothing is released when a request ends.

    Source: the min-token rule of SGLang's gateway. One difference: while any candidate has no figures, all are
    compared by what was sent alone, as a rank is not idle because nobody asked it.
    """

    def rank_tokens(self, ranks: Sequence[RankState]) -> list[float]:
        """Load of each rank, in tokens."""
        scraped = [rank.scraped.used_tokens for rank in ranks if rank.scraped and rank.scraped.used_tokens is not None]
        if len(scraped) < len(ranks):
            return [rank.charged_tokens for rank in ranks]
        return [used + rank.charged_tokens for used, rank in zip(scraped, ranks, strict=True)]

    def worker_tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Load of each worker, in tokens."""
        tokens = iter(self.rank_tokens([rank for state in states for rank in state.ranks]))
        return [sum(next(tokens) for _ in state.ranks) for state in states]


LOAD_MODELS: dict[str, Callable[[], LoadModel]] = {"scraped": Scraped}


def make_load_model(name: str) -> LoadModel:
    """The load model of that name. Raises ConfigError for an unknown one."""
    if name not in LOAD_MODELS:
        raise ConfigError(f"load_model: unknown model {name!r}, expected one of {', '.join(LOAD_MODELS)}")
    return LOAD_MODELS[name]()
