"""One target in a process of its own: inputs until the number is reached. `fuzz_run` starts it and watches.

python tests/fuzz/fuzz_child.py TARGET --inputs N --seed S --board FILE --findings FOLDER [--guided]
"""

import argparse
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Hashable
from pathlib import Path

from fuzz_board import MAX_INPUT_BYTES, Board, Counters
from fuzz_findings import MOST_FINDINGS, Pace, check_pace, kind, save, smaller
from fuzz_mutate import Mutator
from fuzz_target import Target


class Search:
    """Runs inputs, and remembers kinds of outcome and findings."""

    def __init__(self, target: Target, board: Board, findings: Path) -> None:
        self._target = target
        self._board = board
        self._folder = findings
        self._counters = Counters()
        self._behaviours: set[Hashable] = set()
        self._found: set[str] = set()
        self._pace = Pace()

    @property
    def counters(self) -> Counters:
        """So far."""
        return self._counters

    def run(self, data: bytes) -> bool:
        """One input. Whether it did something new."""
        known = len(self._behaviours)
        self._counters = Counters(self._counters.inputs + 1, known, len(self._found))
        self._board.write(self._counters, data)
        started_s = time.thread_time()
        try:
            outcome = self._target.check(data)
            spent_s = time.thread_time() - started_s
            limit_s = self._pace.limit_s(data)
            if spent_s > limit_s:
                check_pace(self._target.check, data, limit_s)
            else:
                self._pace.took(data, spent_s)
        except Exception as error:
            self._finding(data, error)
            return False
        self._behaviours.update(outcome if isinstance(outcome, frozenset) else (outcome,))
        return len(self._behaviours) > known

    def _finding(self, data: bytes, error: Exception) -> None:
        what = kind(error)
        if what in self._found or len(self._found) >= MOST_FINDINGS:
            return
        self._found.add(what)
        small = smaller(self._target.check, data, what)
        path = save(self._folder, self._target, small, "".join(traceback.format_exception(error)))
        print(f"{self._target.name}: {what}: {error} ({path})", flush=True)

    def close(self) -> None:
        """Write the last figures."""
        self._counters = Counters(self._counters.inputs, len(self._behaviours), len(self._found))
        self._board.write(self._counters, b"")


def run_random(search: Search, target: Target, inputs: int, seed: int) -> None:
    """Inputs by our own driver: the same ones for the same seed."""
    mutator = Mutator(target.seeds, target.words, random.Random(seed))
    for data in target.seeds[:inputs]:
        search.run(data)
    while search.counters.inputs < inputs:
        data = mutator.make()
        if search.run(data):
            mutator.keep(data)
    search.close()


def run_guided(search: Search, target: Target, inputs: int, seed: int) -> None:
    """Inputs by libFuzzer, guided by the coverage of the target's modules; it ends the process."""
    import atheris  # noqa: PLC0415 - a tool of `make fuzz` only

    with tempfile.TemporaryDirectory(prefix="extproc-fuzz-") as directory:
        corpus, words = Path(directory, "corpus"), Path(directory, "words")
        corpus.mkdir()
        for number, data in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(data)
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))

        def one_input(data: bytes) -> None:
            if search.counters.inputs < inputs:  # libFuzzer's own count leaves out the corpus
                search.run(data)
                if search.counters.inputs == inputs:
                    search.close()

        options = (f"-runs={inputs}", f"-seed={seed}", f"-max_len={MAX_INPUT_BYTES}", f"-dict={words}")
        atheris.Setup([sys.argv[0], *options, "-print_final_stats=0", "-verbosity=1", str(corpus)], one_input)
        atheris.Fuzz()


def _escaped(word: bytes) -> str:
    """As libFuzzer's dictionaries have it."""
    return "".join(rf"\x{byte:02x}" for byte in word)


def load_target(name: str, guided: bool) -> Target:
    """The target, its modules instrumented if it is to be guided by them."""
    if not guided:
        from fuzz_targets import TARGETS  # noqa: PLC0415 - or else below
    else:
        import atheris  # noqa: PLC0415

        with atheris.instrument_imports(include=["extproc"], enable_loader_override=False):
            from fuzz_targets import TARGETS  # noqa: PLC0415
    return TARGETS[name]


def main() -> None:
    """Exits with 0 whether there were findings or not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--inputs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--findings", type=Path, required=True)
    parser.add_argument("--guided", action="store_true")
    options = parser.parse_args()
    target = load_target(options.target, options.guided)
    with Board(options.board) as board:
        search = Search(target, board, options.findings)
        run = run_guided if options.guided else run_random
        run(search, target, options.inputs, options.seed)


if __name__ == "__main__":
    main()
