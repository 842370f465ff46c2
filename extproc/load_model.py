"""What "load" means: from a table row to a number of tokens that ranks and workers are compared by.

Reads the load table, never writes. `scraped` is the rule of the existing gateway, for parity and as a baseline.
"""

from collections.abc import Callable, Sequence
from math import exp, inf, log
from typing import NamedTuple, Protocol

from extproc.errors import ConfigError
from extproc.load import WorkerState
from extproc.model import Role

STALE_WEIGHT = 0.02
"""Figures that have faded to this (four request lifetimes) say nothing any more."""

STALE_AGE = -log(STALE_WEIGHT)
"""The same as an age in request lifetimes."""

PREFILL = Role.PREFILL


class RankLoads(NamedTuple):
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
                    return RankLoads([[each.charged_tokens for each in one.ranks] for one in states], final=False)
                tokens.append(rank.scraped.used_tokens + rank.charged_tokens)
            loads.append(tokens)
        return RankLoads(loads, final=True)

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
        ledger = _ledger(states, now_s)
        corrected = _corrected(states, ledger, now_s)
        return RankLoads(ledger, final=False) if corrected is None else RankLoads(corrected, final=True)

    def drain_s(self, states: Sequence[WorkerState], tokens: Sequence[Sequence[float]]) -> list[float]:
        """How long a request would wait on each worker, in seconds; in tokens while no speed is known."""
        drains = []
        usual = 0.0
        for state, loads in zip(states, tokens, strict=True):
            least_s = inf
            for rank, load in zip(state.ranks, loads, strict=True):
                if not load:  # whatever its speed
                    least_s = 0.0
                    break
                wait_s = load / (rank.tokens_per_s or usual or (usual := _usual_speed(states)))
                if wait_s < least_s:  # noqa: PLR1730 - a call of min() is twice the time
                    least_s = wait_s
            drains.append(least_s)
        return drains


def _usual_speed(states: Sequence[WorkerState]) -> float:
    """The mean of the ranks' speeds, for those of which it is not known; 1 while none is, as then only tokens count."""
    known = [rank.tokens_per_s for state in states for rank in state.ranks if rank.tokens_per_s]
    return sum(known) / len(known) if known else 1.0


def _ledger(states: Sequence[WorkerState], now_s: float) -> list[list[float]]:
    """Each rank's open leases, less what is done of them (`RankState.done_tokens`, written out: this is most of a
    decision)."""
    ledger = []
    for state in states:
        loads = []
        for rank in state.ranks:
            tokens = rank.outstanding_tokens
            if tokens and rank.role is PREFILL:
                oldest, speed = rank.oldest, rank.tokens_per_s
                if oldest is not None and speed is not None:
                    done = speed * (now_s - rank.serving_since_s)
                    tokens -= done if done < oldest.tokens else oldest.tokens
            loads.append(tokens)
        ledger.append(loads)
    return ledger


def _corrected(
    states: Sequence[WorkerState], ledger: Sequence[Sequence[float]], now_s: float
) -> list[list[float]] | None:
    """The ledger and what engines had besides, as far as it has not faded (`RankState.news_weight`); None while one of
    the ranks has no figures, or old ones."""
    corrected = []
    for state, ledger_loads in zip(states, ledger, strict=True):
        loads = []
        for rank, ledger_load in zip(state.ranks, ledger_loads, strict=True):
            if rank.news_at_s is None:
                return None
            age = (now_s - rank.news_at_s) / rank.lifetime_s
            if age > STALE_AGE:
                return None
            load, foreign = ledger_load, rank.foreign_tokens
            if foreign:
                load += foreign * exp(-age) if age > 0 else foreign
            loads.append(load if load > 0 else 0.0)
        corrected.append(loads)
    return corrected


LOAD_MODELS: dict[str, Callable[[Callable[[], float]], LoadModel]] = {"scraped": lambda _: Scraped(), "live": Live}


def make_load_model(name: str, clock: Callable[[], float]) -> LoadModel:
    """The load model of that name. Raises ConfigError for an unknown one."""
    if name not in LOAD_MODELS:
        raise ConfigError(f"load_model: unknown model {name!r}, expected one of {', '.join(LOAD_MODELS)}")
    return LOAD_MODELS[name](clock)
