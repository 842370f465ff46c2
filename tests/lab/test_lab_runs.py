"""Whole runs: what must hold whatever the policy."""

import random

import pytest
from lab_cluster import poisson

from extproc.errors import ConfigError
from extproc.lab.cluster import Cluster
from extproc.lab.experiment import Case, Load, compare, run_cases
from extproc.lab.request import TraceRequest
from extproc.lab.service import PolicyName, View
from extproc.lab.settings import Settings, Shape
from extproc.lab.stats import Estimate, Latency, quantile
from extproc.lab.synthetic import synthetic
from extproc.lab.workload import check_fits, decode_capacity, offered_s, scaled, spread, time_scale_for
from extproc.load_model import LOAD_MODELS
from extproc.model import Role
from extproc.policy import WORKER_POLICIES
from extproc.request import GenerationRequest
from extproc.sim.gpu import GpuModel

LOAD = Load(requests=400, utilization=0.7)


@pytest.mark.parametrize(
    "policy", [*WORKER_POLICIES, "scraped", "clairvoyant", *sorted(set(LOAD_MODELS) - {"scraped"})]
)
def test_every_policy_serves_every_request_and_gives_its_leases_back(policy):
    settings = Settings(prefill=Shape(2, 2), decode=Shape(2, 2))
    cluster = Cluster(policy, settings, 0, LOAD.arrivals(settings, 0))
    result = cluster.run()
    assert len(result.ttft_s) == 400
    assert min(result.ttft_s) > 0
    assert all(flight.finished_s >= flight.first_token_s > flight.arrival_s for flight in result.flights)
    for service in cluster.services:
        if policy != "clairvoyant":
            for state in service.table.states:
                assert [(rank.outstanding_tokens, rank.outstanding_requests) for rank in state.ranks] == [(0, 0)] * 2


def test_same_seed_same_figures_on_one_process_or_two():
    cases = [Case(policy, seed, Settings(), LOAD) for policy in ("scraped", "clairvoyant") for seed in (0, 1)]
    once = run_cases(cases)
    assert run_cases(cases) == once
    assert run_cases(cases, jobs=2) == once
    assert once[0] != once[1]


def test_policies_of_a_seed_meet_the_same_load():
    runs = [Cluster(policy, Settings(), 3, LOAD.arrivals(Settings(), 3)).run() for policy in ("scraped", "clairvoyant")]
    first, second = ([(flight.arrival_s, flight.request) for flight in run.flights] for run in runs)
    assert first == second


@pytest.mark.parametrize("shape", [Shape(1, 2), Shape(1, 8), Shape(2, 4)])
def test_clairvoyant_is_not_worse_than_round_robin(shape):
    settings = Settings(prefill=shape, decode=shape)
    found = compare(("round_robin", "clairvoyant"), range(3), settings, LOAD)
    assert found.against("clairvoyant", "round_robin", "ttft_mean").high < 0
    assert found.against("clairvoyant", "round_robin", "tpot_mean").median < 0


def test_dp_attention_makes_everybody_wait():
    apart, together = (
        Cluster("round_robin", Settings(dp_attention=on), 0, LOAD.arrivals(Settings(), 0)).run() for on in (False, True)
    )
    assert Latency.of(together.ttft_s).mean > Latency.of(apart.ttft_s).mean
    assert Latency.of(together.tpot_s).mean > Latency.of(apart.tpot_s).mean


def test_replicas_share_the_traffic_and_know_nothing_of_each_other(monkeypatch):
    settings = Settings(replicas=2, scrape_interval_s=None)
    cluster = Cluster("round_robin", settings, 0, LOAD.arrivals(settings, 0))
    placed = [0, 0]
    for number, service in enumerate(cluster.services):

        def place(request, seen, number=number, original=service.place):
            placed[number] += 1
            return original(request, seen)

        monkeypatch.setattr(service, "place", place)
    result = cluster.run()
    assert sum(placed) == 400
    assert abs(placed[0] - 200) < 4 * 10  # binomial: standard deviation 10
    # Each service sends its own requests to its ranks in turn.
    assert {flight.prefill_rank for flight in result.flights} == {0, 1}
    assert cluster.services[0].table is not cluster.services[1].table


def test_the_service_sees_bytes_not_tokens():
    requests = synthetic(2_000, random.Random(0))
    settings = Settings()
    view = View(settings, random.Random(1), with_prompts=False)
    seen = [view.of(request) for request in requests]
    ratios = [one.prompt_tokens / request.prompt_tokens for one, request in zip(seen, requests, strict=True)]
    assert 0.98 < sorted(ratios)[1_000] < 1.02  # 4 standard errors of the median are 1.7 %
    assert sum(0.86 < ratio < 1.162 for ratio in ratios) / 2_000 == pytest.approx(0.683, abs=0.05)  # one sigma
    assert {one.max_output_tokens for one in seen} <= {2048.0, 4096.0}
    exact = View(Settings(exact_tokens=True), random.Random(1), with_prompts=False)
    assert [exact.of(request).prompt_tokens for request in requests] == [one.prompt_tokens for one in requests]


def test_prompts_share_bytes_where_the_trace_shares_blocks():
    view = View(Settings(bytes_per_token_sigma=0.0), random.Random(1), with_prompts=True)
    one, other = (view.of(TraceRequest(0.0, 1_200, 1, blocks)) for blocks in ((5, 6, 7), (5, 6, 8)))
    assert isinstance(one, GenerationRequest)
    common = next(at for at, (a, b) in enumerate(zip(one.prompt, other.prompt, strict=True)) if a != b)
    assert 2 * 2_048 < common <= 2 * 2_048 + 8  # hex digits of two blocks may agree for a few places
    assert len(one.prompt) == 4_800 + 2
    assert one.routing_key == "6"


def test_policy_names():
    assert PolicyName.parse("round_robin") == PolicyName("round_robin", "round_robin", "scraped")
    assert PolicyName.parse("scraped").rank == "minimum_tokens"
    assert PolicyName.parse("random+round_robin+scraped") == PolicyName("random", "round_robin", "scraped")
    assert PolicyName.parse("random").rank == "minimum_tokens"
    for wrong in ("nonsense", "random+nonsense", "random+round_robin+nonsense", "a+b+c+d", ""):
        with pytest.raises(ConfigError, match="is not one of"):
            PolicyName.parse(wrong)


def test_utilization_is_offered_work_over_capacity():
    settings = Settings(prefill=Shape(2, 2))
    requests = LOAD.arrivals(settings, 0)
    span_s = requests[-1].arrival_s - requests[0].arrival_s
    assert offered_s(requests, settings, Role.PREFILL) / (4 * span_s) == pytest.approx(0.7)
    result = Cluster("scraped", settings, 0, requests).run()
    # Most batches are not full, so the overheads are a little more; and work goes on after the last arrival.
    assert sum(result.prefill_busy_s) / (4 * span_s) == pytest.approx(0.7, rel=0.02)
    gpu = GpuModel()
    assert 0 < decode_capacity(requests, gpu) < gpu.max_running_requests / gpu.decode_s(gpu.max_running_requests, 0)
    scale = time_scale_for(requests, settings, Role.DECODE, 0.5)
    faster = scaled(requests, scale)
    assert offered_s(faster, settings, Role.DECODE) / (2 * faster[-1].arrival_s) == pytest.approx(0.5, rel=1e-6)


def test_equal_timestamps_are_spread_within_the_tick_in_order():
    requests = poisson(9, 1.0, seed=0)
    ticks = [0, 0, 0, 3, 6, 6, 9, 9, 9]
    coarse = [TraceRequest(at_s, request.prompt_tokens, 1) for at_s, request in zip(ticks, requests, strict=True)]
    fine = spread(coarse, random.Random(1))
    assert [request.prompt_tokens for request in fine] == [request.prompt_tokens for request in coarse]
    moments = [request.arrival_s for request in fine]
    assert moments == sorted(moments)
    assert len(set(moments)) == 9
    assert all(at <= moment < at + 3 for at, moment in zip(ticks, moments, strict=True))
    assert moments[3] == 3
    assert spread(coarse, random.Random(1)) == fine != spread(coarse, random.Random(2))


def test_a_request_that_never_fits_is_refused():
    requests = poisson(5, 1.0, seed=0)
    with pytest.raises(ConfigError, match="KV cache"):
        check_fits(requests, GpuModel(kv_capacity_tokens=2_000))


def test_median_intervals_are_those_of_the_sign_test():
    assert Estimate.of([3.0]) == Estimate(3.0, 3.0, 3.0, 0.0)
    assert Estimate.of([5, 1, 4, 2, 3]) == Estimate(3, 1, 5, 1 - 2 / 2**5)
    ten = Estimate.of(list(range(10)))
    assert (ten.low, ten.high) == (1, 8)  # tables: 2nd and 9th of 10 hold the median with 97.9 %
    assert ten.coverage == pytest.approx(0.9785, abs=1e-4)
    assert quantile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert Latency.of([]) == Latency(0.0, 0.0, 0.0)


@pytest.mark.parametrize("lag_s", [0.001, 5.0])
def test_processes_of_one_service_know_what_each_other_did(lag_s):
    settings = Settings(prefill=Shape(1, 8), replicas=2, replica_lag_s=lag_s)
    cluster = Cluster("live", settings, 0, LOAD.arrivals(settings, 0))
    cluster.run()
    first, second = (service.table for service in cluster.services)
    assert first.output_tokens is not None
    scraped = [[rank.scraped_at_s for state in table.states for rank in state.ranks] for table in (first, second)]
    assert None not in scraped[1]  # the first scrapes for both
    if lag_s < 1:
        # The run ends with the last request, whose end only its own process knows by then.
        assert abs(first.in_flight[Role.DECODE] - second.in_flight[Role.DECODE]) <= 1


def test_processes_place_as_one_does():
    """And two services that know nothing of each other do not, so this shows something."""

    def mean_ttft_s(**changes) -> float:
        settings = Settings(prefill=Shape(1, 8), **changes)
        load = Load(requests=1_500, utilization=0.7)
        runs = [Cluster("live", settings, seed, load.arrivals(settings, seed)).run() for seed in range(3)]
        return sum(Latency.of(run.ttft_s).mean for run in runs) / len(runs)

    one, apart, together = mean_ttft_s(), mean_ttft_s(replicas=2), mean_ttft_s(replicas=2, replica_lag_s=0.002)
    assert together < one * 1.03
    assert apart > one * 1.05
