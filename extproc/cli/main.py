"""The command line: parses, dispatches, and turns errors into messages and exit statuses."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

# Before grpc is imported: its fork handlers are of no use here and warn at each start of Envoy.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import extproc
from extproc.errors import ConfigError

EXIT_USAGE = 2
"""As argparse exits for a wrong flag."""

Run = Callable[[argparse.Namespace], int]


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand. Its module is imported when it is named: some of them take a second."""

    module: str
    """Has `add_arguments(parser)` and `run(args) -> exit status`."""
    summary: str


COMMANDS = {
    "up": Command("extproc.cli.up", "run a whole gateway: the service and an Envoy in front of it"),
    "serve": Command("extproc.cli.serve", "run the ext_proc service, for an Envoy that is already there"),
    "envoy": Command("extproc.cli.envoy", "print the Envoy configuration that goes with the service"),
    "check": Command("extproc.cli.check", "check the configuration and ask every worker what it is"),
    "drain": Command("extproc.cli.drain", "take a worker out of a running gateway, and put it back"),
    "top": Command("extproc.cli.top", "show workers, ranks and the last decisions of a running gateway"),
    "lab": Command("extproc.lab.cli", "compare routing policies on modelled engines, in virtual time"),
    "engine": Command("extproc.sim.cli", "run a simulated SGLang engine"),
    "completion": Command("extproc.cli.completion", "print a script by which a shell completes commands and flags"),
}

FOLLOWER = "process"
"""What the service starts its further processes by (`--processes`)."""


def main(argv: Sequence[str] | None = None) -> int:
    """The `extproc` command. Returns its exit status."""
    words = sys.argv[1:] if argv is None else argv
    # No flag in front of the command takes a value, so the first word that is none is the command.
    args = make_parser([word for word in words if not word.startswith("-")][:1]).parse_args(words)
    run: Run = args.run
    try:
        return run(args)
    except ConfigError as error:
        sys.stderr.write(f"extproc: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def make_parser(complete: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The parser of all commands; only those in `complete` have their flags."""
    parser = argparse.ArgumentParser(
        prog="extproc",
        description="An Envoy ext_proc service: each LLM request to the least loaded prefill and decode DP ranks.",
    )
    parser.add_argument("--version", action="version", version=f"extproc {extproc.version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        summary = command.summary
        subparser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in complete:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    if FOLLOWER in complete:  # not listed: nobody starts it by hand
        module = importlib.import_module(f"extproc.cli.{FOLLOWER}")
        subparser = commands.add_parser(FOLLOWER)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser
