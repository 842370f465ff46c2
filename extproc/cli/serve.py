"""`extproc serve`: the ext_proc service alone. And how a gateway ends: `extproc up` does it in the same way."""

import argparse
import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable

import uvloop

import extproc
from extproc.cli.flags import add_config_flags, config_from
from extproc.cli.logs import setup_logging
from extproc.config import Config
from extproc.memory import give_back_large_blocks, spare_what_stays
from extproc.server import Service

logger = logging.getLogger("extproc")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, nothing else."""
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises ConfigError."""
    config = config_from(args)
    setup_logging(config.log_level, 0 if config.processes > 1 else None)
    give_back_large_blocks()
    uvloop.run(_serve(config))
    return 0


async def _serve(config: Config) -> None:
    stop = stop_signal()
    service = Service(config)
    async with service.running() as addresses:
        spare_what_stays()
        logger.info("version %s", extproc.version())
        logger.info("ext_proc service on %s, metrics on %s/metrics", addresses.grpc, addresses.status)
        await stop.wait()
        await drain(service, stop, service.close)


def stop_signal() -> asyncio.Event:
    """An event that is set by SIGINT or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def drain(service: Service, stop: asyncio.Event, close: Callable[[], Awaitable[None]]) -> None:
    """Come to an end without losing a request. A second signal, which sets `stop` again, ends it at once.

    Health checks turn requests away, which are still served for the drain delay; `close` lets no more in; those that
    are there may finish within the grace period.
    """
    stop.clear()
    draining, again = asyncio.create_task(_drain(service, close)), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([draining, again], return_when=asyncio.FIRST_COMPLETED)
        if draining.done():
            draining.result()
    finally:
        draining.cancel()
        again.cancel()
    open_streams = service.open_streams
    if open_streams:
        logger.warning("stopping with %d streams open", open_streams)
    logger.info("stopping")


async def _drain(service: Service, close: Callable[[], Awaitable[None]]) -> None:
    delay_s, grace_s = service.config.shutdown_drain_delay_secs, service.config.shutdown_grace_period_secs
    logger.info("draining: not ready, new requests are served for %g s more; a second signal ends it at once", delay_s)
    await service.leave()
    await asyncio.sleep(delay_s)
    await close()
    logger.info("draining: no new requests, %d streams may go on for %g s", service.open_streams, grace_s)
    try:
        async with asyncio.timeout(grace_s):
            await service.idle()
    except TimeoutError:
        return
