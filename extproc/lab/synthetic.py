"""A synthetic load with prompts and outputs of very different lengths. No I/O."""

import math
import random

from extproc.lab.request import TraceRequest

PROMPT_MEDIAN_TOKENS = 6_900
PROMPT_SIGMA = 1.0
OUTPUT_MEDIAN_TOKENS = 300
OUTPUT_SIGMA = 0.6
"""Lognormal lengths. Medians and spread follow Mooncake's conversation trace (median prompt 6,909, p90 27,367 tokens;
median output 350), but arrivals are Poisson and there is no shared prefix."""
LONGEST_PROMPT_TOKENS = 128_000
LONGEST_OUTPUT_TOKENS = 4_096


def synthetic(count: int, rng: random.Random, requests_per_s: float = 1.0) -> list[TraceRequest]:
    """Poisson arrivals; the rate is to be scaled to a utilisation."""
    at_s = 0.0
    requests = []
    for _ in range(count):
        requests.append(
            TraceRequest(
                at_s,
                _length(rng, PROMPT_MEDIAN_TOKENS, PROMPT_SIGMA, LONGEST_PROMPT_TOKENS),
                _length(rng, OUTPUT_MEDIAN_TOKENS, OUTPUT_SIGMA, LONGEST_OUTPUT_TOKENS),
            )
        )
        at_s += rng.expovariate(requests_per_s)
    return requests


def _length(rng: random.Random, median: float, sigma: float, longest: int) -> int:
    return max(1, min(longest, round(median * math.exp(rng.gauss(0.0, sigma)))))
