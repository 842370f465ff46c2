"""The load table as `/debug/loads` shows it: every worker and rank with what its load is made of.

Pure. The shape is documented in docs/loads.md. What is not known is null, never 0; times are seconds before now.
"""

import msgspec

from extproc.config import Config
from extproc.estimate import TokenEstimator
from extproc.load import LoadTable, RankState, WorkerState
from extproc.load_model import LoadModel
from extproc.model import Role


def describe_table(config: Config, table: LoadTable, loads: LoadModel, estimator: TokenEstimator) -> dict[str, object]:
    """All of it, ready for JSON."""
    now_s = table.clock()
    return {
        "settings": {
            "load_model": config.load_model,
            "worker_load_check_interval_s": config.worker_load_check_interval,
            **{f"{role}_policy": config.worker_policy(role) for role in Role},
            **{f"{role}_rank_policy": config.rank_policy(role) for role in Role},
        },
        "mean_output_tokens": table.output_tokens,
        "estimates": [
            {
                "endpoint": endpoint,
                "model": model or None,
                "bytes_per_token": mean.bytes_per_token,
                "media_tokens": mean.media_tokens,
                "asked": mean.asked,
                "learned": mean.learned,
            }
            for (endpoint, model), mean in estimator.known().items()
        ],
        "workers": [_worker(state, loads, now_s) for state in table.states],
    }


def describe_state(state: WorkerState) -> dict[str, object]:
    """One worker as `/workers` shows it: may it be picked, and what is still on it."""
    worker = state.worker
    return {
        "worker": worker.name,
        "role": worker.role,
        "healthy": state.healthy,
        "draining": state.draining,
        "in_flight": state.in_flight,
    }


def _worker(state: WorkerState, loads: LoadModel, now_s: float) -> dict[str, object]:
    worker = state.worker
    return {
        **describe_state(state),
        "endpoint": worker.endpoint,
        "model": worker.model,
        "dp_size": worker.dp_size,
        "circuit": state.circuit.state,
        "engine_clock_s": state.engine_clock_s,
        "ranks": [
            _rank(rank, load_tokens, now_s)
            for rank, load_tokens in zip(state.ranks, loads.rank_loads([state]).tokens[0], strict=True)
        ],
    }


def _rank(rank: RankState, load_tokens: float, now_s: float) -> dict[str, object]:
    scraped = None
    if rank.scraped is not None:
        scraped = msgspec.structs.asdict(rank.scraped)
        del scraped["dp_rank"]
    return {
        "dp_rank": rank.dp_rank,
        "load_tokens": load_tokens,
        "outstanding_tokens": rank.outstanding_tokens,
        "outstanding_requests": rank.outstanding_requests,
        "largest_tokens": max((lease.tokens for lease in rank.leases), default=0.0),
        "done_tokens": rank.done_tokens(now_s),
        "charged_tokens": rank.charged_tokens,
        "foreign_tokens": None if rank.news_at_s is None else rank.foreign_tokens,
        "news_weight": rank.news_weight(now_s),
        "news_age_s": None if rank.news_at_s is None else now_s - rank.news_at_s,
        "scrape_age_s": None if rank.scraped_at_s is None else now_s - rank.scraped_at_s,
        "tokens_per_s": rank.tokens_per_s,
        "request_tokens_per_s": rank.request_tokens_per_s,
        "lifetime_s": rank.lifetime_s,
        "scraped": scraped,
    }
