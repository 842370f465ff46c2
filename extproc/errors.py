"""Errors that end a request, each with the HTTP status and OpenAI-style type a client gets.

No I/O. Raised in the core, turned into an immediate response in one place (`exchange`).
"""


class RequestError(Exception):
    """A request that cannot be served; `message` tells the client what to change or expect."""

    status = 500
    kind = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field at fault, where there is one."""


class BadRequest(RequestError):
    """The client sent something no engine should see."""

    status = 400
    kind = "invalid_request_error"


class UnknownModel(RequestError):
    """The model is not one that the configured workers serve (OpenAI answers 404 here too)."""

    status = 404
    kind = "invalid_request_error"


class NotServed(RequestError):
    """A path that this gateway neither schedules nor passes on."""

    status = 404
    kind = "invalid_request_error"


class BodyTooLarge(RequestError):
    """The body exceeds the configured limit."""

    status = 413
    kind = "invalid_request_error"


class EngineFailed(RequestError):
    """A leg failed before the client got anything: the pair may be retried."""

    status = 502
    kind = "bad_gateway"


class PrefillTimeout(RequestError):
    """Prefill did not answer in time."""

    status = 504
    kind = "timeout"


class Overloaded(RequestError):
    """Every worker of a role has as much as it may have."""

    status = 429
    kind = "rate_limit_error"


class NoWorker(RequestError):
    """No healthy worker for a role."""

    status = 503
    kind = "service_unavailable"


class ConfigError(Exception):
    """The configuration cannot be used; the message names the key or flag and what was expected."""
