"""The engine model in virtual time: exact figures, no clock."""

from dataclasses import replace

import pytest

from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, EventKind, Job, Phase, Rejected, Role
from extproc.sim.model import EngineModel

GPU = GpuModel(
    prefill_tokens_per_s=1000.0,
    prefill_batch_overhead_ms=0.0,
    chunk_tokens=100,
    decode_base_ms=10.0,
    decode_per_request_ms=1.0,
    decode_per_kv_token_us=10.0,
    kv_capacity_tokens=1000,
    reserved_decode_tokens=10,
    kv_bytes_per_token=1000,
    kv_transfer_gb_per_s=1e-3,  # 1 ms a token
    kv_transfer_base_ms=0.0,
)
FOREVER_S = 1e9


def job(prompt: int, output: int = 1, room: int | None = None, rank: int | None = None) -> Job:
    return Job(f"{prompt}-{output}-{room}", prompt, output, room, rank)


def submit(model: EngineModel, one: Job, now_s: float = 0.0) -> list[Event]:
    model.admit(one)
    return model.submit(one, now_s)


def kinds(events: list[Event]) -> list[tuple[EventKind, Job, float]]:
    return [(event.kind, event.job, round(event.at_s, 9)) for event in events]


def test_a_rank_prefills_in_order_of_arrival_and_in_chunks() -> None:
    model = EngineModel(Role.NULL, gpu=GPU)
    long, short = job(150), job(30)
    submit(model, long)
    submit(model, short)
    # 100 tokens of `long` take 0.1 s; then its last 50 and all 30 of `short` share a batch of 0.08 s.
    assert model.next_s() == pytest.approx(0.1)
    assert kinds(model.advance(0.1)) == []
    assert kinds(model.advance(0.18)) == [
        (EventKind.FIRST_TOKEN, long, 0.18),
        (EventKind.FINISHED, long, 0.18),
        (EventKind.FIRST_TOKEN, short, 0.18),
        (EventKind.FINISHED, short, 0.18),
    ]
    assert model.next_s() is None


def test_events_keep_their_own_time_however_late_one_looks() -> None:
    punctual, late = EngineModel(Role.NULL, gpu=GPU), EngineModel(Role.NULL, gpu=GPU)
    jobs = [[job(150, 3), job(30, 7), job(200, 2)] for _ in range(2)]
    seen: list[list[tuple[EventKind, float]]] = []
    for model, mine in zip((punctual, late), jobs, strict=True):
        for one in mine:
            submit(model, one)
        events: list[Event] = []
        if model is late:
            events = model.advance(FOREVER_S)
        else:
            while (next_s := model.next_s()) is not None:
                events += model.advance(next_s)
        seen.append([(event.kind, event.at_s) for event in events])
    assert seen[0] == seen[1]
    assert len(seen[0]) == 6


def test_a_decode_step_grows_with_the_batch_and_its_cache() -> None:
    model = EngineModel(Role.DECODE, gpu=GPU)
    jobs = [job(100, 3, room=0, rank=0), job(200, 3, room=1, rank=0)]
    for one in jobs:
        assert kinds(submit(model, one)) == [(EventKind.KV_ALLOCATED, one, 0.0)]
    first = model.received(jobs[0], 1.0)
    assert kinds(first) == [(EventKind.FIRST_TOKEN, jobs[0], 1.0)]
    # Alone: 10 ms + 1 request x 1 ms + 101 tokens x 10 us.
    one_s = 1.0 + 0.010 + 0.001 + 0.00101
    end_s = model.next_s()
    assert end_s == pytest.approx(one_s)
    model.received(jobs[1], 1.001)  # joins when the running step ends
    model.advance(end_s)
    # Together: 2 requests, 102 + 201 tokens.
    assert model.next_s() == pytest.approx(one_s + 0.010 + 0.002 + 0.00303)
    assert model.generated(jobs[0]) == 2
    assert model.generated(jobs[1]) == 1
    done = [event.job for event in model.advance(FOREVER_S) if event.kind is EventKind.FINISHED]
    assert done == jobs
    assert model.ranks[0].kv_used_tokens == 0


def test_prefill_waits_for_decode_to_allocate_and_to_take() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    one = job(50, room=7)
    submit(model, one)
    model.advance(5.0)
    assert one.phase is Phase.BOOTSTRAP
    model.announce(0, 7, 5.0)
    # 50 tokens: 0.05 s to compute, 0.05 s to send.
    assert kinds(model.advance(6.0)) == [(EventKind.KV_SENT, one, 5.1)]
    assert model.ranks[0].kv_used_tokens == 50
    model.advance(60.0)
    assert one.phase is Phase.INFLIGHT
    assert kinds(model.taken(one, 61.0)) == [(EventKind.FIRST_TOKEN, one, 61.0), (EventKind.FINISHED, one, 61.0)]
    assert model.ranks[0].kv_used_tokens == 0


def test_decode_may_come_first() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    model.announce(0, 7, 0.0)
    submit(model, job(50, room=7), 1.0)
    assert model.next_s() == pytest.approx(1.05)
    # A room that decode gave up before its request came waits like any other.
    model.announce(0, 8, 1.0)
    model.withdraw(0, 8)
    later = job(50, room=8)
    submit(model, later, 1.0)
    assert later.phase is Phase.BOOTSTRAP


def test_only_the_last_chunk_is_sent_after_prefill() -> None:
    model = EngineModel(Role.PREFILL, gpu=GPU)
    one = job(130, room=7)
    model.announce(0, 7, 0.0)
    submit(model, one)
    assert kinds(model.advance(FOREVER_S)) == [(EventKind.KV_SENT, one, 0.16)]


@pytest.mark.parametrize(("role", "state"), [(Role.PREFILL, "Bootstrapping"), (Role.DECODE, "WaitingForInput")])
def test_a_side_that_waits_too_long_gives_up(role: Role, state: str) -> None:
    model = EngineModel(role, gpu=GPU, bootstrap_timeout_s=20.0, waiting_timeout_s=20.0)
    one, two = job(50, room=7), job(50, room=8)
    submit(model, one, 1.0)
    submit(model, two, 2.0)
    events = model.advance(21.0)
    assert [(event.kind, event.job, event.status) for event in events] == [(EventKind.FAILED, one, 500)]
    assert f"Request 7 timed out after 20.0s in KVPoll.{state}" in events[0].message
    assert [event.job for event in model.advance(22.0)] == [two]
    assert model.next_s() is None
    assert model.ranks[0].kv_used_tokens == 0


def test_a_full_cache_keeps_requests_waiting_in_order() -> None:
    gpu = replace(GPU, kv_capacity_tokens=250)
    model = EngineModel(Role.DECODE, gpu=gpu)
    big, blocked, small = (job(size, 2, room=size, rank=0) for size in (200, 100, 20))
    assert [event.job for event in submit(model, big)] == [big]
    # 250 - 200 - 10 reserved leaves no room for 100 + 10; 20 + 10 would fit, but not past the head of the queue.
    assert submit(model, blocked) == []
    assert submit(model, small) == []
    assert model.ranks[0].kv_used_tokens == 200
    model.received(big, 1.0)
    events = model.advance(FOREVER_S / 1e6)
    allocated = [event.job for event in events if event.kind is EventKind.KV_ALLOCATED]
    assert allocated == [blocked, small]


def test_prefill_admits_a_prompt_only_when_all_of_it_fits() -> None:
    gpu = replace(GPU, kv_capacity_tokens=250)
    model = EngineModel(Role.PREFILL, gpu=gpu)
    first, second = job(200, room=1, rank=0), job(100, room=2, rank=0)
    for one in (first, second):
        model.announce(0, one.room or 0, 0.0)
        submit(model, one)
    model.advance(1.0)
    assert first.phase is Phase.INFLIGHT
    assert (second.phase, second.prefilled_tokens) == (Phase.WAITING, 0)
    model.taken(first, 2.0)
    assert model.next_s() == pytest.approx(2.1)


def test_decode_retracts_the_youngest_when_the_cache_runs_full() -> None:
    gpu = replace(GPU, kv_capacity_tokens=110, reserved_decode_tokens=0)
    model = EngineModel(Role.DECODE, gpu=gpu)
    old, young = job(50, 20, room=1, rank=0), job(50, 20, room=2, rank=0)
    for one in (old, young):
        submit(model, one)
        model.received(one, 0.0)
    most_used, events = 0, []
    while (next_s := model.next_s()) is not None:
        events += model.advance(next_s)
        most_used = max(most_used, model.ranks[0].kv_used_tokens)
    assert [event.job for event in events if event.kind is EventKind.FINISHED] == [old, young]
    assert (old.retractions, old.generated_tokens, young.generated_tokens) == (0, 20, 20)
    assert young.retractions > 0
    assert most_used <= 110
    assert model.ranks[0].kv_used_tokens == 0


def test_max_running_requests_bounds_the_batch() -> None:
    model = EngineModel(Role.DECODE, gpu=replace(GPU, max_running_requests=2))
    jobs = [job(10, 5, room=i, rank=0) for i in range(3)]
    for one in jobs:
        submit(model, one)
        model.received(one, 0.0)
    model.advance(model.next_s() or 0.0)
    assert [one.phase for one in jobs] == [Phase.RUNNING, Phase.RUNNING, Phase.READY]
    assert len([event for event in model.advance(FOREVER_S) if event.kind is EventKind.FINISHED]) == 3


@pytest.mark.parametrize("role", list(Role))
def test_the_rank_is_the_explicit_one_else_it_follows_from_the_room(role: Role) -> None:
    model = EngineModel(role, dp_size=4, gpu=GPU)
    explicit, by_room = job(10, room=7, rank=2), job(10, room=13)
    for one in (explicit, by_room):
        model.admit(one)
    assert (explicit.rank, by_room.rank) == (2, 13 % 4)


def test_without_disaggregation_ranks_take_turns() -> None:
    model = EngineModel(Role.NULL, dp_size=3, gpu=GPU)
    jobs = [job(10) for _ in range(5)]
    for one in jobs:
        model.admit(one)
    assert [one.rank for one in jobs] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(Rejected, match="out of range") as refused:
        EngineModel(Role.PREFILL, dp_size=2, gpu=GPU).admit(job(10, room=1, rank=rank))
    assert refused.value.status == 400


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    with pytest.raises(Rejected, match="exceeds the maximum") as refused:
        EngineModel(Role.PREFILL, gpu=GPU).admit(job(1001, room=1))
    assert refused.value.status == 400


def test_a_live_room_cannot_be_used_again() -> None:
    model = EngineModel(Role.PREFILL, dp_size=2, gpu=GPU)
    first = job(10, room=5, rank=0)
    model.admit(first)
    with pytest.raises(Rejected, match="already in use"):
        model.admit(job(10, room=5, rank=1))
    model.release(first)
    model.admit(job(10, room=5, rank=1))


@pytest.mark.parametrize("role", list(Role))
def test_abort_frees_everything_in_every_phase(role: Role) -> None:
    """Runs the same three jobs again and again, aborting the middle one a little later each time."""
    gpu = replace(GPU, kv_capacity_tokens=300)
    phases = set()
    for tick in range(120):
        model = EngineModel(role, gpu=gpu)
        jobs = [job(120, 12, room=i if role is not Role.NULL else None, rank=0) for i in range(3)]
        abort_s = tick * 0.005
        pending = [event for one in jobs for event in submit(model, one)]
        for one in jobs:
            if role is Role.PREFILL and one is not jobs[0]:
                pending += model.announce(0, one.room or 0, 0.0)
        now_s, aborted = 0.0, False
        while True:
            for event in pending:
                if event.kind is EventKind.KV_ALLOCATED:
                    pending = pending + model.received(event.job, max(now_s, event.at_s))
                elif event.kind is EventKind.KV_SENT:
                    pending = pending + model.taken(event.job, max(now_s, event.at_s))
            next_s = model.next_s()
            if not aborted and (next_s is None or next_s > abort_s):
                phases.add(jobs[1].phase)
                pending, aborted, now_s = model.abort(jobs[1], abort_s), True, abort_s
                if role is Role.PREFILL:
                    pending += model.announce(0, 0, abort_s)
                continue
            if next_s is None:
                break
            now_s = next_s
            pending = model.advance(now_s)
        assert model.ranks[0].kv_used_tokens == 0
        assert model.ranks[0].idle
        assert [one.phase for one in jobs] == [Phase.DONE] * 3
    assert len(phases - {Phase.DONE}) >= 2, phases
