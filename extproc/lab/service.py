"""The service as the lab drives it: its own Scheduler and LoadTable, with virtual time for a clock.

Nothing of the choice is done here: this module only makes configuration, requests and calls that the gRPC shell would
make in the same order (place on arrival, release prefill at its answer, release decode at the end, observe a scrape).
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.config import Config, WorkerConfig
from extproc.errors import ConfigError
from extproc.estimate import BYTES_PER_TOKEN
from extproc.lab.clock import Clock
from extproc.lab.request import BLOCK_TOKENS, TraceRequest
from extproc.lab.settings import Settings
from extproc.load import LoadTable
from extproc.load_model import LOAD_MODELS
from extproc.model import RankLoad, Role
from extproc.policy import RANK_POLICIES, WORKER_POLICIES
from extproc.processes.messages import Observed
from extproc.processes.replica import Replica
from extproc.request import Endpoint, GenerationRequest
from extproc.schedule import Scheduled, Scheduler

CLAIRVOYANT = "clairvoyant"

COMPOSED = {
    "round_robin": ("round_robin", "round_robin", "scraped"),
    "scraped": (None, "minimum_tokens", "scraped"),
    "live": (None, "minimum_tokens", "live"),
}
"""Short names -> worker policy (None: the service's default), rank policy, load model."""


@dataclass(frozen=True, slots=True)
class PolicyName:
    """A policy of the command line, taken apart."""

    worker: str
    rank: str
    load_model: str

    @classmethod
    def parse(cls, text: str) -> "PolicyName":
        """`NAME` or `WORKER+RANK+LOADS`, parts from the right may be missing. Raises ConfigError for unknown parts."""
        default = Config()
        if text in COMPOSED:
            worker, rank, load_model = COMPOSED[text]
            name = cls(worker or default.policy, rank, load_model)
        else:
            parts = [*text.split("+"), "", ""][:3] if text.count("+") < 3 else [text, "", ""]
            name = cls(parts[0], parts[1] or "minimum_tokens", parts[2] or _best_load_model())
        for known, part in ((WORKER_POLICIES, name.worker), (RANK_POLICIES, name.rank), (LOAD_MODELS, name.load_model)):
            if part not in known:
                raise ConfigError(f"policy {text!r}: {part!r} is not one of {', '.join(known)}")
        return name


def _best_load_model() -> str:
    return "live" if "live" in LOAD_MODELS else "scraped"


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes; rank numbers count over all workers of the role."""

    prefill_rank: int
    decode_rank: int
    scheduled: Scheduled | None = None
    """What the service's leases hang on; None for a choice that the service did not make."""


class Service(Protocol):
    """What the modelled cluster asks for."""

    def place(self, request: TraceRequest, seen: GenerationRequest) -> Route:
        """`seen`: the request as the service sees it."""

    def prefill_ended(self, route: Route) -> None:
        """The prefill leg has been answered."""

    def request_ended(self, route: Route) -> None:
        """The decode leg has ended."""

    def observe(self, role: Role, worker: int, loads: Sequence[RankLoad], at_s: float) -> None:
        """A scrape of a worker gave figures; it was asked at `at_s`."""


class ScheduledService:
    """One replica of the service."""

    def __init__(self, policy: PolicyName, settings: Settings, rng: random.Random, clock: Clock) -> None:
        config = Config(
            prefill=_workers(Role.PREFILL, settings),
            decode=_workers(Role.DECODE, settings),
            policy=policy.worker,
            prefill_rank_policy=policy.rank,
            decode_rank_policy=policy.rank,
            load_model=policy.load_model,
        )
        workers = config.workers()
        self.table = LoadTable(workers, clock.read)
        for worker in workers:
            self.table.worker_changed(worker, healthy=True)
        self._names = {role: [worker.name for worker in workers if worker.role is role] for role in Role}
        self._first_rank = {
            name: number * (settings.prefill if role is Role.PREFILL else settings.decode).ranks
            for role, names in self._names.items()
            for number, name in enumerate(names)
        }
        self._decode_ranks = settings.decode.ranks
        self._prefill_ranks = settings.prefill.ranks
        self._scheduler = Scheduler(config, self.table, rng)
        self.replica: Replica | None = None
        """As one of several processes."""

    def place(self, request: TraceRequest, seen: GenerationRequest) -> Route:
        scheduled = self._scheduler.place(seen)
        prefill, decode = scheduled.placement.prefill, scheduled.placement.decode
        room = scheduled.placement.room
        # An engine that is not told the rank takes the room's remainder.
        prefill_rank = room % self._prefill_ranks if prefill.dp_rank is None else prefill.dp_rank
        decode_rank = room % self._decode_ranks if decode.dp_rank is None else decode.dp_rank
        return Route(
            self._first_rank[prefill.worker.name] + prefill_rank,
            self._first_rank[decode.worker.name] + decode_rank,
            scheduled,
        )

    def prefill_ended(self, route: Route) -> None:
        if route.scheduled is not None:
            self.table.release(route.scheduled.prefill)

    def request_ended(self, route: Route) -> None:
        if route.scheduled is not None:
            self.table.release(route.scheduled.decode)

    def observe(self, role: Role, worker: int, loads: Sequence[RankLoad], at_s: float) -> None:
        self.table.observe(self._names[role][worker], loads, at_s)
        if self.replica is not None:
            self.replica.tell(Observed(self._names[role][worker], tuple(loads), at_s))


class View:
    """Makes of a trace's request what the service sees of it. One for each seed; requests are asked for in order."""

    def __init__(self, settings: Settings, rng: random.Random, with_prompts: bool) -> None:
        """`with_prompts`: make the prompts' bytes too, which only some policies look at."""
        self._settings = settings
        self._rng = rng
        self._with_prompts = with_prompts

    def of(self, request: TraceRequest) -> GenerationRequest:
        """Bytes per token vary from request to request; the output's length shows only as a limit."""
        settings = self._settings
        noise = math.exp(self._rng.gauss(0.0, settings.bytes_per_token_sigma))
        prompt_bytes = max(1, round(request.prompt_tokens * settings.bytes_per_token * noise))
        tokens = float(request.prompt_tokens) if settings.exact_tokens else prompt_bytes / BYTES_PER_TOKEN
        limit = settings.max_tokens
        while limit < request.output_tokens:
            limit *= 2
        return GenerationRequest(
            endpoint=Endpoint.COMPLETIONS,
            model=None,
            batch_size=1,
            prompt_tokens=tokens,
            max_output_tokens=float(limit),
            prompt=memoryview(_prompt(request, prompt_bytes) if self._with_prompts else b""),
            # The first block is a system prompt that many share; the second is the conversation's own.
            routing_key=str(request.blocks[1]) if len(request.blocks) > 1 else "",
        )


def _prompt(request: TraceRequest, prompt_bytes: int) -> bytes:
    """Bytes that have a common prefix where the trace says so: every block has its own text, of equal length."""
    block_bytes = max(1, round(prompt_bytes / max(1, request.prompt_tokens) * BLOCK_TOKENS))
    text = b"".join(_block_text(block, int(BLOCK_TOKENS * BYTES_PER_TOKEN)) for block in request.blocks)
    return b'"' + text[: max(1, min(prompt_bytes, block_bytes * len(request.blocks)))] + b'"'


def _block_text(block: int, length: int) -> bytes:
    digest = hashlib.sha256(block.to_bytes(8, "big")).hexdigest().encode()
    return (digest * (length // len(digest) + 1))[:length]


def _workers(role: Role, settings: Settings) -> tuple[WorkerConfig, ...]:
    shape, net = (settings.prefill, 0) if role is Role.PREFILL else (settings.decode, 1)
    return tuple(
        WorkerConfig(url=f"http://10.{net}.{number >> 8}.{number & 255}:30000", dp_size=shape.ranks)
        for number in range(shape.workers)
    )
