"""Bytes → JSON objects as odd as JSON allows: choices are read off the input, so that every input is a valid object."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

KEYS = (
    *("text", "prompt", "input_ids", "messages", "tools", "model", "n", "stream", "max_tokens", "sampling_params"),
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "routed_dp_rank", "disagg_prefill_dp_rank"),
    *("data_parallel_rank", "max_completion_tokens", "max_new_tokens", "content", "role"),
    *("stream_options", "", "x", "}", '"', "\\"),
)
BLANKS = ("", "", " ", "\n", "\t\r\n ")
NUMBERS = (
    *("0", "-0", "-0.0", "1", "2", "-5", "7.25", "1e3", "1E+2", "5e-324", "1e400", "9007199254740993"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "123456789" * 9),
)
STRINGS = (
    *("", "x", "hello", "}", "{", "[", "]", ",", ":", '\\"', "\\\\", "\\/", "\\n", "\\u0000", "\\u007d", "\\u0022"),
    *("ü", "漢字", "\U0001f600", "\\ud83d\\ude00", "\\ud83d", "\\ude00", "data:image/png;base64,AAAA", "image_url"),
)
MOST_DEPTH = 6
MOST_PARTS = 5


class Choices:
    """Reads choices off bytes; the first one of each when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def __bool__(self) -> bool:
        return self._data.__length_hint__() > 0

    def number(self, below: int) -> int:
        """One in [0, below), below at most 256."""
        return next(self._data, 0) % below

    def one(self, options: Sequence[T]) -> T:
        """One of them."""
        return options[self.number(len(options))]


def json_object(choices: Choices) -> bytes:
    """An object with blanks around it."""
    return f"{choices.one(BLANKS)}{_object(choices, 0)}{choices.one(BLANKS)}".encode()


def _object(choices: Choices, depth: int) -> str:
    members = [f"{_key(choices)}{choices.one(BLANKS)}:{_blank_value(choices, depth)}" for _ in range(_parts(choices))]
    return "{" + (",".join(members) or choices.one(BLANKS)) + "}"


def _array(choices: Choices, depth: int) -> str:
    if choices.number(3):  # mostly of one kind, as prompts are
        kind = choices.one(VALUES)
        values = [f"{choices.one(BLANKS)}{kind(choices, depth + 1)}" for _ in range(_parts(choices))]
    else:
        values = [_blank_value(choices, depth) for _ in range(_parts(choices))]
    return "[" + (",".join(values) or choices.one(BLANKS)) + "]"


def _parts(choices: Choices) -> int:
    return choices.number(MOST_PARTS + 1) if choices else 0


def _blank_value(choices: Choices, depth: int) -> str:
    kinds = VALUES if depth < MOST_DEPTH else VALUES[:-2]
    return f"{choices.one(BLANKS)}{choices.one(kinds)(choices, depth + 1)}{choices.one(BLANKS)}"


def _key(choices: Choices) -> str:
    """A key, with one of its characters escaped or none."""
    name = choices.one(KEYS)
    at = choices.number(2 * len(name) + 1)
    spelled = [f"\\u{ord(letter):04x}" if i == at or letter in '"\\' else letter for i, letter in enumerate(name)]
    return f'"{"".join(spelled)}{choices.one(STRINGS) if not choices.number(8) else ""}"'


def _string(choices: Choices, _depth: int) -> str:
    return '"' + "".join(choices.one(STRINGS) for _ in range(1 + choices.number(3))) + '"'


def _number(choices: Choices, _depth: int) -> str:
    return choices.one(NUMBERS)


def _word(choices: Choices, _depth: int) -> str:
    return choices.one(("null", "true", "false"))


VALUES: tuple[Callable[[Choices, int], str], ...] = (_string, _number, _word, _string, _array, _object)
