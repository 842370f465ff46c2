"""docs/migration.md names every flag of both gateways, and what it calls ours is."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from extproc.cli.main import make_parser

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
FLAG = re.compile(r"--[a-z0-9][a-z0-9-]*")
ROW = re.compile(r"^\| (`--.*?) \| (.*) \|$", re.MULTILINE)
OWN = {flag for action in make_parser(["up"])._actions[-1].choices["up"]._actions for flag in action.option_strings}


def test_what_is_the_same_is_a_flag_here() -> None:
    same = [flag for theirs, ours in ROW.findall(PAGE) if ours.startswith("same") for flag in FLAG.findall(theirs)]
    assert len(same) > 30
    assert set(same) <= OWN


def test_flags_to_use_instead_are_flags_here() -> None:
    instead = {flag for _, ours in ROW.findall(PAGE) for flag in FLAG.findall(ours)}
    assert "--api-key-file" in instead
    assert instead <= OWN


def test_what_is_not_there_is_not_there() -> None:
    gone = {flag for theirs, ours in ROW.findall(PAGE) if ours.startswith("not ") for flag in FLAG.findall(theirs)}
    assert "--mini-lb" in gone
    assert not gone & OWN


@pytest.mark.peers
@pytest.mark.parametrize(
    ("variable", "launcher"),
    [("SGLANG_ROUTER_PYTHON", ["sglang_router.launch_router"]), ("SMG_PYTHON", ["smg", "launch"])],
)
def test_every_flag_of_theirs_is_there(variable: str, launcher: list[str]) -> None:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} is not set")
    printed = subprocess.run(
        [python, "-m", *launcher, "--help"], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    theirs = set(re.findall(r"^  (?:-\w, )?(--[a-z0-9-]+)", printed, re.MULTILINE)) - {"--help"}
    assert len(theirs) > 90
    assert theirs - set(FLAG.findall(PAGE)) == set()
