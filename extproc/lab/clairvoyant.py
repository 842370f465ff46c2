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
        """Prefill: the rank that has it computed first. Decode: the one whose other requests slow it down least."""
        waits_s = [group.remaining_s(rank) + rank.prompt_s(request) for group, rank in self._prefill]
        slowdowns_s = [self._slowdown_s(index, request) for index in range(len(self._decode))]
        return Route(self._least(waits_s), self._least(slowdowns_s))

    def prefill_ended(self, route: Route) -> None:
        """Nothing to release: it looks at the engines."""

    def request_ended(self, route: Route) -> None:
        """Nothing to release."""

    def observe(self, role: Role, worker: int, loads: Sequence[RankLoad], at_s: float) -> None:
        """Needs no scrapes."""

    def _least(self, figures: Sequence[float]) -> int:
        least = min(figures)
        return self._rng.choice([index for index, figure in enumerate(figures) if figure == least])

    def _slowdown_s(self, index: int, request: TraceRequest) -> float:
        """By how much the rank's other requests will lengthen this one's steps, all in all."""
        group, rank = self._decode[index]
        request_s = self._gpu.decode_per_request_ms / 1e3
        token_s = self._gpu.decode_per_kv_token_us / 1e6
        slowdown_s = 0.0
        for kv_tokens, left in group.batch_now(rank):
            shared = min(left, request.output_tokens)
            slowdown_s += shared * (request_s + token_s * (kv_tokens + shared / 2))
        for flight in self._on_decode(index):
            if flight not in rank.batch:  # still in prefill, or retracted
                shared = min(flight.request.output_tokens - flight.generated_tokens, request.output_tokens)
                slowdown_s += shared * (request_s + token_s * (flight.request.prompt_tokens + shared / 2))
        return slowdown_s
