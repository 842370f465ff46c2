"""`extproc serve`: the ext_proc service alone."""

import argparse
import asyncio
import logging
import signal

import uvloop

from extproc.cli.flags import add_config_flags, config_from
from extproc.cli.logs import setup_logging
from extproc.config import Config
from extproc.server import Service

logger = logging.getLogger("extproc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, nothing else."""
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError."""
    config = config_from(args)
    setup_logging(config.log_level)
    uvloop.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    stop = stop_signal()
    async with Service(config).running() as addresses:
        logger.info("ext_proc service on %s, metrics on %s/metrics", addresses.grpc, addresses.status)
        await stop.wait()
        logger.info("stopping")


def stop_signal() -> asyncio.Event:
    """An event that is set by SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop
