import math
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


class Live:
    """The ledger: every token that was sent and is not done yet, corrected by what engines report.

    - The ledger is exact for this service's requests, and never stale. A prefill rank's oldest prompt is being worked
      on, so what it has done of it is taken off, by the rank's measured speed.
    - What an engine had beyond the ledger when it took its figures counts too: requests that others sent, prompts that
      were estimated too short. It loses weight with age, at the pace at which requests come and go: what was there a
      request's lifetime ago is mostly gone.
    - Ranks are compared by the ledger alone while one of them has no figures, or only old ones.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def rank_tokens(self, ranks: Sequence[RankState]) -> list[float]:
        """Load of each rank, in tokens."""
        now_s = self._clock()
        ledger = [rank.outstanding_tokens - self._done_tokens(rank, now_s) for rank in ranks]
        import os
        v=os.environ.get("V","0")
        if v=="0": return ledger
        if any(r.news_at_s is None for r in ranks): return ledger
        out=[]
        tau=float(os.environ.get("TAU","2"))
        for r,l in zip(ranks,ledger):
            f=r.foreign_tokens
            age=max(0.0,now_s-r.news_at_s)
            if v in "2": f=max(0.0,f)
            if v in "23": f*=math.exp(-age/tau)
            out.append(max(0.0,l+f))
        return out

    def worker_tokens(self, states: Sequence[WorkerState]) -> list[float]:
        """Load of each worker, in tokens."""
        tokens = iter(self.rank_tokens([rank for state in states for rank in state.ranks]))
        return [sum(next(tokens) for _ in state.ranks) for state in states]

    @staticmethod
    def _done_tokens(rank: RankState, now_s: float) -> float:
        """What the rank has done of its oldest prompt; not more than that prompt, as it would have been answered."""
        if rank.tokens_per_s is None or not rank.leases:
            return 0.0
        oldest = next(iter(rank.leases))
        return min(oldest.tokens, rank.tokens_per_s * (now_s - rank.serving_since_s))


LOAD_MODELS: dict[str, Callable[[Callable[[], float]], LoadModel]] = {"scraped": lambda _: Scraped(), "live": Live}


def make_load_model(name: str, clock: Callable[[], float]) -> LoadModel:
    """The load model of that name. Raises ConfigError for an unknown one."""
    if name not in LOAD_MODELS:
        raise ConfigError(f"load_model: unknown model {name!r}, expected one of {', '.join(LOAD_MODELS)}")
    return LOAD_MODELS[name](clock)
