"""Pictures of a comparison: latency distributions, and each prefill rank's load over time. Needs matplotlib ([lab])."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from extproc.errors import ConfigError
from extproc.lab.cluster import RunResult
from extproc.lab.outstanding import Outstanding

POINTS = 400
"""Samples of a line over time."""
WINDOW = (0.4, 0.6)
"""Part of the run that the lines over time show: the middle fifth, far from the empty start and end."""


def require_matplotlib() -> Any:
    """The plotting module. Raises ConfigError when it is not installed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and slow to import
    except ImportError:
        raise ConfigError("--plot needs matplotlib: install the extra, extproc[lab]") from None
    return Figure


def draw(results: dict[str, RunResult], path: Path, title: str) -> None:
    """One picture: distributions above, one row of load over time for each policy below. One seed's runs.

    Raises ConfigError when matplotlib is missing or the file cannot be written.
    """
    figure = require_matplotlib()(figsize=(11, 4 + 1.8 * len(results)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.add_gridspec(1 + len(results), 2, height_ratios=[2.2, *[1] * len(results)])
    _distribution(figure.add_subplot(grid[0, 0]), {name: run.ttft_s for name, run in results.items()}, "TTFT, s")
    tpot_ms = {name: [value * 1e3 for value in run.tpot_s] for name, run in results.items()}
    _distribution(figure.add_subplot(grid[0, 1]), tpot_ms, "TPOT, ms")
    top: Any = None
    for number, (name, run) in enumerate(results.items(), 1):
        top = figure.add_subplot(grid[number, :], sharex=top, sharey=top)
        _load(top, run.prefill, run.ended_s)
        top.set_ylabel(f"{name}\nk tokens", fontsize=8)
    top.set_ylim(bottom=0)
    top.set_xlabel("time, s: prompt tokens outstanding on each prefill rank")
    try:
        figure.savefig(path, dpi=90)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}") from None


def _distribution(axes: Any, values: Mapping[str, Sequence[float]], label: str) -> None:
    """Share of requests that took longer: the tail is what differs."""
    for name, policy_values in values.items():
        ordered = sorted(policy_values)
        longer = [1 - number / len(ordered) for number in range(len(ordered))]
        axes.plot(ordered, longer, label=name, linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1)
    axes.set_xlabel(label)
    axes.set_ylabel("share that took longer")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)


def _load(axes: Any, load: Outstanding, ended_s: float) -> None:
    start_s, end_s = (share * ended_s for share in WINDOW)
    times = [start_s + (end_s - start_s) * number / (POINTS - 1) for number in range(POINTS)]
    for rank in range(load.ranks):
        changes = [(at_s, tokens) for at_s, changed, tokens in load.series if changed == rank]
        axes.plot(times, sampled(changes, times), linewidth=0.8)
    axes.set_xlim(start_s, end_s)


def sampled(changes: Sequence[tuple[float, int]], times: Sequence[float]) -> list[float]:
    """The value, in thousands, that a step function has at each time; 0 before its first change."""
    moments = [at_s for at_s, _ in changes]
    found = [bisect_right(moments, at_s) for at_s in times]
    return [changes[count - 1][1] / 1e3 if count else 0.0 for count in found]
