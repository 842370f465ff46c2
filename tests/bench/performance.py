"""`make bench`: what the gateway costs, beside a no-op service, plain Envoy and the existing gateways.

All gateways run at once in front of the same engines; they are put under load in turns, so that whatever else the
machine does meets all of them. docs/performance.md says what the figures mean.
"""

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench_process import write_json
from perf_background import remember, scrape
from perf_decision import POLICY, RANKS, SIZES, decide, policies
from perf_engines import running_engines
from perf_flame import draw, own_shares, read, record, sampler, without_common_root
from perf_gateways import BY_NAME, CONTENDERS, Gateway, available, running
from perf_load import Cell, Rig, measure, write_bodies
from perf_markdown import write_into
from perf_native import compile_core, make_tools
from perf_report import Results, as_json, background, decisions, gateways, stage_table, verdicts
from perf_stages import stages
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.demo.stack import StackError
from extproc.envoy_process import find_binary
from extproc.errors import ConfigError

CONNECTIONS = (1, 16, 64)
RATES = {"2KB": (250, 1000), "64KB": (250,), "SSE": (250,)}
"""Open loop, requests a second: well below what any gateway can do, and near what this one can."""
CELLS = tuple(Cell(body, connections=count) for body in RATES for count in CONNECTIONS) + tuple(
    Cell(body, rate=rate) for body, rates in RATES.items() for rate in rates
)
QUICK_CELLS = (Cell("2KB", connections=16), Cell("SSE", connections=16), Cell("2KB", rate=50))
QUICK_CONTENDERS = ("direct", "extproc", "floor")
PARTS = ("gateways", "decision", "stages", "scrape", "memory", "flame")
QUICK_PARTS = ("gateways", "decision")
WORKERS = 2
"""Of each role."""
SCRAPED_WORKERS = 1000
PROMPTS = 1_000_000
DECISION_BATCHES, QUICK_BATCHES = 60, 4
SCRAPE_S = 15.0
FLAME_S = 15.0
WARM_UP_S = 1.0
DOCS = Path(__file__).parents[2] / "docs"
WIDTH = 170
"""Columns where there is no terminal to ask."""
EXIT_FAILURES = 1
EXIT_CANNOT_RUN = 2
EXIT_INTERRUPTED = 130

Step = Callable[[str], None]
"""Says what comes next, and moves the bar."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    parts: tuple[str, ...]
    contenders: tuple[str, ...]
    cells: tuple[Cell, ...]
    repeats: int
    seconds: float
    scraped_workers: int
    prompts: int
    batches: int
    flame: Path

    @property
    def steps(self) -> int:
        """Measurements."""
        compiling = any(BY_NAME[name].compiled for name in self.contenders)
        steps = {
            "gateways": compiling
            + self.repeats * sum(_takes_part(name, cell) for name in self.contenders for cell in self.cells),
            "decision": len(SIZES) + 2 * len(policies()),
            "stages": 1,
            "scrape": 1,
            "memory": 1,
            "flame": 1,
        }
        return sum(steps[part] for part in self.parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; not 0 if any request failed. A bar that is missed is not an error."""
    options = parser().parse_args(arguments)
    # Tables go to standard error when standard output is for the JSON.
    console = Console(stderr=options.json == Path("-"))
    if not console.is_terminal:
        console.width = WIDTH
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # so that children are stopped in order
    try:
        plan = plan_from(options, console)
        results = run(plan, console)
    except (ConfigError, StackError, OSError, subprocess.TimeoutExpired) as error:
        console.print(f"The benchmark cannot go on: {error}", style="red", markup=False, soft_wrap=True)
        return EXIT_CANNOT_RUN
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    for name, value in {**results.machine, **results.settings}.items():
        console.print(f"{name}: {value}", markup=False, highlight=False, soft_wrap=True)
    if results.figures:
        console.print(gateways(results))
    if results.decisions:
        console.print(decisions(results))
    if results.stages:
        console.print(stage_table(results))
    for line in background(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(verdicts(results))
    if options.docs is not None:
        write_into(options.docs, results)
    if options.json is not None:
        write_json(options.json, as_json(results))
    return EXIT_FAILURES if results.failed else 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="performance.py", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a short run that shows that it works, and nothing else")
    made.add_argument("--only", metavar="PART,…", help=f"parts to run, of {', '.join(PARTS)} (default: all)")
    made.add_argument("--contenders", metavar="NAME,…", help=f"who takes part, of {', '.join(BY_NAME)} (default: all)")
    made.add_argument("--cells", metavar="LOAD,…", help="kinds of load, as they are named in the table (2KB c16)")
    made.add_argument("--repeats", type=int, default=3, help="measurements of each (default: %(default)s)")
    made.add_argument("--seconds", type=float, default=4.0, help="for each measurement (default: %(default)s)")
    made.add_argument("--prompts", type=int, default=PROMPTS, help="of the part memory (default: %(default)s)")
    made.add_argument("--flame", type=Path, default=DOCS / "img/flame.svg", help="where the flame graph goes")
    made.add_argument(
        "--docs",
        type=Path,
        nargs="?",
        const=DOCS / "performance.md",
        metavar="FILE",
        help="write the tables between the marks of this document (default: docs/performance.md)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write all figures there; -: to standard output")
    return made


def plan_from(options: argparse.Namespace, console: Console) -> Plan:
    """What to do. Raises ConfigError for names that there are not."""
    quick = options.quick
    names = _named(options.contenders, list(BY_NAME), QUICK_CONTENDERS if quick else tuple(BY_NAME))
    parts = _named(options.only, PARTS, QUICK_PARTS if quick else PARTS)
    cells = {cell.name: cell for cell in (QUICK_CELLS if quick else CELLS)}
    chosen = _named(options.cells, list(cells), tuple(cells))
    present = tuple(contender.name for contender in available(names))
    if absent := [f"{name} ({BY_NAME[name].needs} is not set)" for name in names if name not in present]:
        console.print(f"without {', '.join(absent)}", markup=False)
    if "flame" in parts and sampler() is None:
        console.print("without the flame graph: py-spy is not installed")
        parts = tuple(part for part in parts if part != "flame")
    return Plan(
        parts=parts,
        contenders=present,
        cells=tuple(cells[name] for name in chosen),
        repeats=1 if quick else options.repeats,
        seconds=1.0 if quick else options.seconds,
        scraped_workers=20 if quick else SCRAPED_WORKERS,
        prompts=min(options.prompts, 5000) if quick else options.prompts,
        batches=QUICK_BATCHES if quick else DECISION_BATCHES,
        flame=options.flame,
    )


def _named(text: str | None, known: Sequence[str], otherwise: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else otherwise
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is not one of {', '.join(known)}")
    return names


def run(plan: Plan, console: Console) -> Results:
    """All parts. Raises StackError and OSError when something does not start."""
    results = Results(machine(), settings(plan))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        tempfile.TemporaryDirectory(prefix="bench-") as name,
    ):
        bar = progress.add_task("starting", total=plan.steps)

        def step(text: str) -> None:
            progress.update(bar, description=text, advance=1)

        directory = Path(name)
        tools = make_tools(directory)
        write_bodies(directory)
        if "decision" in plan.parts:
            _decide(plan, results, step)
        if "stages" in plan.parts:
            step("stages")
            results.stages = stages()
        if "memory" in plan.parts:
            step(f"{plan.prompts:,} prompts")
            results.memory = remember(plan.prompts)
        if "scrape" in plan.parts:
            step("scraping")
            (directory / "many").mkdir()
            with running_engines(tools, directory / "many", workers=plan.scraped_workers // 2, ranks=RANKS) as engines:
                results.scraping = scrape(engines, RANKS, directory, interval_s=1.0, seconds=SCRAPE_S)
        if {"gateways", "flame"} & set(plan.parts):
            with running_engines(tools, directory, workers=WORKERS, ranks=RANKS) as engines:
                _gateways(plan, results, Rig(engines, tools, directory), step)
    results.machine["load average after"] = _load_average()
    return results


def _decide(plan: Plan, results: Results, step: Step) -> None:
    for policy in policies():
        for body in ("2KB", "64KB"):
            step(f"decision, {policy}, {body}")
            results.decisions.append(decide(policy, 10, body, plan.batches))
    for workers in SIZES:
        step(f"decision, {workers} workers")
        if workers != 10:
            results.decisions.append(decide(POLICY, workers, "2KB", plan.batches))


def _gateways(plan: Plan, results: Results, rig: Rig, step: Step) -> None:
    with contextlib.ExitStack() as stack:
        names = plan.contenders if "gateways" in plan.parts else ("extproc",)
        compiled = None
        if any(BY_NAME[name].compiled for name in names):
            step("compiling the core")
            compiled = compile_core(rig.directory)
        started = [stack.enter_context(running(BY_NAME[name], rig.engines, rig.directory, compiled)) for name in names]
        if "flame" in plan.parts:
            step("flame graph")
            _flame(plan, results, rig, started)
        if "gateways" not in plan.parts:
            return
        for cell in plan.cells:
            taking_part = [gateway for gateway in started if _takes_part(gateway.name, cell)]
            for repeat in range(plan.repeats):
                for gateway in _in_turns(taking_part, repeat):
                    step(f"{cell.name}, {gateway.name}, {repeat + 1} of {plan.repeats}")
                    measure(rig, gateway, cell, seconds=WARM_UP_S)
                    seconds, seed = plan.seconds, repeat + 1
                    figures = measure(rig, gateway, cell, seconds=seconds, seed=seed)
                    results.figures.append(figures)


def _flame(plan: Plan, results: Results, rig: Rig, started: Sequence[Gateway]) -> None:
    gateway = next((gateway for gateway in started if gateway.name == "extproc"), None)
    if gateway is None or gateway.pid is None:
        return
    cell, raw = Cell("2KB", connections=16), rig.directory / "samples.txt"
    measure(rig, gateway, cell, seconds=WARM_UP_S)
    sampling = record(gateway.pid, FLAME_S, raw)
    measure(rig, gateway, cell, seconds=FLAME_S)
    _, said = sampling.communicate()
    if sampling.returncode:
        raise StackError(f"py-spy: {said.decode(errors='replace').strip()[-300:]}")
    root = without_common_root(read(raw.read_text()))
    results.hot = own_shares(root)
    plan.flame.write_text(draw(root, f"extproc up, {cell.name}: {root.samples:,} samples of the service's one thread"))


def _in_turns(gateways_: Sequence[Gateway], repeat: int) -> Iterator[Gateway]:
    first = repeat % len(gateways_) if gateways_ else 0
    yield from [*gateways_[first:], *gateways_[:first]]  # nobody is always the first


def _takes_part(name: str, cell: Cell) -> bool:
    only = BY_NAME[name].only
    return not only or cell.name in only


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), ""
    )
    memory = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), ""
    )
    found = {
        "cores": os.cpu_count(),
        "cpu": cpu,
        "memory": memory,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": f"{platform.python_version()} ({platform.python_compiler()})",
        "envoy": _said([str(find_binary()), "--version"], 1).rpartition("version: ")[2],
        "wrk": _said(["wrk", "--version"], 0),
        "load average before": _load_average(),
    }
    for name in ("extproc", "uvloop", "xds-protos", "msgspec", "hpack", "grpcio"):
        found[name] = version(name)
    for variable, package in (("SMG_PYTHON", "smg"), ("SGLANG_ROUTER_PYTHON", "sglang-router")):
        if python := os.environ.get(variable):
            code = f"from importlib.metadata import version; print(version({package!r}))"
            found[package] = _said([python, "-c", code], 0)
    return found


def settings(plan: Plan) -> dict[str, Any]:
    """How it was run."""
    return {
        "workers": f"{WORKERS} prefill, {WORKERS} decode, {RANKS} ranks each",
        "envoy concurrency": f"{os.cpu_count()} (its default, and that of `extproc up`: one thread a core)",
        "commit": _said(["git", "-C", str(DOCS), "rev-parse", "--short", "HEAD"], 0),
        "pinning": "none: engines, generator and gateway share all cores",
        "repeats": plan.repeats,
        "seconds": plan.seconds,
        "contenders": [f"{c.name}: {c.about}" for c in CONTENDERS if c.name in plan.contenders],
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _load_average() -> str:
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def _said(command: Sequence[str], line: int) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[min(line, len(lines) - 1)].strip() if lines else ""


if __name__ == "__main__":
    sys.exit(main())
