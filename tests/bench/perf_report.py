"""The benchmark's results: against their bars, as tables, as JSON."""

import dataclasses
import enum
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from perf_background import Memory, Scraping
from perf_decision import POLICY, Decision
from perf_load import Figures
from perf_stages import Stage
from rich.table import Table

MIB = 1 << 20
LARGE_PROMPTS_US = 150.0
SMALL_PROMPTS_US = 60.0


class Verdict(enum.StrEnum):
    """What a figure is by its bar and its aim."""

    GOOD = "good"
    """The aim is reached, or the bar where there is no aim."""
    HELD = "bar held"
    """Not the aim."""
    MISSED = "MISSED"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Row:
    """One requirement and what was measured for it. Ratios are taken repeat by repeat."""

    about: str
    bar: float
    aim: float | None
    most: bool
    """The bar is an upper bound."""
    values: tuple[float, ...]
    unit: str = "x"
    """x | % | us"""

    @property
    def measured(self) -> float | None:
        """The median."""
        return statistics.median(self.values) if self.values else None

    @property
    def verdict(self) -> Verdict:
        """Against bar and aim."""
        value = self.measured
        if value is None:
            return Verdict.UNKNOWN
        if not self._reaches(value, self.bar):
            return Verdict.MISSED
        return Verdict.GOOD if self.aim is None or self._reaches(value, self.aim) else Verdict.HELD

    def _reaches(self, value: float, bound: float) -> bool:
        return value <= bound if self.most else value >= bound

    def words(self) -> tuple[str, str, str, str, str]:
        """Cells of the table."""
        sign = "≤" if self.most else "≥"
        bar, aim = sign + self._text(self.bar), "" if self.aim is None else sign + self._text(self.aim)
        value = self.measured
        if value is None:
            return self.about, bar, aim, "", self.verdict
        spread = f" ({self._text(min(self.values))} to {self._text(max(self.values))})" if len(self.values) > 1 else ""
        return self.about, bar, aim, self._text(value) + spread, self.verdict

    def _text(self, value: float) -> str:
        if self.unit == "%":
            return f"{value:.0%}"
        return f"{value:.0f} us" if self.unit == "us" else f"{value:.2f}"


@dataclass(slots=True)
class Results:
    """Everything of one run."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    figures: list[Figures] = field(default_factory=list)
    """In the order of the repeats."""
    decisions: list[Decision] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    """In the order of a request."""
    scraping: Scraping | None = None
    memory: Memory | None = None
    hot: list[tuple[str, float]] = field(default_factory=list)
    """Functions by the share of samples in which they were innermost."""

    def of(self, contender: str, cell: str) -> list[Figures]:
        """Each repeat's figures."""
        return [figures for figures in self.figures if (figures.contender, figures.cell) == (contender, cell)]

    @property
    def failed(self) -> int:
        """Requests that were not answered right."""
        return sum(figures.failed for figures in self.figures)


def rows(results: Results) -> list[Row]:
    """Every bar."""

    def ratios(
        ours: str, theirs: str, cell: str, value: Callable[[Figures], float], base: str = ""
    ) -> tuple[float, ...]:
        """Ours over theirs; over what `base` has of it already, where that is named."""
        mine, other = results.of(ours, cell), results.of(theirs, cell)
        under = [value(figures) for figures in results.of(base, cell)] if base else [0.0] * len(mine)
        triples = zip(mine, other, under, strict=False)
        return tuple((value(m) - b) / (value(o) - b) for m, o, b in triples if value(o) > b)

    def service(figures: Figures) -> float:
        return figures.cpu.get("python", 0.0)

    cpu, rate = (lambda figures: figures.cpu_s), (lambda figures: figures.requests_per_s)
    at = {(d.policy, d.workers, d.body): d for d in results.decisions}
    few, many = at.get((POLICY, 10, "2KB")), at.get((POLICY, 1000, "2KB"))
    grown = (many.decision_us / few.decision_us,) if few and many else ()
    small = [d.decision_us for d in results.decisions if d.body == "2KB" and d.workers == 10]
    large = [d.decision_us for d in results.decisions if d.body == "64KB" and d.policy == "cache_aware"]
    memory = results.memory
    kept = () if memory is None else ((memory.after_bytes - memory.before_bytes) / memory.configured_bytes,)

    def of_build(name: str, about: str) -> list[Row]:
        """The bars of the gateway as a whole, for one build of it."""
        ours, whole = f"extproc{name}", ratios(f"extproc{name}", f"floor{name}", "2KB c16", service)
        above = tuple(value - 1 for value in whole)
        shares = tuple(service(figures) / figures.cpu_s for figures in results.of(ours, "2KB c16") if figures.cpu_s)
        latency = ratios(ours, "smg", "2KB c1", lambda figures: figures.p50_us, base="direct")
        cached = ratios(f"extproc-cache{name}", "smg-cache", "64KB c16", rate)
        return [
            # The bar can be read in two ways: of what comes on top of the floor, or of the whole.
            Row(f"service CPU above the no-op floor, over the floor, 2 KB, c16{about}", 1.5, None, True, above),
            Row(f"all of the service's CPU over the no-op floor, 2 KB, c16{about}", 1.5, None, True, whole),
            Row(f"req/s over smg's, 2 KB, c16{about}", 0.4, 0.6, False, ratios(ours, "smg", "2KB c16", rate)),
            Row(f"CPU a request over smg's, 2 KB, c16{about}", 2.2, 1.5, True, ratios(ours, "smg", "2KB c16", cpu)),
            Row(f"Python's share of that CPU{about}", 1 / 3, None, True, shares, "%"),
            Row(f"added p50 over smg's, 2 KB, c1{about}", 3.5, 2.0, True, latency),
            Row(f"req/s over smg's, 16-chunk SSE, c16{about}", 0.8, 1.2, False, ratios(ours, "smg", "SSE c16", rate)),
            Row(f"req/s over smg's, 64 KB, c16, both cache_aware{about}", 1.0, None, False, cached),
        ]

    return [
        *of_build("", ""),
        Row(
            "lean over grpcio, service CPU, 2 KB, c16",
            0.35,
            None,
            True,
            ratios("extproc", "extproc-grpcio", "2KB c16", service),
        ),
        *of_build("-compiled", ", compiled"),
        Row(f"decision, 1,000 workers over 10, {POLICY}", 1.5, None, True, grown),
        Row(
            "decision, 2 KB, the dearest policy, 10 workers",
            SMALL_PROMPTS_US,
            None,
            True,
            (max(small),) if small else (),
            "us",
        ),
        Row(
            "decision, 64 KB, cache_aware, 10 workers",
            LARGE_PROMPTS_US,
            None,
            True,
            (max(large),) if large else (),
            "us",
        ),
        Row(
            "scraping 1,000 workers x 8 ranks each second, of one core",
            0.2,
            None,
            True,
            (results.scraping.core_share - results.scraping.idle_core_share,) if results.scraping else (),
            "%",
        ),
        Row("RSS gained by a million prompts over the trees' configured size", 1.0, None, True, kept),
    ]


def verdicts(results: Results) -> Table:
    """Bars, aims, figures."""
    table = Table("requirement", "bar", "aim", "measured", "verdict", title="Against the bars")
    colours = {Verdict.GOOD: "green", Verdict.HELD: "yellow", Verdict.MISSED: "red", Verdict.UNKNOWN: "dim"}
    for row in rows(results):
        table.add_row(*row.words(), style=colours[row.verdict])
    return table


def gateways(results: Results) -> Table:
    """One line a cell and contender."""
    table = Table(title="Gateways: medians over the repeats (spread of req/s: lowest and highest)")
    for name in ("load", "gateway", "req/s", "spread", "p50 ms", "p99 ms", "CPU s/1,000", "service", "Envoy", "RSS MiB",
                 "engines", "generator"):  # fmt: skip
        table.add_column(name, justify="left" if name in {"load", "gateway"} else "right")
    for cell, contender in dict.fromkeys((figures.cell, figures.contender) for figures in results.figures):
        table.add_row(cell, contender, *_summary(results.of(contender, cell)))
    return table


def _summary(runs: Sequence[Figures]) -> list[str]:
    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(map(value, runs))

    rates = [figures.requests_per_s for figures in runs]
    failed = sum(figures.failed for figures in runs)
    return [
        f"{statistics.median(rates):,.0f}" + (f", {failed} failed" if failed else ""),
        f"{min(rates):,.0f} to {max(rates):,.0f}",
        f"{median(lambda f: f.p50_us) / 1000:.2f}",
        f"{median(lambda f: f.p99_us) / 1000:.2f}",
        f"{median(lambda f: f.cpu_s):.3f}",
        f"{median(lambda f: f.cpu.get('python', 0.0)):.3f}",
        f"{median(lambda f: f.cpu.get('envoy', 0.0)):.3f}",
        f"{median(lambda f: f.resident_bytes) / MIB:.0f}",
        f"{median(lambda f: f.engines_share):.0%}",
        f"{median(lambda f: f.generator_share):.0%}",
    ]


def decisions(results: Results) -> Table:
    """Microseconds of a decision."""
    table = Table(
        "policy", "workers", "body", "parse", "pick + charge", "mutate", "decision", title="Decision, us of CPU"
    )
    for d in results.decisions:
        figures = (d.parse_us, d.place_us, d.mutate_us, d.decision_us)
        table.add_row(d.policy, str(d.workers), d.body, *(f"{value:.1f}" for value in figures))
    return table


def stage_table(results: Results) -> Table:
    """Microseconds of each step of a request."""
    table = Table("step of a request, without transport", "us", title="Stages")
    for name, value in stage_rows(results):
        table.add_row(name, value)
    return table


def stage_rows(results: Results) -> Iterator[tuple[str, str]]:
    """Cells of that table, the sum at the end."""
    for stage in results.stages:
        yield stage.name, f"{stage.median_us:.1f}"
    yield "together", f"{sum(stage.median_us for stage in results.stages):.1f}"


def background(results: Results) -> list[str]:
    """The other parts in words."""
    lines = []
    if one := results.scraping:
        lines.append(
            f"scraping {one.workers:,} workers x {one.ranks} ranks: {one.scrapes_per_s:,.0f} scrapes a second "
            f"({one.failed} failed), {one.core_share:.1%} of a core, {one.idle_core_share:.1%} without the scrapes"
        )
    if tree := results.memory:
        lines.append(
            f"{tree.prompts:,} different prompts of 2 KB, cache_aware: RSS {tree.before_bytes / MIB:.0f} MiB before, "
            f"{tree.half_way_bytes / MIB:.0f} half-way, {tree.after_bytes / MIB:.0f} after; "
            f"configured {tree.configured_bytes / MIB:.0f} (max_tree_size, both roles); {tree.seconds:.0f} s"
        )
    lines += [f"{share:6.1%}  {name}" for name, share in results.hot[:20]]
    return lines


def as_json(results: Results) -> dict[str, Any]:
    """All of it."""
    return {
        **dataclasses.asdict(results),
        "bars": [
            {**dataclasses.asdict(row), "measured": row.measured, "verdict": row.verdict} for row in rows(results)
        ],
        "failed": results.failed,
    }
