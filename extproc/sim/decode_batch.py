"""The running decode batch: one token for every member in each step. No I/O, no clocks.

A step costs O(1) plus O(log n) for each job that ends, not O(batch): a member's progress is the number of steps since
it joined.
"""

import heapq
from itertools import count

from extproc.sim.job import Job


class DecodeBatch:
    """Members in the order in which they joined."""

    __slots__ = ("_ends", "_joined", "_order", "kv_tokens", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.kv_tokens = 0
        """KV cache that the members hold: prompts and output so far."""
        self._joined: dict[Job, int] = {}  # step count and output at joining, as one offset
        self._ends: list[tuple[int, int, Job]] = []
        self._order = count()

    def __len__(self) -> int:
        return len(self._joined)

    def __contains__(self, job: Job) -> bool:
        return job in self._joined

    def generated(self, job: Job) -> int:
        """Tokens that a member has so far."""
        return self.steps - self._joined[job]

    def kv_of(self, job: Job) -> int:
        """KV cache that a member holds, in tokens."""
        return job.prompt_tokens + self.generated(job)

    def add(self, job: Job) -> None:
        """Join the next step, with `job.generated_tokens` so far."""
        self._joined[job] = self.steps - job.generated_tokens
        self.kv_tokens += job.prompt_tokens + job.generated_tokens
        ends_after_step = self.steps + job.output_tokens - job.generated_tokens
        heapq.heappush(self._ends, (ends_after_step, next(self._order), job))

    def remove(self, job: Job) -> int:
        """Leave; the KV cache held comes back, in tokens. Writes `job.generated_tokens`."""
        freed = self.kv_of(job)
        job.generated_tokens = self.generated(job)
        self.kv_tokens -= freed
        del self._joined[job]
        return freed

    def youngest(self) -> Job:
        """The member that joined last."""
        return next(reversed(self._joined))

    def step(self) -> list[Job]:
        """One token more for everybody; returns those that now have all theirs (still members)."""
        self.steps += 1
        self.kv_tokens += len(self._joined)
        done: list[Job] = []
        while self._ends and self._ends[0][0] <= self.steps:
            job = heapq.heappop(self._ends)[2]
            # A removed (aborted, retracted) job leaves its entry behind, and one that came back has a later entry too.
            if job in self._joined and self.generated(job) >= job.output_tokens:
                done.append(job)
        return done
