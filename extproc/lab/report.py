"""A comparison as a table for people and as JSON for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from extproc.lab.experiment import Comparison, Load
from extproc.lab.settings import Settings
from extproc.lab.stats import Estimate

BASES = ("round_robin", "scraped")
"""Policies that the others are compared with, where they are in the run."""
FIGURES = ("ttft_mean", "ttft_p50", "ttft_p99", "tpot_mean", "tpot_p50", "tpot_p99", "imbalance", "decode_imbalance")


def as_json(comparison: Comparison, settings: Settings, load: Load) -> dict[str, Any]:
    """Medians over seeds at the plain keys; intervals, differences and single seeds beside them."""
    return {
        "policies": {policy: _policy_json(comparison, policy) for policy in comparison.policies},
        "seeds": list(comparison.seeds),
        "settings": {
            **asdict(settings),
            "prefill": str(settings.prefill),
            "decode": str(settings.decode),
            "load": {
                "trace": None if load.trace is None else load.trace.name,
                "requests": load.requests,
                "utilization": load.utilization,
                "utilization_of": load.utilization_of.value,
                "time_scale": load.time_scale,
            },
        },
    }


def _policy_json(comparison: Comparison, policy: str) -> dict[str, Any]:
    estimates = {figure: comparison.estimate(policy, figure) for figure in FIGURES}
    return {
        "ttft_s": {name: estimates[f"ttft_{name}"].median for name in ("mean", "p50", "p99")},
        "tpot_s": {name: estimates[f"tpot_{name}"].median for name in ("mean", "p50", "p99")},
        "imbalance": estimates["imbalance"].median,
        "decode_imbalance": estimates["decode_imbalance"].median,
        "intervals": {figure: asdict(estimate) for figure, estimate in estimates.items()},
        "against": {
            base: {figure: asdict(comparison.against(policy, base, figure)) for figure in FIGURES}
            for base in BASES
            if base in comparison.policies and base != policy
        },
        "per_seed": [asdict(summary) for summary in comparison.runs[policy]],
    }


def tables(comparison: Comparison, title: str) -> list[Table]:
    """The figures, and how they differ from each base."""
    return [
        _figures_table(comparison, title),
        *(
            _differences_table(comparison, base)
            for base in BASES
            if len(comparison.policies) > 1 and base in comparison.policies
        ),
    ]


def _figures_table(comparison: Comparison, title: str) -> Table:
    shown = Table(title=title, title_justify="left", caption=_caption(comparison), caption_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in (
        "TTFT s\nmean",
        "\np50",
        "\np99",
        "TPOT ms\nmean",
        "\np50",
        "\np99",
        "imbalance\nprefill",
        "\ndecode",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for policy in comparison.policies:
        medians = {figure: comparison.estimate(policy, figure).median for figure in FIGURES}
        seconds = [f"{medians[f'ttft_{name}']:.2f}" for name in ("mean", "p50", "p99")]
        milliseconds = [f"{medians[f'tpot_{name}'] * 1e3:.1f}" for name in ("mean", "p50", "p99")]
        shown.add_row(
            policy, *seconds, *milliseconds, f"{medians['imbalance']:.2f}", f"{medians['decode_imbalance']:.2f}"
        )
    return shown


def _differences_table(comparison: Comparison, base: str) -> Table:
    shown = Table(title=f"against {base}", title_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in ("TTFT mean", "TTFT p99", "TPOT mean", "TPOT p99"):
        shown.add_column(heading, justify="right")
    for policy in comparison.policies:
        if policy != base:
            figures = ("ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99")
            differences = [comparison.against(policy, base, figure) for figure in figures]
            shown.add_row(policy, *(percent(each, with_interval=len(comparison.seeds) > 1) for each in differences))
    return shown


def percent(estimate: Estimate, with_interval: bool) -> str:
    """A relative difference in per cent, as `-30.1 [-32.0, -29.1]`."""
    text = f"{estimate.median * 100:+.1f}"
    return f"{text} [{estimate.low * 100:+.1f}, {estimate.high * 100:+.1f}]" if with_interval else f"{text} %"


def _caption(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    if count == 1:
        return "One seed: no intervals. Use --seeds for more."
    coverage = comparison.estimate(comparison.policies[0], "ttft_mean").coverage
    return f"Medians over {count} seeds; in brackets the interval that holds the median with {coverage:.1%} confidence."


def describe(settings: Settings, load: Load, requests: int | None) -> str:
    """The title: what was compared, in one line."""
    parts = [
        f"prefill {settings.prefill}, decode {settings.decode}",
        "synthetic load" if load.trace is None else load.trace.name,
        f"{requests} requests" if requests else "all requests",
        f"time x{load.time_scale:g}"
        if load.utilization is None
        else f"utilisation {load.utilization:g} of {load.utilization_of.value}",
        "no scrapes" if settings.scrape_interval_s is None else f"scraped every {settings.scrape_interval_s:g} s",
    ]
    extras: Sequence[tuple[bool, str]] = (
        (settings.scrape_failure_ratio > 0, f"{settings.scrape_failure_ratio:.0%} of scrapes fail"),
        (settings.replicas > 1 and settings.replica_lag_s is None, f"{settings.replicas} replicas"),
        (settings.replica_lag_s is not None, f"{settings.replicas} processes, {settings.replica_lag_s or 0:g} s apart"),
        (settings.dp_attention, "DP attention"),
        (settings.prefill_attention, "attention in prefill"),
        (settings.prefix_cache, "prefix cache"),
    )
    return ", ".join([*parts, *(text for applies, text in extras if applies)])
