"""`extproc lab`: flags in, table, JSON and pictures out."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from extproc.errors import ConfigError
from extproc.lab import plot, report
from extproc.lab.experiment import Case, Load, compare, simulate
from extproc.lab.pages import Page
from extproc.lab.progress import output_console, progress_bar
from extproc.lab.service import CLAIRVOYANT, PolicyName
from extproc.lab.settings import Settings, Shape
from extproc.model import Role

SCRAPES_OFF = "off"
DEFAULT_POLICIES = "round_robin,scraped,live,clairvoyant"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `extproc lab`."""
    load = parser.add_argument_group("load")
    source = load.add_mutually_exclusive_group()
    source.add_argument("--trace", type=Path, metavar="FILE", help="Mooncake's JSONL form, or CSV (by its suffix)")
    source.add_argument("--synthetic", action="store_true", help="Poisson arrivals, lognormal lengths (the default)")
    load.add_argument("--requests", type=_count, metavar="N", help="only the first N (default: all; synthetic: 6000)")
    speed = load.add_mutually_exclusive_group()
    speed.add_argument(
        "--utilization", type=_positive, metavar="U", help="scale time to this load, 0.7 for 70 %% of what fits"
    )
    speed.add_argument("--time-scale", type=_positive, metavar="X", help="run the trace X times as fast (default: 1)")
    load.add_argument(
        "--utilization-of",
        choices=[role.value for role in Role],
        default=Role.PREFILL.value,
        help="whose capacity --utilization means (default: %(default)s)",
    )

    engines = parser.add_argument_group("engines")
    engines.add_argument("--prefill", default="1x2", metavar="PxR", help="P workers with R DP ranks each (%(default)s)")
    engines.add_argument("--decode", default="1x2", metavar="DxR", help="D workers with R DP ranks each (%(default)s)")
    engines.add_argument("--dp-attention", action="store_true", help="all ranks of a worker step together")
    engines.add_argument(
        "--prefill-attention", action="store_true", help="a prompt token costs more the later it stands in its prompt"
    )
    engines.add_argument("--prefix-cache", action="store_true", help="prefill ranks keep and reuse prompts' KV cache")

    service = parser.add_argument_group("service")
    service.add_argument(
        "--policies",
        default=DEFAULT_POLICIES,
        metavar="NAMES",
        help="separated by commas: round_robin, scraped, live, clairvoyant, any worker policy, or "
        "WORKER+RANK+LOADS as cache_aware+minimum_tokens+live (default: %(default)s)",
    )
    service.add_argument(
        "--replicas", type=_count, default=1, metavar="N", help="independent services sharing the traffic"
    )
    service.add_argument(
        "--replica-lag",
        type=_positive,
        metavar="S",
        help="make them processes of one service, which know so much later what another does (docs/processes.md)",
    )
    service.add_argument(
        "--scrape-interval", type=_interval, default=1.0, metavar="S|off", help="seconds (default: %(default)s), or off"
    )
    service.add_argument("--scrape-failures", type=_share, default=0.0, metavar="SHARE", help="of scrapes, at random")
    service.add_argument(
        "--scrape-page", choices=[page.value for page in Page], default=Page.LOADS.value, help="default: %(default)s"
    )
    service.add_argument("--exact-tokens", action="store_true", help="the service knows prompt tokens exactly")

    output = parser.add_argument_group("runs and output")
    output.add_argument("--seeds", type=_count, default=1, metavar="N", help="repeat with seeds 0 to N-1")
    output.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes (default: %(default)s)")
    output.add_argument("--json", metavar="FILE", help="write the figures there; - for standard output")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (extra [lab])")
    output.add_argument("--quiet", action="store_true", help="no table, no progress")


def run(args: argparse.Namespace) -> int:
    """Compare and show. Raises ConfigError for what the flags cannot mean."""
    settings = Settings(
        prefill=Shape.parse(args.prefill),
        decode=Shape.parse(args.decode),
        dp_attention=args.dp_attention,
        prefill_attention=args.prefill_attention,
        prefix_cache=args.prefix_cache,
        replicas=args.replicas,
        replica_lag_s=args.replica_lag,
        scrape_interval_s=args.scrape_interval,
        scrape_failure_ratio=args.scrape_failures,
        scrape_page=Page(args.scrape_page),
        exact_tokens=args.exact_tokens,
    )
    load = Load(
        trace=args.trace,
        requests=args.requests,
        utilization=0.7 if args.utilization is None and args.trace is None else args.utilization,
        utilization_of=Role(args.utilization_of),
        time_scale=args.time_scale or 1.0,
    )
    policies = [name.strip() for name in args.policies.split(",") if name.strip()]
    for policy in policies:
        if policy != CLAIRVOYANT:
            PolicyName.parse(policy)
    if not policies:
        raise ConfigError("--policies: expected at least one")
    if args.plot:
        plot.require_matplotlib()
    requests = len(load.arrivals(settings, 0))  # a bad trace is told before anything runs

    errors = Console(stderr=True)
    jobs = min(args.jobs, os.cpu_count() or 1)
    with progress_bar(errors, len(policies) * args.seeds, hidden=args.quiet) as done:
        comparison = compare(policies, range(args.seeds), settings, load, jobs=jobs, done=done)

    if not args.quiet:
        console = errors if args.json == "-" else output_console()
        console.print(*report.tables(comparison, report.describe(settings, load, requests)), sep="\n")
    if args.json:
        _write_json(args.json, report.as_json(comparison, settings, load))
    if args.plot:
        results = {policy: simulate(Case(policy, 0, settings, load), record=True) for policy in policies}
        plot.draw(results, args.plot, report.describe(settings, load, requests))
    return 0


def _write_json(place: str, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    if place == "-":
        sys.stdout.write(text)
        return
    try:
        Path(place).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {place}: {error.strerror}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return value


def _interval(text: str) -> float | None:
    return None if text == SCRAPES_OFF else _positive(text)
