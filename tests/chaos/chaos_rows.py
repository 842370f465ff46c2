"""A row of the table of faults: what was seen, and whether it is what must hold. And how rows are printed."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """One fault, seen many times."""

    number: int
    """Of the fault in the table of `docs/reliability.md`; a fault with several forms has a row for each."""
    fault: str
    clients: Counter[str] = field(default_factory=Counter)
    """What clients got, and how often."""
    figures: dict[str, list[float]] = field(default_factory=dict)
    """What was measured, in milliseconds."""
    checks: list[tuple[bool, str]] = field(default_factory=list)
    """Whether it held, and what had to hold."""
    notes: list[str] = field(default_factory=list)
    slack: ClassVar[float] = 1.0
    """What limits of time are multiplied with: more than 1 where other work shares the machine."""
    missing: str = ""
    """The feature that is not there yet: then nothing is checked, and the notes say what was seen instead."""

    def took(self, name: str, milliseconds: float) -> None:
        """Note one measurement."""
        self.figures.setdefault(name, []).append(milliseconds)

    def check(self, held: bool, what: str) -> None:
        """Note whether something held."""
        self.checks.append((bool(held), what))

    def check_p99(self, name: str, limit_ms: float) -> None:
        """A figure must be there, and its p99 must be within a limit."""
        worst = percentile(self.figures.get(name, ()), 0.99)
        self.check(worst <= limit_ms * self.slack, f"{name}: p99 within {limit_ms:g} ms ({worst:.1f})")

    @property
    def failed(self) -> list[str]:
        """What had to hold and did not."""
        return [what for held, what in self.checks if not held]

    @property
    def verdict(self) -> str:
        """One word, or what is wrong."""
        if self.missing:
            return f"not yet: {self.missing}"
        return "FAILS: " + "; ".join(self.failed) if self.failed else "holds"


def percentile(values: Iterable[float], share: float) -> float:
    """The nearest-rank percentile; infinite for nothing, so that a bound on it is missed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.inf


def summary(values: list[float]) -> str:
    """Median, p99 and count."""
    return f"{percentile(values, 0.5):.1f} / {percentile(values, 0.99):.1f} ({len(values)})"


def print_rows(rows: Iterable[Row], console: Console) -> None:
    """The table."""
    table = Table(title="Faults: figures in ms, median / p99 (count)", show_lines=True)
    for name, ratio in (("#", 1), ("fault", 8), ("clients got", 10), ("measured", 14), ("notes", 12), ("verdict", 10)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for row in rows:
        table.add_row(
            str(row.number),
            row.fault,
            "\n".join(f"{count} x {what}" for what, count in row.clients.most_common()),
            "\n".join(f"{name}: {summary(values)}" for name, values in row.figures.items()),
            "\n".join(row.notes),
            row.verdict,
        )
    console.print(table)
