"""One request of a workload, and what becomes of it in one run. No I/O, no clocks."""

from dataclasses import dataclass, field

BLOCK_TOKENS = 512
"""Prompt tokens that one `hash_ids` entry of a Mooncake trace stands for (FAST '25 traces, README)."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What a client sends, and how much it will truly cost. Shared by all runs."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """Tokens it will generate, at least 1; no policy but the clairvoyant one knows."""
    blocks: tuple[int, ...] = ()
    """Ids of the prompt's blocks of BLOCK_TOKENS: equal ids at the front mean an equal prefix. May be empty."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request on its way through the modelled engines. Each part writes its own fields; times are virtual seconds."""

    request: TraceRequest
    arrival_s: float
    prefill_rank: int = -1
    """Index over all prefill ranks, -1 until placed."""
    decode_rank: int = -1
    left_tokens: int = 0
    """Prefill: prompt tokens not yet in a batch."""
    admitted: bool = False
    """Prefill: has a place in the KV cache."""
    generated_tokens: int = 0
    """Decode: while not in a batch; the batch knows better."""
    first_token_s: float = field(default=-1.0)
    finished_s: float = field(default=-1.0)
