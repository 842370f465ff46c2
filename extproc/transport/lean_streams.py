"""What the processor does with the streams of `extproc.lean`. Apart from the server around it, as this is compiled."""

import logging

from extproc import wire
from extproc.exchange import ProtocolViolation
from extproc.lean.grpc import Status, Stream
from extproc.service import Processor

logger = logging.getLogger(__name__)


class Streams:
    """Receives ext_proc streams."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def on_open(self, stream: Stream) -> None:
        """One begins."""
        stream.state = self._processor.opened(stream.metadata, stream)

    def on_message(self, stream: Stream, message: bytes) -> None:
        """A message of Envoy's."""
        try:
            useful = self._processor.received(stream.state, message)
        except (wire.WireError, ProtocolViolation) as error:
            logger.warning("%s", error)
            self._end(stream, Status.INVALID_ARGUMENT, str(error))
        except Exception:
            logger.exception("a bug; the request is given up")
            self._end(stream, Status.INTERNAL)
        else:
            if not useful:
                self._end(stream, Status.OK)

    def on_end(self, stream: Stream) -> None:
        """Envoy has said all it wants to."""
        self._end(stream, Status.OK)

    def on_reset(self, stream: Stream) -> None:
        """The HTTP request is over."""
        # A stream and its call know each other; parted, both are freed at once and not by the garbage collector.
        call, stream.state = stream.state, None
        self._processor.ended(call)

    def _end(self, stream: Stream, status: Status, details: str = "") -> None:
        stream.finish(status, details)
        self.on_reset(stream)


class AccessLogs:
    """Receives the access logs of an Envoy's threads."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def on_open(self, stream: Stream) -> None:
        """A thread of an Envoy has something to log."""

    def on_message(self, stream: Stream, message: bytes) -> None:
        """Some requests that broke off."""
        try:
            self._processor.logged(message)
        except wire.WireError as error:
            logger.warning("access log: %s", error)
            stream.finish(Status.INVALID_ARGUMENT, str(error))

    def on_end(self, stream: Stream) -> None:
        """No more will come."""
        stream.finish()

    def on_reset(self, stream: Stream) -> None:
        """The Envoy is gone."""
