"""The results as Markdown, written between two marks of docs/performance.md, so that a run can replace them."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from perf_load import Figures
from perf_report import MIB, Results, background, rows, stage_rows

from extproc.errors import ConfigError

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HOT = 15
"""Functions in the list."""


def write_into(document: Path, results: Results) -> None:
    """Replace what stands between the marks. Raises ConfigError when they are not there."""
    before, begin, rest = document.read_text().partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not (begin and end):
        raise ConfigError(f"{document}: the marks {BEGIN} and {END} are missing")
    document.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{behind}")


def markdown(results: Results) -> str:
    """All tables."""
    parts = ["### Machine and versions", *_pairs(results)]
    parts += ["", "### Against the bars", *_table(("requirement", "bar", "aim", "measured", "verdict"), _bars(results))]
    if results.figures:
        names = ("load", "gateway", "req/s", "p50 ms", "p99 ms", "CPU s per 1,000", "of it service", "of it Envoy",
                 "RSS MiB", "engines", "generator")  # fmt: skip
        parts += ["", "### Gateways", *_table(names, _gateways(results))]
    if results.decisions:
        names = ("policy", "workers", "body", "parse", "pick + charge", "mutate", "decision")
        parts += ["", "### Decision, µs of CPU", *_table(names, _decisions(results))]
    if results.stages:
        steps = _table(("step", "µs"), stage_rows(results))
        parts += ["", "### Steps of one request in the service, without transport", *steps]
    words = background(results)[: -len(results.hot[:20]) or None]
    if words:
        parts += ["", "### Beside requests", *(f"- {line}" for line in words)]
    if results.hot:
        hot = ([f"`{name}`", f"{share:.1%}"] for name, share in results.hot[:HOT])
        parts += ["", "### Where the service's own samples are", *_table(("function", "share"), hot)]
    return "\n".join(parts)


def _pairs(results: Results) -> Iterable[str]:
    for name, value in {**results.machine, **results.settings}.items():
        yield f"- {name}: {'; '.join(value) if isinstance(value, list) else value}"


def _bars(results: Results) -> Iterable[Sequence[str]]:
    for row in rows(results):
        yield row.words()


def _gateways(results: Results) -> Iterable[Sequence[str]]:
    for cell, contender in dict.fromkeys((figures.cell, figures.contender) for figures in results.figures):
        yield cell, contender, *_summary(results.of(contender, cell))


def _summary(runs: Sequence[Figures]) -> Sequence[str]:
    def median(value: Callable[[Figures], float]) -> float:
        return statistics.median(map(value, runs))

    rates = [figures.requests_per_s for figures in runs]
    failed = sum(figures.failed for figures in runs)
    return (
        f"{median(lambda f: f.requests_per_s):,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
        + (f", {failed} failed" if failed else ""),
        f"{median(lambda f: f.p50_us) / 1000:.2f}",
        f"{median(lambda f: f.p99_us) / 1000:.1f}",
        f"{median(lambda f: f.cpu_s):.3f}",
        f"{median(lambda f: f.cpu.get('python', 0.0)):.3f}",
        f"{median(lambda f: f.cpu.get('envoy', 0.0)):.3f}",
        f"{median(lambda f: f.resident_bytes) / MIB:.0f}",
        f"{median(lambda f: f.engines_share):.0%}",
        f"{median(lambda f: f.generator_share):.0%}",
    )


def _decisions(results: Results) -> Iterable[Sequence[str]]:
    for d in results.decisions:
        figures = (d.parse_us, d.place_us, d.mutate_us, d.decision_us)
        yield d.policy, str(d.workers), d.body, *(f"{value:.1f}" for value in figures)


def _table(names: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterable[str]:
    yield f"| {' | '.join(names)} |"
    yield "|---" * len(names) + "|"
    for line in lines:
        yield f"| {' | '.join(line)} |"
