"""Figures of one run, and what several seeds say together. No I/O."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from extproc.lab.cluster import RunResult

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values_s: Sequence[float]) -> "Latency":
        """All zero for no values."""
        ordered = sorted(values_s)
        return cls(fmean(ordered), quantile(ordered, 0.5), quantile(ordered, 0.99)) if ordered else cls(0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Summary:
    """One run of one policy with one seed."""

    ttft_s: Latency
    tpot_s: Latency
    imbalance: float
    """Of the prefill ranks; see `Outstanding`."""
    decode_imbalance: float
    retractions: int

    @classmethod
    def of(cls, result: RunResult) -> "Summary":
        """All requests count, from the first to the last."""
        return cls(
            Latency.of(result.ttft_s),
            Latency.of(result.tpot_s),
            result.prefill.imbalance,
            result.decode.imbalance,
            result.retractions,
        )

    def figures(self) -> dict[str, float]:
        """Each figure under the name that it has in differences and intervals."""
        return {
            **{f"ttft_{name}": getattr(self.ttft_s, name) for name in ("mean", "p50", "p99")},
            **{f"tpot_{name}": getattr(self.tpot_s, name) for name in ("mean", "p50", "p99")},
            "imbalance": self.imbalance,
            "decode_imbalance": self.decode_imbalance,
        }


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the two nearest of sorted values."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median over seeds, and an interval that holds the true median with `coverage` probability."""

    median: float
    low: float
    high: float
    coverage: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """The interval between two order statistics: exact, whatever the distribution (sign test, Conover 1999, 3.4).

        The narrowest such interval with at least 95 %; below 6 values that does not exist, and it is minimum to
        maximum, with the coverage stated (5 values: 93.75 %).
        """
        ordered, count = sorted(values), len(values)
        skip = 0
        while skip + 1 <= (count - 1) // 2 and _coverage(count, skip + 1) >= CONFIDENCE:
            skip += 1
        return cls(median(ordered), ordered[skip], ordered[count - 1 - skip], _coverage(count, skip))


def _coverage(count: int, skip: int) -> float:
    """Probability that the median of a distribution lies within `count` draws without `skip` at either end."""
    outside = sum(math.comb(count, below) for below in range(skip + 1)) / float(2**count)
    return max(0.0, 1.0 - 2.0 * outside)


def difference(value: float, base: float) -> float:
    """Relative to the base, -0.3 for 30 % less."""
    return value / base - 1.0 if base else 0.0
