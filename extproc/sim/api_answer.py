"""What the engine answers, in SGLang's and OpenAI's shapes. No I/O.

The text is made so that a test can tell a right answer: token number i is the word `tok<i>`, from 0, one space between
words.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from extproc.sim.api_request import Api, ApiRequest, Prompt


def text_of(start: int, end: int) -> str:
    """The text of output tokens `start` to `end` - 1, with the space that parts it from the text before."""
    words = " ".join(f"tok{i}" for i in range(start, end))
    return f" {words}" if start and words else words


@dataclass(slots=True)
class Choice:
    """How one prompt stands: tokens so far, and once it is over, why."""

    prompt: Prompt
    rank: int
    tokens: int = 0
    finish: dict[str, Any] | None = None
    latency_s: float = 0.0

    @property
    def reason(self) -> str | None:
        """`length`, `stop` or `abort`; None while it runs."""
        return None if self.finish is None else str(self.finish["type"])


def finished(request: ApiRequest, tokens: int) -> dict[str, Any]:
    """The finish reason of a prompt that got all its tokens."""
    if request.ends_by_itself:
        return {"type": "stop", "matched": None}
    return {"type": "length", "length": tokens}


def aborted(message: str, status: int | None) -> dict[str, Any]:
    """The finish reason of a prompt that the scheduler gave up."""
    return {"type": "abort", "message": message, "status_code": status, "err_type": None}


def error_chunk(message: str, status: int) -> dict[str, Any]:
    """An error after the headers of a stream were sent, on the OpenAI paths."""
    kind = HTTPStatus(status).name
    return {"error": {"object": "error", "message": message, "type": kind, "param": None, "code": status}}


def generate(request: ApiRequest, choice: Choice, index: int | None = None) -> dict[str, Any]:
    """One prompt's answer on /generate; in a stream each chunk repeats all text so far."""
    meta: dict[str, Any] = {
        "id": choice.prompt.rid,
        "finish_reason": choice.finish,
        "prompt_tokens": choice.prompt.tokens,
        "weight_version": "default",
        "total_retractions": 0,
        "completion_tokens": choice.tokens,
        "cached_tokens": 0,
        "dp_rank": choice.rank,
        "e2e_latency": choice.latency_s,
    }
    if request.return_logprob:
        start = max(0, request.logprob_start) if request.logprob_start >= 0 else choice.prompt.tokens
        meta["input_token_logprobs"] = [[-1.0, i, None] for i in range(start, choice.prompt.tokens)]
        meta["output_token_logprobs"] = [[-0.5, i, None] for i in range(choice.tokens)]
    answer: dict[str, Any] = {
        "text": text_of(0, choice.tokens),
        "output_ids": list(range(choice.tokens)),
        "meta_info": meta,
    }
    if index is not None:
        answer["index"] = index
    return answer


def usage(request: ApiRequest, choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts; a prompt with several choices counts once."""
    prompt_tokens = sum(choice.prompt.tokens for choice in choices[:: request.choices_per_prompt])
    completion_tokens = sum(choice.tokens for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": None,
        "reasoning_tokens": 0,
    }


def whole(request: ApiRequest, choices: Sequence[Choice], created: int) -> Any:
    """The answer to a request that does not stream."""
    if request.api is Api.GENERATE:
        answers = [generate(request, choice) for choice in choices]
        return answers if request.batch else answers[0]
    chat = request.api is Api.CHAT
    listed = []
    for i, choice in enumerate(choices):
        text = text_of(0, choice.tokens)
        content: dict[str, Any] = {"text": text}
        if chat:
            message = {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None}
            content = {"message": message}
        ending = {"logprobs": None, "finish_reason": choice.reason, "matched_stop": None}
        listed.append({"index": i, **content, **ending})
    return {
        "id": choices[0].prompt.rid,
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": request.model,
        "choices": listed,
        "usage": usage(request, choices),
        "metadata": {"weight_version": "default"},
    }


def chunk(request: ApiRequest, rid: str, created: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
    """A chunk of an OpenAI stream."""
    return {
        "id": rid,
        "object": "chat.completion.chunk" if request.api is Api.CHAT else "text_completion",
        "created": created,
        "model": request.model,
        "choices": choices,
        "usage": None,
    }


def pieces(request: ApiRequest, choice: Choice, index: int, sent: int, created: int) -> list[dict[str, Any]]:
    """The chunks that take a client from `sent` tokens of a choice to where it stands now."""
    if request.api is Api.GENERATE:
        batch = request.batch
        return [generate(request, choice, index if batch else None)]
    text = text_of(sent, choice.tokens)
    rid = request.prompts[0].rid
    if request.api is Api.COMPLETIONS:
        part = {"index": index, "text": text, "logprobs": None, "finish_reason": choice.reason, "matched_stop": None}
        return [chunk(request, rid, created, [part])]
    deltas: list[tuple[dict[str, Any], str | None]] = []
    if not sent:
        deltas.append(({"role": "assistant", "content": ""}, None))
    if text:
        deltas.append(({"role": None, "content": text}, None))
    if choice.finish is not None:
        deltas.append(({"role": None, "content": None}, choice.reason))
    return [chunk(request, rid, created, [_delta(index, delta, reason)]) for delta, reason in deltas]


def _delta(index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
    whole_delta = {**delta, "reasoning_content": None, "tool_calls": None}
    return {"index": index, "delta": whole_delta, "logprobs": None, "finish_reason": reason, "matched_stop": None}
