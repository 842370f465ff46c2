"""Runs targets as processes, a few at a time, and watches them: progress, hangs, crashes."""

import importlib.util
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fuzz_board import Board, Counters
from fuzz_findings import save
from fuzz_target import Target

LOOK_S = 0.1
ROUNDING = 1e-6
"""A share of a number of inputs that is a whole number but for the last bits of a float is not rounded up."""
HANG_S = 60.0
"""Without a new input for so long, a process hangs: an input takes a millisecond, making a finding smaller 10 s."""
_COVERAGE = re.compile(r"cov: (\d+)")


class Part(NamedTuple):
    """What one process does."""

    target: Target
    inputs: int
    guided: bool

    @property
    def name(self) -> str:
        """Of the target and the driver."""
        return f"{self.target.name}, {'atheris' if self.guided else 'own'}"


@dataclass(slots=True)
class Run:
    """One process, and what came of it."""

    part: Part
    log: Path
    board: Board
    process: subprocess.Popen[bytes]
    started_s: float
    counters: Counters = field(default_factory=Counters)
    moved_s: float = 0.0
    """When it last began an input."""
    ended_s: float | None = None
    died: str = ""
    """How, if it did not come to its end."""

    @property
    def inputs_per_s(self) -> float:
        """Start-up included."""
        return self.counters.inputs / max(1e-9, (self.ended_s or time.monotonic()) - self.started_s)

    @property
    def edges(self) -> tuple[int, int] | None:
        """Edges of the code that the seeds reached, and that all inputs did; None where they were not counted."""
        found = _COVERAGE.findall(self.log.read_text(errors="replace"))
        return (int(found[0]), int(found[-1])) if found else None

    @property
    def findings(self) -> int:
        """Different ones, its death included."""
        return self.counters.findings + bool(self.died)

    def look(self, findings: Path) -> bool:
        """Note how far it is, end it if it hangs; whether it still runs."""
        over = self.process.poll() is not None
        counters, current = self.board.read()
        now_s = time.monotonic()
        if counters.inputs != self.counters.inputs or not counters.inputs:
            self.moved_s = now_s
        self.counters = counters
        hangs = now_s - self.moved_s > HANG_S
        if hangs and not over:
            self.process.kill()
            self.process.wait()
        if not over and not hangs:
            return True
        self.ended_s = now_s
        if hangs or self.process.returncode:
            self.died = f"hung for {HANG_S:g} s" if hangs else f"ended with status {self.process.returncode}"
            said = self.log.read_text(errors="replace")[-2000:]
            save(findings, self.part.target, current, f"{self.died}\n{said}")
        self.board.close()
        return False


def can_guide() -> bool:
    """Whether atheris is there."""
    return importlib.util.find_spec("atheris") is not None


def share_out(targets: Sequence[Target], inputs: int, guided: bool) -> list[Part]:
    """How many of the inputs each target gets, rounded up. Where coverage guides, our own driver gets half of them:
    it goes by kinds of outcome, and finds others."""
    whole = sum(target.share for target in targets)
    parts = list[Part]()
    for target in targets:
        drivers = (True, False) if guided and target.modules else (False,)
        parts += [
            Part(target, math.ceil(inputs * target.share / whole / len(drivers) - ROUNDING), driver)
            for driver in drivers
        ]
    return parts


def run_all(
    plan: Sequence[Part],
    *,
    seed: int,
    jobs: int,
    findings: Path,
    directory: Path,
    seen: Callable[[Iterable[Run]], None],
) -> list[Run]:
    """Run the plan; `seen` is called with all runs so far every now and then. Logs and boards go to `directory`."""
    waiting, running, runs = list(plan), list[Run](), list[Run]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = _start(waiting.pop(0), seed, findings, directory)
                running.append(run)
                runs.append(run)
            running = [run for run in running if run.look(findings)]
            seen(runs)
            if running:
                time.sleep(LOOK_S)
    finally:
        for run in running:
            run.process.kill()
            run.process.wait()
    return runs


def _start(part: Part, seed: int, findings: Path, directory: Path) -> Run:
    board, log = directory / f"{part.name}.board", directory / f"{part.name}.log"
    Board.make(board)
    script = Path(__file__).with_name("fuzz_child.py")
    options = ("--inputs", str(part.inputs), "--seed", str(seed), "--board", str(board), "--findings", str(findings))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), part.target.name, *options, *(["--guided"] if part.guided else [])],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    now_s = time.monotonic()
    return Run(part, log, Board(board), process, now_s, moved_s=now_s)
