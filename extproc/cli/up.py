"""`extproc up`: service and Envoy as one program, a PD gateway on one port."""

import argparse
import asyncio
import logging
import tempfile
from pathlib import Path

import uvloop

import extproc
from extproc.cli.flags import add_config_flags, config_from
from extproc.cli.logs import setup_logging
from extproc.cli.serve import drain, stop_signal
from extproc.config import Config
from extproc.envoy_process import EnvoyError, EnvoyProcess, find_binary
from extproc.errors import ConfigError
from extproc.memory import give_back_large_blocks, spare_what_stays
from extproc.server import Service

logger = logging.getLogger("extproc")

EXIT_ENVOY_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and how to run Envoy."""
    add_config_flags(parser)
    envoy = parser.add_argument_group("envoy")
    envoy.add_argument("--envoy", metavar="PATH", help="the Envoy binary (default: the one of the extra [envoy])")
    envoy.add_argument(
        "--envoy-concurrency", type=int, metavar="N", help="Envoy's worker threads (default: one for each core)"
    )
    envoy.add_argument("--access-log", metavar="FILE", help="Envoy's access log, JSON lines (/dev/stdout works)")


def run(args: argparse.Namespace) -> int:
    """Run both until SIGINT or SIGTERM, or until one of them dies. Raises ConfigError."""
    config = config_from(args)
    setup_logging(config.log_level, 0 if config.processes > 1 else None)
    give_back_large_blocks()
    binary = find_binary(args.envoy)
    failure: Exception | None = None
    try:
        uvloop.run(_up(config, binary, args.envoy_concurrency, args.access_log))
    except* (EnvoyError, ConfigError) as group:  # a group, as the service runs in a TaskGroup
        failure = group.exceptions[0]
    if isinstance(failure, ConfigError):
        raise failure
    if failure:
        logger.error("%s", failure)
        return EXIT_ENVOY_FAILED
    return 0


async def _up(config: Config, binary: Path, concurrency: int | None, access_log: str | None) -> None:
    from extproc import envoy_config  # noqa: PLC0415 - takes a second to import

    stop = stop_signal()
    with tempfile.TemporaryDirectory(prefix="extproc-") as directory:
        # Nobody else needs to reach the service, so it takes no port.
        service = Service(config, grpc_target=f"unix:{directory}/ext_proc.sock", awaits_envoy=True)
        async with service.running() as addresses:
            bootstrap = envoy_config.bootstrap(
                config, admin="127.0.0.1:0", grpc_target=addresses.grpc, access_log=access_log
            )
            async with EnvoyProcess(envoy_config.to_yaml(bootstrap), binary=binary, concurrency=concurrency) as envoy:
                spare_what_stays()
                service.envoy_serves()
                logger.info("version %s", extproc.version())
                logger.info(
                    "gateway on http://%s:%d, metrics on %s/metrics", config.host, config.port, addresses.status
                )
                died = asyncio.create_task(envoy.wait())
                stopped = asyncio.create_task(stop.wait())
                await asyncio.wait([died, stopped], return_when=asyncio.FIRST_COMPLETED)
                stopped.cancel()
                if died.done():
                    died.result()
                await drain(service, stop, envoy.drain)
            await died
