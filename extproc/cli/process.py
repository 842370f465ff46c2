"""`extproc process`: a follower, started by the leader of several processes (`--processes`) and by nobody else.

Its first word comes over the socket that it inherits: who it is, the configuration, the load table. It goes when the
leader says so, and soon after the leader is gone; signals are the leader's matter.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import time

import uvloop

from extproc.cli.logs import setup_logging
from extproc.errors import ConfigError
from extproc.memory import give_back_large_blocks, spare_what_stays
from extproc.processes import snapshot
from extproc.processes.channel import Channel
from extproc.processes.figures import samples_of
from extproc.processes.messages import (
    Batch,
    Close,
    End,
    Failed,
    Figures,
    Leave,
    Listening,
    Message,
    Rest,
    Start,
    batch_frame,
)
from extproc.server import Service

logger = logging.getLogger("extproc")

REPORT_S = 1.0
"""How often the leader gets figures: metrics are scraped every few seconds at most."""

EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The socket."""
    parser.add_argument("fd", type=int, help="file descriptor of the socket to the leader")


def run(args: argparse.Namespace) -> int:
    """Serve until the leader says to end, or is gone."""
    # A stop of the whole group, as systemd does it, is a stop of the leader, which drains.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return uvloop.run(follow(socket.socket(fileno=args.fd)))


async def follow(connection: socket.socket) -> int:
    """Be a follower of the leader at the other end, to the end. Returns an exit status."""
    loop = asyncio.get_running_loop()
    began: asyncio.Future[bool] = loop.create_future()
    ended = asyncio.Event()
    follower: _Follower | None = None

    def received(message: Message) -> None:
        nonlocal follower
        if isinstance(message, Start):
            # In the same step, as the next message is about what this one begins with.
            try:
                follower = _Follower(message, channel, ended)
            except ConfigError as error:
                channel.send(Failed(str(error)))
                began.set_result(False)
            else:
                began.set_result(True)
        elif follower is not None:
            follower.received(message)

    def lost() -> None:
        if not began.done():
            began.set_result(False)
        if follower is not None:
            follower.orphaned()

    channel = Channel(connection, received, lost)
    if await began:
        assert follower is not None  # noqa: S101 - it has begun
        return await follower.run()
    channel.close()
    await channel.closed()
    return EXIT_FAILED


class _Follower:
    """The service as one of several processes that is not the leader."""

    def __init__(self, start: Start, channel: Channel, ended: asyncio.Event) -> None:
        """Raises ConfigError."""
        self._process = start.process
        setup_logging(start.config.log_level, start.process)
        give_back_large_blocks()
        self._service = service = Service(start.config, grpc_target=start.target, process=start.process)
        replica = service.replica
        assert replica is not None  # noqa: S101 - there are several
        self._replica = replica
        self._channel = channel
        self._ended = ended
        self._lag_s = 0.0
        self._tasks = set[asyncio.Task[None]]()
        snapshot.restore(replica, start.table)
        service.changed = self._flush_soon
        service.table.catch_up = channel.poll
        self._flush_is_due = False

    async def run(self) -> int:
        """Serve; returns an exit status."""
        service, channel = self._service, self._channel
        try:
            async with service.serving():
                spare_what_stays()
                channel.send(Listening())
                reporting = asyncio.create_task(self._report())
                await self._ended.wait()
                reporting.cancel()
                if service.processor.open_streams:
                    logger.warning("stopping with %d streams open", service.processor.open_streams)
        except ConfigError as error:
            channel.send(Failed(str(error)))
            channel.close()
            await channel.closed()
            return EXIT_FAILED
        for task in self._tasks:
            task.cancel()
        self._say_figures()
        channel.close()
        return 0

    def received(self, message: Message) -> None:
        """The leader says something."""
        match message:
            case Batch(process, sent_at_s, events):
                self._lag_s = time.monotonic() - sent_at_s
                self._replica.apply(process, events)
            case Leave():
                self._do(self._service.leave())
            case Close():
                self._do(self._service.close())
            case Rest():
                self._do(self._rest())
            case End():
                self._ended.set()

    def orphaned(self) -> None:
        """The leader is gone: nobody knows any more what the others charge, nor how the workers are."""
        if not self._ended.is_set():
            self._do(self._outlive())

    async def _outlive(self) -> None:
        grace_s = self._service.config.shutdown_grace_period_secs
        logger.error(
            "the leader is gone: no new requests, %d streams may go on for %g s",
            *(self._service.processor.open_streams, grace_s),
        )
        await self._service.leave()
        await self._service.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._service.processor.idle()
        self._ended.set()

    async def _rest(self) -> None:
        await self._service.processor.idle()
        self._flush()
        self._say_figures()
        self._channel.send(Rest())

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_S)
            self._say_figures()

    def _say_figures(self) -> None:
        service = self._service
        samples = samples_of(service.telemetry.registry)
        self._channel.send(
            Figures(service.processor.open_streams, service.gateway.open_rooms, self._lag_s, samples)
        )  # fmt: skip

    def _flush_soon(self) -> None:
        if not self._flush_is_due:
            self._flush_is_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        changes = self._replica.take()
        if changes:
            self._channel.send_frame(batch_frame(self._process, time.monotonic(), changes))

    def _do(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
