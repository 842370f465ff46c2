"""What a pick was made by, in words, and the table as JSON."""

import json

import msgspec
import pytest
from fleets import Fleet, request, unlike

from extproc.estimate import Prompt, TokenEstimator
from extproc.explain import MAX_LENGTH, describe
from extproc.model import RankLoad, Role
from extproc.policy import RANK_POLICIES, WORKER_POLICIES
from extproc.table_view import describe_table


def test_loads_of_the_chosen_workers_ranks_and_of_those_it_was_compared_with():
    fleet = Fleet(2, 2, explain=True, policy="least_load")
    states = fleet.states
    for state, tokens in zip(states, ((900, 700), (800, 950)), strict=True):
        figures = [RankLoad(n, 0.0, total, snapshot_s=5.0) for n, total in enumerate(tokens)]
        fleet.table.observe(state.worker.name, figures, at_s=0.0)
    fleet.clock.now_s = 0.25
    explanation = fleet.scheduler.place(request(64)).explanation
    weight = states[0].ranks[0].news_weight(0.25)
    shown = {"prefill0:1/0": 900, "prefill0:1/1*": 700, "prefill1:1/0": 800, "prefill1:1/1": 950}
    assert explanation.prefill == ", ".join(f"{name}={tokens * weight:.0f}@0.2" for name, tokens in shown.items())
    assert explanation.decode == "decode0:1/0*=0@-"


@pytest.mark.parametrize("policy", WORKER_POLICIES)
@pytest.mark.parametrize("rank_policy", RANK_POLICIES)
def test_whatever_the_policy_the_chosen_rank_is_there_and_marked(policy, rank_policy):
    fleet = Fleet(2, 3, explain=True, policy=policy, prefill_rank_policy=rank_policy)
    for _ in range(20):
        scheduled = fleet.scheduler.place(unlike())
        charged = scheduled.prefill
        mark = f"{charged.state.worker.name}/{charged.rank.dp_rank}*="
        assert scheduled.explanation.prefill.count("*") == 1
        assert mark in scheduled.explanation.prefill


def test_picks_are_the_same_with_and_without():
    def picks(explain: bool) -> list[object]:
        fleet = Fleet(2, 2, 4, explain=explain)
        return [fleet.scheduler.place(request(tokens * 37 % 1_000)).placement for tokens in range(50)]

    assert picks(True) == picks(False)


def test_it_is_off_by_default():
    assert Fleet(2).scheduler.place(request()).explanation is None


@pytest.mark.parametrize("ranks", [1, 20, 100, 1_000])
def test_the_length_is_bounded_and_what_is_left_out_is_counted(ranks):
    fleet = Fleet(ranks)
    state = fleet.states[0]
    text = describe(fleet.scheduler.loads, (state, 0), [state], 0.0)
    assert len(text) <= MAX_LENGTH
    shown = text.split(", ")
    left_out = int(shown.pop().removeprefix("...+")) if "..." in text else 0
    assert len(shown) + left_out == ranks
    assert (left_out > 0) is (ranks >= 100)


def test_the_table_as_json():
    fleet = Fleet(2)
    estimator = TokenEstimator()
    estimator.ask("/generate", None)
    estimator.learn("/generate", None, Prompt(800), 100)
    state = fleet.states[0]
    fleet.scheduler.place(request(100))
    fleet.table.observe(state.worker.name, [RankLoad(1, 5.0, 6.0, snapshot_s=100.0)], at_s=0.0)
    fleet.clock.now_s = 2.0
    view = describe_table(fleet.config, fleet.table, fleet.scheduler.loads, estimator)
    view = json.loads(msgspec.json.encode(view))
    assert view["settings"] == {
        "load_model": "live",
        "worker_load_check_interval_s": 10.0,
        "prefill_policy": "least_load",
        "decode_policy": "least_load",
        "prefill_rank_policy": "minimum_tokens",
        "decode_rank_policy": "minimum_tokens",
    }
    [estimate] = view["estimates"]
    assert (estimate["endpoint"], estimate["model"], estimate["learned"]) == ("/generate", None, 1)
    assert 4 < estimate["bytes_per_token"] < 8
    assert view["mean_output_tokens"] is None
    prefill, decode = view["workers"]
    assert prefill | {"ranks": []} == {
        "worker": "prefill0:1",
        "role": "prefill",
        "healthy": True,
        "draining": False,
        "circuit": "closed",
        "endpoint": "10.0.0.0:1",
        "model": None,
        "dp_size": 2,
        "in_flight": 1,
        "engine_clock_s": -100.0,
        "ranks": [],
    }
    assert sum(rank["outstanding_tokens"] for rank in prefill["ranks"]) == 100
    silent, known = prefill["ranks"]
    assert [rank["load_tokens"] for rank in prefill["ranks"]] == [
        rank["outstanding_tokens"] for rank in prefill["ranks"]
    ]
    assert (silent["scraped"], silent["scrape_age_s"], silent["news_age_s"], silent["foreign_tokens"]) == (None,) * 4
    assert (known["scrape_age_s"], known["news_age_s"], known["scraped"]["total_tokens"]) == (2.0, 2.0, 6.0)
    assert known["scraped"]["snapshot_s"] == 100.0
    assert set(silent) == set(known)
    assert decode["role"] == Role.DECODE
