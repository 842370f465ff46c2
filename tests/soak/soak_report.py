"""The result of a soak run: on the terminal, as JSON, and as a picture where matplotlib is there."""

import importlib.util
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from soak_watch import SURE_REQUESTS, Curve

SHARES = (0.1, 0.5, 1.0)


@dataclass(slots=True)
class Report:
    """Everything that is to be said of a run."""

    requests: int
    seconds: float
    seed: int
    clients: Counter[str] = field(default_factory=Counter)
    """What clients got."""
    statuses: dict[str, dict[int, int]] = field(default_factory=dict)
    """`clients` and `service` → status → requests whose clients stayed."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Of all attempts."""
    fault_hits: int = 0
    left_over: str = ""
    """What is still charged or open; empty: nothing."""
    active_in_envoy: dict[str, int] = field(default_factory=dict)
    census: dict[str, dict[str, int]] = field(default_factory=dict)
    """`before` and `after` → type → live objects of the service, of the types that tell."""
    grown: dict[str, int] = field(default_factory=dict)
    """Types with the most objects more than before."""
    curves: list[Curve] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        shown = {name: getattr(self, name) for name in self.__slots__ if name != "curves"}
        return {**shown, "requests_per_s": self.requests / self.seconds, "curves": [c.as_json() for c in self.curves]}

    def print(self, console: Console) -> None:
        """The tables and the verdict."""
        rate = self.requests / self.seconds
        console.print(f"{self.requests:,} requests in {self.seconds:.0f} s ({rate:.0f}/s), seed {self.seed}")
        console.print(f"clients got: {_counts(self.clients)}", markup=False)
        for who, statuses in self.statuses.items():
            console.print(f"by status, where clients stayed, {who}: {_counts(statuses)}", markup=False)
        console.print(f"attempts: {_counts(self.outcomes)}; engine faults that struck: {self.fault_hits}", markup=False)
        console.print(self._processes())
        console.print(f"charged, open or in flight at the end: {self.left_over or 'nothing'}", markup=False)
        console.print(f"Envoy's open requests and gRPC streams: {self.active_in_envoy or 'none'}", markup=False)
        census = Table(title="Live objects of the service")
        for name in ("type", *self.census):
            census.add_column(name)
        for kind in next(iter(self.census.values())):
            census.add_row(kind, *(str(counts[kind]) for counts in self.census.values()))
        console.print(census)
        console.print(f"most grown: {_counts(self.grown)}", markup=False)
        for problem in self.problems:
            console.print(f"FAILS: {problem}", markup=False)
        if not self.problems:
            judged = "nothing grows" if self.requests >= SURE_REQUESTS else "too short a run to judge memory by"
            console.print(f"everything adds up, nothing is left, {judged}", markup=False)

    def _processes(self) -> Table:
        table = Table(title="Processes over the run")
        columns = [f"{what} at {share:.0%}" for what in ("RSS MB", "FDs") for share in SHARES]
        for name in ("process", *columns, "bytes/request", "more FDs", "threads"):
            table.add_column(name, justify="left" if name == "process" else "right")
        for curve in self.curves:
            points = [curve.at(share) for share in SHARES]
            table.add_row(
                curve.name,
                *(f"{point['rss_mb']:.1f}" for point in points),
                *(f"{point['fds']:.0f}" for point in points),
                f"{curve.bytes_per_request:.1f}",
                f"{curve.more_fds:+.0f}",
                f"{points[-1]['threads']:.0f}",
            )
        return table

    def save(self, folder: Path) -> None:
        """`soak.json`, and `soak.png` if it can be drawn."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "soak.json").write_text(json.dumps(self.as_json(), indent=1))
        if importlib.util.find_spec("matplotlib"):
            draw(self.curves, folder / "soak.png")


def draw(curves: list[Curve], path: Path) -> None:
    """Memory and descriptors over requests."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, descriptors = figure.subplots(2, sharex=True)
    for curve in curves:
        memory.plot(curve.requests, [rss / 1e6 for rss in curve.rss_bytes], label=curve.name)
        descriptors.plot(curve.requests, curve.fds, label=curve.name)
    memory.set_ylabel("RSS, MB")
    descriptors.set_ylabel("file descriptors")
    descriptors.set_xlabel("requests")
    for axes in (memory, descriptors):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count:,} x {what}" for what, count in sorted(counts.items(), key=lambda item: -item[1]))
