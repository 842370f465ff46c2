"""What the engine remembers of each request, for tests and demos. Bounded memory."""

import base64
import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

HEADERS_KEPT = (
    *("host", "content-type", "content-length", "user-agent", "via"),
    *("x-request-id", "x-data-parallel-rank", "traceparent", "tracestate"),
)
"""Besides every `x-…` header."""


@dataclass(slots=True, eq=False)
class Record:
    """One generation request. Times are virtual seconds on the engine's clock; `*_unix` are real ones since 1970."""

    number: int
    arrived_s: float
    arrived_unix: float
    path: str
    headers: dict[str, str]
    body_length: int
    body_sha256: str
    body: bytes | None
    """None: longer than the engine keeps."""
    stream: bool = False
    bootstrap_host: Any = None
    bootstrap_port: Any = None
    bootstrap_room: Any = None
    """As in the request: a number, a list for a batch, or None."""
    routed_dp_rank: int | None = None
    """After the header and the old alias were taken into account."""
    disagg_prefill_dp_rank: int | None = None
    rids: list[str] = field(default_factory=list)
    rooms: list[int | None] = field(default_factory=list)
    """One for each prompt, as `ranks`, `prompt_tokens` and `output_tokens`."""
    ranks: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    """Tokens produced."""
    first_token_s: float | None = None
    finished_s: float | None = None
    status: int | None = None
    """What the client was answered with; None: still open, or the client went away."""
    outcome: str = "open"
    """open, finished, failed (engine error), aborted (client gone or /abort_request), rejected (bad request)."""
    error: str = ""
    fault: str | None = None
    """The fault that it met, as specified."""
    fault_unix: float | None = None
    aborted_unix: float | None = None
    """When the engine noticed that the client had gone."""
    ended_unix: float | None = None

    @property
    def rank(self) -> int | None:
        """The rank of the first prompt; None when the request never reached one."""
        return self.ranks[0] if self.ranks else None

    def as_json(self) -> dict[str, Any]:
        """For `GET /sim/requests`; the body as text where it is UTF-8, else as base64."""
        shown = asdict(self)
        shown["rank"] = self.rank
        if self.body is not None:
            try:
                shown["body"] = self.body.decode()
            except UnicodeDecodeError:
                shown["body"] = None
                shown["body_base64"] = base64.b64encode(self.body).decode()
        return shown


class Records:
    """The newest requests, oldest first."""

    def __init__(self, keep: int, keep_body_bytes: int) -> None:
        self._records: deque[Record] = deque(maxlen=keep)
        self._keep_body_bytes = keep_body_bytes
        self._count = 0

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records))

    def __getitem__(self, index: int) -> Record:
        return self._records[index]

    def open(self, now_s: float, unix_s: float, path: str, headers: dict[str, str], body: bytes) -> Record:
        """Remember a request that just came."""
        self._count += 1
        record = Record(
            number=self._count,
            arrived_s=now_s,
            arrived_unix=unix_s,
            path=path,
            headers={name: value for name, value in headers.items() if name in HEADERS_KEPT or name.startswith("x-")},
            body_length=len(body),
            body_sha256=hashlib.sha256(body).hexdigest(),
            body=body if len(body) <= self._keep_body_bytes else None,
        )
        self._records.append(record)
        return record

    def clear(self) -> None:
        """Forget everything; numbers go on."""
        self._records.clear()
