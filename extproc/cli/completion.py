"""`extproc completion`: a script by which bash, zsh or fish completes commands, flags, choices and files."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import shtab

SHELLS = ("bash", "zsh", "fish")

FILES = {"FILE", "FILE.png"}
"""Metavars of flags that take a file."""
FOLDERS = {"DIR"}
PATHS = {"envoy", "grpc_uds", "tokenizer_path"}
"""Flags whose PATH is one of this machine; others take the path of a URL."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shell."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that is to complete")


def run(args: argparse.Namespace) -> int:
    """Print the script, on standard output."""
    from extproc.cli.main import make_parser  # noqa: PLC0415 - it imports this module, too

    parser = make_parser()
    for action in _actions(parser):
        place = _place(action)
        if place:
            # Where shtab looks for it.
            action.complete = place  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, args.shell).rstrip() + "\n")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Flags and arguments of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _place(action: argparse.Action) -> Mapping[str, object] | None:
    """What of the file system an argument takes; None: nothing."""
    if action.metavar in FOLDERS:
        return shtab.DIRECTORY
    if action.metavar in FILES or action.type is Path or action.dest in PATHS:
        return shtab.FILE
    return None
