"""`make soak`: very many requests with faults through a real gateway; then nothing may be left, and nothing have grown.

PYTHONPATH=tests/chaos python tests/soak/run.py [--requests 100000] [--seed 1] [--out .soak]
"""

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from soak import soak

REQUESTS = 100_000
OUT = Path(".soak")
TABLE_WIDTH = 140


def main() -> int:
    """0 when everything adds up."""
    parser = argparse.ArgumentParser(description="Very many requests with faults, and then nothing may be left.")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"default: {REQUESTS:,}")
    parser.add_argument("--seed", type=int, default=1, help="of the traffic (default: 1)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help=f"soak.json, soak.png (default: {OUT})")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("requests", total=options.requests)
        report = asyncio.run(soak(options.requests, options.seed, lambda count: progress.advance(bar, count)))
    report.print(console)
    report.save(options.out)
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
