"""All runs as one table for people and as JSON for programs. No I/O.

Runs of one seed had the same requests at about the same time on the same machine: ratios are taken seed by seed, and
then their median.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench_contenders import BY_NAME
from bench_run import RunFigures
from bench_workload import Plan
from rich.table import Table

from extproc.lab.stats import Latency

BASES = ("smg", "room")
"""What the others are compared with, where they took part."""
PARTS = ("mean", "p50", "p99")


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that came out."""

    plan: Plan
    runs: dict[str, list[RunFigures]]
    """By contender; all have the same seeds in the same order."""
    predicted: dict[str, list[Latency]]
    """The lab's TTFT in real seconds, by contender and seed; not every contender has one."""

    def ttft(self, name: str, part: str) -> float:
        """Median over the runs."""
        return float(median(getattr(run.ttft_s, part) for run in self.runs[name]))

    def tpot(self, name: str, part: str) -> float:
        """Median over the runs."""
        return float(median(getattr(run.tpot_s, part) for run in self.runs[name]))

    def against(self, name: str, base: str, part: str) -> list[float]:
        """TTFT as a multiple of the base's, seed by seed."""
        pairs = zip(self.runs[name], self.runs[base], strict=True)
        return [getattr(run.ttft_s, part) / getattr(other.ttft_s, part) for run, other in pairs if other.ttft_s.p50]

    def over_prediction(self, name: str) -> float | None:
        """Mean TTFT as a multiple of the lab's; None without a prediction."""
        predicted = self.predicted.get(name)
        if not predicted:
            return None
        pairs = zip(self.runs[name], predicted, strict=True)
        return median(run.ttft_s.mean / lab.mean for run, lab in pairs)

    @property
    def failures(self) -> int:
        """Requests of all contenders that were not answered right."""
        return sum(run.failures for runs in self.runs.values() for run in runs)


def table(results: Results) -> Table:
    """One line a contender."""
    plan = results.plan
    title = (
        f"prefill {plan.prefill}, decode {plan.decode}, {plan.trace.name if plan.trace else 'synthetic load'}, "
        f"{plan.requests} requests, utilisation {plan.utilization:g}, "
        f"time x{plan.time_scale:g}: medians of {_repeats(results)} runs, in ms of real time"
    )
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    bases = [base for base in BASES if base in results.runs]
    headings = ["TTFT\nmean", "\np50", "\np99", *(f"mean, p99\nover {base}" for base in bases), "mean over\nlab's"]
    headings += ["TPOT\nmean", "\np99", "spread\nP", "\nD", "ranks\nnamed", "outside\nengines", "CPU\nidle", "failed"]
    for heading in headings:
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, runs in results.runs.items():
        cells = [f"{results.ttft(name, part) * 1e3:.0f}" for part in PARTS]
        for base in bases:
            ratios = [median(results.against(name, base, part) or [0.0]) for part in ("mean", "p99")]
            cells.append("-" if name == base else " ".join(f"{ratio:.2f}" for ratio in ratios))
        cells.append(_number(results.over_prediction(name)))
        cells += [f"{results.tpot(name, part) * 1e3:.2f}" for part in ("mean", "p99")]
        cells += [_number(_median([getattr(run, key) for run in runs])) for key in ("prefill_spread", "decode_spread")]
        cells.append(f"{median(run.explicit_ranks for run in runs):.0%}")
        cells.append(f"{median(run.outside_s.mean for run in runs) * 1e3:.1f}")
        idle = _median([run.cpu_idle for run in runs])
        cells.append("-" if idle is None else f"{idle:.0%}")
        cells.append(str(sum(run.failures for run in runs)))
        shown.add_row(name, *cells)
    return shown


def as_json(results: Results) -> dict[str, Any]:
    """Medians over the runs, ratios to each base, and every run."""
    plan = results.plan
    return {
        "settings": {
            **asdict(plan),
            "prefill": str(plan.prefill),
            "decode": str(plan.decode),
            "trace": plan.trace and plan.trace.name,
            "repeats": _repeats(results),
        },
        "contenders": {name: _contender(results, name) for name in results.runs},
    }


def _contender(results: Results, name: str) -> dict[str, Any]:
    runs, contender = results.runs[name], BY_NAME[name]
    figures = [asdict(run) | {"prefill_spread": run.prefill_spread, "decode_spread": run.decode_spread} for run in runs]
    return {
        "about": contender.about,
        "flags": [*contender.interval_flag(results.plan.time_scale), *contender.flags],
        "ttft_s": {part: results.ttft(name, part) for part in PARTS},
        "tpot_s": {part: results.tpot(name, part) for part in PARTS},
        "prefill_spread": _median([run.prefill_spread for run in runs]),
        "decode_spread": _median([run.decode_spread for run in runs]),
        "failures": sum(run.failures for run in runs),
        "ttft_over": {
            base: {part: results.against(name, base, part) for part in PARTS}
            for base in BASES
            if base in results.runs and base != name
        },
        "ttft_predicted_s": [asdict(latency) for latency in results.predicted.get(name, [])],
        "runs": figures,
    }


def _repeats(results: Results) -> int:
    return max((len(runs) for runs in results.runs.values()), default=0)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
