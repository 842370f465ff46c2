"""Reads workloads: Mooncake's JSONL, or CSV. Raises ConfigError that names the file and the line."""

import csv
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from itertools import islice
from pathlib import Path

import msgspec

from extproc.errors import ConfigError
from extproc.lab.request import TraceRequest


class _MooncakeLine(msgspec.Struct):
    """One line of a Mooncake trace (FAST '25): milliseconds and tokens."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


CSV_COLUMNS = {
    "arrival_s": ("timestamp", "timestamp_s", "arrival_s", "time"),
    "prompt_tokens": ("input_tokens", "input_length", "prompt_tokens", "contexttokens"),
    "output_tokens": ("output_tokens", "output_length", "generatedtokens"),
}
"""Field -> the column names it may have, in lower case. The last ones are those of the Azure LLM inference traces."""

_decode_line = msgspec.json.Decoder(_MooncakeLine).decode


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """The first `limit` requests of a trace, by its suffix: `.csv`, else JSONL. The first arrives at 0."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            parsed = _read_csv(path, lines) if path.suffix.lower() == ".csv" else _read_jsonl(path, lines)
            requests = list(islice(_checked(path, parsed), limit))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not requests:
        raise ConfigError(f"{path}: no requests in it")
    first_s = requests[0].arrival_s
    return [replace(request, arrival_s=request.arrival_s - first_s) for request in requests]


def _checked(path: Path, parsed: Iterator[tuple[int, TraceRequest]]) -> Iterator[TraceRequest]:
    latest_s = float("-inf")
    for number, request in parsed:
        if request.prompt_tokens < 1 or request.output_tokens < 0:
            raise ConfigError(
                f"{path}:{number}: expected at least 1 input token and 0 output tokens, "
                f"got {request.prompt_tokens} and {request.output_tokens}"
            )
        if request.arrival_s < latest_s:
            raise ConfigError(f"{path}:{number}: the timestamp is before the one on the line before: sort the trace")
        latest_s = request.arrival_s
        # Prefill makes one token in any case.
        yield request if request.output_tokens else replace(request, output_tokens=1)


def _read_jsonl(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, TraceRequest]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _decode_line(line)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
        yield number, TraceRequest(row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids)


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[tuple[int, TraceRequest]]:
    rows = csv.reader(lines)
    header = [name.strip().lower() for name in next(rows, [])]
    columns = {}
    for field, names in CSV_COLUMNS.items():
        found = next((header.index(name) for name in names if name in header), None)
        if found is None:
            raise ConfigError(f"{path}:1: no column for {field}: expected a header with one of {', '.join(names)}")
        columns[field] = found
    for row in rows:
        if not row:
            continue
        try:
            request = TraceRequest(
                _seconds(row[columns["arrival_s"]]),
                int(row[columns["prompt_tokens"]]),
                int(row[columns["output_tokens"]]),
            )
        except (ValueError, IndexError) as error:
            raise ConfigError(f"{path}:{rows.line_num}: {error}") from None
        yield rows.line_num, request


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time."""
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()
