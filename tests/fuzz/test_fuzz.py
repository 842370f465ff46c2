"""The short version of `make fuzz`: every target under Hypothesis, and the driver itself."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_board import Board
from fuzz_child import Search, run_random
from fuzz_exchange import check_exchange
from fuzz_findings import kind, smaller
from fuzz_mutate import Mutator
from fuzz_target import Target
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from extproc import is_compiled
from extproc.gateway import Gateway
from extproc.load import LoadTable

EXAMPLES = 200


@st.composite
def inputs(draw, target: Target) -> bytes:
    """A seed with pieces put in, or the pieces alone, or any bytes."""
    pieces = [st.binary(max_size=8)]
    if target.words:
        pieces.append(st.sampled_from(target.words))
    data = draw(st.sampled_from([b"", *target.seeds]))
    for piece in draw(st.lists(st.one_of(pieces), max_size=12)):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + piece + data[at + draw(st.integers(0, len(piece))) :]
    return data


@pytest.mark.parametrize("name", TARGETS)
def test_what_must_hold_holds(name):
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def check(data):
        target.check(data)

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_ordinary(name):
    """They reach more than a refusal, so that what grows from them does, too."""
    target = TARGETS[name]
    kinds = set()
    for data in target.seeds:
        outcome = target.check(data)
        kinds |= outcome if isinstance(outcome, frozenset) else {outcome}
    assert len(kinds) > 1


@pytest.mark.skipif(is_compiled(), reason="compiled classes call their own methods, whatever is set on them")
@pytest.mark.parametrize(("owner", "name"), [(Gateway, "closed"), (LoadTable, "release")])
def test_an_exchange_that_forgets_something_is_noticed(monkeypatch, owner, name):
    def play():
        for data in TARGETS["exchange"].seeds:
            check_exchange(data)

    play()
    monkeypatch.setattr(owner, name, lambda *_, **__: None)
    with pytest.raises(AssertionError):
        play()


def broken(data: bytes) -> int:
    """Stands in for a target with a fault."""
    if b"!" in data and b"?" in data:
        raise ZeroDivisionError
    return len(data) % 3


BROKEN = Target("broken", broken, (b"hello!", b"world"), (b"?", b"!"), share=1.0)


def test_a_fault_is_found_made_smaller_and_saved_once(tmp_path):
    Board.make(tmp_path / "board")
    with Board(tmp_path / "board") as board:
        search = Search(BROKEN, board, tmp_path / "findings")
        run_random(search, BROKEN, 500, seed=1)
        counters, current = board.read()
    assert (counters.inputs, counters.behaviours, counters.findings, current) == (500, 3, 1, b"")
    [saved] = (path for path in (tmp_path / "findings").iterdir() if not path.suffix)
    assert sorted(saved.read_bytes()) == sorted(b"!?")
    assert "ZeroDivisionError" in saved.with_suffix(".txt").read_text()


def test_a_seed_gives_the_same_inputs_again():
    def some(seed: int) -> list[bytes]:
        mutator = Mutator(BROKEN.seeds, BROKEN.words, random.Random(seed))
        return [mutator.make() for _ in range(50)]

    assert some(1) == some(1) != some(2)


def test_smaller_keeps_the_fault():
    with pytest.raises(ZeroDivisionError) as raised:
        broken(b"some ! long ? text")
    assert smaller(broken, b"some ! long ? text", kind(raised.value)) == b"!?"


def test_the_command(tmp_path):
    script = Path(__file__).with_name("run.py")
    options = ["--inputs", "2000", "--findings", str(tmp_path / "findings"), "--not-guided"]
    done = subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for name in TARGETS)
    assert not (tmp_path / "findings").exists()
