"""The load table: charges come and go, and nothing leaks."""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from extproc.load import MAX_CHANGES, LoadTable
from extproc.load_model import Scraped
from extproc.model import RankLoad, Role, Worker


def worker(name: str = "w:1", role: Role = Role.PREFILL, dp_size: int | None = 2) -> Worker:
    return Worker(name, role, f"http://{name}", "127.0.0.1:1", dp_size=dp_size)


def test_only_healthy_workers_with_an_address_are_eligible():
    table = LoadTable([worker(), worker("w:2", Role.DECODE)], lambda: 0.0)
    assert not table.eligible(Role.PREFILL)
    table.worker_changed(worker(), True)
    assert [state.worker.name for state in table.eligible(Role.PREFILL)] == ["w:1"]
    assert not table.eligible(Role.DECODE)
    unresolved = Worker("w:2", Role.DECODE, "http://w:2")
    table.worker_changed(unresolved, True)
    assert not table.eligible(Role.DECODE)
    table.worker_changed(worker(), False)
    assert not table.eligible(Role.PREFILL)


def test_a_scrape_erases_increments_but_not_the_ledger():
    table = LoadTable([worker()], lambda: 0.0)
    state = table.states[0]
    lease = table.charge(state, 1, 100, 28)
    assert Scraped().rank_loads([state]).tokens[0] == [0, 100]
    table.observe("w:1", [RankLoad(0, used_tokens=70), RankLoad(1, used_tokens=5)], at_s=1.0)
    assert Scraped().rank_loads([state]).tokens[0] == [70, 5]
    assert state.ranks[1].outstanding_tokens == 128
    table.release(lease)
    table.release(lease)
    assert state.ranks[1].outstanding_tokens == 0
    assert state.in_flight == 0


def test_missing_figures_are_not_zero():
    table = LoadTable([worker()], lambda: 0.0)
    state = table.states[0]
    table.observe("w:1", [RankLoad(0, used_tokens=70), RankLoad(1, running_requests=3)], at_s=1.0)
    table.charge(state, 0, 10)
    # Rank 1 did not say: both are compared by what was sent.
    assert Scraped().rank_loads([state]).tokens[0] == [10, 0]
    table.observe("w:1", [RankLoad(1, used_tokens=80)], at_s=2.0)
    assert Scraped().rank_loads([state]).tokens[0] == [80, 80]


def test_what_the_ledger_was_is_known_as_far_back_as_changes_are_kept():
    now_s = [0.0]
    table = LoadTable([worker()], lambda: now_s[0])
    state = table.states[0]
    was, rng, leases = [], random.Random(3), []
    for step in range(3 * MAX_CHANGES):
        now_s[0] = float(step)
        if leases and rng.random() < 0.5:
            table.release(leases.pop(rng.randrange(len(leases))))
        else:
            leases.append(table.charge(state, 0, rng.randrange(1_000)))
        was.append(state.ranks[0].outstanding_tokens)
    rank = state.ranks[0]
    for back in (1, 2, 100, MAX_CHANGES - 1, MAX_CHANGES):
        assert rank.outstanding_at(now_s[0] - back + 0.5) == was[-1 - back]
    assert rank.outstanding_at(5.0) == was[-1 - MAX_CHANGES]  # the oldest that is known
    assert rank.changed_at_s == now_s[0]
    assert len(rank.changes) == 2 * MAX_CHANGES


def test_figures_for_unknown_workers_and_ranks_are_dropped():
    table = LoadTable([worker()], lambda: 0.0)
    table.observe("gone:1", [RankLoad(0, used_tokens=1)], at_s=1.0)
    table.observe("w:1", [RankLoad(7, used_tokens=1)], at_s=1.0)
    assert [rank.scraped for rank in table.states[0].ranks] == [None, None]


def test_an_engine_may_come_back_with_other_ranks():
    table = LoadTable([worker()], lambda: 0.0)
    state = table.states[0]
    leases = [table.charge(state, 0, 5), table.charge(state, 1, 7)]
    table.worker_changed(worker(dp_size=1), True)
    assert [rank.outstanding_tokens for rank in state.ranks] == [5]
    table.worker_changed(worker(dp_size=4), True)
    assert [rank.outstanding_tokens for rank in state.ranks] == [5, 0, 0, 0]
    for lease in leases:
        table.release(lease)
    assert all(rank.outstanding_tokens == rank.outstanding_requests == 0 for rank in state.ranks)
    assert state.in_flight == 0


TOKENS = st.floats(0, 1e6)


class LeaseMachine(RuleBasedStateMachine):
    """Any order of charges, releases, scrapes and restarts: the ledger equals the sum of open leases."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.table = LoadTable([worker("a:1"), worker("b:1", dp_size=4)], lambda: 0.0)
        self.open = {}

    @rule(
        target=leases, which=st.integers(0, 1), rank=st.integers(0, 3), prompt=st.floats(0, 1e6), out=st.floats(0, 1e6)
    )
    def charge(self, which, rank, prompt, out):
        state = self.table.states[which]
        lease = self.table.charge(state, rank % len(state.ranks), prompt, out)
        self.open[id(lease)] = lease
        return lease

    @rule(lease=consumes(leases), twice=st.booleans())
    def release(self, lease, twice):
        self.table.release(lease)
        if twice:
            self.table.release(lease)
        del self.open[id(lease)]

    @rule(which=st.sampled_from(["a:1", "b:1", "c:1"]), rank=st.integers(0, 5), used=st.none() | st.floats(0, 1e6))
    def observe(self, which, rank, used):
        self.table.observe(which, [RankLoad(rank, used_tokens=used)], at_s=0.0)

    @rule(dp_size=st.none() | st.integers(1, 6), healthy=st.booleans())
    def restart(self, dp_size, healthy):
        self.table.worker_changed(worker("a:1", dp_size=dp_size), healthy)

    @invariant()
    def ledger_is_the_sum_of_open_leases(self):
        for state in self.table.states:
            mine = [lease for lease in self.open.values() if lease.state is state]
            assert state.in_flight == len(mine)
            for rank in state.ranks:
                tokens = [lease.tokens for lease in mine if lease.rank is rank]
                assert rank.outstanding_requests == len(tokens)
                assert abs(rank.outstanding_tokens - sum(tokens)) <= 1e-6 * (1 + sum(tokens)) + 1e-3
                assert rank.charged_tokens >= 0


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestLeases = LeaseMachine.TestCase


def test_repr_says_what_a_person_wants_to_know():
    table = LoadTable([worker()], lambda: 0.0)
    table.worker_changed(worker(), True)
    table.charge(table.states[0], 1, random.Random(0).randrange(10, 11))
    assert "prefill w:1/1 up scraped=None charged=10 outstanding=10/1" in repr(table)
