"""`extproc check`: is the configuration right, and what are the workers?"""

import argparse
import asyncio
import random
import sys
import time

from extproc.cli.flags import add_config_flags, config_from
from extproc.config import Config
from extproc.discovery.api_keys import ApiKeys
from extproc.discovery.fetch import make_client
from extproc.discovery.health import entries
from extproc.discovery.probe import ProbeReport, probe
from extproc.load import LoadTable
from extproc.model import Role
from extproc.schedule import Scheduler
from extproc.tls import server_certificates

EXIT_PROBLEMS = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, nothing else."""
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if all is well, 1 if a worker has a problem. Raises ConfigError."""
    config = config_from(args)
    Scheduler(config, LoadTable(config.workers(), time.monotonic), random.Random())  # raises for an unknown policy
    server_certificates(config)  # raises for files that do not fit
    reports = asyncio.run(_probe_all(config))
    lines = [line for report in reports for line in describe(report)]
    usable = {report.worker.role for report in reports if report.healthy}
    lines += [f"no usable {role} worker: every request will get 503" for role in Role if role not in usable]
    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_PROBLEMS if len(usable) < len(Role) or any(report.problems for report in reports) else 0


async def _probe_all(config: Config) -> list[ProbeReport]:
    keys = ApiKeys(config)
    async with make_client(keepalive_s=5) as client:
        return await asyncio.gather(
            *(
                probe(config, role, entry, client, headers=keys.headers(entry.to_worker(role).name))
                for role, entry in entries(config)
            )
        )


def describe(report: ProbeReport) -> list[str]:
    """What was found at one worker, in a few lines."""
    worker = report.worker
    lines = [f"{worker.role} worker {worker.name}: {'usable' if report.healthy else 'NOT USABLE'}"]
    if report.healthy:
        facts = [f"endpoint {worker.endpoint}", f"model {worker.model or 'unknown'}"]
        facts.append(f"dp_size {worker.dp_size or 'unknown'}")
        if worker.role is Role.PREFILL:
            facts.append(f"bootstrap {worker.bootstrap_host}:{worker.bootstrap_port}")
        lines.append(f"    {', '.join(facts)}")
    if report.metrics_url:
        used = [
            f"rank {load.dp_rank} {'unknown' if load.used_tokens is None else f'{load.used_tokens:,.0f}'}"
            for load in report.loads
        ]
        lines.append(f"    used tokens: {', '.join(used)} ({report.metrics_url})")
    return [*lines, *(f"    problem: it {problem}" for problem in report.problems)]
