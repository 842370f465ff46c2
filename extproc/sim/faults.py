"""What goes wrong on purpose: which fault hits which request. Pure: no I/O, no clocks; chance is seeded.

    KIND[=VALUE][@PHASE][,p=SHARE][,count=N][,after=CHUNKS][,delay=SECONDS]

A fault of a generation request has a phase: `upload` (its headers are here, its body is not read), `arrival` (its body
is read, the engine has not seen it), `work` (the engine is at it, nothing was answered) or `stream` (some chunks of the
answer are out). Health checks and pages with figures have faults of their own. `fault_effects` carries them out.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SYNTAX = "KIND[=VALUE][@PHASE][,p=SHARE][,count=N][,after=CHUNKS][,delay=SECONDS]"
HELP = f"""\
fault to show, {SYNTAX}; may be repeated, the first that hits wins. KIND: status=CODE (answer with it), reset (TCP RST),
close (end the connection without an answer), hang (neither answer nor close), die (end the process). PHASE: upload (the
body is not read), arrival (default), work (DELAY seconds after the engine took it on, default 0.1), stream (after
CHUNKS chunks of the answer, default 1). For other pages, without a phase: health=down|hang, and
metrics=down|slow|garbage|huge|gzip-bomb|redirect|html. p: share of the requests that it hits; count: how many at most.
GET, PUT and DELETE /sim/faults switch them at run time. Example: reset@stream,after=3,p=0.01"""


class Phase(StrEnum):
    """When a fault strikes. `HEALTH` and `METRICS` are the other pages, not phases of a generation request."""

    UPLOAD = "upload"
    ARRIVAL = "arrival"
    WORK = "work"
    STREAM = "stream"
    HEALTH = "health"
    METRICS = "metrics"


GENERATION = (Phase.UPLOAD, Phase.ARRIVAL, Phase.WORK, Phase.STREAM)

VALUES = {
    "health": ("down", "hang"),
    "metrics": ("down", "slow", "garbage", "huge", "gzip-bomb", "redirect", "html"),
}
OPTIONS: dict[str, tuple[str, type[int] | type[float], int, int]] = {
    "p": ("probability", float, 0, 1),
    "count": ("count", int, 1, 1_000_000_000),
    "after": ("after", int, 1, 1_000_000),
    "delay": ("delay_s", float, 0, 3600),
}
"""Name → field of `Fault`, type, least and largest value."""
KINDS = ("status", "reset", "close", "hang", "die", *VALUES)


class BadFault(ValueError):
    """A specification that says nothing; the message names the part at fault."""


@dataclass(eq=False, slots=True)
class Fault:
    """One fault, and how often it has struck."""

    spec: str
    """As it was given."""
    kind: str
    phase: Phase
    value: str = ""
    probability: float = 1.0
    count: int | None = None
    """How often at most; None: no limit."""
    after: int = 1
    delay_s: float = 0.1
    hits: int = 0

    @property
    def status(self) -> int:
        """The HTTP status of kind `status`."""
        return int(self.value)

    def as_json(self) -> dict[str, Any]:
        """For `GET /sim/faults`."""
        left = None if self.count is None else self.count - self.hits
        return {"fault": self.spec, "phase": self.phase, "hits": self.hits, "left": left}


def parse_fault(spec: str) -> Fault:
    """Read a specification. Raises `BadFault`."""
    head, *options = spec.split(",")
    name, _, phase_text = head.partition("@")
    kind, _, value = name.partition("=")
    if kind not in KINDS:
        raise BadFault(f"fault {spec!r}: kind {kind!r} is not one of {', '.join(KINDS)}")
    fault = Fault(spec, kind, _phase(spec, kind, phase_text, "@" in head), value)
    _check_value(fault)
    for option in options:
        _set_option(fault, option)
    if fault.kind == "status" and fault.phase is Phase.STREAM:
        raise BadFault(f"fault {spec!r}: phase 'stream' is too late for a status")
    return fault


def _phase(spec: str, kind: str, text: str, given: bool) -> Phase:
    if kind in VALUES:
        if given:
            raise BadFault(f"fault {spec!r}: {kind} has no phase")
        return Phase(kind)
    if not given:
        return Phase.ARRIVAL
    if text not in GENERATION:
        raise BadFault(f"fault {spec!r}: phase {text!r} is not one of {', '.join(GENERATION)}")
    return Phase(text)


def _check_value(fault: Fault) -> None:
    spec, kind, value = fault.spec, fault.kind, fault.value
    if kind == "status":
        if not (value.isdecimal() and 400 <= int(value) <= 599):
            raise BadFault(f"fault {spec!r}: status {value!r} is not a number from 400 to 599")
    elif kind in VALUES:
        if value not in VALUES[kind]:
            raise BadFault(f"fault {spec!r}: {kind} {value!r} is not one of {', '.join(VALUES[kind])}")
    elif value:
        raise BadFault(f"fault {spec!r}: {kind} takes no value, got {value!r}")


def _set_option(fault: Fault, option: str) -> None:
    name, _, text = option.partition("=")
    if name not in OPTIONS:
        raise BadFault(f"fault {fault.spec!r}: option {name!r} is not one of {', '.join(OPTIONS)}")
    field, kind, least, most = OPTIONS[name]
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise BadFault(f"fault {fault.spec!r}: {name} {text!r} is not {what} from {least} to {most}")
    setattr(fault, field, value)


class FaultPlan:
    """The faults of one engine, in the order in which they are tried."""

    def __init__(self, faults: Iterable[Fault] = (), seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.faults = list(faults)

    def strike(self, phase: Phase) -> Fault | None:
        """The fault that hits what has just reached this phase, if one does; it is counted."""
        for fault in self.faults:
            if fault.phase is not phase or (fault.count is not None and fault.hits >= fault.count):
                continue
            if fault.probability == 1 or self._random.random() < fault.probability:
                fault.hits += 1
                return fault
        return None

    def replace(self, specs: Iterable[str]) -> None:
        """Other faults from now on. Raises `BadFault`, and then nothing has changed."""
        self.faults = [parse_fault(spec) for spec in specs]

    def as_json(self) -> list[dict[str, Any]]:
        """For `GET /sim/faults`."""
        return [fault.as_json() for fault in self.faults]
