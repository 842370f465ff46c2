"""The nouns everything else is written in: workers, ranks, placements.

No I/O, no behaviour beyond what the types mean. Nothing here knows Envoy's or SGLang's field names.
"""

import enum
from dataclasses import dataclass

from extproc.values import Value


class Role(enum.StrEnum):
    """What a worker does in PD disaggregation."""

    PREFILL = "prefill"
    DECODE = "decode"


PREFILL, DECODE = Role
"""For what runs with every request: up to Python 3.11 a member that is found on its class is a call of Python."""


@dataclass(frozen=True, slots=True)
class Worker:
    """One engine, as far as it is known: what the configuration says, completed by what the engine reported.

    Replaced as a whole when discovery learns more; `name` and `role` stay, and are its identity.
    """

    name: str
    """`host:port` as the operator wrote it: the label in logs, metrics and headers."""
    role: Role
    url: str
    """Base URL without a trailing slash, `http://host:port`."""
    endpoint: str | None = None
    """`ip:port` that Envoy dials; None until the host name was resolved."""
    bootstrap_host: str | None = None
    """Prefill only: the host that decode engines reach the bootstrap server at."""
    bootstrap_port: int | None = None
    """Prefill only: the port of its bootstrap server."""
    dp_size: int | None = None
    """Number of data-parallel ranks, at least 1; None while unknown, then no rank is injected."""
    model: str | None = None
    """The served model name; None while unknown."""

    @property
    def rank_count(self) -> int:
        """Ranks to keep loads for: `dp_size`, or 1 while that is unknown."""
        return self.dp_size or 1


class RankLoad(Value, frozen=True):
    """What an engine reported about one DP rank in one scrape; None where it did not say.

    All in tokens or requests. `snapshot_s` is the engine's own clock (Unix seconds) when it took the figures;
    the plain `/metrics` page does not carry it.
    """

    dp_rank: int
    used_tokens: float | None = None
    """Tokens whose KV cache is allocated. Queued prompts are not in it."""
    total_tokens: float | None = None
    """Used tokens plus everything queued."""
    waiting_uncached_tokens: float | None = None
    """Prefill work waiting, without the bootstrap queue."""
    max_total_tokens: float | None = None
    running_requests: float | None = None
    queued_requests: float | None = None
    token_usage_ratio: float | None = None
    output_tokens_per_s: float | None = None
    """Decode only: output of all its requests together, over the engine's last few decode steps."""
    prefill_uncached_tokens_total: float | None = None
    """Counter; its delta over that of `prefill_busy_us_total` is the rank's measured prefill speed."""
    prefill_busy_us_total: float | None = None
    snapshot_s: float | None = None


class Pick(Value, frozen=True):
    """One leg's destination: the worker, and the DP rank on it."""

    worker: Worker
    dp_rank: int | None
    """The rank to ask the engine for; None: the engine decides (one rank, unknown, or switched off)."""


class Placement(Value, frozen=True):
    """Where one attempt of one request goes: both legs and the room they meet in."""

    prefill: Pick
    decode: Pick
    room: int
    """First bootstrap room, in [0, 2^63-1]; a batch of N owns room .. room+N-1."""
