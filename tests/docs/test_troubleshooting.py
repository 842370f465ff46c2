"""docs/troubleshooting.md quotes messages: they must be the code's."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
VARIES = "…"
QUOTE = re.compile(r"`([^`]+)`")
OTHERS = {"Object contains unknown field …"}
"""Words of a library: msgspec's."""


def messages() -> list[str]:
    """Every text in the package; what is put into it shows as VARIES."""
    found = []
    for path in (ROOT / "extproc").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%\w|\{\w*\}", VARIES, node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else VARIES for part in node.values]
                found.append("".join(map(str, parts)))
    return found


def quotes() -> list[str]:
    """What stands in backticks in a column of messages and is several words."""
    found = []
    column = None
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            column = None
        elif column is None:
            column = next((i for i, cell in enumerate(cells) if "message" in cell), -1)
        elif column >= 0:
            found += [quote for quote in QUOTE.findall(cells[column]) if " " in quote]
    return found


MESSAGES = messages()


@pytest.mark.parametrize("quote", sorted(set(quotes()) - OTHERS))
def test_a_quoted_message_is_the_code_s(quote: str) -> None:
    pieces = [re.escape(piece.strip()) for piece in quote.split(VARIES) if piece.strip()]
    pattern = re.compile(r".*?".join(pieces), re.DOTALL)
    assert any(pattern.search(message) for message in MESSAGES)


def test_messages_are_found() -> None:
    assert len(quotes()) > 40
    assert "no healthy … worker (…): try again later" in MESSAGES
