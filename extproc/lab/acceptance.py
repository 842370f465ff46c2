"""All that the `live` load model must reach on the Mooncake conversation trace, in one run: required and reached.

`python -m extproc.lab.acceptance --trace FILE`. Figures are medians over seeds. Exit status 1 when a row is missed.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from extproc.errors import ConfigError
from extproc.lab.experiment import Case, Load, run_cases
from extproc.lab.pages import Page
from extproc.lab.progress import output_console, progress_bar
from extproc.lab.settings import Settings, Shape
from extproc.lab.stats import Estimate, Summary, difference
from extproc.model import Role

REQUESTS = 6_000
DEFAULT_TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
TAIL_RATIO = 2.0
"""The decode row's load: p99 TPOT under round robin is this many times the median."""
DECODE_UTILIZATIONS = tuple(share / 100 for share in range(30, 95, 5))


@dataclass(frozen=True, slots=True)
class Row:
    """One case of the table. Limits are relative differences of `live`: -0.3 asks for at least 30 % less."""

    name: str
    figure: str
    settings: Settings
    load: Load
    limits: dict[str, float]
    """Other policy -> largest difference to it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One comparison, required and reached."""

    row: str
    against: str
    required: float
    reached: Estimate
    at_most: bool = True
    """Whether `required` is an upper limit; else a lower one."""

    @property
    def passed(self) -> bool:
        return self.reached.median <= self.required if self.at_most else self.reached.median >= self.required


def rows(trace: Path, decode_utilization: float, page: Page) -> list[Row]:
    """The table of what must be reached; the last row's utilisation has to be found first."""
    prefill = Settings(scrape_page=page)
    # Four times the prefill ranks: prompts are 35 times as long as outputs in this trace, and prefill must not be
    # what decode waits for.
    decode = replace(prefill, prefill=Shape(4, 8), decode=Shape(1, 8))
    eight = replace(prefill, prefill=Shape(1, 8), decode=Shape(1, 8))
    first = Load(trace, REQUESTS, utilization=0.7)
    return [
        Row(
            "prefill 1x2, 0.7: mean TTFT",
            "ttft_mean",
            prefill,
            first,
            {"round_robin": -0.30, "scraped": -0.08, "clairvoyant": 0.08},
        ),
        Row(
            "prefill 1x8, 0.7: mean TTFT",
            "ttft_mean",
            eight,
            first,
            {"round_robin": -0.55, "scraped": -0.08, "clairvoyant": 0.08},
        ),
        Row(
            "prefill 1x2, 0.9: p99 TTFT",
            "ttft_p99",
            prefill,
            replace(first, utilization=0.9),
            {"round_robin": -0.40, "scraped": -0.20, "clairvoyant": 0.10},
        ),
        Row(
            f"decode 1x8, {decode_utilization:g}: p99 TPOT",
            "tpot_p99",
            decode,
            replace(first, utilization=decode_utilization, utilization_of=Role.DECODE),
            {"round_robin": -0.25, "scraped": 0.0},
        ),
    ]


@dataclass(frozen=True, slots=True)
class Variant:
    """Another way for scrapes to be, under which `live` must stay as good."""

    name: str
    changes: dict[str, float | None]


VARIANTS = (
    Variant("scraped every 10 s", {"scrape_interval_s": 10.0}),
    Variant("half of the scrapes fail", {"scrape_failure_ratio": 0.5}),
    Variant("all scrapes fail", {"scrape_failure_ratio": 1.0}),
)
VARIANT_LIMIT = 0.03
REPLICA_SHARE = 0.8
PROCESS_LAGS_S = (0.002, 0.01)
"""From one process of the service to another: about the median and the 99th percentile measured (docs/processes.md)."""
PROCESS_LIMIT = 0.01
"""Two processes place as one does: of a figure they may lose as much as the seeds' own luck makes."""
BASELINE, SUBJECT = "round_robin", "live"


def find_decode_utilization(trace: Path, jobs: int, page: Page) -> tuple[float, float]:
    """The utilisation of the decode row, to 0.05, and the ratio of p99 to median TPOT there (seed 0)."""
    row = rows(trace, 0.5, page)[-1]
    cases = [
        Case(BASELINE, 0, row.settings, replace(row.load, utilization=utilization))
        for utilization in DECODE_UTILIZATIONS
    ]
    ratios = [summary.tpot_s.p99 / summary.tpot_s.p50 for summary in run_cases(cases, jobs)]
    found = min(range(len(ratios)), key=lambda index: abs(ratios[index] - TAIL_RATIO))
    return DECODE_UTILIZATIONS[found], ratios[found]


class Runs:
    """Collects what has to be run, runs it once, and hands it out by case."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds
        self._results: dict[Case, Summary | None] = {}

    def want(self, policy: str, settings: Settings, load: Load) -> None:
        """Plan a policy with all seeds."""
        self._results.update({Case(policy, seed, settings, load): None for seed in self._seeds})

    def run(self, jobs: int, console: Console) -> None:
        """Run all that is planned."""
        cases = list(self._results)
        with progress_bar(console, len(cases)) as done:
            self._results = dict(zip(cases, run_cases(cases, jobs, done), strict=True))

    def figures(self, policy: str, settings: Settings, load: Load, figure: str) -> list[float]:
        """A figure of a planned policy, one value a seed."""
        summaries = [self._results[Case(policy, seed, settings, load)] for seed in self._seeds]
        return [summary.figures()[figure] for summary in summaries if summary is not None]


def judge(table: Sequence[Row], seeds: Sequence[int], jobs: int, console: Console) -> list[Verdict]:
    """Run the whole table and compare."""
    runs = Runs(seeds)
    for row in table:
        for policy in (SUBJECT, *row.limits):
            runs.want(policy, row.settings, row.load)
        for settings in (*_variants(row), _replicas(row), *(_processes(row, lag_s) for lag_s in PROCESS_LAGS_S)):
            runs.want(SUBJECT, settings, row.load)
    runs.run(jobs, console)

    verdicts = []
    for row in table:
        mine = runs.figures(SUBJECT, row.settings, row.load, row.figure)
        for other, limit in row.limits.items():
            theirs = runs.figures(other, row.settings, row.load, row.figure)
            verdicts.append(Verdict(row.name, other, limit, _differences(mine, theirs)))
    for row in table:
        mine = runs.figures(SUBJECT, row.settings, row.load, row.figure)
        for variant, settings in zip(VARIANTS, _variants(row), strict=True):
            varied = runs.figures(SUBJECT, settings, row.load, row.figure)
            verdicts.append(Verdict(f"{row.name}, {variant.name}", "1 s", VARIANT_LIMIT, _differences(varied, mine)))
    for row in table:
        mine = runs.figures(SUBJECT, row.settings, row.load, row.figure)
        base = runs.figures(BASELINE, row.settings, row.load, row.figure)
        split = runs.figures(SUBJECT, _replicas(row), row.load, row.figure)
        # The gain is over one round robin in both cases; two independent ones would be worse, and easier to beat.
        shares = [(whole - two) / (whole - one) for whole, one, two in zip(base, mine, split, strict=True)]
        verdicts.append(
            Verdict(f"{row.name}, 2 replicas", "gain of 1", REPLICA_SHARE, Estimate.of(shares), at_most=False)
        )
    for row in table:
        mine = runs.figures(SUBJECT, row.settings, row.load, row.figure)
        for lag_s in PROCESS_LAGS_S:
            apart = runs.figures(SUBJECT, _processes(row, lag_s), row.load, row.figure)
            name = f"{row.name}, 2 processes {lag_s * 1e3:g} ms apart"
            verdicts.append(Verdict(name, "1 process", PROCESS_LIMIT, _differences(apart, mine)))
    return verdicts


def _variants(row: Row) -> list[Settings]:
    return [replace(row.settings, **variant.changes) for variant in VARIANTS]  # type: ignore[arg-type]


def _replicas(row: Row) -> Settings:
    return replace(row.settings, replicas=2)


def _processes(row: Row, lag_s: float) -> Settings:
    return replace(row.settings, replicas=2, replica_lag_s=lag_s)


def _differences(mine: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Seed by seed."""
    return Estimate.of([difference(one, other) for one, other in zip(mine, theirs, strict=True)])


def show(verdicts: Sequence[Verdict], console: Console, title: str) -> None:
    """The table: required, reached, interval over seeds."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("case")
    shown.add_column("against", no_wrap=True)
    for heading in ("required", "reached", "interval"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    shown_case = ""
    for verdict in verdicts:
        sign = "≤" if verdict.at_most else "≥"
        form = "+.0%" if verdict.at_most else ".0%"
        fine = "+.1%" if verdict.at_most else ".0%"
        shown.add_row(
            "" if verdict.row == shown_case else verdict.row,
            verdict.against,
            f"{sign} {verdict.required:{form}}",
            f"{verdict.reached.median:{fine}}",
            f"{verdict.reached.low:{fine}} … {verdict.reached.high:{fine}}",
            "ok" if verdict.passed else "[bold red]no",
        )
        shown_case = verdict.row
    console.print(shown)


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, object]]:
    """One object a comparison."""
    return [
        {
            "case": verdict.row,
            "against": verdict.against,
            "required": verdict.required,
            "at_most": verdict.at_most,
            "reached": verdict.reached.median,
            "low": verdict.reached.low,
            "high": verdict.reached.high,
            "passed": verdict.passed,
        }
        for verdict in verdicts
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every row is reached, 1 when not, 2 for a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m extproc.lab.acceptance", description=__doc__)
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--scrape-page", type=Page, choices=list(Page), default=Page.LOADS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    console = output_console()
    try:
        utilization, ratio = find_decode_utilization(args.trace, args.jobs, args.scrape_page)
        table = rows(args.trace, utilization, args.scrape_page)
        verdicts = judge(table, range(args.seeds), args.jobs, console)
    except ConfigError as error:
        sys.stderr.write(f"acceptance: {error}\n")
        return 2
    title = (
        f"{args.trace.name}, first {REQUESTS} requests, {args.seeds} seeds, page {args.scrape_page}; "
        f"decode at {utilization:g} of its capacity, where round robin's p99 TPOT is {ratio:.2f} times the median"
    )
    show(verdicts, console, title)
    if args.json:
        args.json.write_text(json.dumps(as_json(verdicts), indent=2) + "\n", encoding="utf-8")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
