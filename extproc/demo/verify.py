"""Was a request answered right? What the client saw, against what it asked for and what engines recorded. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extproc.demo.answer import Answer, Pick
from extproc.demo.workload import Request
from extproc.request import Endpoint

Record = Mapping[str, Any]
"""One entry of an engine's `/sim/requests`."""


@dataclass(frozen=True, slots=True)
class EngineRecords:
    """What one engine recorded."""

    label: str
    role: str
    worker: str
    """`host:port`."""
    dp_size: int
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Leg:
    """One side of a request, as the engine that ran it recorded it."""

    engine: EngineRecords
    record: Record

    @property
    def ranks(self) -> list[int]:
        """The rank of each prompt."""
        return list(self.record["ranks"])

    def __str__(self) -> str:
        """`P1/0`; `P1/0,1` when the prompts of a batch ran on several ranks."""
        return f"{self.engine.label}/{','.join(map(str, sorted(set(self.ranks)))) or '?'}"


@dataclass(slots=True)
class Result:
    """One request with everything that is known of it."""

    request: Request
    answer: Answer
    prefill: Leg | None = None
    decode: Leg | None = None
    problems: list[str] = field(default_factory=list)
    """Empty: it was answered right."""


def verify(
    requests: Sequence[Request], answers: Sequence[Answer], engines: Sequence[EngineRecords], *, ranks_picked: bool
) -> list[Result]:
    """Check every answer. `ranks_picked`: the gateway picks ranks; if not, the engines take `room % dp_size`."""
    legs: dict[tuple[str, int], list[Leg]] = {}
    for engine in engines:
        for record in engine.records:
            for room in record["rooms"][:1]:
                legs.setdefault((engine.role, room), []).append(Leg(engine, record))
    results = []
    rooms: set[int] = set()
    for request, answer in zip(requests, answers, strict=True):
        result = Result(request, answer)
        result.problems.extend(check_answer(request, answer))
        if answer.room is not None:
            taken = set(range(answer.room, answer.room + len(request.prompt_tokens)))
            if rooms & taken:
                result.problems.append(f"room {answer.room} was used twice")
            rooms |= taken
            for role, pick in (("prefill", answer.prefill), ("decode", answer.decode)):
                found = legs.get((role, answer.room), [])
                setattr(result, role, found[0] if found else None)
                if len(found) == 1:
                    result.problems.extend(check_leg(request, answer, found[0], pick, ranks_picked=ranks_picked))
                else:
                    result.problems.append(f"{len(found)} {role} engines recorded room {answer.room}, expected 1")
        elif answer.status == 200:
            result.problems.append("the response has no x-pd-room header")
        results.append(result)
    return results


def check_answer(request: Request, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer as the client sees it."""
    if answer.status != 200:
        yield f"status {answer.status}: {answer.error}" if answer.status else f"no answer: {answer.error}"
        return
    if answer.error:
        yield answer.error
    count = len(request.prompt_tokens)
    if sorted(answer.texts) != list(range(count)):
        yield f"{len(answer.texts)} texts for {count} prompts"
    for index, text in sorted(answer.texts.items()):
        if text != request.expected_text:
            yield f"wrong text for prompt {index}: {text[:40]!r}… of {len(text)} characters"
        if (reason := answer.finish_reasons.get(index)) != "length":
            yield f"finish reason {reason!r} for prompt {index}, expected 'length'"
    if request.kind.endpoint is Endpoint.GENERATE:
        prompt_tokens = dict(enumerate(request.prompt_tokens))
        output_tokens = dict.fromkeys(range(count), request.output_tokens)
    else:
        prompt_tokens = {0: sum(request.prompt_tokens)}
        output_tokens = {0: count * request.output_tokens}
    if answer.prompt_tokens != prompt_tokens:
        yield f"prompt tokens {answer.prompt_tokens}, expected {prompt_tokens}"
    if answer.output_tokens != output_tokens:
        yield f"output tokens {answer.output_tokens}, expected {output_tokens}"


def check_leg(request: Request, answer: Answer, leg: Leg, pick: Pick | None, *, ranks_picked: bool) -> Iterator[str]:
    """What is wrong with one leg: it must have run where the response headers say, and to its end."""
    role, record, dp_size = leg.engine.role, leg.record, leg.engine.dp_size
    count = len(request.prompt_tokens)
    assert answer.room is not None  # noqa: S101 - the leg was found by it
    rooms = list(range(answer.room, answer.room + count))
    if pick is None:
        yield f"the response has no readable x-pd-{role} header"
        return
    if pick.worker != leg.engine.worker:
        yield f"{role} ran on {leg.engine.worker}, the header says {pick.worker}"
    if record["rooms"] != rooms:
        yield f"{role} has rooms {record['rooms']}, expected {rooms}"
    if (pick.dp_rank is not None) != (ranks_picked and dp_size > 1):
        yield f"{role} rank in the header: {pick.dp_rank}"
    ranks = [room % dp_size for room in rooms] if pick.dp_rank is None else [pick.dp_rank] * count
    if record["ranks"] != ranks:
        yield f"{role} ran on ranks {record['ranks']}, expected {ranks}"
    told = record["disagg_prefill_dp_rank"]
    if role == "decode" and answer.prefill and told != answer.prefill.dp_rank:
        yield f"decode was told prefill rank {told}, the header says {answer.prefill.dp_rank}"
    if record["outcome"] != "finished" or record["status"] != 200:
        yield f"{role} leg {record['outcome']} with status {record['status']}: {record['error']}"
    if record["prompt_tokens"] != list(request.prompt_tokens):
        yield f"{role} has prompt tokens {record['prompt_tokens']}, expected {list(request.prompt_tokens)}"
    if role == "decode" and record["output_tokens"] != [request.output_tokens] * count:
        yield f"decode made tokens {record['output_tokens']}, expected {request.output_tokens} for each prompt"
