"""A worker that drains: it is never picked, whatever the policy, and what runs on it goes on."""

import random
from dataclasses import replace

import pytest
from fleets import Fleet, request, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import generate_latest

from extproc.circuit import CircuitLimits
from extproc.config import Config, WorkerConfig, build
from extproc.errors import ConfigError, NoWorker
from extproc.model import RankLoad, Role
from extproc.policy import WORKER_POLICIES
from extproc.server import Service
from extproc.table_view import describe_state
from extproc.telemetry import Telemetry


def drain(fleet: Fleet, number: int, draining: bool = True) -> None:
    fleet.table.set_draining(fleet.workers[number].name, draining)


def picked(fleet: Fleet, each: object, **options: object) -> str:
    """Where the request goes; it ends at once."""
    scheduled = fleet.scheduler.place(each, **options)
    fleet.end(scheduled)
    return scheduled.placement.prefill.worker.name


def test_it_gets_nothing_new_and_what_runs_goes_on():
    fleet = Fleet(2, 2)
    scheduled = fleet.place(*(unlike() for _ in range(20)))
    before = fleet.in_flight[0]
    assert before
    drain(fleet, 0)
    assert [state.worker.name for state in fleet.table.eligible(Role.PREFILL)] == [fleet.workers[1].name]
    fleet.place(*(unlike() for _ in range(20)))
    state = fleet.table.states[0]
    assert describe_state(state) == {
        "worker": fleet.workers[0].name,
        "role": "prefill",
        "healthy": True,
        "draining": True,
        "in_flight": before,
    }
    for each in scheduled:
        fleet.end(each)
    assert state.in_flight == 0
    drain(fleet, 0, False)
    assert fleet.workers[0].name in {picked(fleet, unlike()) for _ in range(50)}


@pytest.mark.parametrize("policy", sorted(WORKER_POLICIES))
def test_no_policy_sticks_to_it(policy):
    """The same key and the same prompt as ever: the one worker that has them drains."""
    fleet = Fleet(1, 1, 1, policy=policy)
    sticky = request(prompt=random.Random(5).randbytes(4000), key="somebody")
    home = picked(fleet, sticky)
    fleet.table.set_draining(home, True)
    assert home not in {picked(fleet, sticky) for _ in range(60)}


@pytest.mark.parametrize("policy", ["consistent_hashing", "prefix_hash"])
def test_what_hashes_to_it_comes_home_afterwards(policy):
    fleet = Fleet(1, 1, 1, policy=policy)
    sticky = request(prompt=random.Random(5).randbytes(4000), key="somebody")
    home = picked(fleet, sticky)
    fleet.table.set_draining(home, True)
    assert picked(fleet, sticky) != home
    fleet.table.set_draining(home, False)
    assert picked(fleet, sticky) == home


def test_a_retry_does_not_go_to_it_even_as_a_last_resort():
    fleet = Fleet(1, 1)
    drain(fleet, 0)
    names = [worker.name for worker in fleet.workers]
    assert {picked(fleet, unlike(), avoid=names[1:]) for _ in range(30)} == {names[1]}


def test_a_role_whose_workers_all_drain_or_are_dead_has_none():
    fleet = Fleet(2, 2, 2)
    drain(fleet, 0)
    drain(fleet, 1)
    fleet.set_healthy(2, False)
    with pytest.raises(NoWorker, match=r"no healthy prefill worker \(3 configured, 2 draining\)"):
        fleet.scheduler.place(unlike())
    with pytest.raises(NoWorker):
        fleet.scheduler.check_available()
    drain(fleet, 1, False)
    assert picked(fleet, unlike()) == fleet.workers[1].name


def test_it_stays_so_when_the_worker_restarts_or_is_known_better():
    fleet = Fleet(2, 2)
    drain(fleet, 0)
    fleet.set_healthy(0, False)
    fleet.set_healthy(0, True)
    fleet.table.worker_changed(replace(fleet.workers[0], dp_size=8), True)
    assert fleet.table.states[0].draining
    assert [state.worker.name for state in fleet.table.eligible(Role.PREFILL)] == [fleet.workers[1].name]


def test_scrapes_of_it_go_on():
    fleet = Fleet(2, 2)
    drain(fleet, 0)
    fleet.table.observe(fleet.workers[0].name, [RankLoad(1, used_tokens=7)], at_s=0.0)
    assert fleet.table.states[0].ranks[1].scraped.used_tokens == 7


def test_an_unknown_worker_cannot_drain():
    with pytest.raises(KeyError):
        Fleet(1).table.set_draining("nobody:1", True)


def test_a_closed_scheduler_places_nothing():
    fleet = Fleet(1)
    fleet.scheduler.close()
    for ask in (lambda: fleet.scheduler.place(unlike()), fleet.scheduler.pick_direct, fleet.scheduler.check_available):
        with pytest.raises(NoWorker, match="stopping"):
            ask()
    assert fleet.in_flight == [0]


class Drains(RuleBasedStateMachine):
    """Any order of drains, undos, deaths, circuit trips, picks and ends: no pick is ever of a worker that drains."""

    @initialize(policy=st.sampled_from(sorted(WORKER_POLICIES)), seed=st.integers(0, 99))
    def start(self, policy, seed):
        self.fleet = Fleet(1, 2, None, 8, seed=seed, policy=policy)
        # Circuits that open at the second failure in a row.
        for state in self.fleet.table.states:
            state.circuit.limits = CircuitLimits(2, 1, 5, 60)
        self.marked = set()
        self.down = set()
        self.open = []

    @rule(number=st.integers(0, 3), draining=st.booleans())
    def mark(self, number, draining):
        drain(self.fleet, number, draining)
        (self.marked.add if draining else self.marked.discard)(self.fleet.workers[number].name)

    @rule(number=st.integers(0, 3), healthy=st.booleans())
    def health(self, number, healthy):
        self.fleet.set_healthy(number, healthy)
        (self.down.discard if healthy else self.down.add)(self.fleet.workers[number].name)

    @rule(key=st.integers(0, 3), avoid=st.sets(st.integers(0, 3)))
    def place(self, key, avoid):
        each = request(prompt=b"%d" % key * 400, key=f"key {key}")
        names = [worker.name for worker in self.fleet.workers]
        try:
            scheduled = self.fleet.scheduler.place(each, avoid=[names[number] for number in avoid])
        except NoWorker:
            assert not self.fleet.states
            return
        name = scheduled.placement.prefill.worker.name
        assert name not in self.marked | self.down
        self.open.append(scheduled)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data, failed):
        scheduled = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.fleet.table.release(scheduled.prefill, failed)
        self.fleet.table.release(scheduled.decode)

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds):
        self.fleet.clock.now_s += seconds

    @invariant()
    def marks_are_as_set_and_what_runs_is_counted(self):
        for state in self.fleet.table.states:
            assert state.draining == (state.worker.name in self.marked)
        assert sum(state.in_flight for state in self.fleet.table.states) == 2 * len(self.open)


Drains.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDrains = Drains.TestCase


@given(st.sets(st.integers(0, 3)))
def test_metrics_and_repr_say_which(numbers):
    fleet = Fleet(1, 1, 1, 1)
    for number in numbers:
        drain(fleet, number)
    text = generate_latest(Telemetry(fleet.table, fleet.clock, lambda: 0).registry).decode()
    for number, worker in enumerate(fleet.workers):
        sample = f'extproc_worker_draining{{role="prefill",worker="{worker.name}"}} {float(number in numbers)}'
        assert sample in text
        assert f"prefill {worker.name}/0 up{' draining' if number in numbers else ''} " in repr(fleet.table)


def test_the_configuration_can_begin_with_it():
    config = Config(
        prefill=(WorkerConfig(url="http://127.0.0.1:1", draining=True), WorkerConfig(url="http://127.0.0.1:2")),
        decode=(WorkerConfig(url="http://127.0.0.1:3"),),
    )
    table = Service(config).table
    assert [state.draining for state in table.states] == [True, False, False]


def test_the_file_says_so_in_words():
    worker = {"url": "http://127.0.0.1:1", "draining": True}
    assert build({"prefill": [worker], "shutdown_drain_delay_secs": 0}, {}).prefill[0].draining
    with pytest.raises(ConfigError, match=r"prefill\[0\].draining"):
        build({"prefill": [{**worker, "draining": "soon"}]}, {})
    with pytest.raises(ConfigError, match="shutdown_drain_delay_secs"):
        build({"shutdown_drain_delay_secs": -1}, {})
