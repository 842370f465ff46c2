"""Rows 1-5: a leg fails, and what becomes of the client and of the other leg."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from chaos_client import CHAT, GENERATE, Seen, chat, generate
from chaos_field import Attempt, Field, volley
from chaos_rows import Row

PROMPT_BYTES = 8000
"""0.1 s of prefill: time to fail in the middle."""
OTHER_LEG_MS = {1: 10, 2: 10, 4: 50, 5: 50}
"""The promises of the rows. A decode that failed keeps nobody waiting: the next attempt does not wait for prefill."""
CLIENT_MS = {1: 50, 2: 50, 4: 50, 5: 500}
"""A broken stream is known late: Envoy leaves connections that it broke off open for 270 ms (docs/reliability.md)."""
MESSAGE = "simulated fault"


@dataclass(frozen=True)
class Case:
    """A fault of one role, and what it must lead to."""

    number: int
    name: str
    role: str
    spec: str
    expected: str
    """What every client must see."""
    everywhere: bool = False
    """On all engines of the role; else on the first only."""
    retried: bool = True
    stream: bool = False
    path: str = CHAT
    count: int = 60
    """Requests; the short version sends fewer."""

    def body(self) -> dict[str, object]:
        """The request."""
        make = generate if self.path == GENERATE else chat
        return make(tokens=30 if self.stream else 2, prompt_bytes=PROMPT_BYTES, stream=self.stream)


REJECTED = [
    Case(1, "prefill answers 400", "prefill", "status=400", "400", everywhere=True, retried=False),
    Case(1, "prefill answers 422 mid-prefill", "prefill", "status=422@work,delay=0.03", "422", True, retried=False),
]
PREFILL_FAILS = [
    Case(2, "one prefill answers 503", "prefill", "status=503", "200"),
    Case(2, "one prefill answers 500", "prefill", "status=500", "200"),
    Case(2, "one prefill resets", "prefill", "reset", "200"),
    Case(2, "one prefill resets mid-prefill", "prefill", "reset@work,delay=0.03", "200"),
    Case(2, "one prefill closes mid-prefill", "prefill", "close@work,delay=0.03", "200"),
    Case(2, "one prefill 500 mid-prefill, stream", "prefill", "status=500@work,delay=0.03", "200", stream=True),
    Case(2, "all prefills answer 503", "prefill", "status=503", "502", everywhere=True),
    Case(2, "all prefills reset mid-prefill", "prefill", "reset@work,delay=0.03", "502", everywhere=True),
    Case(2, "one prefill resets, /generate stream", "prefill", "reset", "200", stream=True, path=GENERATE),
]
DECODE_FAILS = [
    Case(4, "one decode answers 503", "decode", "status=503", "200"),
    Case(4, "one decode answers 500", "decode", "status=500", "200"),
    Case(4, "one decode resets", "decode", "reset", "200"),
    Case(4, "one decode closes while it waits", "decode", "close@work,delay=0.03", "200"),
    Case(
        4,
        "one decode closes an early /generate stream",
        "decode",
        "close@work,delay=0.03",
        "200",
        stream=True,
        path=GENERATE,
    ),
    Case(4, "all decodes answer 503", "decode", "status=503", "503", everywhere=True),
    Case(4, "all decodes reset", "decode", "reset", "503", everywhere=True),
]
BROKEN = "200, then ClientPayloadError"
DECODE_BREAKS = [
    Case(5, "decode resets mid-stream", "decode", "reset@stream,after=5", BROKEN, True, False, stream=True),
    Case(5, "decode closes mid-stream", "decode", "close@stream,after=5", BROKEN, True, False, stream=True),
    Case(
        5, "decode closes mid-stream, /generate", "decode", "close@stream,after=5", BROKEN, True, False, True, GENERATE
    ),
]
CASES = [*REJECTED, *PREFILL_FAILS, *DECODE_FAILS, *DECODE_BREAKS]


async def run_case(field: Field, case: Case, count: int | None = None) -> Row:
    """Send the requests, then read off the engines' records what followed from each fault."""
    await field.calm()
    row = Row(case.number, case.name)
    engines = [engine for engine in field.engines if engine.role == case.role]
    # To a busy service its workers may look worse than they are: a few warm-up requests are not part of the row.
    async with field.client() as client:
        await volley(4, 2, lambda _: client.send(chat()))
        await field.set_faults(engines if case.everywhere else engines[:1], case.spec)
        seen = await volley(count or case.count, 2, lambda _: client.send(case.body(), case.path))
        await field.set_faults(engines)
    row.clients.update(one.said(case.stream) for one in seen)
    row.check(set(row.clients) == {case.expected}, f"every client gets {case.expected}")
    left = await field.left_over()
    row.check(not left, f"nothing is left over ({left})")
    attempts = await field.attempts(seen)
    struck = 0
    for one in seen:
        struck += measure(row, one, attempts.get(one.request_id, []), "decode" if case.role == "prefill" else "prefill")
    row.check(struck > 0, "some requests meet the fault")
    row.notes.append(f"{struck} attempts met the fault")
    judge(row, case, seen, [attempts.get(one.request_id, []) for one in seen])
    if case.number == 5:
        judge_log(row, field.stack.gateway_log, seen)
    return row


def measure(row: Row, seen: Seen, attempts: Sequence[Attempt], other: str) -> int:
    """Times from each fault to what follows from it; returns how many attempts met a fault."""
    struck = 0
    for attempt, following in zip_longest(attempts, attempts[1:]):
        failed_unix = attempt.fault_unix
        if failed_unix is None:
            continue
        struck += 1
        leg = getattr(attempt, other)
        if leg is None:
            row.took(f"{other} leg never came", 0.0)
        elif leg["aborted_unix"]:
            row.took(f"failure to {other} leg's cancellation", (leg["aborted_unix"] - failed_unix) * 1e3)
        elif leg["outcome"] != "finished":  # it had failed by itself: the engines tell each other
            row.took(f"failure to {other} leg's own end", (leg["ended_unix"] - failed_unix) * 1e3)
        if following is not None:
            row.took("failure to the next attempt", (following.arrived_unix - failed_unix) * 1e3)
        elif not seen.left:
            row.took("failure to the client's answer", (seen.ended_unix - failed_unix) * 1e3)
    return struck


def judge(row: Row, case: Case, seen: Sequence[Seen], attempts: Sequence[Sequence[Attempt]]) -> None:
    """What the case promises beyond the status."""
    other = "decode" if case.role == "prefill" else "prefill"
    if f"failure to {other} leg's cancellation" in row.figures:
        row.check_p99(f"failure to {other} leg's cancellation", OTHER_LEG_MS[case.number])
    if "failure to the client's answer" in row.figures:
        row.check_p99("failure to the client's answer", CLIENT_MS[case.number])
    if "failure to the next attempt" in row.figures:
        row.check_p99("failure to the next attempt", CLIENT_MS[case.number])
    if not case.retried:
        row.check(all(len(tried) <= 1 for tried in attempts), "there is no retry")
    if case.number == 1:
        row.check(all(MESSAGE.encode() in one.body for one in seen), "the engine's own message")
    if case.everywhere and seen[0].status != 200:
        row.notes.append(f"says {seen[0].body[:160].decode(errors='replace')!r}")
    if case.everywhere and case.retried and not case.spec.startswith("status"):
        row.check(all(one.body.startswith(b"{") for one in seen), "the error is JSON")
        row.check(all(f"{case.role} worker".encode() in one.body for one in seen), f"it says that {case.role} failed")
    if case.expected == "200" and not case.everywhere:
        again = [tried for tried in attempts if len(tried) > 1]
        pairs = [(tried[0].engines.get(case.role), tried[1].engines.get(case.role)) for tried in again]
        fresh = all(first != second for first, second in pairs)
        row.check(fresh, "a retry avoids the worker that failed")
    if case.number == 5:
        row.check(not any(one.done for one in seen), "no stream ends with [DONE]")


def judge_log(row: Row, log: str, seen: Sequence[Seen]) -> None:
    """Row 5: the log says that the stream broke off, not that all is well."""
    wanted = {one.request_id for one in seen}
    fields = [dict(part.split("=", 1) for part in line.split() if "=" in part) for line in log.splitlines()]
    outcomes = sorted({line.get("outcome", "") for line in fields if line.get("request_id") in wanted})
    row.notes.append(f"log: outcome={', '.join(outcomes)}")
    row.check(outcomes == ["decode_failed"], "the log says that decode broke the stream off")
