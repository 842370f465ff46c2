"""What one comparison is about: everything that a run depends on but its seed and its policy."""

import re
from dataclasses import dataclass, field

from extproc.errors import ConfigError
from extproc.lab.pages import Page
from extproc.sim.gpu import GpuModel


@dataclass(frozen=True, slots=True)
class Shape:
    """Workers of one role: `2x4` is two workers with four DP ranks each."""

    workers: int
    ranks: int

    @property
    def total_ranks(self) -> int:
        return self.workers * self.ranks

    def __str__(self) -> str:
        return f"{self.workers}x{self.ranks}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Raises ConfigError for anything but `WORKERSxRANKS` with numbers of at least 1."""
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
        if match is None:
            raise ConfigError(f"shape {text!r}: expected WORKERSxRANKS, as 1x8 for one worker with eight DP ranks")
        return cls(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in virtual seconds."""

    prefill: Shape = Shape(1, 2)
    decode: Shape = Shape(1, 2)
    dp_attention: bool = False
    """All ranks of a worker run their batches together."""
    prefill_attention: bool = False
    """A prompt token costs more the later it stands (see `prefill_cost`)."""
    prefix_cache: bool = False
    """Prefill ranks keep the KV cache of prompts and skip what they have."""
    replicas: int = 1
    """Independent services, each seeing an equal share of the requests at random."""
    replica_lag_s: float | None = None
    """With a figure, the replicas are processes of one service (docs/processes.md): each knows so much later what
    another has done, and the first of them scrapes for all. None: they know nothing of each other."""
    scrape_interval_s: float | None = 1.0
    """None: no scrapes at all."""
    scrape_failure_ratio: float = 0.0
    scrape_page: Page = Page.LOADS
    scrape_latency_s: float = 0.002
    """From asking to knowing; the engine reads its figures half way. Our choice: a local network and a small page."""
    bytes_per_token: float = 4.0
    """Median over requests, of the true ratio. The service's own assumption is its own matter."""
    bytes_per_token_sigma: float = 0.15
    """Standard deviation of the logarithm of that ratio, from request to request. 0: all alike."""
    exact_tokens: bool = False
    """The service knows prompt tokens exactly, as for `input_ids`."""
    max_tokens: int = 2048
    """The limit that clients set; those that need more set the next power of two."""
    gpu: GpuModel = field(default_factory=GpuModel)
