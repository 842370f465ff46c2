"""Faults as a client meets them on the wire. I/O only: `faults` decides what hits whom.

Each effect ends its handler: by an error answer, by the connection's end, or never. The record says which fault it was
and when it struck, so that a test can measure what follows from it.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn

from aiohttp import web

from extproc.sim.api_request import ApiError
from extproc.sim.fault_pages import bad_page
from extproc.sim.faults import Fault, FaultPlan, Phase
from extproc.sim.records import Record

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

EXIT_STATUS = 70
"""Of a process that dies on command: `EX_SOFTWARE` of sysexits.h."""

LOOK_S = 0.01
"""How often a connection that is not read is looked at for its end."""

_GONE = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)
"""`POLLRDHUP` is Linux': elsewhere only a reset is seen while a connection is not read."""


class FaultEffects:
    """Stands at each place where a fault may strike."""

    def __init__(self, plan: FaultPlan) -> None:
        self.plan = plan

    async def reach(self, phase: Phase, http: web.Request, record: Record) -> None:
        """A request has come this far. Raises ApiError, or does not return, when a fault hits it here."""
        fault = self.plan.strike(phase)
        if fault is not None:
            await self.show(fault, http, record)

    @contextlib.asynccontextmanager
    async def while_working(self, http: web.Request, record: Record) -> AsyncIterator[None]:
        """Around the engine's work on a request; a fault ends the work."""
        fault = self.plan.strike(Phase.WORK)
        if fault is None:
            yield
            return
        try:
            async with asyncio.timeout(fault.delay_s) as limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            await self.show(fault, http, record)

    def in_stream(self, http: web.Request, record: Record) -> Callable[[int], Awaitable[None]]:
        """For a streamed answer: to be called after each chunk, with the number of chunks so far."""
        fault = self.plan.strike(Phase.STREAM)

        async def wrote(chunks: int) -> None:
            if fault is not None and chunks == fault.after:
                await self.show(fault, http, record)

        return wrote

    def guard(self, phase: Phase, handler: Handler) -> Handler:
        """A handler of another page that may go wrong."""

        async def guarded(http: web.Request) -> web.StreamResponse:
            fault = self.plan.strike(phase)
            return await handler(http) if fault is None else await bad_page(fault.value, http)

        return guarded

    async def show(self, fault: Fault, http: web.Request, record: Record) -> NoReturn:
        """Let a fault strike a generation request."""
        record.fault, record.fault_unix = fault.spec, time.time()
        headers_are_out = http.writer.output_size > 0
        match fault.kind:
            case "status" if not headers_are_out:
                raise ApiError(fault.status, f"simulated fault: {fault.spec}", "SimulatedFault")
            case "die":
                print(f"simulated fault: {fault.spec} at {record.fault_unix:.6f}", flush=True)
                os._exit(EXIT_STATUS)
            case "hang" if fault.phase is Phase.UPLOAD:
                await self._stop_reading(fault, http)
            case "hang":
                pass
            case "close":
                if http.transport is not None:
                    http.transport.close()
            case _:  # also a status for which it is too late
                _reset(http)
        await _cancelled()

    async def _stop_reading(self, fault: Fault, http: web.Request) -> None:
        """Read nothing more, until the client has gone or the fault is switched off; then drop what still comes.

        The event loop does not see a client go while it does not read, hence the poll. And the kernel tells of an
        orderly end only behind the data before it: a client that had more to send is seen to go once that is read.
        """
        transport = http.transport
        if transport is None:
            return
        transport.pause_reading()
        poll = select.poll()
        poll.register(transport.get_extra_info("socket").fileno(), _GONE)
        while fault in self.plan.faults and not transport.is_closing():
            if poll.poll(0):
                transport.abort()
                return
            await asyncio.sleep(LOOK_S)
        if not transport.is_closing():
            transport.resume_reading()
            async for _ in http.content.iter_any():
                pass


async def _cancelled() -> NoReturn:
    """Until aiohttp cancels the handler, which it does when the connection has ended."""
    while True:
        await asyncio.Event().wait()


def _reset(http: web.Request) -> None:
    """End the connection with a TCP RST: what `close` does on a socket that must not linger."""
    transport = http.transport
    if transport is not None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
