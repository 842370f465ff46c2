"""What "load" means: from a table row to a number of tokens that ranks and workers are compared by.

Reads the load table, never writes. `scraped` is the rule of the existing gateway, for parity and as a baseline.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from extproc.errors import ConfigError
from extproc.load import RankState, WorkerState

STALE_WEIGHT = 0.02
"""Figures that have faded to this (four request lifetimes) say nothing any more."""


class LoadModel(Protocol):
    """Tokens on each of several candidates. They are rated together, since they must be comparable."""

    def rank_tokens(self, ranks: Sequence[RankState]) -> list[float]:
        """Load of each rank, in tokens."""

    def worker_tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Load of each worker, in tokens: the sum over its ranks."""

    def drain_s(self, states: Sequence[WorkerState]) -> list[float]:
        """How long a request would wait on each worker, in seconds, or in anything in proportion to that.

        It waits on one rank only: the least loaded one, so that counts, not the sum over the ranks.
        """


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

    def drain_s(self, states: Sequence[WorkerState]) -> list[float]:
        """Tokens on the least loaded rank: this rule knows no speeds."""
        tokens = iter(self.rank_tokens([rank for state in states for rank in state.ranks]))
        return [min(next(tokens) for _ in state.ranks) for state in states]


class Live:
    """The ledger: every token that was sent and is not done yet, corrected by what engines report.

    - The ledger is exact for this service's requests, and never stale. A prefill rank works on its oldest prompt: what
      it has done of that by now, by its measured speed, is taken off.
    - What an engine had beyond the ledger when it took its figures counts too: requests that others sent, prompts that
      were estimated too short (or, below it, too long). It fades by the time a request stays: what was there so long
      ago is mostly gone.
    - Ranks are compared by the ledger alone while one of them has no figures, or old ones.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def rank_tokens(self, ranks: Sequence[RankState]) -> list[float]:
        """Load of each rank, in tokens."""
        # One loop, and nothing worked out that is not needed: with 8 ranks a worker this is most of a decision.
        now_s = self._clock()
        ledger, corrected, fresh = list[float](), list[float](), True
        for rank in ranks:
            tokens = rank.outstanding_tokens
            if tokens:
                tokens -= rank.done_tokens(now_s)
            ledger.append(tokens)
            if fresh:
                weight = rank.news_weight(now_s)
                fresh = weight >= STALE_WEIGHT
                corrected.append(max(0.0, tokens + weight * rank.foreign_tokens))
        return corrected if fresh else ledger

    def worker_tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Load of each worker, in tokens."""
        tokens = iter(self.rank_tokens([rank for state in states for rank in state.ranks]))
        return [sum(next(tokens) for _ in state.ranks) for state in states]

    def drain_s(self, states: Sequence[WorkerState]) -> list[float]:
        """How long a request would wait on each worker, in seconds; in tokens while no speed is known."""
        ranks = [rank for state in states for rank in state.ranks]
        waits = self.rank_tokens(ranks)
        known = [rank.tokens_per_s for rank in ranks if rank.tokens_per_s]
        if known:
            usual = sum(known) / len(known)
            waits = [tokens / (rank.tokens_per_s or usual) for tokens, rank in zip(waits, ranks, strict=True)]
        drains, first = list[float](), 0
        for state in states:
            last = first + len(state.ranks)
            drains.append(min(waits[first:last]))
            first = last
        return drains


LOAD_MODELS: dict[str, Callable[[Callable[[], float]], LoadModel]] = {"scraped": lambda _: Scraped(), "live": Live}


def make_load_model(name: str, clock: Callable[[], float]) -> LoadModel:
    """The load model of that name. Raises ConfigError for an unknown one."""
    if name not in LOAD_MODELS:
        raise ConfigError(f"load_model: unknown model {name!r}, expected one of {', '.join(LOAD_MODELS)}")
    return LOAD_MODELS[name](clock)
