"""Accounts for every request: what clients saw, what the service logged of each attempt, what it counted."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from chaos_field import Field
from prometheus_client.parser import text_string_to_metric_families
from soak_traffic import Sent

EXAMPLES = 5
NAMELESS = "-"
_LINE = re.compile(
    r"outcome=(?P<outcome>\S+) status=(?P<status>\d+) endpoint=(?P<endpoint>\S+) request_id=(?P<id>\S+)"
    r" attempt=(?P<attempt>\d+)"
)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A line of the service's log."""

    outcome: str
    status: int
    endpoint: str
    number: int


def read_log(path: Path) -> dict[str, list[Attempt]]:
    """The attempts at each request, in their order."""
    attempts: dict[str, list[Attempt]] = defaultdict(list)
    with path.open(errors="replace") as lines:
        for line in lines:
            if found := _LINE.search(line):
                attempts[found["id"]].append(
                    Attempt(found["outcome"], int(found["status"]), found["endpoint"], int(found["attempt"]))
                )
    for each in attempts.values():
        each.sort(key=lambda attempt: attempt.number)
    return attempts


async def counted(field: Field) -> Counter[tuple[str, str, int]]:
    """Attempts by endpoint, outcome and status, from the service's metrics."""
    async with field.http.get(f"{field.status_url}/metrics") as answer:
        text = await answer.text()
    counts: Counter[tuple[str, str, int]] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "extproc_attempts_total":
                labels = sample.labels
                counts[labels["endpoint"], labels["outcome"], int(labels["status"])] += int(sample.value)
    return counts


def final_statuses(sent: Iterable[Sent], attempts: dict[str, list[Attempt]]) -> Counter[int]:
    """By what status the last attempts at these requests were answered, as the service says."""
    return Counter(attempts[one.request_id][-1].status for one in sent if one.request_id in attempts)


def problems(
    sent: list[Sent], attempts: dict[str, list[Attempt]], metrics: Counter[tuple[str, str, int]], hits: int
) -> list[str]:
    """What does not add up. `hits`: how often engine faults struck."""
    found = []
    logged = Counter((a.endpoint, a.outcome, a.status) for each in attempts.values() for a in each)
    if logged != metrics:
        found.append(f"log and metrics differ: {dict(logged - metrics)} in the log only, {dict(metrics - logged)} not")
    # A client that leaves at once can be gone before the service has read anything of its request.
    left, nameless = sum(one.kind == "leaves" for one in sent), len(attempts.get(NAMELESS, ()))
    if nameless > left:
        found.append(f"{nameless} attempts without a request, and only {left} clients left")
    strangers = attempts.keys() - {one.request_id for one in sent} - {NAMELESS}
    if strangers:
        found.append(f"{len(strangers)} requests in the log that nobody sent: {list(strangers)[:EXAMPLES]}")
    stayed = [one for one in sent if one.kind != "leaves"]
    unequal = [f"{one} but {attempts.get(one.request_id)}" for one in stayed if not _agree(one, attempts)]
    if unequal:
        found.append(f"{len(unequal)} answers that the service did not give: {'; '.join(unequal[:EXAMPLES])}")
    wrong = [one for one in stayed if one.kind.startswith("nonsense for")]
    if wrong:
        found.append(f"{len(wrong)} times nonsense got a wrong answer: {wrong[:EXAMPLES]}")
    unhappy = [one for one in stayed if one.kind != "nonsense" and one.said != "200"]
    if len(unhappy) > hits:
        found.append(f"{len(unhappy)} requests failed, but only {hits} faults struck: {unhappy[:EXAMPLES]}")
    return found


def _agree(one: Sent, attempts: dict[str, list[Attempt]]) -> bool:
    """Whether the log has all attempts at a request, and the last one is what its client saw."""
    logged = attempts.get(one.request_id, [])
    complete = [attempt.number for attempt in logged] == list(range(1, len(logged) + 1))
    return bool(logged) and complete and logged[-1].status == one.status
