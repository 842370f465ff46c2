"""The last placements as `/debug/decisions` shows them: where each request went, and what became of it.

Pure. The shape is documented in docs/observing.md. Nothing that clients choose is shown but the request id.
"""

from collections.abc import Iterable

from extproc.events import Finished
from extproc.model import Pick

RUNNING = "running"
"""In place of an outcome."""

MAX_REQUEST_ID = 64
"""Characters; a UUID, which Envoy makes where a client sends no id, has 36."""


def describe_decisions(ended: Iterable[Finished], running: Iterable[Finished], now_s: float) -> dict[str, object]:
    """All of them, those that came last first, ready for JSON."""
    told = [(record, RUNNING) for record in running] + [(record, str(record.outcome)) for record in ended]
    told.sort(key=lambda each: -each[0].started_s)
    return {"decisions": [_entry(record, outcome, now_s - record.started_s) for record, outcome in told]}


def _entry(record: Finished, outcome: str, age_s: float) -> dict[str, object]:
    placement = record.placement
    return {
        "age_s": age_s,
        "request_id": printable(record.request_id)[:MAX_REQUEST_ID],
        "attempt": record.attempt,
        "endpoint": record.endpoint,
        "outcome": outcome,
        "status": record.status or None,
        "reason": record.reason or None,
        "prefill": placement and _pick(placement.prefill),
        "decode": placement and _pick(placement.decode),
        # A string, as JavaScript's numbers are exact to 2^53 only, and jq's are the same.
        "room": placement and str(placement.room),
        "prompts": record.batch_size or None,
        "prompt_tokens": record.prompt_tokens if placement else None,
        "counted_tokens": record.counted_tokens,
        "decision_s": record.decision_s,
        "response_headers_s": record.response_headers_s,
        "prefill_s": record.prefill_s,
        "duration_s": record.duration_s,
        "prefill_end": record.prefill_end if outcome != RUNNING else None,
        "decode_end": record.decode_end if outcome != RUNNING else None,
        "prefill_loads": record.explanation and record.explanation.prefill,
        "decode_loads": record.explanation and record.explanation.decode,
    }


def _pick(pick: Pick) -> dict[str, object]:
    return {"worker": pick.worker.name, "dp_rank": pick.dp_rank}


def printable(text: str) -> str:
    """Without anything that a terminal could take for a command, or that could turn the text around."""
    return "".join(character if " " <= character <= "~" else "?" for character in text)
