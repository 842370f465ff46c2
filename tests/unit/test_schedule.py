"""The scheduler: what it composes, charges and refuses. What worker policies do is in test_policy_scenarios."""

import random
import statistics

import pytest

from extproc.config import Config
from extproc.errors import ConfigError, NoWorker, Overloaded
from extproc.load import LoadTable
from extproc.model import RankLoad, Role, Worker
from extproc.request import Endpoint, GenerationRequest
from extproc.schedule import Scheduler


def request(tokens: float = 100, batch_size: int = 1) -> GenerationRequest:
    return GenerationRequest(Endpoint.GENERATE, None, batch_size, tokens, 16, ())


def worker(role: Role, number: int, dp_size: int | None = 2) -> Worker:
    name = f"{role}{number}:1"
    return Worker(name, role, f"http://{name}", f"10.0.0.{number}:1", "host", 8998, dp_size)


def cluster(prefill=2, decode=2, dp_size=2, **settings) -> tuple[LoadTable, Scheduler]:
    workers = [worker(Role.PREFILL, n, dp_size) for n in range(prefill)]
    workers += [worker(Role.DECODE, n, dp_size) for n in range(decode)]
    table = LoadTable(workers, lambda: 0.0)
    for each in workers:
        table.worker_changed(each, True)
    return table, Scheduler(Config(**settings), table, random.Random(11))


def heavy_tailed(count: int, seed: int) -> list[float]:
    """Prompt lengths like production's: median 1,000 tokens, 1 in 20 above 10,000."""
    rng = random.Random(seed)
    return [rng.lognormvariate(6.9, 1.4) for _ in range(count)]


def spread(tokens: list[float]) -> float:
    return max(tokens) / statistics.mean(tokens)


def test_a_burst_between_two_scrapes_spreads():
    table, scheduler = cluster(prefill=1, decode=1, dp_size=8)
    for name in ("prefill0:1", "decode0:1"):
        table.observe(name, [RankLoad(rank, used_tokens=500) for rank in range(8)], 0.0)
    for _ in range(64):
        scheduler.place(request(100))
    for state in table.states:
        assert [rank.charged_tokens for rank in state.ranks] == [800] * 8


@pytest.mark.parametrize("seed", range(5))
def test_minimum_tokens_spreads_heavy_tailed_prompts(seed):
    """List scheduling keeps max - mean below the largest job (Graham 1969); `room % dp_size` has no such bound."""
    spreads = {}
    jobs = heavy_tailed(400, seed)
    for scheduler_on in (True, False):
        table, scheduler = cluster(prefill=1, decode=1, dp_minimum_tokens_scheduler=scheduler_on)
        for tokens in jobs:
            scheduler.place(request(tokens))
        loads = [rank.charged_tokens for rank in table.eligible(Role.PREFILL)[0].ranks]
        assert sum(loads) == pytest.approx(sum(jobs))
        spreads[scheduler_on] = spread(loads)
    bound = 1 + max(jobs) / statistics.mean([sum(jobs) / 2])
    assert spreads[True] <= bound
    assert spreads[True] <= spreads[False]


def test_the_roles_are_set_apart():
    _, scheduler = cluster(decode_rank_policy="bootstrap_room")
    placement = scheduler.place(request()).placement
    assert placement.prefill.dp_rank is not None
    assert placement.decode.dp_rank is None


def test_where_the_engine_decides_its_rank_is_charged():
    table, scheduler = cluster(prefill=1, decode=1, dp_minimum_tokens_scheduler=False)
    scheduled = scheduler.place(request())
    assert scheduled.placement.prefill.dp_rank is None
    assert scheduled.prefill.rank.dp_rank == scheduled.placement.room % 2
    assert table.states[0].in_flight == 1


@pytest.mark.parametrize("role", Role)
def test_nothing_is_charged_when_a_role_is_missing(role):
    table, scheduler = cluster(prefill=1, decode=1)
    table.worker_changed(worker(role, 0), False)
    with pytest.raises(NoWorker, match=f"no healthy {role} worker"):
        scheduler.place(request())
    with pytest.raises(NoWorker, match=f"no healthy {role} worker"):
        scheduler.check_available()
    assert all(rank.charged_tokens == 0 for state in table.states for rank in state.ranks)


def test_failed_workers_are_avoided_while_there_are_others():
    _, scheduler = cluster()
    for _ in range(50):
        assert scheduler.place(request(), avoid={"prefill0:1"}).placement.prefill.worker.name == "prefill1:1"
    last_resort = scheduler.place(request(), avoid={"prefill0:1", "prefill1:1"})
    assert last_resort.placement.prefill.worker.role is Role.PREFILL


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "best"},
        {"prefill_policy": "best"},
        {"prefill_rank_policy": "best"},
        {"load_model": "best"},
    ],
)
def test_unknown_names_are_named(settings):
    with pytest.raises(ConfigError, match=r"'best', expected one of \w+"):
        cluster(**settings)


@pytest.mark.parametrize("limit", [3, -1, 0])
def test_at_most_so_many_requests_are_in_flight(limit):
    table, scheduler = cluster(max_concurrent_requests=limit)
    placed = [scheduler.place(request(), avoid=()) for _ in range(3)]
    if limit <= 0:  # no limit; -1 as in sglang_router
        scheduler.check_available()
        scheduler.place(request())
        return
    table.release(placed[0].prefill)  # a request is in flight until its decode leg ends
    for refuse in (scheduler.check_available, lambda: scheduler.place(request())):
        with pytest.raises(Overloaded, match="3 requests are in flight"):
            refuse()
    table.release(placed[0].decode)
    scheduler.check_available()
    scheduler.place(request())
