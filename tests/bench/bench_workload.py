"""The trace as requests to send: when, and which bytes. No I/O but for reading the trace.

The lab's own workload, so that its prediction is for the same requests. All lengths are those of the trace but for the
output, which may be shortened: every output token is a chunk that five processes on two cores have to handle.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from extproc.lab.experiment import Load
from extproc.lab.request import TraceRequest
from extproc.lab.settings import Settings, Shape

MODEL = "sim-model"
BYTES_PER_TOKEN = 4
"""What the simulated engine makes a token of."""

WORDS = (
    *("a", "of", "to", "in", "is", "it", "on", "as", "at", "be", "the", "and", "for", "you", "was", "are", "his"),
    *("not", "but", "one", "all", "new", "two", "our", "way", "day", "who", "how", "some", "time", "very", "when"),
    *("come", "here", "just", "like", "river", "stone", "cloud", "house", "night", "water"),
)
LONG_WORDS = ("morning", "between", "another")
WORD_BYTES = 5.2
"""A word of the texts with its space, on average: smg takes a word for 1.3 tokens, which is then exact."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every contender of a run gets."""

    prefill: Shape
    decode: Shape
    requests: int
    time_scale: float
    """How many times faster than the modelled GPU the engines run, and the trace with them."""
    utilization: float
    """Of the prefill ranks."""
    output_ratio: float
    """Outputs are that share of the trace's."""
    trace: Path | None
    """None: a synthetic load of about the same shape."""

    def lab_settings(self, scrape_interval_s: float) -> Settings:
        """The same engines in the lab. Texts have exactly 4 bytes a token, so the service's estimate is exact."""
        return Settings(
            prefill=self.prefill,
            decode=self.decode,
            scrape_interval_s=scrape_interval_s,
            bytes_per_token_sigma=0.0,
        )

    def arrivals(self, seed: int) -> list[TraceRequest]:
        """In virtual time. The seed varies the moments within the trace's 3 s clock tick, nothing else."""
        load = Load(self.trace, self.requests, self.utilization)
        return [
            replace(request, output_tokens=max(1, round(request.output_tokens * self.output_ratio)))
            for request in load.arrivals(self.lab_settings(10.0), seed)
        ]


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send."""

    number: int
    at_s: float
    """Real seconds after the start of the run."""
    body: bytes
    prompt_tokens: int
    output_tokens: int


def shots(arrivals: Sequence[TraceRequest], time_scale: float, seed: int) -> list[Shot]:
    """The requests in real time. No two prompts begin alike: there is no prefix to share."""
    text = _text(BYTES_PER_TOKEN * max(request.prompt_tokens for request in arrivals) * 2, seed)
    rng = random.Random(f"{seed}/texts")
    return [shot(number, request, time_scale, text, rng) for number, request in enumerate(arrivals)]


def shot(number: int, request: TraceRequest, time_scale: float, text: str, rng: random.Random) -> Shot:
    """One request; its number is at the front of the prompt, so that engines' records can be told apart."""
    size = BYTES_PER_TOKEN * request.prompt_tokens
    start = rng.randrange(max(1, len(text) - size))
    prompt = f"#{number:05d} {text[start : start + size]}"[:size]
    fields = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": request.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(fields, separators=(",", ":")).encode()
    return Shot(number, request.arrival_s / time_scale, body, request.prompt_tokens, request.output_tokens)


def _text(size: int, seed: int) -> str:
    rng = random.Random(f"{seed}/words")
    short = sum(map(len, WORDS)) / len(WORDS) + 1
    long = sum(map(len, LONG_WORDS)) / len(LONG_WORDS) + 1
    share = (WORD_BYTES - short) / (long - short)
    count = int(size / WORD_BYTES) + 1
    return " ".join(rng.choice(LONG_WORDS if rng.random() < share else WORDS) for _ in range(count))
