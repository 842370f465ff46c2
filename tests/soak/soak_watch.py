"""Memory, file descriptors and threads of processes over the run, and whether they grow. Linux (`/proc`)."""

import re
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

SAMPLES = 100
"""Of a run."""
STEADY_FROM = 0.2
"""What is judged begins here: before, caches and deques that have limits fill up (the largest, the load table's changes
of a rank, has 4,096 entries, reached after 2,048 requests for each of the fleet's 8 ranks)."""

MOST_BYTES_PER_REQUEST = 64.0
"""Growth of memory that is let pass. Less than what could be left behind with each request: an entry of a dict with a
number as its key takes 84 bytes, an exchange that has not begun 1,671 (`tracemalloc`, CPython 3.11). Allocators keep
some pages: a step of 1 MiB over 80,000 requests would be 13 bytes a request."""
MOST_FDS = 16
"""More descriptors at the end than after the warm-up: connection pools breathe with the load. A fault that left one
behind would have done so hundreds of times."""
SURE_REQUESTS = 20_000
"""Shorter runs cannot tell growth from noise and warm-up: the figures are shown, memory is not judged."""


@dataclass(slots=True)
class Curve:
    """One process over the requests that were answered."""

    name: str
    pid: int
    requests: list[int] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def look(self, requests: int) -> None:
        """Take a sample."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        self.requests.append(requests)
        self.rss_bytes.append(int(_find(r"VmRSS:\s+(\d+) kB", status)) * 1024)
        self.threads.append(int(_find(r"Threads:\s+(\d+)", status)))
        self.fds.append(sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir()))

    def at(self, share: float) -> dict[str, float]:
        """The sample nearest to a share of the run."""
        wanted = share * self.requests[-1]
        index = min(range(len(self.requests)), key=lambda i: abs(self.requests[i] - wanted))
        return {"rss_mb": self.rss_bytes[index] / 1e6, "fds": self.fds[index], "threads": self.threads[index]}

    @property
    def bytes_per_request(self) -> float:
        """Growth of memory after the warm-up."""
        start = STEADY_FROM * self.requests[-1]
        steady = [point for point in zip(self.requests, self.rss_bytes, strict=True) if point[0] >= start]
        return slope(steady)

    @property
    def more_fds(self) -> float:
        """Growth of descriptors: the last tenth of the run against the tenth after the warm-up."""
        last = self.requests[-1]
        before = [n for at, n in zip(self.requests, self.fds, strict=True) if 0.2 * last <= at <= 0.3 * last]
        after = [n for at, n in zip(self.requests, self.fds, strict=True) if at >= 0.9 * last]
        return median(after) - median(before)

    def problems(self) -> list[str]:
        """What is not flat."""
        found = []
        if self.requests[-1] >= SURE_REQUESTS and self.bytes_per_request > MOST_BYTES_PER_REQUEST:
            found.append(
                f"{self.name}: memory grows by {self.bytes_per_request:.0f} bytes a request "
                f"(limit {MOST_BYTES_PER_REQUEST:.0f})"
            )
        if self.more_fds > MOST_FDS:
            found.append(f"{self.name}: {self.more_fds:.0f} more file descriptors (limit {MOST_FDS})")
        return found

    def as_json(self) -> dict[str, Any]:
        """All samples, and what was made of them."""
        return {**asdict(self), "bytes_per_request": self.bytes_per_request, "more_fds": self.more_fds}


def slope(points: list[tuple[int, int]]) -> float:
    """Theil and Sen's: the median of the slopes between all pairs, which single steps and spikes do not move."""
    slopes = [(y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2) if x2 > x1]
    return median(slopes) if slopes else 0.0


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found, pattern
    return found[1]
