"""`extproc check`: is the configuration right, and what are the workers?"""

import argparse
import asyncio
import random
import time

from rich.console import Console
from rich.table import Table

from extproc.cli.flags import add_config_flags, config_from
from extproc.config import Config
from extproc.discovery.fetch import make_client
from extproc.discovery.health import entries
from extproc.discovery.probe import ProbeReport, probe
from extproc.load import LoadTable
from extproc.model import Role
from extproc.schedule import Scheduler

EXIT_PROBLEMS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, nothing else."""
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if all is well, 1 if a worker has a problem. Raises ConfigError."""
    config = config_from(args)
    Scheduler(config, LoadTable(config.workers(), time.monotonic), random.Random())  # names an unknown policy
    reports = asyncio.run(_probe_all(config))
    console = Console()
    console.print(_table(reports))
    for report in reports:
        for problem in report.problems:
            console.print(f"{report.worker.role} worker {report.worker.name} {problem}", style="red", highlight=False)
    usable = {report.worker.role for report in reports if report.healthy}
    for role in Role:
        if role not in usable:
            console.print(f"no usable {role} worker: every request will get 503", style="bold red")
    return EXIT_PROBLEMS if len(usable) < len(Role) or any(report.problems for report in reports) else 0


async def _probe_all(config: Config) -> list[ProbeReport]:
    async with make_client(keepalive_s=5) as client:
        return await asyncio.gather(*(probe(config, role, entry, client) for role, entry in entries(config)))


def _table(reports: list[ProbeReport]) -> Table:
    table = Table(title="Workers")
    for heading in ("worker", "role", "healthy", "endpoint", "model", "dp_size", "bootstrap", "loads", "used tokens"):
        table.add_column(heading)
    for report in reports:
        worker = report.worker
        used = [f"{load.used_tokens:,.0f}" if load.used_tokens is not None else "-" for load in report.loads]
        table.add_row(
            worker.name,
            worker.role,
            "yes" if report.healthy else "no",
            worker.endpoint or "-",
            worker.model or "-",
            str(worker.dp_size or "-"),
            f"{worker.bootstrap_host}:{worker.bootstrap_port}" if worker.role is Role.PREFILL else "",
            report.metrics_url or "-",
            " ".join(used) or "-",
        )
    return table
