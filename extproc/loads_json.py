"""What an engine's `/v1/loads` says about the load of each of its DP ranks, as JSON.

Pure: bytes in, figures out; a fiftieth of the time that the same figures take as text. SGLang makes both forms of the
same dictionary, whose names these are (`managers/load_snapshot.py`, 0.5.23); `?include=core` is all plain figures of a
rank and leaves out the sections beside them. Older engines send fewer: before `total_prefill_busy_us` there is no
`timestamp` either, whatever the form.

Rules, those of `loads_text` as far as they go for JSON:
- One `RankLoad` per `dp_rank` that said anything; should a rank come twice, the last one.
- A figure that is null, negative, infinite or no number was not said: it stays None.
- An entry that cannot be read is skipped.
"""

import math
from typing import Annotated, Any

import msgspec

from extproc.model import RankLoad

MAX_RANK = 999_999
"""Higher rank numbers are garbage, as in `loads_text`."""

_Figure = Annotated[float, msgspec.Meta(ge=0)] | None


class _Load(msgspec.Struct, gc=False):
    """One rank, in SGLang's words and in the order of the fields of `RankLoad`."""

    dp_rank: Annotated[int, msgspec.Meta(ge=0, le=MAX_RANK)]
    num_used_tokens: _Figure = None
    num_total_tokens: _Figure = None
    num_waiting_uncached_tokens: _Figure = None
    max_total_num_tokens: _Figure = None
    num_running_reqs: _Figure = None
    num_waiting_reqs: _Figure = None
    token_usage: _Figure = None
    gen_throughput: _Figure = None
    total_prefill_uncached_tokens: _Figure = None
    total_prefill_busy_us: _Figure = None
    timestamp: _Figure = None


class _Page(msgspec.Struct, gc=False):
    loads: list[_Load]


_FIGURES = _Load.__struct_fields__[1:]
_decode = msgspec.json.Decoder(_Page).decode


def parse_loads(page: bytes) -> tuple[RankLoad, ...]:
    """The figures of each DP rank on the page, ordered by `dp_rank`; empty when it has none. Never raises."""
    try:
        entries = _decode(page).loads
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        entries = _readable_entries(page)
    ranks = {entry.dp_rank: RankLoad(*msgspec.structs.astuple(entry)) for entry in entries}
    return tuple(load for rank, load in sorted(ranks.items()) if load.used_tokens is not None or load != RankLoad(rank))


def _readable_entries(page: bytes) -> list[_Load]:
    """What there is of a page that is not as it should be."""
    try:
        answer = msgspec.json.decode(page)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []
    entries = answer.get("loads") if isinstance(answer, dict) else None
    found = []
    for entry in entries if isinstance(entries, list) else ():
        rank = entry.get("dp_rank") if isinstance(entry, dict) else None
        if type(rank) is int and 0 <= rank <= MAX_RANK:
            found.append(_Load(rank, *(_figure(entry.get(name)) for name in _FIGURES)))
    return found


def _figure(value: Any) -> float | None:
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        return None
    try:
        return float(value)
    except OverflowError:
        return None
