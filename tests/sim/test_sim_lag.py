"""When a rank's figures become visible: the lag that real engines have."""

import pytest

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Job, Role
from extproc.sim.model import EngineModel
from extproc.sim.snapshot import Figures

GPU = GpuModel(prefill_tokens_per_s=1000.0, prefill_batch_overhead_ms=0.0, decode_per_kv_token_us=0.0)


def figures(model: EngineModel, now_s: float) -> tuple[Figures, Figures]:
    return model.figures(now_s)[0]


def start(model: EngineModel, job: Job, now_s: float = 0.0) -> None:
    model.admit(job)
    model.submit(job, now_s)


def test_queued_prompts_do_not_count_as_used_and_show_only_after_a_batch() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    for room in range(3):
        model.announce(0, room, 0.0)
        start(model, Job("", 8_000, 1, room))
    start(model, Job("", 500, 1, 3))  # decode has not named this room
    metrics, _ = figures(model, 0.01)
    assert metrics.used_tokens == metrics.waiting_reqs == 0
    model.advance(8.1)  # the batch of the first prompt ended at 8.0, and the next one has taken its memory since
    assert model.ranks[0].kv_used_tokens == 8_000 + GPU.chunk_tokens
    for shown in figures(model, 8.1):
        assert shown.at_s == pytest.approx(8.0)
        assert shown.used_tokens == 8_000
        assert shown.waiting_reqs == 2
        assert shown.waiting_uncached_tokens == 16_000
        assert shown.queued_tokens == shown.waiting_uncached_tokens + 500
        assert shown.bootstrap_reqs == 1
        assert shown.prefill_tokens_total == 8_000
        assert shown.prefill_busy_s_total == pytest.approx(8.0)


def test_decode_gauges_move_every_40_iterations_and_loads_every_15() -> None:
    model = EngineModel(Role.DECODE, gpu=GPU)
    job = Job("", 1_000, 500, 1)
    start(model, job)
    model.received(job, 0.0)
    step_s = GPU.decode_s(1, 0)
    seen_metrics, seen_loads = [], []
    for step in range(1, 95):
        now_s = step * step_s + 1e-6
        model.advance(now_s)
        metrics, loads = figures(model, now_s)
        seen_metrics.append(metrics.used_tokens)
        seen_loads.append(loads.used_tokens)
    # After step n the request holds 1,000 prompt tokens, the token from prefill, and n more.
    assert sorted(set(seen_metrics)) == [0, 1_041, 1_081]
    assert seen_metrics.index(1_041) == 40 - 1
    assert sorted(set(seen_loads)) == [0, 1_016, 1_031, 1_046, 1_061, 1_076, 1_091]
    assert seen_loads.index(1_016) == 15 - 1
    metrics, _ = figures(model, 94 * step_s)
    assert metrics.output_tokens_per_s == pytest.approx(1 / step_s)


def test_an_idle_rank_keeps_its_last_gauges_for_30_seconds() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    model.announce(0, 1, 0.0)
    job = Job("", 1_000, 1, 1)
    start(model, job)
    model.advance(2.0)
    model.taken(job, 2.0)
    assert figures(model, 30.9)[0].used_tokens == 1_000
    assert figures(model, 31.1)[0].used_tokens == 0


def test_loads_are_at_most_50_ms_old_while_no_batch_runs() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    start(model, Job("", 1_000, 1, 1))
    assert figures(model, 0.01)[1].bootstrap_reqs == 0
    metrics, loads = figures(model, 0.06)
    assert loads.bootstrap_reqs == 1
    assert metrics.bootstrap_reqs == 0


def test_a_rank_that_waits_for_decode_is_not_idle() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    start(model, Job("", 1_000, 1, 1))
    assert figures(model, 100.0)[0].bootstrap_reqs == 0
