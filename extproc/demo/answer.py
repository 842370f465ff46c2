"""What came back for one request, collected from answers of any shape, whole or streamed. No I/O."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

PREFILL, DECODE, ROOM = "x-pd-prefill", "x-pd-decode", "x-pd-room"
"""Response headers of the gateway."""

_PICK = re.compile(r"(?P<worker>[^;]+)(?:;dp_rank=(?P<rank>\d+))?")


@dataclass(frozen=True, slots=True)
class Pick:
    """A worker and its rank, as a response header names them."""

    worker: str
    dp_rank: int | None
    """None: the gateway left the choice to the engine."""

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """`host:port;dp_rank=N` or `host:port`; None for anything else."""
        match = _PICK.fullmatch(header or "")
        return cls(match["worker"], None if match["rank"] is None else int(match["rank"])) if match else None


@dataclass(slots=True)
class Answer:
    """One answer. Times are seconds since the request was sent."""

    status: int | None = None
    """None: no answer at all."""
    error: str = ""
    prefill: Pick | None = None
    decode: Pick | None = None
    room: int | None = None
    texts: dict[int, str] = field(default_factory=dict)
    """By the index of the prompt."""
    finish_reasons: dict[int, str] = field(default_factory=dict)
    prompt_tokens: dict[int, int] = field(default_factory=dict)
    """As the engine counted: by prompt on /generate, else the sum, at 0."""
    output_tokens: dict[int, int] = field(default_factory=dict)
    first_token_s: float | None = None
    """None: not streamed."""
    total_s: float = 0.0

    def take_headers(self, status: int, headers: Mapping[str, str]) -> None:
        """The response has begun."""
        self.status = status
        self.prefill, self.decode = Pick.parse(headers.get(PREFILL)), Pick.parse(headers.get(DECODE))
        room = headers.get(ROOM, "")
        self.room = int(room) if room.isdecimal() else None

    def take_openai(self, content: Mapping[str, Any]) -> None:
        """A whole answer, or the next chunk of one, in OpenAI's shape."""
        if content.get("error"):
            self.error = str(content["error"])
            return
        for choice in content["choices"]:
            index = choice["index"]
            part = choice.get("delta") or choice.get("message")
            text = part.get("content") if part else choice.get("text")
            self.texts[index] = self.texts.get(index, "") + (text or "")
            if choice.get("finish_reason"):
                self.finish_reasons[index] = choice["finish_reason"]
        if usage := content.get("usage"):
            self.prompt_tokens[0], self.output_tokens[0] = usage["prompt_tokens"], usage["completion_tokens"]

    def take_generate(self, content: Any) -> None:
        """A whole answer, or the next chunk of one, of `/generate`; a chunk repeats the text so far."""
        for position, part in enumerate(content if isinstance(content, list) else [content]):
            if part.get("error"):
                self.error = str(part["error"])
                continue
            index, meta = part.get("index", position), part["meta_info"]
            self.texts[index] = part["text"]
            self.prompt_tokens[index], self.output_tokens[index] = meta["prompt_tokens"], meta["completion_tokens"]
            if meta["finish_reason"]:
                self.finish_reasons[index] = meta["finish_reason"]["type"]

    @property
    def has_text(self) -> bool:
        """Whether a first token is there."""
        return any(self.texts.values())
