"""The prompt's length in an engine's answer: `usage.prompt_tokens` (OpenAI) or `meta_info.prompt_tokens` (`/generate`).

Pure. Shapes: SGLang 0.5.23. A batch on `/generate` is a list, or in a stream one event for each prompt and step, told
apart by `index`. In a stream the last event that has a count speaks; OpenAI's has one only where the request asked for
it (`stream_options.include_usage`).
"""

from collections.abc import Mapping

import msgspec

from extproc.number import number

_EVENT = b"data:"

MAX_ANSWER_BYTES = 64 << 10
"""Longer answers of known length are not asked for: a prefill answer has under 1 KB, unless it carries logprobs."""


class _Figures(msgspec.Struct):
    prompt_tokens: int | None = None


class _Answer(msgspec.Struct):
    usage: _Figures | None = None
    meta_info: _Figures | None = None
    index: int | None = None

    @property
    def tokens(self) -> int:
        """0: it does not say."""
        figures = self.meta_info or self.usage
        return figures.prompt_tokens or 0 if figures else 0


_decode_answer = msgspec.json.Decoder(_Answer | list[_Answer]).decode
_decode_event = msgspec.json.Decoder(_Answer).decode


def is_readable(headers: Mapping[str, str]) -> bool:
    """Whether an answer with these headers may be asked for: a short one, or a stream (of one token, from prefill)."""
    if headers.get("content-encoding", "identity") != "identity":
        return False
    if "content-length" in headers:
        length = number(headers["content-length"])
        return length is not None and length <= MAX_ANSWER_BYTES
    return headers.get("content-type", "").startswith("text/event-stream")


def counted_tokens(body: bytes, prompts: int) -> int | None:
    """Tokens of all prompts of a request, from the answer to it; None when it does not say so for all of them."""
    try:
        if body.lstrip()[:5] == _EVENT:
            return _of_stream(body, prompts)
        answer = _decode_answer(body)
    except (msgspec.DecodeError, RecursionError):  # another form of answer, or cut off: then there is no count
        return None
    if isinstance(answer, list):
        counts = [each.tokens for each in answer]
        return sum(counts) if len(counts) == prompts and all(counts) else None
    return answer.tokens or None


def _of_stream(body: bytes, prompts: int) -> int | None:
    by_index: dict[int, int] = {}
    for line in reversed(body.splitlines()):
        if not line.startswith(_EVENT) or line.endswith(b"[DONE]"):
            continue
        event = _decode_event(line.removeprefix(_EVENT))
        if not event.tokens:
            continue
        if event.meta_info is None:
            return event.tokens  # OpenAI's is for all prompts together
        by_index.setdefault(event.index or 0, event.tokens)
        if len(by_index) == prompts:
            return sum(by_index.values())
    return None
