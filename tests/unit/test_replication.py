"""The load table in several processes: what one does, all know, once; and nothing stays charged."""

import math
import random
from collections import deque

import pytest
import yaml
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from extproc.circuit import CircuitLimits, CircuitState
from extproc.config import Config, WorkerConfig, build, target_of
from extproc.errors import ConfigError
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import RankLoad, Role, Worker
from extproc.mutation import process_mark
from extproc.processes import snapshot
from extproc.processes.figures import SummedRegistry, samples_of
from extproc.processes.messages import (
    Batch,
    Charged,
    Draining,
    End,
    Figures,
    Gone,
    Judged,
    Message,
    Observed,
    Released,
    Start,
    Unframer,
    WorkerChanged,
    decode,
    frame,
)
from extproc.processes.replica import Replica
from extproc.schedule import Scheduler

LIMITS = CircuitLimits(failure_threshold=3, success_threshold=1, timeout_s=10.0, window_s=60.0)


def worker(name: str = "p:1", role: Role = Role.PREFILL, dp_size: int | None = 2) -> Worker:
    return Worker(name, role, f"http://{name}", "127.0.0.1:1", dp_size=dp_size)


WORKERS = (worker("p:1"), worker("p:2", dp_size=4), worker("d:1", Role.DECODE))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Process:
    """One process without its sockets."""

    def __init__(self, number: int, clock: Clock, workers=WORKERS) -> None:
        self.table = LoadTable(workers, clock, LIMITS)
        for each in workers:
            self.table.worker_changed(each, True)
        self.blamed: list[tuple[str, str]] = []
        self.wakes = 0
        self.replica = Replica(
            number,
            self.table,
            blame=lambda request, name: self.blamed.append((request, name)),
            wake=self._wake,
        )

    def _wake(self) -> None:
        self.wakes += 1

    def state(self, name: str):
        return self.table.state(name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair(clock) -> tuple[Process, Process]:
    return Process(0, clock), Process(1, clock)


def tell(one: Process, other: Process) -> list:
    """Everything that one has not told yet, over the wire."""
    events = one.replica.take()
    message = decode(frame(Batch(one.replica.process, 0.0, events))[4:])
    assert isinstance(message, Batch)
    assert message.events == events
    other.replica.apply(message.process, message.events)
    return events


def test_a_charge_and_its_release_are_seen_by_the_other(pair, clock):
    one, other = pair
    lease = one.table.charge(one.state("p:2"), 3, 100, 28)
    assert other.state("p:2").in_flight == 0
    tell(one, other)
    rank = other.state("p:2").ranks[3]
    assert (rank.outstanding_tokens, rank.outstanding_requests, rank.charged_tokens) == (128, 1, 100)
    assert other.table.in_flight[Role.PREFILL] == 1
    clock.now_s += 2
    one.table.release(lease)
    tell(one, other)
    assert (rank.outstanding_tokens, rank.outstanding_requests) == (0, 0)
    assert other.state("p:2").in_flight == other.table.in_flight[Role.PREFILL] == 0
    assert one.replica.leases_of_others == other.replica.leases_of_others == 0


def test_what_came_from_another_is_not_told_again(pair):
    one, other = pair
    lease = one.table.charge(one.state("p:1"), 0, 10)
    one.table.release(lease, True, judge=False)
    one.table.judge(lease, True)
    one.replica.blamed("id", "p:1")
    one.replica.tell(Draining("p:2", True))
    tell(one, other)
    assert other.replica.take() == []
    assert other.wakes == 0
    assert other.blamed == [("id", "p:1")]
    assert other.state("p:2").draining


def test_only_what_happens_is_told(pair):
    one, other = pair
    lease = one.table.charge(one.state("p:1"), 0, 10)
    one.table.release(lease, False)
    one.table.release(lease, True)
    one.table.judge(lease, True)
    kinds = [type(event) for event in tell(one, other)]
    assert kinds == [Charged, Released]
    assert one.wakes == 1


def test_a_wake_for_each_batch(pair):
    one, _ = pair
    one.table.charge(one.state("p:1"), 0, 10)
    one.table.charge(one.state("p:1"), 0, 10)
    assert one.wakes == 1
    assert len(one.replica.take()) == 2
    one.table.charge(one.state("p:1"), 0, 10)
    assert one.wakes == 2


def test_circuits_open_everywhere_and_close_everywhere(pair, clock):
    one, other = pair
    for process in (one, other, one):
        lease = process.table.charge(process.state("p:1"), 0, 10)
        process.table.release(lease, True, judge=False)
        process.table.judge(lease, True)
        tell(one, other)
        tell(other, one)
    for process in pair:
        assert process.state("p:1").circuit.state is CircuitState.OPEN
        assert [state.worker.name for state in process.table.eligible(Role.PREFILL)] == ["p:2"]
    clock.now_s += 11
    # One of them tries it; the other has not even looked.
    assert len(one.table.eligible(Role.PREFILL)) == 2
    lease = one.table.charge(one.state("p:1"), 0, 10)
    tell(one, other)
    assert [state.worker.name for state in other.table.eligible(Role.PREFILL)] == ["p:2"]
    one.table.release(lease, False)
    tell(one, other)
    for process in pair:
        assert process.state("p:1").circuit.state is CircuitState.CLOSED
        assert len(process.table.eligible(Role.PREFILL)) == 2


def test_outputs_and_speeds_are_learned_once_by_each(pair, clock):
    one, other = pair
    loads = (RankLoad(0, used_tokens=10.0, running_requests=2, output_tokens_per_s=100.0),)
    for process in pair:
        process.table.observe("d:1", loads, clock.now_s)
    prefill = one.table.charge(one.state("p:1"), 0, 100)
    decode_lease = one.table.charge(one.state("d:1"), 0, 100, 20, after=prefill, max_output=1000)
    clock.now_s += 1
    one.table.release(prefill)
    tell(one, other)
    clock.now_s += 4
    one.table.release(decode_lease)
    tell(one, other)
    assert one.table.output_tokens == other.table.output_tokens == 50 * 4
    for name in ("p:1", "d:1"):
        mine, theirs = one.state(name).ranks[0], other.state(name).ranks[0]
        assert mine.lifetime_s == theirs.lifetime_s
        assert mine.tokens_per_s == theirs.tokens_per_s
        assert mine.work_tokens == theirs.work_tokens > 0
    assert one.state("p:1").ranks[0].tokens_per_s == 100


def test_a_process_that_ends_leaves_nothing_charged_and_nobody_blamed(pair, clock):
    one, other = pair
    open_leases = [one.table.charge(one.state("p:1"), rank % 2, 10) for rank in range(5)]
    one.table.release(open_leases[0], True, judge=False)  # its verdict will never come
    tell(one, other)
    kept = other.table.charge(other.state("p:1"), 0, 7)
    assert other.replica.forget(0) == 4
    assert other.replica.forget(0) == 0
    assert [rank.outstanding_tokens for rank in other.state("p:1").ranks] == [7, 0]
    assert other.state("p:1").in_flight == 1
    assert other.state("p:1").circuit.failures == 0
    other.table.release(kept)
    assert other.table.in_flight[Role.PREFILL] == 0
    # The next process of that number begins to count anew.
    fresh = Process(0, clock)
    fresh.table.charge(fresh.state("p:1"), 0, 3)
    tell(fresh, other)
    assert other.state("p:1").ranks[0].outstanding_tokens == 3


def test_gone_is_passed_on(clock):
    leader, first, second = Process(0, clock), Process(1, clock), Process(2, clock)
    first.table.charge(first.state("d:1"), 1, 10, 5)
    events = tell(first, leader)
    second.replica.apply(1, events)
    leader.replica.forget(1)
    leader.replica.tell(Gone(1))
    tell(leader, second)
    assert second.table.in_flight[Role.DECODE] == leader.table.in_flight[Role.DECODE] == 0


def test_events_on_leases_that_are_not_known_are_dropped(pair):
    one, _ = pair
    one.replica.apply(7, [Released(1, False, True, 0.0), Judged(1, True, 0.0), Charged(1, "gone:1", 0, 1.0, 1.0, 0.0)])
    assert one.replica.leases_of_others == 0
    assert one.table.in_flight == dict.fromkeys(Role, 0)


def test_a_charge_on_a_rank_that_is_no_more(pair):
    one, other = pair
    lease = one.table.charge(one.state("p:2"), 3, 10)
    other.table.worker_changed(worker("p:2", dp_size=1), True)
    tell(one, other)
    assert other.state("p:2").in_flight == 1
    assert [rank.outstanding_tokens for rank in other.state("p:2").ranks] == [0]
    one.table.release(lease)
    tell(one, other)
    assert other.state("p:2").in_flight == 0


def test_a_late_charge_stands_in_order_in_the_ledger(pair, clock):
    one, other = pair
    lease = one.table.charge(one.state("p:1"), 0, 10)
    clock.now_s += 0.001
    mine = other.table.charge(other.state("p:1"), 0, 5)
    clock.now_s += 0.001
    tell(one, other)
    rank = other.state("p:1").ranks[0]
    assert list(rank.changes[::2]) == sorted(rank.changes[::2])
    assert rank.outstanding_at(100.0005) == 0
    assert rank.outstanding_at(100.0015) == rank.outstanding_at(clock.now_s) == 15
    clock.now_s -= 0.0005  # released before the other's charge was applied
    one.table.release(lease)
    clock.now_s += 0.001
    tell(one, other)
    other.table.release(mine)
    assert rank.outstanding_at(clock.now_s) == 0


def test_a_snapshot_makes_a_fresh_table_alike(pair, clock):
    leader, first = pair
    leader.table.set_draining("p:2", True)
    leader.table.worker_changed(worker("d:1", Role.DECODE, dp_size=3), True)
    first.table.worker_changed(worker("d:1", Role.DECODE, dp_size=3), True)
    for _ in range(3):
        leader.table.release(leader.table.charge(leader.state("p:1"), 0, 10), True)
        clock.now_s += 1
    leader.table.observe("d:1", [RankLoad(2, used_tokens=70.0, total_tokens=90.0, snapshot_s=5.0)], clock.now_s)
    leader.table.output_tokens = 33.0
    kept = leader.table.charge(leader.state("d:1"), 2, 10, 3)
    theirs = first.table.charge(first.state("p:2"), 3, 8)
    over = first.table.charge(first.state("p:2"), 3, 9)
    first.table.release(over, True, judge=False)
    tell(first, leader)
    leader.replica.take()

    taken = decode(frame(Start(2, Config(), "unix:/x", snapshot.take(leader.replica)))[4:])
    assert isinstance(taken, Start)
    fresh = Process(2, clock)
    snapshot.restore(fresh.replica, taken.table)
    assert fresh.replica.take() == []
    assert repr(fresh.table) == repr(leader.table)
    assert fresh.table.output_tokens == 33.0
    assert fresh.state("d:1").engine_clock_s == leader.state("d:1").engine_clock_s
    for name in ("p:1", "p:2", "d:1"):
        assert fresh.state(name).circuit == leader.state(name).circuit
        for mine, theirs_rank in zip(fresh.state(name).ranks, leader.state(name).ranks, strict=True):
            for figure in ("scraped", "scraped_at_s", "lifetime_s", "foreign_tokens", "news_at_s", "tokens_per_s"):
                assert getattr(mine, figure) == getattr(theirs_rank, figure)
    assert fresh.state("p:1").circuit.state is CircuitState.OPEN
    assert fresh.table.eligible(Role.PREFILL) == []
    # And it goes on in step: leases of before end, also one whose verdict alone is due.
    leader.table.release(kept)
    first.table.release(theirs)
    first.table.judge(over, True)
    tell(leader, fresh)
    tell(first, fresh)
    assert fresh.table.in_flight == dict.fromkeys(Role, 0)


def test_messages_survive_any_cut():
    messages: list[Message] = [
        Batch(
            1,
            2.5,
            [
                Charged(1, "p:1", 0, 1.0, 2.0, 3.0),
                Charged(2, "p:1", 0, 1.0, 2.0, 3.0, 1, 64.0),
                Released(1, None, False, 4.0),
                Judged(1, True, 5.0),
                Observed("p:1", (RankLoad(0, used_tokens=1.0),), 6.0),
                WorkerChanged(WORKERS[0], False),
                Gone(3),
            ],
        ),
        End(),
        Figures(1, 2, 0.5, {"a": [("a_total", {"x": "y"}, 1.0)]}),
    ]
    assert isinstance(messages[0], Batch)
    assert messages[0].events[0].max_output == math.inf
    stream = b"".join(map(frame, messages))
    for size in (1, 3, 7, len(stream)):
        unframer = Unframer()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [decode(message) for piece in pieces for message in unframer.feed(piece)] == messages


# Sums of counters


def registry() -> tuple[CollectorRegistry, Counter, Histogram]:
    own = CollectorRegistry()
    counter = Counter("extproc_attempts", "Attempts.", ["outcome"], registry=own)
    return own, counter, Histogram("extproc_prefill_leg_seconds", "Legs.", ["worker"], buckets=(1, 2), registry=own)


def report(own: CollectorRegistry, open_exchanges: int = 0) -> Figures:
    return Figures(open_exchanges, open_exchanges, 0.25, samples_of(own))


def test_the_page_is_the_sum_and_never_falls():
    own, counter, histogram = registry()
    theirs, their_counter, their_histogram = registry()
    counter.labels("ok").inc(2)
    histogram.labels("p:1").observe(0.5)
    their_counter.labels("ok").inc(3)
    their_counter.labels("aborted").inc()
    their_histogram.labels("p:1").observe(1.5)
    their_histogram.labels("p:2").observe(0.5)
    page = SummedRegistry(own)

    def value(name: str, **labels: str) -> float | None:
        samples = [sample for metric in page.collect() for sample in metric.samples]
        found = [sample.value for sample in samples if (sample.name, sample.labels) == (name, labels)]
        assert len(found) < 2
        return found[0] if found else None

    page.reported(1, report(theirs))  # of a process that does not serve yet, or any more
    assert value("extproc_attempts_total", outcome="ok") == 2
    page.begun(1)
    assert value("extproc_processes") == 2
    page.reported(1, report(theirs, open_exchanges=4))
    page.reported(1, report(theirs, open_exchanges=4))
    assert page.open_streams == 4
    for _ in range(2):  # before its end, and after it
        assert value("extproc_attempts_total", outcome="ok") == 5
        assert value("extproc_attempts_total", outcome="aborted") == 1
        assert value("extproc_prefill_leg_seconds_bucket", worker="p:1", le="1.0") == 1
        assert value("extproc_prefill_leg_seconds_bucket", worker="p:1", le="+Inf") == 2
        assert value("extproc_prefill_leg_seconds_sum", worker="p:1") == 2.0
        assert value("extproc_prefill_leg_seconds_count", worker="p:2") == 1
        page.ended(1)
    assert value("extproc_processes") == 1
    assert page.open_streams == 0
    fresh, fresh_counter, _ = registry()
    fresh_counter.labels("ok").inc()
    page.begun(1)
    page.reported(1, report(fresh))
    assert value("extproc_attempts_total", outcome="ok") == 6
    assert value("extproc_replication_lag_seconds", process="1") == 0.25
    assert b"extproc_attempts_total" in generate_latest(page)


# Configuration


def test_each_process_has_an_address_of_its_own():
    assert target_of("unix:/run/x.sock", 0, 1) == "unix:/run/x.sock"
    assert [target_of("unix:/run/x.sock", n, 2) for n in range(2)] == ["unix:/run/x.sock.0", "unix:/run/x.sock.1"]
    assert [target_of("[::1]:9002", n, 3) for n in range(3)] == ["[::1]:9002", "[::1]:9003", "[::1]:9004"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"processes": 2, "policy": "manual"}, "manual remembers its keys in one process"),
        ({"processes": 2, "decode_policy": "manual"}, "manual remembers its keys in one process"),
        ({"processes": 3, "grpc_port": 65534}, "takes a port from grpc_port 65534 on"),
        ({"processes": 0}, "processes"),
    ],
)
def test_settings_that_do_not_go_with_several(flags, words):
    with pytest.raises(ConfigError, match=words):
        build({}, flags)


def test_a_policy_that_is_not_used_does_no_harm():
    build({}, {"processes": 2, "policy": "manual", "prefill_policy": "random", "decode_policy": "random"})


def test_blame_is_told_once():
    workers = {"prefill": (WorkerConfig(url="http://p:1"),), "decode": (WorkerConfig(url="http://d:1"),)}
    config = Config(processes=2, **workers)
    table = LoadTable(config.workers(), lambda: 0.0)
    gateway = Gateway(config, table, Scheduler(config, table, random.Random(1)), lambda: 0.0)
    told = []
    gateway.tell_blame = lambda request_id, name: told.append((request_id, name))
    gateway.blame("a", "p:1")
    gateway.blame("", "p:1")
    gateway.apply_blame("a", "d:1")
    assert told == [("a", "p:1")]
    assert gateway.blamed("a") == {"p:1", "d:1"}


# Whatever meets whatever


class Star(RuleBasedStateMachine):
    """A leader and two followers that live, die and come back; every hop of a batch takes as long as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.processes = {number: Process(number, self.clock) for number in range(3)}
        self.to_leader: dict[int, deque[bytes]] = {1: deque(), 2: deque()}
        self.from_leader: dict[int, deque[bytes]] = {1: deque(), 2: deque()}
        self.open: dict[int, list] = {number: [] for number in range(3)}
        self.unjudged: dict[int, list] = {number: [] for number in range(3)}

    @initialize()
    def begin(self):
        for process in self.processes.values():
            process.replica.take()

    def alive(self, number: int) -> bool:
        return number in self.processes

    def flush(self, number: int) -> None:
        events = self.processes[number].replica.take()
        if not events:
            return
        framed = frame(Batch(number, self.clock(), events))
        if number:
            self.to_leader[number].append(framed)
        else:
            for queue in (self.from_leader[follower] for follower in (1, 2) if self.alive(follower)):
                queue.append(framed)

    @rule(
        number=st.integers(0, 2),
        name=st.sampled_from([each.name for each in WORKERS]),
        rank=st.integers(0, 3),
        prompt=st.floats(0, 1e6),
        output=st.floats(0, 1e6),
    )
    def charge(self, number, name, rank, prompt, output):
        if self.alive(number):
            table = self.processes[number].table
            state = table.state(name)
            self.open[number].append(table.charge(state, rank % len(state.ranks), prompt, output))

    @rule(number=st.integers(0, 2), which=st.integers(0, 50), failed=st.none() | st.booleans(), judge=st.booleans())
    def release(self, number, which, failed, judge):
        if self.alive(number) and self.open[number]:
            leases = self.open[number]
            lease = leases.pop(which % len(leases))
            self.processes[number].table.release(lease, failed, judge=judge)
            if not judge:
                self.unjudged[number].append(lease)

    @rule(number=st.integers(0, 2), failed=st.none() | st.booleans())
    def judge(self, number, failed):
        if self.alive(number) and self.unjudged[number]:
            self.processes[number].table.judge(self.unjudged[number].pop(), failed)

    @rule(rank=st.integers(0, 1), used=st.floats(0, 1e6))
    def observe(self, rank, used):
        leader, loads = self.processes[0], (RankLoad(rank, used_tokens=used),)
        leader.table.observe("p:1", loads, self.clock())
        leader.replica.tell(Observed("p:1", loads, self.clock()))

    @rule(healthy=st.booleans(), dp_size=st.integers(1, 5))
    def worker_changed(self, healthy, dp_size):
        leader, changed = self.processes[0], worker("p:2", dp_size=dp_size)
        leader.table.worker_changed(changed, healthy)
        leader.replica.tell(WorkerChanged(changed, healthy))

    @rule(draining=st.booleans())
    def drain(self, draining):
        self.processes[0].table.set_draining("d:1", draining)
        self.processes[0].replica.tell(Draining("d:1", draining))

    @rule(elapsed_s=st.floats(0, 5))
    def time_passes(self, elapsed_s):
        self.clock.now_s += elapsed_s

    @rule(number=st.integers(0, 2))
    def end_of_a_go(self, number):
        if self.alive(number):
            self.flush(number)

    @rule(number=st.integers(1, 2))
    def leader_reads(self, number):
        if self.to_leader[number]:
            framed = self.to_leader[number].popleft()
            batch = decode(framed[4:])
            self.flush(0)
            for other in (1, 2):
                if other != number and self.alive(other):
                    self.from_leader[other].append(framed)
            self.processes[0].replica.apply(batch.process, batch.events)

    @rule(number=st.integers(1, 2))
    def follower_reads(self, number):
        if self.alive(number) and self.from_leader[number]:
            batch = decode(self.from_leader[number].popleft()[4:])
            self.processes[number].replica.apply(batch.process, batch.events)

    @precondition(lambda self: len(self.processes) > 1)
    @rule(number=st.integers(1, 2), heard=st.booleans())
    def dies(self, number, heard):
        """With what it has sent still on its way, or with that lost."""
        if not self.alive(number):
            return
        del self.processes[number]
        if heard:
            while self.to_leader[number]:
                self.leader_reads(number)
        self.to_leader[number].clear()
        self.from_leader[number].clear()
        self.open[number].clear()
        self.unjudged[number].clear()
        self.processes[0].replica.forget(number)
        self.processes[0].replica.tell(Gone(number))

    @rule(number=st.integers(1, 2))
    def comes_back(self, number):
        if self.alive(number):
            return
        self.flush(0)
        start = decode(frame(Start(number, Config(), "", snapshot.take(self.processes[0].replica)))[4:])
        fresh = Process(number, self.clock)
        snapshot.restore(fresh.replica, start.table)
        self.processes[number] = fresh

    def settle(self) -> None:
        while True:
            for number in self.processes:
                self.flush(number)
            if not any((*self.to_leader.values(), *self.from_leader.values())):
                return
            for number in (1, 2):
                self.leader_reads(number)
                self.follower_reads(number)

    @invariant()
    def nothing_is_negative(self):
        for process in self.processes.values():
            for state in process.table.states:
                assert state.in_flight >= 0
                assert all(rank.outstanding_requests == len(rank.leases) for rank in state.ranks)

    @rule()
    def all_are_told(self):
        """Then all tables are equal, and hold just the leases that are open."""
        self.settle()
        leader = self.processes[0].table
        for number, process in self.processes.items():
            assert process.table.in_flight == leader.in_flight
            for state in process.table.states:
                mine = leader.state(state.worker.name)
                assert (state.worker, state.healthy, state.draining) == (mine.worker, mine.healthy, mine.draining)
                assert state.in_flight == mine.in_flight
                assert state.in_flight == sum(lease.state.worker.name == state.worker.name for lease in self.all_open())
                if state.worker.name == "p:2":  # which ranks a lease was on when they vanished is told apart by time
                    continue
                for rank, theirs in zip(state.ranks, mine.ranks, strict=True):
                    assert rank.outstanding_requests == theirs.outstanding_requests
                    assert rank.outstanding_tokens == pytest.approx(theirs.outstanding_tokens, abs=1e-3)
                    assert rank.scraped == theirs.scraped
            others = sum(
                len(self.open[other]) + len(self.unjudged[other]) for other in self.processes if other != number
            )
            assert process.replica.leases_of_others <= others

    def all_open(self) -> list:
        return [lease for number in self.processes for lease in self.open[number]]

    def teardown(self):
        """When everything has ended, nothing is charged anywhere, and nothing is remembered."""
        for number, process in self.processes.items():
            for lease in self.open[number]:
                process.table.release(lease)
            for lease in self.unjudged[number]:
                process.table.judge(lease, None)
            self.open[number], self.unjudged[number] = [], []
        self.settle()
        for process in self.processes.values():
            assert process.table.in_flight == dict.fromkeys(Role, 0)
            assert process.replica.leases_of_others == 0
            for state in process.table.states:
                assert state.in_flight == 0
                assert all(rank.outstanding_tokens == 0 and not rank.leases for rank in state.ranks)


TestStar = Star.TestCase
TestStar.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)


# Envoy's configuration


def test_envoy_is_told_of_every_process():
    from extproc.envoy_config import bootstrap, to_yaml  # noqa: PLC0415 - takes a second to import

    def generated(**settings) -> dict:
        return yaml.safe_load(to_yaml(bootstrap(Config(**settings), grpc_target="unix:/run/x.sock")))[
            "static_resources"
        ]

    one, two = generated(), generated(processes=2)
    paths = {
        cluster["name"]: [
            endpoint["endpoint"]["address"]["pipe"]["path"]
            for endpoint in cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        ]
        for cluster in two["clusters"]
        if cluster["name"].startswith("extproc")
    }
    assert paths == {
        "extproc": ["/run/x.sock.0", "/run/x.sock.1"],
        "extproc_0": ["/run/x.sock.0"],
        "extproc_1": ["/run/x.sock.1"],
    }
    assert [cluster["name"] for cluster in one["clusters"]] == ["il_pd", "decode", "prefill", "extproc"]

    def manager(resources: dict, name: str) -> dict:
        listener = next(each for each in resources["listeners"] if each["name"] == name)
        return listener["filter_chains"][0]["filters"][0]["typed_config"]

    (mirror,) = manager(two, "il_pd")["route_config"]["virtual_hosts"][0]["routes"][0]["route"][
        "request_mirror_policies"
    ]
    assert mirror["cluster_header"] == "x-pd-process"
    asked = {
        cluster["name"]: options["http_filters"][0]["typed_config"]["grpc_service"]["envoy_grpc"]["cluster_name"]
        for cluster in two["clusters"]
        for options in cluster["typed_extension_protocol_options"].values()
        if "http_filters" in options
    }
    assert asked == {process_mark(number): f"extproc_{number}" for number in (0, 1)}
    logs = [log["typed_config"]["common_config"]["grpc_service"] for log in manager(two, "il_pd")["access_log"]]
    assert [log["envoy_grpc"]["cluster_name"] for log in logs] == ["extproc_0", "extproc_1"]
    assert "process" not in yaml.safe_dump(one).replace("processing_mode", "").replace("ext_proc", "")
