"""Delays of one length: in order, called off, begun anew, one timer."""

import asyncio

import pytest

from extproc.delays import MAX_SLACK_S, SLACK, Delays


class Loop:
    """As much of an event loop as `Delays` uses, with a clock moved by hand."""

    def __init__(self):
        self.now_s = 0.0
        self.calls = []

    def time(self):
        return self.now_s

    def call_at(self, when_s, call):
        self.calls.append((when_s, call))

    def advance(self, to_s):
        while self.calls and self.calls[0][0] <= to_s:
            when_s, call = self.calls.pop(0)
            self.now_s = when_s
            call()
        self.now_s = to_s


@pytest.fixture
def loop(monkeypatch):
    made = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: made)
    return made


def test_each_is_due_after_its_delay(loop):
    told = []
    delays = Delays(1.0, lambda key: told.append((key, loop.now_s)))
    for key, at_s in enumerate((0.0, 0.01, 0.5, 0.99)):
        loop.advance(at_s)
        delays.add(key)
    assert len(loop.calls) == 1
    loop.advance(0.999)
    assert not told
    loop.advance(10.0)
    assert [key for key, _ in told] == [0, 1, 2, 3]
    for (_, told_s), added_s in zip(told, (0.0, 0.01, 0.5, 0.99), strict=True):
        assert 1.0 <= told_s - added_s <= 1.0 + 2 * SLACK
    assert not loop.calls
    assert not delays


def test_one_that_is_taken_out_is_not_told(loop):
    told = []
    delays = Delays(1.0, told.append)
    delays.add("a")
    delays.add("b")
    delays.discard("a")
    delays.discard("unknown")
    loop.advance(5.0)
    assert told == ["b"]


def test_added_again_it_begins_anew(loop):
    told = []
    delays = Delays(1.0, told.append)
    delays.add("a")
    delays.add("b")
    loop.advance(0.9)
    delays.add("a")
    loop.advance(1.5)
    assert told == ["b"]
    loop.advance(2.5)
    assert told == ["b", "a"]


def test_after_a_pause_it_goes_on(loop):
    told = []
    delays = Delays(1.0, told.append)
    delays.add("a")
    delays.discard("a")
    loop.advance(5.0)
    assert not loop.calls
    delays.add("b")
    loop.advance(7.0)
    assert told == ["b"]


def test_whom_it_tells_may_add_and_take_out(loop):
    told = []

    def due(key):
        told.append(key)
        if key == "a":
            delays.discard("b")
            delays.add("d")

    delays = Delays(1.0, due)
    for key in "abc":
        delays.add(key)
    loop.advance(1.5)
    assert told == ["a", "c"]
    loop.advance(5.0)
    assert told == ["a", "c", "d"]


def test_an_error_stops_nobody_else(loop):
    told = []

    def due(key):
        told.append(key)
        if key == "a":
            raise RuntimeError

    delays = Delays(1.0, due)
    for key in "abc":
        delays.add(key)
    with pytest.raises(RuntimeError):
        loop.advance(2.0)
    loop.advance(2.0)
    assert told == ["a", "b", "c"]


@pytest.mark.parametrize(("after_s", "slack_s"), [(0.02, 0.02 * SLACK), (600.0, MAX_SLACK_S)])
def test_it_is_late_by_little(loop, after_s, slack_s):
    told = []
    delays = Delays(after_s, told.append)
    delays.add("a")
    loop.advance(after_s)
    assert not told
    loop.advance(after_s + slack_s)
    assert told == ["a"]
