"""`extproc check`: is the configuration right, what are the workers, and does an Envoy that runs go with it?"""

import argparse
import asyncio
import random
import sys
import time

import httpx

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


ADMIN_TIMEOUT_S = 5.0
"""For each page of Envoy's admin interface."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and where an Envoy is to be asked."""
    add_config_flags(parser)
    envoy = parser.add_argument_group("envoy")
    envoy.add_argument(
        "--envoy-admin", metavar="URL", help="look at the Envoy with this admin interface, too; workers may be left out"
    )
    envoy.add_argument(
        "--grpc-target", metavar="TARGET", help="where that Envoy should find the service (default: where it listens)"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if all is well, 1 if a worker or Envoy has a problem. Raises ConfigError."""
    config = config_from(args, need_workers=not args.envoy_admin)
    Scheduler(config, LoadTable(config.workers(), time.monotonic), random.Random())  # raises for an unknown policy
    server_certificates(config)  # raises for files that do not fit
    well = True
    if config.prefill or config.decode:
        well = _look_at_workers(config)
    if args.envoy_admin:
        well = _look_at_envoy(args.envoy_admin, config, args.grpc_target) and well
    return 0 if well else EXIT_PROBLEMS


def _look_at_workers(config: Config) -> bool:
    """Print what the workers are; whether all is well."""
    reports = asyncio.run(_probe_all(config))
    lines = [line for report in reports for line in describe(report)]
    usable = {report.worker.role for report in reports if report.healthy}
    lines += [f"no usable {role} worker: every request will get 503" for role in Role if role not in usable]
    sys.stdout.write("\n".join(lines) + "\n")
    return len(usable) == len(Role) and not any(report.problems for report in reports)


def _look_at_envoy(admin: str, config: Config, grpc_target: str | None) -> bool:
    """Print what the running Envoy has of ours; whether all is well."""
    from extproc.envoy_config.examine import examine  # noqa: PLC0415 - takes a second to import
    from extproc.envoy_config.running import RunningEnvoy  # noqa: PLC0415

    url = (admin if "://" in admin else f"http://{admin}").rstrip("/")
    try:
        with httpx.Client(base_url=url, timeout=ADMIN_TIMEOUT_S, trust_env=False) as client:
            pages = [
                client.get(path).raise_for_status().json()
                for path in ("/server_info", "/config_dump", "/clusters?format=json")
            ]
        envoy = RunningEnvoy.of(*pages)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        sys.stdout.write(f"Envoy's admin interface {url} does not answer: {error}\n")
        return False
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        sys.stdout.write(f"{url} is not Envoy's admin interface: its answers are others\n")
        return False
    findings = examine(envoy, config, grpc_target=grpc_target)
    sys.stdout.write(f"Envoy at {url}\n")
    for finding in findings:
        sys.stdout.write(f"    {'problem: ' if finding.problem else ''}{finding.text}\n")
    return not any(finding.problem for finding in findings)


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
