"""One sub-request inside the engine model, and what the model says about it. No I/O, no clocks."""

from dataclasses import dataclass
from enum import Enum


class Role(Enum):
    """What an engine does (`--disaggregation-mode`)."""

    PREFILL = "prefill"
    DECODE = "decode"
    NULL = "null"

    @property
    def engine_type(self) -> str:
        """The engine's name for the role in metric labels."""
        return "unified" if self is Role.NULL else self.value


class Phase(Enum):
    """Where a job is. The names follow the engine's queues."""

    NEW = "new"
    BOOTSTRAP = "bootstrap"  # prefill: decode has not yet said where the KV cache goes
    WAITING = "waiting"  # prefill and null: ready, waiting for a batch or in one
    INFLIGHT = "inflight"  # prefill: computed, KV cache on its way to decode
    PREALLOC = "prealloc"  # decode: waiting for room in the KV cache
    TRANSFER = "transfer"  # decode: KV cache allocated, waiting for prefill's data
    READY = "ready"  # decode: data there, joins the next step
    RUNNING = "running"  # decode and null: in the decode batch
    RETRACTED = "retracted"  # decode: pushed out of a full KV cache, waits to come back
    DONE = "done"


@dataclass(eq=False, slots=True)
class Job:
    """One prompt. Written by the rank that runs it; times are virtual seconds."""

    rid: str
    prompt_tokens: int
    output_tokens: int
    """Tokens to produce; at least 1."""
    room: int | None = None
    routed_rank: int | None = None
    rank: int = -1
    """The DP rank it runs on; -1 until submitted."""
    phase: Phase = Phase.NEW
    arrived_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    """Tokens produced so far; while in a decode batch the batch knows better: ask `DecodeBatch.generated`."""
    retractions: int = 0


class EventKind(Enum):
    """What a step of the model brought about."""

    KV_ALLOCATED = "kv allocated"  # decode has room: tell the prefill rank where to write
    KV_SENT = "kv sent"  # prefill wrote the KV cache: decode can take it
    FIRST_TOKEN = "first token"  # noqa: S105 - not a password
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """`at_s` is the virtual time at which it happened, which can lie before the time of the call."""

    kind: EventKind
    job: Job
    at_s: float
    status: int = 200
    message: str = ""


class Rejected(Exception):
    """The engine does not take the request: `status` and `message` go into its answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
