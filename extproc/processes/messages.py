"""What the leader and its followers say to each other: msgpack, one message a frame, its length before it.

Pure. Times are of `time.monotonic`, one clock for all processes of a Linux machine (CLOCK_MONOTONIC: since boot).
Both ends are of one version, as the leader starts its followers; so nothing here has to be compatible.
"""

import math
from collections.abc import Iterator, Sequence

import msgspec

from extproc.circuit import Circuit
from extproc.config import Config
from extproc.model import RankLoad, Worker

LENGTH_BYTES = 4
"""Big-endian, of the message alone."""

# Events: changes of the table. Leases are numbered by the process that made them.


class Charged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """A lease was made."""

    lease: int
    worker: str
    dp_rank: int
    prompt_tokens: float
    output_tokens: float
    at_s: float
    after: int = 0
    """The lease of the prefill leg; 0: none that is to be learned from."""
    max_output: float = math.inf


class Released(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """It was given back."""

    lease: int
    failed: bool | None
    judged: bool
    """The circuit has been told, too."""
    at_s: float


class Judged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """The circuit was told, after the release."""

    lease: int
    failed: bool | None
    at_s: float


class Blamed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A worker failed a request, whose next attempt may come to any process."""

    request_id: str
    worker: str


class Observed(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """The leader: a scrape gave figures."""

    worker: str
    loads: tuple[RankLoad, ...]
    at_s: float


class WorkerChanged(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """The leader: a worker came up, went down, or is known better."""

    worker: Worker
    healthy: bool


class Draining(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """The leader: a worker gets no new requests, or gets them again."""

    worker: str
    draining: bool


class Gone(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """The leader: a process has ended; what it had charged is not charged any more."""

    process: int


Event = Charged | Released | Judged | Blamed | Observed | WorkerChanged | Draining | Gone


class RankSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """A rank but for its leases; as in `load.RankState`."""

    scraped: RankLoad | None
    scraped_at_s: float | None
    charged_tokens: float
    serving_since_s: float
    tokens_per_s: float | None
    counted: bool
    request_tokens_per_s: float | None
    work_tokens: float
    busy_s: float
    lifetime_s: float
    foreign_tokens: float
    news_at_s: float | None


class WorkerSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """A worker but for its leases; as in `load.WorkerState`."""

    worker: Worker
    healthy: bool
    draining: bool
    engine_clock_s: float | None
    circuit: Circuit
    ranks: tuple[RankSnapshot, ...]


class TableSnapshot(msgspec.Struct, frozen=True, array_like=True):
    """A whole load table."""

    workers: tuple[WorkerSnapshot, ...]
    leases: tuple[tuple[int, tuple[Charged, ...]], ...]
    """By process, those that are open, oldest first."""
    output_tokens: float | None


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Changes of one go of a process's event loop, in their order."""

    process: int
    sent_at_s: float
    events: list[Event]


class Start(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The leader's first message."""

    process: int
    config: Config
    target: str
    """Where to serve: gRPC `host:port` or `unix:PATH`."""
    table: TableSnapshot


class Listening(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The follower serves."""


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The follower cannot serve, and why."""

    reason: str


class Leave(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Say to health checks that no more requests are wanted."""


class Close(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Take no new streams."""


class Rest(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """The leader asks: say when no exchange is left. The follower answers the same then."""


class End(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """End at once."""


Sample = tuple[str, dict[str, str], float]
"""Of a Prometheus page: name, labels, value."""


class Figures(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A follower's own figures, from time to time; that they come shows that it lives."""

    open_streams: int
    open_exchanges: int
    lag_s: float
    """How old the latest batch was when it came."""
    samples: dict[str, list[Sample]]
    """Of its counters and histograms, by their names."""


Message = Batch | Start | Listening | Failed | Leave | Close | Rest | End | Figures

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def frame(message: Message) -> bytes:
    """A message as it goes over a socket."""
    encoded = _encoder.encode(message)
    return len(encoded).to_bytes(LENGTH_BYTES, "big") + encoded


def decode(message: bytes | memoryview) -> Message:
    """A message without its length. Raises msgspec.MsgspecError."""
    decoded: Message = _decoder.decode(message)
    return decoded


class Unframer:
    """Takes a stream of bytes apart."""

    def __init__(self) -> None:
        self._unread = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The messages that are complete now. To be used up at once."""
        unread = self._unread
        unread += data
        at = 0
        while len(unread) - at >= LENGTH_BYTES:
            end = at + LENGTH_BYTES + int.from_bytes(unread[at : at + LENGTH_BYTES], "big")
            if len(unread) < end:
                break
            yield bytes(unread[at + LENGTH_BYTES : end])
            at = end
        del unread[:at]


def batch_frame(process: int, sent_at_s: float, events: Sequence[Event]) -> bytes:
    """A `Batch`, framed."""
    return frame(Batch(process, sent_at_s, list(events)))
