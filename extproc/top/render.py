"""The picture: from an overview to lines of a terminal. Pure.

Whatever does not fit into the height is told shorter: first there are fewer decisions, then a worker's ranks share one
line (a bar each), then the workers with the least load are counted only. 80 columns are enough; more make bars longer.
Colours repeat what is also said in words or signs.
"""

import math
from collections.abc import Iterable, Sequence

from rich.text import Text

from extproc.overview import CLIENT_OUTCOMES, FINE_OUTCOMES, Decision, Overview, Quantiles, RankRow, RoleRows, WorkerRow
from extproc.readable import duration, times, tokens

MIN_WIDTH = 80
COLUMNS = (("LOAD", 7), ("SENT", 7), ("REQS", 5), ("ENGINE", 7), ("QUEUE", 6), ("ASKED", 7))
"""Figures of a rank, right of its bar: name and width."""
MARK_WIDTH = 10
"""` << 12x` beside a bar: of a rank that drowns."""
RANK_WIDTH = 5
MIN_NAME_WIDTH = 16
MIN_DECISIONS = 3
MAX_DECISIONS = 12
LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-=*#%@"
EIGHTHS = "▏▎▍▌▋▊▉█"

SOFT, GOOD, WARN, BAD, HEAD, LOAD = "dim", "green", "yellow", "bold red", "bold", "cyan"

LEGEND = "LOAD: tokens compared by · SENT: not done · ENGINE: in use there · <<: x others"


def render(overview: Overview, *, url: str, width: int, height: int | None = None, ascii_only: bool = False) -> Text:
    """The picture, at most `height` lines; None: as many as it takes, with every rank."""
    width = max(width, MIN_WIDTH)
    top = list(_summary(overview, url, width))
    roles = [_all_ranks(role, width, ascii_only) for role in overview.roles]
    room = None if height is None else height - len(top) - 1  # the legend
    decisions = len(overview.decisions[:MAX_DECISIONS])
    if room is not None:
        least = 1 + min(decisions, MIN_DECISIONS)  # with its head
        if sum(map(len, roles)) + least > room:
            roles = _one_line_each(overview, width, ascii_only, room - least)
        decisions = max(0, min(decisions, room - sum(map(len, roles)) - 1))
    parts = [top, *roles, list(_decisions(overview.decisions[:decisions], width)), [Text(LEGEND, style=SOFT)]]
    spare = len(parts) if room is None else room - sum(len(part) for part in parts[1:-1])
    lines = list(parts[0])
    for part in parts[1:]:
        if spare > 0:
            lines.append(Text())
            spare -= 1
        lines.extend(part)
    if ascii_only:
        lines = [Text(_to_ascii(line.plain), style=line.style, spans=line.spans) for line in lines]
    shown = lines if height is None else lines[:height]
    for line in shown:
        line.truncate(width)
    return Text("\n").join(shown)


def _to_ascii(text: str) -> str:
    """Sign for sign, as the spans of a line's styles count them."""
    return text.replace("·", "-").replace("→", ">").encode("ascii", "replace").decode()


def _summary(overview: Overview, url: str, width: int) -> Iterable[Text]:
    state = ("ready", GOOD) if not overview.not_ready else (f"NOT READY: {overview.not_ready}", BAD)
    yield Text.assemble(("extproc top", HEAD), f"  {url}  ", state, no_wrap=True)
    when = "since start" if overview.window_s is None else f"last {duration(overview.window_s)}"
    rate = "" if overview.rate_per_s is None else f" · {overview.rate_per_s:.1f}/s"
    headers = overview.response_headers
    yield Text.assemble((f"{overview.open_requests:,} running", HEAD), f"{rate} · TTFT {_quantiles(headers)} ({when})")
    line = Text("ended: ")
    if not overview.outcomes:
        line.append("none yet")
    for number, (outcome, count) in enumerate(overview.outcomes):
        line.append(" · " if number else "")
        line.append(f"{count:,} {outcome.replace('_', ' ')}", style=_outcome_style(outcome))
    if overview.retries:
        line.append(f" ({overview.retries:,} retries)")
    yield line


def _quantiles(of: Quantiles) -> str:
    return f"p50 {duration(of.p50_s)}, p99 {duration(of.p99_s)}" if of.count else "-"


def _outcome_style(outcome: str) -> str:
    return GOOD if outcome in FINE_OUTCOMES else WARN if outcome in CLIENT_OUTCOMES else BAD


# Workers and ranks


def _all_ranks(role: RoleRows, width: int, ascii_only: bool) -> list[Text]:
    lines = [_head(role, width)]
    for worker in role.workers:
        lines.append(_worker_line(worker))
        lines.extend(_rank_line(rank, width, ascii_only) for rank in worker.ranks)
    return lines


def _figures_width() -> int:
    return sum(size for _, size in COLUMNS)


def _head(role: RoleRows, width: int) -> Text:
    left = width - _figures_width()
    title = Text.assemble((role.role.upper(), HEAD), (f" {role.policy}", SOFT))
    title.truncate(left - 1, overflow="ellipsis", pad=True)
    title.append(" " + "".join(f"{name:>{size}}" for name, size in COLUMNS), style=SOFT)
    return title


def _state_style(worker: WorkerRow) -> str:
    return GOOD if worker.usable else WARN if worker.state == "draining" else BAD


def _worker_line(worker: WorkerRow) -> Text:
    line = Text.assemble(
        (f" {worker.name} ", HEAD), (worker.state, _state_style(worker)), f", {worker.in_flight} in flight"
    )
    if worker.prefill_leg and worker.prefill_leg.count:
        line.append(f", prefill took {_quantiles(worker.prefill_leg)}")
    return line


def _rank_line(rank: RankRow, width: int, ascii_only: bool) -> Text:
    size = width - _figures_width() - RANK_WIDTH - MARK_WIDTH
    drowning = rank.times_others is not None
    bar = _bar(rank.share, size, ascii_only)
    mark = f" << {times(rank.times_others)}" if rank.times_others is not None else ""
    # The mark stands right after the bar, so that the eye finds it.
    line = Text.assemble(f"{rank.dp_rank:>{RANK_WIDTH - 1}} ", (bar, BAD if drowning else LOAD), (mark, BAD))
    line.pad_right(width - _figures_width() - line.cell_len)
    line.append(f"{tokens(rank.load_tokens):>{COLUMNS[0][1]}}", style=BAD if drowning else HEAD)
    line.append(_figures([rank]))
    return line


def _figures(ranks: Sequence[RankRow]) -> str:
    """All columns but the load; of several ranks the sums, and the age of the oldest."""
    ages = [rank.age_s for rank in ranks if rank.age_s is not None]
    cells = (
        tokens(sum(rank.sent_tokens for rank in ranks)),
        tokens(sum(rank.requests for rank in ranks)),
        tokens(_sum(rank.engine_tokens for rank in ranks)),
        tokens(_sum(rank.queued for rank in ranks)),
        duration(max(ages, default=None)),
    )
    return "".join(f"{cell:>{size}}" for cell, (_, size) in zip(cells, COLUMNS[1:], strict=True))


def _sum(values: Iterable[float | None]) -> float | None:
    """None while one is not known."""
    known = list(values)
    return None if None in known else sum(value for value in known if value is not None)


def _bar(share: float, size: int, ascii_only: bool) -> str:
    if ascii_only:
        return "#" * round(share * size)
    eighths = round(share * size * 8)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _one_line_each(overview: Overview, width: int, ascii_only: bool, room: int) -> list[list[Text]]:
    """A line a worker, in which each rank is one bar of 8 heights; in `room` lines, heads included."""
    parts = []
    heads = len(overview.roles)
    workers = sum(len(role.workers) for role in overview.roles)
    for role in overview.roles:
        lines = [_head(role, width)]
        shown = list(role.workers)
        if heads + workers > room:
            # Each role gets its share of the lines, one of them for the count of those that are left out.
            share = max(1, (room - heads) * len(shown) // max(1, workers) - 1)
            loaded = sorted(shown, key=lambda worker: -max((rank.load_tokens for rank in worker.ranks), default=0.0))
            kept = {id(worker) for worker in loaded[:share]}
            shown = [worker for worker in shown if id(worker) in kept]
        lines.extend(_compact_line(worker, width, ascii_only) for worker in shown)
        if left_out := len(role.workers) - len(shown):
            lines.append(Text(f" ... and {left_out} workers with less load", style=SOFT))
        parts.append(lines)
    return parts


def _compact_line(worker: WorkerRow, width: int, ascii_only: bool) -> Text:
    room = width - _figures_width()
    levels = ASCII_LEVELS if ascii_only else LEVELS
    worst = max(worker.ranks, key=lambda rank: rank.times_others or 0.0, default=None)
    line = Text(no_wrap=True)
    line.append(f" {worker.name} ", style=HEAD)
    if worker.state != "up":
        line.append(f"{worker.state} ", style=_state_style(worker))
    mark = ""
    if worst is not None and worst.times_others is not None:
        mark = f" << {worst.dp_rank}: {times(worst.times_others)}"
    # A name too long gives way to the bars, which matter here; of too many, the highest of several is shown.
    line.truncate(max(MIN_NAME_WIDTH, room - len(worker.ranks) - len(mark) - 1), overflow="ellipsis")
    each = math.ceil(len(worker.ranks) / (room - line.cell_len - len(mark)))
    for ranks in (worker.ranks[at : at + each] for at in range(0, len(worker.ranks), each)):
        level = levels[min(len(levels) - 1, int(max(rank.share for rank in ranks) * len(levels)))]
        line.append(level, style=BAD if any(rank.times_others is not None for rank in ranks) else LOAD)
    line.append(mark, style=BAD)
    line.truncate(room, pad=True)
    line.append(f"{tokens(sum(rank.load_tokens for rank in worker.ranks)):>{COLUMNS[0][1]}}", style=HEAD)
    line.append(_figures(worker.ranks))
    return line


# Decisions


def _decisions(decisions: Sequence[Decision], width: int) -> Iterable[Text]:
    names = [str(pick or "-") for each in decisions for pick in (each.prefill, each.decode)]
    name = max(8, min((width - 38) // 2, max(map(len, names), default=8)))
    heads = f" {'PREFILL':<{name}} {'DECODE':<{name}}{'TOKENS':>7} OUTCOME, TTFT"
    yield Text.assemble(("DECIDED", HEAD), (heads, SOFT))
    for each in decisions:
        where = f"{_short(str(each.prefill or '-'), name):<{name}} {_short(str(each.decode or '-'), name):<{name}}"
        line = Text(f"{duration(each.age_s):>7} {where}{tokens(each.prompt_tokens):>7} ")
        line.append(each.outcome.replace("_", " "), style=_outcome_style(each.outcome))
        if each.attempt > 1:
            line.append(f" (attempt {each.attempt})")
        if each.first_token_s is not None:
            line.append(f" {duration(each.first_token_s)}")
        elif each.reason:
            line.append(f" {each.reason}", style=SOFT)
        room = f" room {each.room}"
        if each.room and line.cell_len + len(room) <= width:
            line.append(room, style=SOFT)
        yield line


def _short(text: str, size: int) -> str:
    """Without its middle where it is too long: both the host's beginning and the rank tell something."""
    if len(text) <= size:
        return text
    tail = size // 2
    return f"{text[: size - tail - 2]}..{text[-tail:]}"
