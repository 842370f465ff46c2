"""`make fuzz`: feeds odd input to everything that takes input, and keeps what breaks a promise.

python tests/fuzz/run.py [--inputs 1000000] [--targets request,exchange] [--seed 1] [--again FILE]
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fuzz_run import Run, can_guide, run_all, share_out
from fuzz_targets import TARGETS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

INPUTS = 1_000_000
FINDINGS = Path(".fuzz")
TABLE_WIDTH = 120
GUIDE_MISSING = (
    "atheris is not installed, so coverage guides nothing: pip install --only-binary :all: "
    "-r tests/fuzz/requirements.txt (wheels for Linux on x86-64)"
)


class Bars:
    """A line for each target."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars = {}

    def show(self, runs: Iterable[Run]) -> None:
        """As far as they are."""
        for run in runs:
            name = run.part.name
            if name not in self._bars:
                self._bars[name] = self._progress.add_task(name, total=run.part.inputs, more="")
            more = f"{run.inputs_per_s:,.0f}/s, {run.counters.behaviours} behaviours, {run.findings} findings"
            self._progress.update(self._bars[name], completed=run.counters.inputs, more=more)


def table(runs: Iterable[Run]) -> Table:
    """What came of it."""
    shown = Table(title="Fuzzing")
    for name in ("target", "inputs", "inputs/s", "driver", "edges: seeds → all", "behaviours", "findings"):
        shown.add_column(name, justify="left" if name in {"target", "driver"} else "right")
    runs = list(runs)
    for run in runs:
        edges = run.edges
        shown.add_row(
            run.part.target.name,
            f"{run.counters.inputs:,}",
            f"{run.inputs_per_s:,.0f}",
            "atheris" if run.part.guided else "own",
            f"{edges[0]} → {edges[1]}" if edges else "-",
            str(run.counters.behaviours),
            f"{run.findings}{f' ({run.died})' if run.died else ''}",
        )
    shown.add_section()
    inputs, findings = sum(run.counters.inputs for run in runs), sum(run.findings for run in runs)
    shown.add_row("all", f"{inputs:,}", "", "", "", "", str(findings))
    return shown


def again(path: Path) -> int:
    """Run one saved input where the traceback is seen; 1 when it still fails."""
    TARGETS[path.name.partition("-")[0]].check(path.read_bytes())
    print("nothing is wrong with it (any more)")
    return 0


def main() -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(description="Feed odd input to everything that takes input.")
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help=f"of all targets (default: {INPUTS:,})")
    parser.add_argument("--targets", type=_targets, default=list(TARGETS), metavar="A,B", help=", ".join(TARGETS))
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other inputs (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="targets at a time (default: 2)")
    parser.add_argument("--findings", type=Path, default=FINDINGS, metavar="FOLDER", help=f"default: {FINDINGS}")
    parser.add_argument("--not-guided", action="store_true", help="our own driver only: same seed, same inputs")
    parser.add_argument("--again", type=Path, metavar="FILE", help="only this input, a finding")
    options = parser.parse_args()
    if options.again:
        return again(options.again)
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    guided = can_guide() and not options.not_guided
    if not guided and not options.not_guided:
        console.print(GUIDE_MISSING, markup=False)
    columns = (TextColumn("{task.description:17}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory(prefix="extproc-fuzz-") as directory:
        with Progress(*columns, TextColumn("{task.fields[more]}"), console=console) as progress:
            runs = run_all(
                share_out([TARGETS[name] for name in options.targets], options.inputs, guided),
                seed=options.seed,
                jobs=options.jobs,
                findings=options.findings,
                directory=Path(directory),
                seen=Bars(progress).show,
            )
        console.print(table(runs))
        for run in runs:
            if run.findings:
                console.print(run.log.read_text(errors="replace")[-3000:], markup=False)
    if any(run.findings for run in runs):
        console.print(f"findings are in {options.findings}/", markup=False)
        return 1
    return 0


def _targets(text: str) -> list[str]:
    names = text.split(",")
    unknown = set(names) - set(TARGETS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
