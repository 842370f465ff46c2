"""A circuit breaker for each worker: stop sending to one that keeps failing requests, and try it again later.

Pure: time is passed in. Health checks ask whether a worker lives; this counts what it does to requests. States:

CLOSED ──`failure_threshold` failures in a row within `window_s`──> OPEN ──`timeout_s`──> HALF_OPEN
HALF_OPEN lets one request through at a time: `success_threshold` good ones close it, a failure opens it again.

Source: the circuit breaker of SGLang's gateway (`--cb-*`); Nygard, "Release It!" (2007).
"""

import enum
import math
import sys
from dataclasses import dataclass
from typing import Final


class CircuitState(enum.StrEnum):
    """Whether a worker may be sent requests."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class CircuitLimits:
    """Thresholds; the same for all workers."""

    failure_threshold: int
    success_threshold: int
    timeout_s: float
    window_s: float


CLOSED, OPEN, HALF_OPEN = CircuitState
"""As `model.PREFILL`."""

NO_LIMITS: Final = CircuitLimits(failure_threshold=sys.maxsize, success_threshold=1, timeout_s=0.0, window_s=0.0)
"""A circuit that never opens."""


@dataclass(slots=True)
class Circuit:
    """One worker's. Only its own failures count, never its partner's; answers of 4xx count as good."""

    limits: CircuitLimits
    state: CircuitState = CLOSED
    failures: int = 0
    """In a row."""
    first_failure_s: float = 0.0
    last_failure_s: float = -math.inf
    successes: int = 0
    """In a row, while half open."""
    opened_at_s: float = 0.0
    trial: bool = False
    """A request is under way that decides."""

    def allows(self, now_s: float) -> bool:
        """Whether a request may be sent; an open circuit becomes half open when its time is over."""
        if self.state is OPEN and now_s - self.opened_at_s >= self.limits.timeout_s:
            self.state, self.successes, self.trial = HALF_OPEN, 0, False
        return self.state is CLOSED or (self.state is HALF_OPEN and not self.trial)

    def sent(self) -> None:
        """A request was sent."""
        self.trial = self.state is HALF_OPEN

    def ended(self, failed: bool | None, now_s: float) -> None:
        """A request has ended; None: neither well nor badly (the client left, the other leg failed)."""
        self.trial = False
        if failed is None:
            return
        if not failed:
            self.failures = 0
            if self.state is HALF_OPEN:
                self.successes += 1
                if self.successes >= self.limits.success_threshold:
                    self.state = CLOSED
            return
        self.last_failure_s = now_s
        if not self.failures or now_s - self.first_failure_s > self.limits.window_s:
            self.failures, self.first_failure_s = 0, now_s
        self.failures += 1
        if self.state is HALF_OPEN or self.failures >= self.limits.failure_threshold:
            self.state, self.opened_at_s, self.failures = OPEN, now_s, 0
