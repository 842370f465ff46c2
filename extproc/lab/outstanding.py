"""Tokens outstanding on each rank over time, and how unequal they are. No I/O."""

from dataclasses import dataclass, field

from extproc.lab.clock import Clock


@dataclass(slots=True)
class Outstanding:
    """True figures, not the service's. `imbalance` is the time average of the fullest rank's tokens over the time
    average of the mean rank's: 1 is perfect, the number of ranks the worst. (Not the average of the ratio, which would
    be decided by moments with hardly any load.)"""

    clock: Clock
    ranks: int
    record: bool = False
    tokens: list[int] = field(default_factory=list)
    series: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, rank, tokens) at each change, where asked for."""
    _changed_s: float = 0.0
    _max_integral: float = 0.0
    _sum_integral: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = [0] * self.ranks

    def add(self, rank: int, tokens: int) -> None:
        """A rank has that many tokens more, or less."""
        now_s = self.clock.now_s
        if now_s > self._changed_s:
            passed_s = now_s - self._changed_s
            self._max_integral += passed_s * max(self.tokens)
            self._sum_integral += passed_s * sum(self.tokens)
            self._changed_s = now_s
        self.tokens[rank] += tokens
        if self.record:
            self.series.append((now_s, rank, self.tokens[rank]))

    @property
    def imbalance(self) -> float:
        """At least 1, at most the number of ranks."""
        return self._max_integral * self.ranks / self._sum_integral if self._sum_integral else 1.0
