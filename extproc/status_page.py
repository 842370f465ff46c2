"""The status page: what `extproc top` shows, as HTML for a browser.

Pure but for reading its own template. Whole without JavaScript; with it, the page fetches itself every second and takes
over the part between, so that there is one renderer. Every value is escaped, and the policy below allows nothing but
the template's own style and script: a name or an id that were markup after all could load and run nothing.
"""

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from extproc.overview import CLIENT_OUTCOMES, FINE_OUTCOMES, Decision, Overview, Quantiles, RankRow, RoleRows, WorkerRow
from extproc.readable import duration, times, tokens

_SOURCE = files("extproc").joinpath("status_page.html").read_text(encoding="utf-8")
_TEMPLATE = Template(_SOURCE)

SHOWN_DECISIONS = 20
BAR_UNITS = 1000
"""The width of a full bar in its own coordinates."""


def _hash_of(element: str) -> str:
    """A Content-Security-Policy source for the one inline element of that name."""
    found = re.search(f"<{element}>(.*?)</{element}>", _SOURCE, re.DOTALL)
    assert found  # noqa: S101 - our own file
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"


HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src {_hash_of('style')}; script-src {_hash_of('script')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def render(overview: Overview) -> str:
    """The whole page."""
    return _TEMPLATE.substitute(now="\n".join(_now(overview)))


def _now(overview: Overview) -> Iterable[str]:
    yield "<h1>extproc</h1>"
    if overview.not_ready:
        yield f'<span class="bad">not ready: {escape(overview.not_ready)}</span>'
    else:
        yield '<span class="good">ready</span>'
    yield "<dl>"
    yield _item("running", f"{overview.open_requests:,}")
    for outcome, count in overview.outcomes:
        yield _item(outcome.replace("_", " "), f"{count:,}", _outcome_class(outcome))
    if overview.retries:
        yield _item("of those, retries", f"{overview.retries:,}")
    if overview.rate_per_s is not None:
        yield _item("requests a second", f"{overview.rate_per_s:.1f}")
    when = "since start" if overview.window_s is None else f"last {duration(overview.window_s)}"
    yield _item(f"time to first token, {when}", _quantiles(overview.response_headers))
    yield "</dl>"
    for role in overview.roles:
        yield from _role(role, overview.load_model, when)
    yield from _decisions(overview.decisions)


def _item(name: str, value: str, css: str = "") -> str:
    return f'<div><dt>{escape(name)}</dt><dd class="{css}">{escape(value)}</dd></div>'


def _quantiles(of: Quantiles) -> str:
    return f"p50 {duration(of.p50_s)}, p99 {duration(of.p99_s)}" if of.count else "none"


def _role(role: RoleRows, load_model: str, when: str) -> Iterable[str]:
    yield '<div class="scroll"><table class="ranks">'
    yield f"<caption><b>{escape(role.role.capitalize())}</b>"
    by = f"policies {escape(role.policy)} (worker/rank), load model {escape(load_model)}"
    yield f'<span class="soft">{by}</span></caption>'
    columns = ("Rank", "Load", "Tokens", "Sent", "Requests", "Engine", "Queue", "Asked")
    heads = (f'<th scope="col"{_left(name in {"Load"})}>{name}</th>' for name in columns)
    yield f'<thead><tr><th scope="col" class="left">Worker</th>{"".join(heads)}</tr></thead>'
    if not role.workers:
        yield '<tbody><tr><td class="left" colspan="9">no worker</td></tr></tbody>'
    for worker in role.workers:
        yield from _worker(worker, when)
    yield "</table></div>"


def _left(yes: bool) -> str:
    return ' class="left"' if yes else ""


def _worker(worker: WorkerRow, when: str) -> Iterable[str]:
    yield "<tbody>"
    css = "good" if worker.usable else "warn" if worker.state == "draining" else "bad"
    leg = ""
    if worker.prefill_leg and worker.prefill_leg.count:
        leg = f'<br><span class="soft" title="prefill leg, {when}">legs {_quantiles(worker.prefill_leg)}</span>'
    head = (
        f'<th scope="rowgroup" rowspan="{max(1, len(worker.ranks))}">{escape(worker.name)}<br>'
        f'<span class="{css}">{escape(worker.state)}</span>, {worker.in_flight} in flight{leg}</th>'
    )
    for rank in worker.ranks:
        yield _rank(head, rank)
        head = ""
    yield "</tbody>"


def _rank(head: str, rank: RankRow) -> str:
    drowning = rank.times_others is not None
    mark = f"<span>{_mark(rank.times_others)}</span>" if rank.times_others is not None else ""
    bar = (
        f'<svg viewBox="0 0 {BAR_UNITS} 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{rank.share * BAR_UNITS:.0f}" height="10"/></svg>'
    )
    cells = (
        f'<td><div class="bar">{bar}{mark}</div></td><td class="load">{tokens(rank.load_tokens)}</td>',
        *(
            f"<td>{text}</td>"
            for text in (
                tokens(rank.sent_tokens),
                tokens(rank.requests),
                tokens(rank.engine_tokens),
                tokens(rank.queued),
                duration(rank.age_s),
            )
        ),
    )
    css = ' class="drowning"' if drowning else ""
    return f'<tr{css}>{head}<th scope="row">{rank.dp_rank}</th>{"".join(cells)}</tr>'


def _mark(times_others: float) -> str:
    return "others idle" if math.isinf(times_others) else f"{times(times_others)} the others"


def _decisions(decisions: Sequence[Decision]) -> Iterable[str]:
    yield '<div class="scroll"><table><caption><b>Last decisions</b>'
    yield '<span class="soft">newest first; worker/rank, a rank of - is left to the engine</span></caption>'
    left = ("Prefill", "Decode", "Outcome", "Request")
    heads = ("Age", "Prefill", "Decode", "Tokens", "First token", "Took", "Outcome", "Request")
    yield "<thead><tr>" + "".join(f'<th scope="col"{_left(name in left)}>{name}</th>' for name in heads)
    yield "</tr></thead><tbody>"
    if not decisions:
        yield '<tr><td class="left" colspan="8">no request yet</td></tr>'
    for each in decisions[:SHOWN_DECISIONS]:
        took = duration(each.duration_s)
        why = escape(each.reason or "", quote=True)
        outcome = escape(each.outcome.replace("_", " ")) + (f" {each.status}" if each.status not in {None, 200} else "")
        again = f", attempt {each.attempt}" if each.attempt > 1 else ""
        yield (
            f'<tr><td>{duration(each.age_s)}</td><td class="left">{escape(str(each.prefill or "-"))}</td>'
            f'<td class="left">{escape(str(each.decode or "-"))}</td><td>{tokens(each.prompt_tokens)}</td>'
            f"<td>{duration(each.first_token_s)}</td><td>{took}</td>"
            f'<td class="left {_outcome_class(each.outcome)}" title="{why}">{outcome}{again}</td>'
            f'<td class="left soft">{escape(each.request_id)}</td></tr>'
        )
    yield "</tbody></table></div>"


def _outcome_class(outcome: str) -> str:
    return "" if outcome in FINE_OUTCOMES else "warn" if outcome in CLIENT_OUTCOMES else "bad"
