"""Policies by name: which worker of a role, and which DP rank on it. One file a policy; no I/O."""

from collections.abc import Callable
from typing import Final

from extproc.errors import ConfigError
from extproc.policy.base import Choice, PolicyContext, RankPolicy, WorkerPolicy
from extproc.policy.bootstrap_room import BootstrapRoom
from extproc.policy.bucket import Bucket
from extproc.policy.cache_aware import CacheAware
from extproc.policy.consistent_hashing import ConsistentHashing
from extproc.policy.least_load import LeastLoad
from extproc.policy.manual import Manual
from extproc.policy.minimum_tokens import MinimumTokens
from extproc.policy.power_of_two import PowerOfTwo
from extproc.policy.prefix_hash import PrefixHash
from extproc.policy.random_choice import RandomChoice
from extproc.policy.rank_round_robin import RankRoundRobin
from extproc.policy.round_robin import RoundRobin

__all__ = [
    "RANK_POLICIES",
    "WORKER_POLICIES",
    "Choice",
    "PolicyContext",
    "RankPolicy",
    "WorkerPolicy",
    "make_rank_policy",
    "make_worker_policy",
]

WORKER_POLICIES: Final[dict[str, Callable[[PolicyContext], WorkerPolicy]]] = {
    "random": RandomChoice,
    "round_robin": lambda _: RoundRobin(),
    "power_of_two": PowerOfTwo,
    "least_load": LeastLoad,
    "cache_aware": CacheAware,
    "prefix_hash": PrefixHash,
    "consistent_hashing": ConsistentHashing,
    "manual": Manual,
    "bucket": Bucket,
}

RANK_POLICIES: Final[dict[str, Callable[[PolicyContext], RankPolicy]]] = {
    "minimum_tokens": MinimumTokens,
    "round_robin": lambda _: RankRoundRobin(),
    "bootstrap_room": lambda _: BootstrapRoom(),
}


def make_worker_policy(name: str, context: PolicyContext) -> WorkerPolicy:
    """A worker policy by its name. Raises ConfigError for an unknown one."""
    if name not in WORKER_POLICIES:
        raise ConfigError(f"policy: unknown policy {name!r}, expected one of {', '.join(WORKER_POLICIES)}")
    return WORKER_POLICIES[name](context)


def make_rank_policy(name: str, context: PolicyContext) -> RankPolicy:
    """A rank policy by its name. Raises ConfigError for an unknown one."""
    if name not in RANK_POLICIES:
        raise ConfigError(f"rank policy: unknown policy {name!r}, expected one of {', '.join(RANK_POLICIES)}")
    return RANK_POLICIES[name](context)
