"""Fleets of workers and requests for tests of policies and of the scheduler."""

import random
from itertools import count

from extproc.config import Config
from extproc.load import LoadTable, WorkerState
from extproc.load_model import make_load_model
from extproc.model import Role, Worker
from extproc.policy import PolicyContext
from extproc.request import Endpoint, GenerationRequest
from extproc.schedule import Scheduled, Scheduler

_numbers = count()


def request(tokens: float = 100, *, prompt: bytes = b"", key: str = "", model: str | None = None) -> GenerationRequest:
    return GenerationRequest(Endpoint.GENERATE, model, 1, tokens, 16, (), memoryview(prompt), key)


def unlike(tokens: float = 100) -> GenerationRequest:
    """A request that has neither beginning nor key in common with another one."""
    number = next(_numbers)
    return request(tokens, prompt=random.Random(number).randbytes(512), key=f"key {number}")


def worker(role: Role, number: int, dp_size: int | None = 2) -> Worker:
    name = f"{role}{number}:1"
    return Worker(name, role, f"http://{name}", f"10.0.0.{number}:1", "host", 8998, dp_size)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    """Prefill workers with the given numbers of ranks, one decode worker, and a scheduler over them."""

    def __init__(self, *dp_sizes: int | None, seed: int = 11, **settings: object) -> None:
        self.clock = Clock()
        self.workers = [worker(Role.PREFILL, number, dp_size) for number, dp_size in enumerate(dp_sizes)]
        decode = worker(Role.DECODE, 0, 1)
        self.table = LoadTable([*self.workers, decode], self.clock)
        for each in (*self.workers, decode):
            self.table.worker_changed(each, True)
        self.config = Config(**settings)
        self.rng = random.Random(seed)
        self.scheduler = Scheduler(self.config, self.table, self.rng)

    @property
    def states(self) -> list[WorkerState]:
        """The prefill workers that may be picked."""
        return list(self.table.eligible(Role.PREFILL))

    @property
    def in_flight(self) -> list[int]:
        return [state.in_flight for state in self.states]

    def context(self) -> PolicyContext:
        """What a policy that is tested alone is made from."""
        return PolicyContext(self.config, make_load_model(self.config.load_model, self.clock), self.rng, self.clock)

    def set_healthy(self, number: int, healthy: bool) -> None:
        self.table.worker_changed(self.workers[number], healthy)

    def place(self, *requests: GenerationRequest) -> list[Scheduled]:
        return [self.scheduler.place(each) for each in requests]

    def end(self, scheduled: Scheduled) -> None:
        self.table.release(scheduled.prefill)
        self.table.release(scheduled.decode)
