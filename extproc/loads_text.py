"""What an engine's Prometheus page says about the load of each of its DP ranks.

Pure: bytes in, figures out. It reads the few lines that carry a load and leaves the rest of the page alone, because
a page has some 300 lines and every worker's page is read every few seconds.

Two pages are understood, in this order: `/metrics` (`sglang:num_used_tokens{dp_rank="0",tp_rank="0",...} 12034.0`)
and `/v1/loads?format=prometheus` (`sglang_num_used_tokens{dp_rank="0"} 12034`). Names and labels are those of SGLang
0.5.23; the line format is https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).

Rules:
- One `RankLoad` per `dp_rank` that said anything. No `dp_rank` label means the engine runs one rank: rank 0. Lines
  without the label are ignored on a page that has lines with it.
- Nothing is ever summed. Every scheduler of a rank (`tp_rank`, `pp_rank`, `moe_ep_rank`) reports the same requests, so
  the one with the lowest ranks speaks for all: it is the one that takes requests in, and by default the only one that
  reports (`--enable-metrics-for-all-schedulers` adds the others).
- `priority=""` is the total over priorities; lines of one priority are skipped.
- `model_name` is not looked at: an engine serves one model. Should a page carry several series for one scheduler all
  the same (another model, another process id), the highest wins: a rank may then look busier than it is, never idler.
- A figure that is NaN, infinite, negative or no number was not said: it stays None.
- A line that cannot be read is skipped, and so is an unterminated last line: 12034 cut short is 12.
"""

import functools
import math
import re
from collections.abc import Iterable

from extproc.model import RankLoad

METRICS_FIELDS = {
    b"sglang:num_used_tokens": "used_tokens",
    b"sglang:num_running_reqs": "running_requests",
    b"sglang:num_queue_reqs": "queued_requests",
    b"sglang:token_usage": "token_usage_ratio",
    b"sglang:gen_throughput": "output_tokens_per_s",
    b"sglang:max_total_num_tokens": "max_total_tokens",
}
"""Metric of `/metrics` -> field of `RankLoad`."""

LOADS_FIELDS = {
    b"sglang_num_used_tokens": "used_tokens",
    b"sglang_num_total_tokens": "total_tokens",
    b"sglang_num_waiting_uncached_tokens": "waiting_uncached_tokens",
    b"sglang_max_total_num_tokens": "max_total_tokens",
    b"sglang_num_running_reqs": "running_requests",
    b"sglang_num_waiting_reqs": "queued_requests",
    b"sglang_token_usage": "token_usage_ratio",
    b"sglang_gen_throughput": "output_tokens_per_s",
    b"sglang_total_prefill_uncached_tokens": "prefill_uncached_tokens_total",
    b"sglang_total_prefill_busy_us": "prefill_busy_us_total",
    b"sglang_timestamp": "snapshot_s",
}
"""Metric of `/v1/loads?format=prometheus` -> field of `RankLoad`."""


def _mentions(names: Iterable[bytes]) -> re.Pattern[bytes]:
    """Finds the metrics' names and the rest of the line after each; not anchored, as the fixed start is what is fast.

    Matches also where a line only mentions a name; the name must end there (`{` or a blank follows).
    """
    return re.compile(rb"(%s)([ \t{][^\n]*+)" % b"|".join(re.escape(name) for name in names))


PAGES = ((METRICS_FIELDS, _mentions(METRICS_FIELDS)), (LOADS_FIELDS, _mentions(LOADS_FIELDS)))

LABEL = re.compile(rb'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]++|\\.)*+)"[ \t]*(?:,|$)', re.DOTALL)
"""One `name="value"` and the comma after it; possessive, so that garbage costs one pass."""

SCHEDULER_LABELS = (b"pp_rank", b"tp_rank", b"moe_ep_rank")

MAX_RANK_DIGITS = 6
"""Longer rank numbers are garbage; the limit keeps int() cheap."""

CACHED_BLOCK_BYTES = 1024
"""Longer label blocks (real ones have some 140 bytes) are parsed each time, so that the cache stays small."""

Scheduler = tuple[int, ...]
"""(pp_rank, tp_rank, moe_ep_rank): lower speaks first."""
Source = tuple[int | None, Scheduler]
"""(dp_rank or None where the label is missing, scheduler)."""

LONE_SCHEDULER: Scheduler = (0, 0, 0)
"""Who speaks on a line that names none."""

NEWLINE = ord("\n")


def parse_loads(page: bytes) -> tuple[RankLoad, ...]:
    """The figures of each DP rank on the page, ordered by `dp_rank`; empty when it has none. Never raises."""
    for fields, mentions in PAGES:
        loads = _parse(page, fields, mentions)
        if loads:
            return loads
    return ()


def _parse(page: bytes, fields: dict[bytes, str], mentions: re.Pattern[bytes]) -> tuple[RankLoad, ...]:
    ranks: dict[int | None, dict[str, tuple[Scheduler, float]]] = {}
    for mention in mentions.finditer(page, 0, page.rfind(b"\n") + 1):
        if not _starts_line(page, mention.start()):
            continue
        sample = _sample(mention[2])
        if sample is None:
            continue
        (dp_rank, scheduler), value = sample
        figures = ranks.setdefault(dp_rank, {})
        field = fields[mention[1]]
        known = figures.get(field)
        if known is None or scheduler < known[0] or (scheduler == known[0] and value > known[1]):
            figures[field] = (scheduler, value)
    if len(ranks) > 1:
        ranks.pop(None, None)
    return tuple(
        RankLoad(dp_rank, **{field: value for field, (_, value) in figures.items()})
        for dp_rank, figures in sorted((rank or 0, figures) for rank, figures in ranks.items())
    )


def _starts_line(page: bytes, at: int) -> bool:
    """Whether only blanks, which the format allows there, are between the start of the line and `at`."""
    while at and page[at - 1] in b" \t":
        at -= 1
    return not at or page[at - 1] == NEWLINE


def _sample(rest: bytes) -> tuple[Source, float] | None:
    """Reads what follows a metric's name on its line: `{labels} value [timestamp]`."""
    close = rest.rfind(b"}")  # neither value nor timestamp can hold a brace
    if close < 0:
        source: Source | None = (None, LONE_SCHEDULER)
    else:
        block = rest[:close]
        source = _cached_source(block) if close <= CACHED_BLOCK_BYTES else _source(block)
    value = _value(rest[close + 1 :])
    return None if source is None or value is None else (source, value)


def _value(text: bytes) -> float | None:
    tokens = text.split()
    if not 1 <= len(tokens) <= 2 or b"_" in text:  # Python reads 1_000 as a number, the text format does not
        return None
    try:
        value = float(tokens[0])
        float(tokens[-1])  # the timestamp: not used, but a word there says that this is no sample
    except ValueError:
        return None
    return value if 0 <= value < math.inf else None


def _source(block: bytes) -> Source | None:
    """Who reported a line, from its label block without the closing brace; None: skip the line."""
    block = block.strip(b" \t")
    if not block.startswith(b"{"):
        return None
    labels = dict[bytes, bytes]()
    at = 1
    while at < len(block):
        label = LABEL.match(block, at)
        if label is None or label[1] in labels:
            return None
        labels[label[1]] = label[2]
        at = label.end()
    if labels.get(b"priority"):
        return None
    # An empty label value means the same as a missing label, by the format's rules.
    dp_rank, *scheduler = (_rank(labels.get(name) or b"0") for name in (b"dp_rank", *SCHEDULER_LABELS))
    known = tuple(rank for rank in scheduler if rank is not None)
    if dp_rank is None or len(known) < len(scheduler):
        return None
    return (dp_rank if labels.get(b"dp_rank") else None, known)


# All metrics of a rank carry the same label block, and so do all engines of one kind: nearly every line is a hit.
_cached_source = functools.lru_cache(maxsize=4096)(_source)


def _rank(text: bytes) -> int | None:
    return int(text) if text.isdigit() and len(text) <= MAX_RANK_DIGITS else None
