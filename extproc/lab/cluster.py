"""One run: a workload through one policy and the modelled engines. No I/O, deterministic.

The life of a request, as in reality: placed on arrival, both legs at once; decode makes room in its KV cache; prefill
computes, the KV cache is sent; then prefill's leg is answered (its lease ends) and decode joins it to the batch at its
next step, which is when the client gets the first token; with the last token the decode lease ends.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from extproc.lab.clairvoyant import Clairvoyant
from extproc.lab.clock import Clock
from extproc.lab.decode import DecodeGroup, DecodeRank
from extproc.lab.outstanding import Outstanding
from extproc.lab.pages import rank_load
from extproc.lab.prefill import PrefillGroup, PrefillRank
from extproc.lab.prefill_cost import PrefillCost
from extproc.lab.prefix_cache import PrefixCache
from extproc.lab.processes import connect
from extproc.lab.request import Flight, TraceRequest
from extproc.lab.scrapes import ScrapeLoop
from extproc.lab.service import CLAIRVOYANT, PolicyName, Route, ScheduledService, Service, View
from extproc.lab.settings import Settings, Shape
from extproc.model import RankLoad, Role

PROMPT_POLICIES = frozenset({"cache_aware", "prefix_hash"})
"""Worker policies that look at the prompt's text."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came out of one run; the lists are in order of arrival."""

    ttft_s: list[float]
    tpot_s: list[float]
    """Only of requests with two output tokens or more."""
    prefill: Outstanding
    decode: Outstanding
    ended_s: float
    prefill_busy_s: list[float]
    """Time with a running batch, for each prefill rank."""
    retractions: int
    flights: list[Flight]


class Cluster:
    """Engines, services and what happens between them."""

    def __init__(
        self,
        policy: str,
        settings: Settings,
        seed: int,
        requests: Sequence[TraceRequest],
        record: bool = False,
    ) -> None:
        """`requests` in order of arrival. `record`: keep each rank's load over time."""
        self._settings = settings
        self._requests = requests
        self._clock = clock = Clock()
        gpu, cost = settings.gpu, PrefillCost(settings.gpu, settings.prefill_attention)
        self._prefill_ranks = [
            PrefillRank(
                index,
                index % settings.prefill.ranks,
                gpu,
                cost,
                PrefixCache(gpu.kv_capacity_tokens) if settings.prefix_cache else None,
            )
            for index in range(settings.prefill.total_ranks)
        ]
        self._decode_ranks = [
            DecodeRank(index, index % settings.decode.ranks, gpu) for index in range(settings.decode.total_ranks)
        ]
        self._prefill_groups = [
            group
            for ranks in _together(self._prefill_ranks, settings.prefill, settings.dp_attention)
            for group in [PrefillGroup(ranks, gpu, cost, clock, self)] * len(ranks)
        ]
        self._decode_groups = [
            group
            for ranks in _together(self._decode_ranks, settings.decode, settings.dp_attention)
            for group in [DecodeGroup(ranks, gpu, clock, self)] * len(ranks)
        ]
        self._prefill_load = Outstanding(clock, len(self._prefill_ranks), record)
        self._decode_load = Outstanding(clock, len(self._decode_ranks), record)
        self._on_decode: list[dict[Flight, None]] = [{} for _ in self._decode_ranks]
        self._routes: dict[Flight, tuple[Service, Route]] = {}
        self._flights: list[Flight] = []
        self._ended = 0

        # What is drawn for the workload must not depend on the policy: each purpose has a stream of its own.
        self._replica_rng = random.Random(f"{seed}/replica")
        with_prompts = policy.partition("+")[0] in PROMPT_POLICIES
        self._view = View(settings, random.Random(f"{seed}/bytes"), with_prompts)
        self.services = [self._service(policy, random.Random(f"{seed}/{n}")) for n in range(settings.replicas)]
        scraping = self.services
        if settings.replica_lag_s is not None:
            connect([each for each in scraping if isinstance(each, ScheduledService)], settings.replica_lag_s, clock)
            scraping = scraping[:1]
        for number, service in enumerate(scraping):
            for role, shape in ((Role.PREFILL, settings.prefill), (Role.DECODE, settings.decode)):
                for worker in range(shape.workers):
                    rng = random.Random(f"{seed}/scrape/{number}/{role}/{worker}")
                    read = self._reader(role, worker)
                    ScrapeLoop(service, role, worker, read, settings=settings, rng=rng, clock=clock)

    def run(self) -> RunResult:
        """All requests, until the last one has ended."""
        total = len(self._requests)
        if total:
            self._clock.at(self._requests[0].arrival_s, self._arrive, 0)
        self._clock.run(until=lambda: self._ended == total)
        flights = self._flights
        return RunResult(
            ttft_s=[flight.first_token_s - flight.arrival_s for flight in flights],
            tpot_s=[
                (flight.finished_s - flight.first_token_s) / (flight.request.output_tokens - 1)
                for flight in flights
                if flight.request.output_tokens > 1
            ],
            prefill=self._prefill_load,
            decode=self._decode_load,
            ended_s=self._clock.now_s,
            prefill_busy_s=[rank.busy_s_total for rank in self._prefill_ranks],
            retractions=sum(rank.retractions_total for rank in self._decode_ranks),
            flights=flights,
        )

    # the life of a request

    def _arrive(self, number: int) -> None:
        request = self._requests[number]
        if number + 1 < len(self._requests):
            self._clock.at(self._requests[number + 1].arrival_s, self._arrive, number + 1)
        service = self.services[self._replica_rng.randrange(len(self.services))]
        route = service.place(request, self._view.of(request))
        flight = Flight(request, request.arrival_s, route.prefill_rank, route.decode_rank)
        self._flights.append(flight)
        self._routes[flight] = service, route
        self._on_decode[route.decode_rank][flight] = None
        self._prefill_load.add(route.prefill_rank, request.prompt_tokens)
        self._decode_load.add(route.decode_rank, request.prompt_tokens + request.output_tokens)
        self._prefill_ranks[route.prefill_rank].expect(flight)
        self._decode_groups[route.decode_rank].submit(self._decode_ranks[route.decode_rank], flight)

    def allocated(self, flight: Flight) -> None:
        """Decode has room: prefill may start."""
        rank = self._prefill_ranks[flight.prefill_rank]
        self._prefill_groups[flight.prefill_rank].add(rank, flight)

    def prefilled(self, rank: PrefillRank, tokens: int, complete: Sequence[tuple[Flight, int]]) -> None:
        """A batch ended: the KV cache of complete prompts is on its way."""
        self._prefill_load.add(rank.index, -tokens)
        for flight, last_chunk in complete:
            self._clock.at(self._clock.now_s + self._settings.gpu.transfer_s(last_chunk), self._sent, flight)

    def _sent(self, flight: Flight) -> None:
        service, route = self._routes[flight]
        service.prefill_ended(route)
        self._prefill_groups[flight.prefill_rank].sent(self._prefill_ranks[flight.prefill_rank], flight)
        self._decode_groups[flight.decode_rank].received(self._decode_ranks[flight.decode_rank], flight)

    def finished(self, flight: Flight) -> None:
        """The last token is out."""
        service, route = self._routes.pop(flight)
        service.request_ended(route)
        del self._on_decode[flight.decode_rank][flight]
        self._decode_load.add(flight.decode_rank, -flight.request.prompt_tokens - flight.request.output_tokens)
        self._ended += 1

    # assembly

    def _service(self, policy: str, rng: random.Random) -> Service:
        if policy != CLAIRVOYANT:
            return ScheduledService(PolicyName.parse(policy), self._settings, rng, self._clock)
        return Clairvoyant(
            list(zip(self._prefill_groups, self._prefill_ranks, strict=True)),
            list(zip(self._decode_groups, self._decode_ranks, strict=True)),
            lambda index: list(self._on_decode[index]),
            self._settings.gpu,
            rng,
        )

    def _reader(self, role: Role, worker: int) -> "_Reader":
        settings = self._settings
        groups: Sequence[PrefillGroup | DecodeGroup]
        ranks: Sequence[PrefillRank | DecodeRank]
        if role is Role.PREFILL:
            own = slice(worker * settings.prefill.ranks, (worker + 1) * settings.prefill.ranks)
            groups, ranks = self._prefill_groups[own], self._prefill_ranks[own]
        else:
            own = slice(worker * settings.decode.ranks, (worker + 1) * settings.decode.ranks)
            groups, ranks = self._decode_groups[own], self._decode_ranks[own]
        return _Reader(groups, ranks, settings)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one worker's page."""

    groups: Sequence[PrefillGroup | DecodeGroup]
    ranks: Sequence[PrefillRank | DecodeRank]
    settings: Settings

    def __call__(self) -> list[RankLoad]:
        for group in dict.fromkeys(self.groups):
            group.refresh()
        page, gpu = self.settings.scrape_page, self.settings.gpu
        return [rank_load(page, rank.pages, rank.dp_rank, gpu) for rank in self.ranks]


RankT = TypeVar("RankT")


def _together(ranks: Sequence[RankT], shape: Shape, dp_attention: bool) -> list[Sequence[RankT]]:
    """The ranks that run their batches together: all of a worker, or each on its own."""
    size = shape.ranks if dp_attention else 1
    return [ranks[start : start + size] for start in range(0, len(ranks), size)]
