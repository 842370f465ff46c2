"""`make bench-scheduling`: ways to choose DP ranks, compared through real gateways in real time.

Each contender is a gateway (Envoy with this service, or smg) in front of simulated engines of its own; all get the
same requests of a trace at the same moments. The contenders take turns, so that whatever else the machine does meets
all of them. docs/scheduling.md says what the figures mean.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_contenders import BY_NAME, CONTENDERS, SMG_PYTHON, smg_python
from bench_process import write_json
from bench_report import Results, as_json, table
from bench_run import RunFigures, run
from bench_workload import Plan
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.demo.stack import StackError
from extproc.errors import ConfigError
from extproc.lab.cluster import Cluster
from extproc.lab.settings import Shape
from extproc.lab.stats import Latency

TRACE = Path(__file__).parents[2] / "../shared/traces/mooncake_conversation.jsonl"
DEFAULT = ("live", "scraped-1s", "scraped-10s", "round-robin", "room", "smg", "smg-least-load")
QUICK = ("live", "room", "smg")
QUICK_REQUESTS = 30
QUICK_TIME_SCALE = 20.0
WIDTH = 150
"""Columns where there is no terminal to ask."""
EXIT_FAILURES = 1
EXIT_CANNOT_RUN = 2
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; not 0 if any request failed."""
    options = parser().parse_args(arguments)
    # Tables go to standard error when standard output is for the JSON.
    console = Console(stderr=options.json == Path("-"))
    if not console.is_terminal:
        console.width = WIDTH
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # so that children are stopped in order
    try:
        results = compare(plan_from(options, console), names_from(options, console), seeds_from(options), console)
    except (ConfigError, StackError) as error:
        console.print(f"The benchmark cannot go on: {error}", style="red", markup=False, soft_wrap=True)
        return EXIT_CANNOT_RUN
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    console.print(table(results))
    for name, runs in results.runs.items():
        for problem in [error for figures in runs for error in figures.errors]:
            console.print(f"{name}: {problem}", style="red", markup=False)
    if options.json is not None:
        write_json(options.json, as_json(results))
    return EXIT_FAILURES if results.failures else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="scheduling.py", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a short run that shows that it works, and nothing else")
    made.add_argument(
        "--contenders",
        metavar="NAME,…",
        help=f"which take part, of {', '.join(BY_NAME)} (default: {','.join(DEFAULT)})",
    )
    made.add_argument("--repeats", type=int, default=3, help="runs of each contender (default: %(default)s)")
    made.add_argument("--seed", type=int, default=1, help="of the first repeat (default: %(default)s)")
    made.add_argument("--requests", type=int, default=400, help="the first of the trace (default: %(default)s)")
    made.add_argument(
        "--trace", type=Path, default=TRACE, help="Mooncake JSONL or CSV (default: the conversation trace)"
    )
    made.add_argument("--prefill", default="1x2", help="WORKERSxRANKS (default: %(default)s)")
    made.add_argument("--decode", default="1x2", help="WORKERSxRANKS (default: %(default)s)")
    made.add_argument("--utilization", type=float, default=0.7, help="of the prefill ranks (default: %(default)s)")
    made.add_argument(
        "--time-scale", type=float, default=10.0, help="speed of engines and trace (default: %(default)s)"
    )
    made.add_argument(
        "--output-ratio", type=float, default=0.5, help="outputs as a share of the trace's (default: %(default)s)"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; -: to standard output")
    return made


def plan_from(options: argparse.Namespace, console: Console) -> Plan:
    """What every contender gets. Raises ConfigError."""
    trace: Path | None = options.trace
    if trace == TRACE and not TRACE.exists():
        console.print("no conversation trace beside the repository: a synthetic load instead")
        trace = None
    return Plan(
        prefill=Shape.parse(options.prefill),
        decode=Shape.parse(options.decode),
        requests=QUICK_REQUESTS if options.quick else options.requests,
        time_scale=QUICK_TIME_SCALE if options.quick else options.time_scale,
        utilization=options.utilization,
        output_ratio=options.output_ratio,
        trace=trace,
    )


def names_from(options: argparse.Namespace, console: Console) -> list[str]:
    """Who takes part. Raises ConfigError for an unknown name."""
    names = options.contenders.split(",") if options.contenders else list(QUICK if options.quick else DEFAULT)
    if unknown := [name for name in names if name not in BY_NAME]:
        raise ConfigError(f"contenders: {unknown[0]!r} is not one of {', '.join(BY_NAME)}")
    if smg_python() is None and any(BY_NAME[name].smg for name in names):
        console.print(f"without smg: {SMG_PYTHON} does not name a Python that has it")
        names = [name for name in names if not BY_NAME[name].smg]
    if not names:
        raise ConfigError("contenders: none is left")
    return [contender.name for contender in CONTENDERS if contender.name in names]


def seeds_from(options: argparse.Namespace) -> list[int]:
    """One for each repeat."""
    return [options.seed + number for number in range(1 if options.quick else options.repeats)]


def compare(plan: Plan, names: Sequence[str], seeds: Sequence[int], console: Console) -> Results:
    """All runs, the contenders in turns. Raises StackError when something does not start."""
    runs: dict[str, list[RunFigures]] = {name: [] for name in names}
    predicted: dict[str, list[Latency]] = {name: [] for name in names if BY_NAME[name].predicted_by}
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(names) * len(seeds) * plan.requests)
        for turn, seed in enumerate(seeds):
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:  # nobody is always the first
                progress.update(bar, description=f"{name}, run {turn + 1} of {len(seeds)}")
                figures = run(BY_NAME[name], plan, seed, lambda: progress.advance(bar))
                runs[name].append(figures)
                if not console.is_terminal:
                    console.print(_line(figures), soft_wrap=True)
                    console.file.flush()
            for name, of_lab in predicted.items():
                of_lab.append(predict(name, plan, seed))
    return Results(plan, runs, predicted)


def predict(name: str, plan: Plan, seed: int) -> Latency:
    """TTFT of the same requests in the lab, which knows neither network nor CPU; in real seconds."""
    contender = BY_NAME[name]
    settings = plan.lab_settings(contender.scrape_interval_s)
    result = Cluster(contender.predicted_by, settings, seed, plan.arrivals(seed)).run()
    return Latency.of([ttft_s / plan.time_scale for ttft_s in result.ttft_s])


def _line(figures: RunFigures) -> str:
    ttft = figures.ttft_s
    return (
        f"{figures.contender}, seed {figures.seed}: TTFT {ttft.mean * 1e3:.0f} / {ttft.p50 * 1e3:.0f} / "
        f"{ttft.p99 * 1e3:.0f} ms (mean, p50, p99), {figures.failures} failed, {figures.seconds:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
