"""The modelled engines against arithmetic, queueing theory and the simulated engines' own step-by-step model."""

import random
from statistics import fmean, stdev

import pytest
from lab_cluster import poisson, step_by_step

from extproc.lab.clock import Clock
from extproc.lab.cluster import Cluster
from extproc.lab.decode import DecodeGroup, DecodeRank
from extproc.lab.prefill import PrefillGroup, PrefillRank
from extproc.lab.prefill_cost import ATTENTION_S, PrefillCost
from extproc.lab.prefix_cache import PrefixCache
from extproc.lab.request import Flight, TraceRequest
from extproc.lab.settings import Settings, Shape
from extproc.sim.gpu import GpuModel

ONE = Shape(1, 1)
FLOAT_ERROR_S = 1e-9


@pytest.mark.parametrize(
    ("gpu", "per_s"),
    [
        pytest.param(GpuModel(), 0.8, id="roomy"),
        pytest.param(GpuModel(kv_capacity_tokens=60_000, max_running_requests=4), 0.5, id="small batches"),
        pytest.param(GpuModel(kv_capacity_tokens=30_000), 0.4, id="kv cache is short"),
        pytest.param(GpuModel(kv_capacity_tokens=24_000, reserved_decode_tokens=8), 2.0, id="retractions"),
    ],
)
def test_same_times_as_the_simulated_engines(gpu, per_s):
    settings = Settings(gpu=gpu)
    retracting = gpu.reserved_decode_tokens == 8
    requests = poisson(300, per_s, seed=7, longest_prompt=3_000 if retracting else 20_000)
    result = Cluster("round_robin", settings, 1, requests).run()
    jobs = step_by_step(settings, result.flights)
    for flight, job in zip(result.flights, jobs, strict=True):
        assert flight.first_token_s == pytest.approx(job.first_token_s, abs=FLOAT_ERROR_S)
        assert flight.finished_s == pytest.approx(job.finished_s, abs=FLOAT_ERROR_S)
    assert result.retractions == sum(job.retractions for job in jobs)
    assert (result.retractions > 0) is retracting


def test_work_is_conserved():
    """Prefill is busy for exactly tokens / speed and one overhead a batch, whatever the policy."""
    gpu = GpuModel(prefill_batch_overhead_ms=0.0)
    requests = poisson(300, 1.0, seed=3)
    tokens = sum(request.prompt_tokens for request in requests)
    for policy in ("round_robin", "scraped", "clairvoyant"):
        result = Cluster(policy, Settings(gpu=gpu), 1, requests).run()
        assert sum(result.prefill_busy_s) == pytest.approx(tokens / gpu.prefill_tokens_per_s)
        for load in (result.prefill, result.decode):
            assert load.tokens == [0, 0]
            assert 1.0 <= load.imbalance <= 2.0


def test_mean_wait_is_that_of_an_m_d_1_queue():
    """Poisson arrivals, all prompts as long as one chunk: Pollaczek-Khinchine says W = rho S / (2 (1 - rho)).

    Waits are correlated, so the error of the mean is taken from means of 20 stretches; 4 standard errors.
    """
    gpu = GpuModel()
    service_s, utilization = gpu.prefill_s(gpu.chunk_tokens), 0.6
    rng = random.Random(5)
    at_s, requests = 0.0, []
    for _ in range(20_000):
        requests.append(TraceRequest(at_s, gpu.chunk_tokens, 1))
        at_s += rng.expovariate(utilization / service_s)
    result = Cluster("round_robin", Settings(prefill=ONE, decode=ONE, scrape_interval_s=None), 1, requests).run()
    waits_s = [ttft_s - service_s - gpu.transfer_s(gpu.chunk_tokens) for ttft_s in result.ttft_s]
    assert min(waits_s) == pytest.approx(0.0, abs=1e-6)
    stretches = [fmean(waits_s[start : start + 1_000]) for start in range(0, len(waits_s), 1_000)]
    tolerance_s = 4 * stdev(stretches) / len(stretches) ** 0.5
    expected_s = utilization * service_s / (2 * (1 - utilization))
    assert tolerance_s < 0.2 * expected_s
    assert fmean(waits_s) == pytest.approx(expected_s, abs=tolerance_s)


class Prefilled:
    """A listener that notes what it hears."""

    def __init__(self, clock):
        self.clock = clock
        self.heard = []

    def prefilled(self, rank, tokens, complete):
        self.heard.append((self.clock.now_s, tokens, [flight for flight, _ in complete]))


def prefill_rank(gpu, cache=None, attention=False):
    clock = Clock()
    heard = Prefilled(clock)
    cost = PrefillCost(gpu, attention)
    rank = PrefillRank(0, 0, gpu, cost, cache)
    return clock, heard, rank, PrefillGroup([rank], gpu, cost, clock, heard)


def queue(group, rank, *requests):
    flights = [Flight(request, 0.0) for request in requests]
    for flight in flights:
        rank.expect(flight)
        group.add(rank, flight)
    return flights


def test_prefill_is_first_come_first_served_in_chunks():
    gpu = GpuModel(chunk_tokens=1_000)
    clock, heard, rank, group = prefill_rank(gpu)
    flights = queue(group, rank, *(TraceRequest(0.0, tokens, 1) for tokens in (2_500, 300, 900, 100)))
    assert group.remaining_s(rank) == pytest.approx(3_800 / 6_500 + 0.005)
    clock.run(until=lambda: False)
    chunks = [tokens for _, tokens, _ in heard.heard]
    assert chunks == [1_000, 1_000, 1_000, 800]  # 500 + 300 + the first 200 of the third
    assert [flight for _, _, complete in heard.heard for flight in complete] == flights
    assert clock.now_s == pytest.approx(3_800 / gpu.prefill_tokens_per_s + 4 * 0.005)


def test_prefix_cache_saves_the_common_front():
    gpu = GpuModel(kv_capacity_tokens=10 * 512)
    clock, heard, rank, group = prefill_rank(gpu, PrefixCache(gpu.kv_capacity_tokens))
    first, second, third = (TraceRequest(0.0, 1_500, 1, blocks) for blocks in ((1, 2, 3), (1, 2, 4), (9, 2, 3)))
    queue(group, rank, first)
    clock.run(until=lambda: False)
    assert rank.cached_tokens(second) == 1_024  # blocks 1 and 2; a last block that is not full is not kept
    assert rank.cached_tokens(third) == 0
    queue(group, rank, second)
    clock.run(until=lambda: False)
    assert [tokens for _, tokens, _ in heard.heard] == [1_500, 1_500]
    assert rank.tokens_total == 1_500 + 476
    assert rank.left_s == pytest.approx(0.0, abs=1e-9)


def test_attention_agrees_with_the_measured_throughputs():
    """57,674 tokens/s a node at 1K and 50,302 at 4K: the difference per token and rank is what the slope gives."""
    cost = PrefillCost(GpuModel(), attention=True)
    per_token_s = {tokens: cost.work_s(0, tokens) / tokens for tokens in (1_024, 4_096)}
    assert per_token_s[4_096] - per_token_s[1_024] == pytest.approx(8 / 50_302 - 8 / 57_674)
    assert cost.work_s(0, 2_000) == pytest.approx(2_000 / 6_500)
    assert cost.work_s(0, 700) + cost.work_s(700, 300) == pytest.approx(cost.work_s(0, 1_000))
    assert 10e-9 < ATTENTION_S < 20e-9


def stepped_together(gpu, joins):
    """DP attention, step by step: `joins` are (time, rank, prompt, output); the time at which each ends."""
    waiting = sorted(range(len(joins)), key=lambda number: joins[number][0])
    members: dict[int, int] = {}
    ends_s: dict[int, float] = {}
    now_s = 0.0
    while waiting or members:
        if not members:
            now_s = max(now_s, joins[waiting[0]][0])
        while waiting and joins[waiting[0]][0] <= now_s:
            members[waiting.pop(0)] = 1
        ranks = {joins[number][1] for number in members}
        now_s += max(
            gpu.decode_s(len(held), sum(held))
            for held in ([joins[n][2] + made for n, made in members.items() if joins[n][1] == rank] for rank in ranks)
        )
        for number in list(members):
            members[number] += 1
            if members[number] == joins[number][3]:
                ends_s[number] = now_s
                del members[number]
    return ends_s


def test_dp_attention_steps_take_as_long_as_the_slowest_rank():
    gpu = GpuModel()
    rng = random.Random(2)
    joins = [(rng.uniform(0, 60), rng.randrange(3), rng.randint(1, 30_000), rng.randint(2, 900)) for _ in range(120)]

    class Listener:
        def allocated(self, flight):
            clock.at(flight.arrival_s, lambda _: group.received(ranks[flight.decode_rank], flight))

        def finished(self, flight):
            pass

    clock = Clock()
    ranks = [DecodeRank(index, index, gpu) for index in range(3)]
    group = DecodeGroup(ranks, gpu, clock, Listener())
    flights = [Flight(TraceRequest(at_s, prompt, out), at_s, 0, rank) for at_s, rank, prompt, out in joins]
    big = GpuModel(kv_capacity_tokens=10**9)
    group._gpu = big  # room for all at once: allocation is not what is looked at here
    for flight in flights:
        group.submit(ranks[flight.decode_rank], flight)
    clock.run(until=lambda: False)
    expected = stepped_together(gpu, joins)
    assert {number: flight.finished_s for number, flight in enumerate(flights)} == pytest.approx(expected, abs=1e-9)
