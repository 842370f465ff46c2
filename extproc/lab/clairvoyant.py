"""The bound: a choice by what no service can know, the true work of every rank and the true length of every request.

It is greedy (one request at a time, in order of arrival), as any router is that places on arrival.
"""

import random
from collections.abc import Callable, Sequence

from extproc.lab.decode import DecodeGroup, DecodeRank
from extproc.lab.prefill import PrefillGroup, PrefillRank
from extproc.lab.request import Flight, TraceRequest
from extproc.lab.service import Route
from extproc.model import RankLoad, Role
from extproc.request import GenerationRequest
from extproc.sim.gpu import GpuModel


class Clairvoyant:
    """Looks into the modelled engines. Equal ranks are decided at random."""

    def __init__(
        self,
        prefill: Sequence[tuple[PrefillGroup, PrefillRank]],
        decode: Sequence[tuple[DecodeGroup, DecodeRank]],
        on_decode: Callable[[int], Sequence[Flight]],
        gpu: GpuModel,
        rng: random.Random,
    ) -> None:
        """`on_decode`: the flights sent to a decode rank that have not ended, whether they have come there or not."""
        self._prefill = prefill
        self._decode = decode
        self._on_decode = on_decode
        self._gpu = gpu
        self._rng = rng

    def place(self, request: TraceRequest, seen: GenerationRequest) -> Route:
        """Prefill: the rank that is free first. Decode: the rank with the least work to share steps with."""
        waits_s = [group.remaining_s(rank) for group, rank in self._prefill]
        shares = [self._shared_work(index, request) for index in range(len(self._decode))]
        return Route(self._least(waits_s), self._least(shares))

    def prefill_ended(self, route: Route) -> None:
        """Nothing to release: it looks at the engines."""

    def request_ended(self, route: Route) -> None:
        """Nothing to release."""

    def observe(self, role: Role, worker: int, loads: Sequence[RankLoad], at_s: float) -> None:
        """Needs no scrapes."""

    def _least(self, figures: Sequence[float]) -> int:
        least = min(figures)
        return self._rng.choice([index for index, figure in enumerate(figures) if figure == least])

    def _shared_work(self, index: int, request: TraceRequest) -> float:
        """What the rank's other requests add to this one's steps, and this one to theirs, in seconds."""
        group, rank = self._decode[index]
        request_s = self._gpu.decode_per_request_ms / 1e3
        token_s = self._gpu.decode_per_kv_token_us / 1e6
        own_s = request_s + token_s * (request.prompt_tokens + request.output_tokens / 2)
        work = 0.0
        members = group.batch_now(rank)
        for kv_tokens, left in members:
            shared = min(left, request.output_tokens)
            work += shared * (own_s + request_s + token_s * (kv_tokens + left / 2))
        for flight in self._on_decode(index):
            if flight not in rank.batch:
                left = flight.request.output_tokens - flight.generated_tokens
                shared = min(left, request.output_tokens)
                work += shared * (own_s + request_s + token_s * (flight.request.prompt_tokens + left / 2))
        return work
