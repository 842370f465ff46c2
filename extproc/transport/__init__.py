"""The gRPC port: one of two transports in front of the same processor.

`lean`: our own HTTP/2 (`extproc.lean`), a fifth of the CPU. `grpcio`: the gRPC project's, for comparison and as a way
out. Both pass the same contract tests.
"""

from collections.abc import Callable
from typing import Protocol

from extproc.service import Processor
from extproc.tls import ServerCertificates
from extproc.transport.over_grpcio import GrpcioTransport
from extproc.transport.over_lean import LeanTransport

__all__ = ["TRANSPORTS", "Transport"]


class Transport(Protocol):
    """A gRPC server with the processor, the access log and the standard health service on it."""

    async def listen(self, target: str) -> str:
        """Serve at `host:port` or `unix:PATH`; returns the target, with the port where 0 was given.

        Raises ConfigError for one that cannot be had.
        """

    async def set_health(self, service: str, serving: bool) -> None:
        """What health checks of a service are told."""

    async def close(self, grace_s: float) -> None:
        """Take no new streams, and free the port; those that are open may go on for `grace_s`. Returns at once."""

    async def stop(self) -> None:
        """End every stream that is still open."""


TRANSPORTS: dict[str, Callable[[Processor, int, ServerCertificates | None], Transport]] = {
    "lean": LeanTransport,
    "grpcio": GrpcioTransport,
}
"""By name. Made of the processor, the largest request body in bytes, and the certificates where TLS is on."""
