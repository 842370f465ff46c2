"""From a trace to arrivals: spread what a coarse clock put together, and scale time to the wanted load. No I/O.

What a seed varies is here and in `cluster`: the moments within the trace's own clock tick, the bytes per token of each
prompt, the replica a request meets, when scrapes happen and which fail, and the service's own random numbers. All but
the last are the same for every policy, so that policies are compared on the same work. Order and lengths never vary.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

from extproc.errors import ConfigError
from extproc.lab.prefill_cost import PrefillCost
from extproc.lab.request import TraceRequest
from extproc.lab.settings import Settings
from extproc.model import Role
from extproc.sim.gpu import GpuModel

DEFAULT_TICK_S = 1.0
"""Assumed resolution of the trace's clock when all its timestamps are equal."""


def spread(requests: Sequence[TraceRequest], rng: random.Random) -> list[TraceRequest]:
    """Spread each group of equal timestamps over the time up to the next one, uniformly; the order stays.

    A request that has its timestamp for itself keeps it.
    """
    groups = [list(group) for _, group in groupby(requests, key=lambda request: request.arrival_s)]
    starts = [group[0].arrival_s for group in groups]
    ticks = [later - start for start, later in pairwise(starts)]
    ticks.append(ticks[-1] if ticks else DEFAULT_TICK_S)
    arrivals: list[TraceRequest] = []
    for group, start_s, tick_s in zip(groups, starts, ticks, strict=True):
        offsets = sorted(rng.uniform(0.0, tick_s) for _ in group) if len(group) > 1 else [0.0]
        arrivals.extend(
            replace(request, arrival_s=start_s + offset) for request, offset in zip(group, offsets, strict=True)
        )
    return arrivals


def scaled(requests: Sequence[TraceRequest], time_scale: float) -> list[TraceRequest]:
    """`time_scale` 2: twice as fast."""
    return [replace(request, arrival_s=request.arrival_s / time_scale) for request in requests]


def time_scale_for(requests: Sequence[TraceRequest], settings: Settings, role: Role, utilization: float) -> float:
    """How much faster the trace must run for that utilisation of a role's ranks.

    Utilisation is the work that arrives over what all ranks can do from the first arrival to the last.
    """
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    if span_s <= 0:
        raise ConfigError("a target utilisation needs requests at different times")
    return utilization / (offered_s(requests, settings, role) / (shape_ranks(settings, role) * span_s))


def shape_ranks(settings: Settings, role: Role) -> int:
    """Ranks of a role."""
    return (settings.prefill if role is Role.PREFILL else settings.decode).total_ranks


def offered_s(requests: Sequence[TraceRequest], settings: Settings, role: Role) -> float:
    """Seconds that one rank at full speed would need for all of it: prefill in full batches, without a prefix cache."""
    gpu = settings.gpu
    if role is Role.PREFILL:
        cost = PrefillCost(gpu, settings.prefill_attention)
        work_s = sum(cost.work_s(0, request.prompt_tokens) for request in requests)
        return work_s + sum(request.prompt_tokens for request in requests) / gpu.chunk_tokens * cost.batch_s(0.0)
    return sum(request.output_tokens for request in requests) / decode_capacity(requests, gpu)


def decode_capacity(requests: Sequence[TraceRequest], gpu: GpuModel) -> float:
    """Output tokens per second of a decode rank that is as full as it gets with such requests.

    Full: as many average requests as the KV cache holds, or the largest batch.
    """
    output = sum(request.output_tokens for request in requests)
    # KV tokens that a request holds, averaged over the steps it takes part in.
    held = (
        sum(request.output_tokens * (request.prompt_tokens + request.output_tokens / 2) for request in requests)
        / output
    )
    batch = max(1, min(gpu.max_running_requests, int(gpu.kv_capacity_tokens / (held + gpu.reserved_decode_tokens))))
    return batch / gpu.decode_s(batch, round(batch * held))


def check_fits(requests: Sequence[TraceRequest], gpu: GpuModel) -> None:
    """Raise ConfigError when a request could never run, which would stop the simulation for ever."""
    longest = gpu.kv_capacity_tokens - gpu.reserved_decode_tokens
    for number, request in enumerate(requests, 1):
        if request.prompt_tokens + request.output_tokens > longest:
            raise ConfigError(
                f"request {number}: {request.prompt_tokens} + {request.output_tokens} tokens "
                f"do not fit into a rank's KV cache ({longest} tokens)"
            )
