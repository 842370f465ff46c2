"""What "load" means: from a table row to a number of tokens that ranks and workers are compared by.

Reads the load table, never writes. `scraped` is the rule of the existing gateway, for parity and as a baseline.
"""

from collections.abc import Callable, Sequence
from math import exp, inf, log
from typing import Final, Protocol

from extproc.errors import ConfigError
from extproc.load import WorkerState
from extproc.model import PREFILL
from extproc.values import Value

STALE_WEIGHT: Final = 0.02
"""Figures that have faded to this (four request lifetimes) say nothing any more."""

STALE_AGE: Final = -log(STALE_WEIGHT)
"""The same as an age in request lifetimes."""


class RankLoads(Value, frozen=True):
    """What several workers were rated at."""

    tokens: list[list[float]]
    """Of each worker's ranks."""
    final: bool
    """Each worker would be rated the same by itself, so that its ranks may be compared by these figures, too."""


class LoadModel(Protocol):
    """Tokens on each of several candidates. They are rated together, since they must be comparable."""

    def rank_loads(self, states: Sequence[WorkerState]) -> RankLoads:
        """Load of each worker's ranks."""

    def drain_s(self, states: Sequence[WorkerState], tokens: Sequence[Sequence[float]]) -> list[float]:
        """How long a request would wait on each worker, in seconds, or in anything in proportion to that.

        `tokens`: what `rank_loads` said of them just now. It waits on one rank only: the least loaded one, so that
        counts, not the sum over the ranks.
        """


class Scraped:
    """Scraped `num_used_tokens` plus what was sent since that scrape; nothing is released when a request ends.

    Source: the min-token rule of SGLang's gateway. One difference: while any candidate has no figures, all are
    compared by what was sent alone, as a rank is not idle because nobody asked it.
    """

    def rank_loads(self, states: Sequence[WorkerState]) -> RankLoads:
        """Load of each worker's ranks."""
        loads = []
        for state in states:
            tokens = []
            for rank in state.ranks:
                if rank.scraped is None or rank.scraped.used_tokens is None:
                    return RankLoads([[each.charged_tokens for each in one.ranks] for one in states], False)
                tokens.append(rank.scraped.used_tokens + rank.charged_tokens)
            loads.append(tokens)
        return RankLoads(loads, True)

    def drain_s(self, states: Sequence[WorkerState], tokens: Sequence[Sequence[float]]) -> list[float]:
        """Tokens on the least loaded rank: this rule knows no speeds."""
        return list(map(min, tokens))


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

    def rank_loads(self, states: Sequence[WorkerState]) -> RankLoads:
        """Load of each worker's ranks."""
        now_s = self._clock()
        ledger, corrected = [], []
        for state in states:
            loads = _ledger(state, now_s)
            ledger.append(loads)
            better = _corrected(state, loads, now_s)
            if better is not None:
                corrected.append(better)
        if len(corrected) == len(ledger):
            return RankLoads(corrected, True)
        return RankLoads(ledger, not corrected)  # one with figures would be rated by them when alone

    def drain_s(self, states: Sequence[WorkerState], tokens: Sequence[Sequence[float]]) -> list[float]:
        """How long a request would wait on each worker, in seconds; in tokens while no speed is known."""
        drains = []
        usual = 0.0
        for index, state in enumerate(states):  # compiled, `zip` with `strict` takes as long as the rest
            loads = tokens[index]
            least_s = 0.0
            if 0.0 not in loads:  # else it is 0 whatever the speed
                least_s = inf
                for rank in state.ranks:
                    wait_s = loads[rank.dp_rank] / (rank.tokens_per_s or usual or (usual := _usual_speed(states)))
                    if wait_s < least_s:  # noqa: PLR1730 - a call of min() is twice the time
                        least_s = wait_s
            drains.append(least_s)
        return drains


def _usual_speed(states: Sequence[WorkerState]) -> float:
    """The mean of the ranks' speeds, for those of which it is not known; 1 while none is, as then only tokens count."""
    known = [rank.tokens_per_s for state in states for rank in state.ranks if rank.tokens_per_s]
    return sum(known) / len(known) if known else 1.0


def _ledger(state: WorkerState, now_s: float) -> list[float]:
    """Each rank's open leases, less what is done of them (`RankState.done_tokens`, written out: this is most of a
    decision)."""
    loads = [rank.outstanding_tokens for rank in state.ranks]
    if state.worker.role is PREFILL and any(loads):
        for rank in state.ranks:
            oldest, speed = rank.oldest, rank.tokens_per_s
            if oldest is not None and speed is not None and rank.outstanding_tokens:
                done = speed * (now_s - rank.serving_since_s)
                loads[rank.dp_rank] -= done if done < oldest.tokens else oldest.tokens
    return loads


def _corrected(state: WorkerState, ledger: Sequence[float], now_s: float) -> list[float] | None:
    """The ledger and what the engine had besides, as far as it has not faded (`RankState.news_weight`); None while one
    of the ranks has no figures, or old ones."""
    loads = []
    for rank in state.ranks:
        news_at_s = rank.news_at_s
        if news_at_s is None or (age := (now_s - news_at_s) / rank.lifetime_s) > STALE_AGE:
            return None
        load, foreign = ledger[rank.dp_rank], rank.foreign_tokens
        if foreign:
            load += foreign * exp(-age) if age > 0 else foreign
        loads.append(load if load > 0 else 0.0)
    return loads


LOAD_MODELS: Final[dict[str, Callable[[Callable[[], float]], LoadModel]]] = {
    "scraped": lambda _: Scraped(),
    "live": Live,
}


def make_load_model(name: str, clock: Callable[[], float]) -> LoadModel:
    """The load model of that name. Raises ConfigError for an unknown one."""
    if name not in LOAD_MODELS:
        raise ConfigError(f"load_model: unknown model {name!r}, expected one of {', '.join(LOAD_MODELS)}")
    return LOAD_MODELS[name](clock)
