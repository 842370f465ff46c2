"""The command line: parses, dispatches, and turns errors into messages and exit statuses."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

# Before grpc is imported: its fork handlers are of no use here and warn at each start of Envoy.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import extproc
from extproc.cli import check, drain, envoy, serve, up
from extproc.errors import ConfigError
from extproc.lab import cli as lab
from extproc.sim import cli as engine

EXIT_USAGE = 2
"""As argparse exits for a wrong flag."""

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The `extproc` command. Returns its exit status."""
    args = _parser().parse_args(argv)
    run: Run = args.run
    try:
        return run(args)
    except ConfigError as error:
        sys.stderr.write(f"extproc: {error}\n")
        return EXIT_USAGE
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="extproc",
        description="An Envoy ext_proc service: each LLM request to the least loaded prefill and decode DP ranks.",
    )
    parser.add_argument("--version", action="version", version=f"extproc {extproc.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, summary: str, add_arguments: Callable[[argparse.ArgumentParser], None], run: Run) -> None:
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        add_arguments(command)
        command.set_defaults(run=run)

    add("up", "run a whole gateway: the service and an Envoy in front of it", up.add_arguments, up.run)
    add("serve", "run the ext_proc service, for an Envoy that is already there", serve.add_arguments, serve.run)
    add("envoy", "print the Envoy configuration that goes with the service", envoy.add_arguments, envoy.run)
    add("check", "check the configuration and ask every worker what it is", check.add_arguments, check.run)
    add("drain", "take a worker out of a running gateway, and put it back", drain.add_arguments, drain.run)
    add("lab", "compare routing policies on modelled engines, in virtual time", lab.add_arguments, lab.run)
    add("engine", "run a simulated SGLang engine", engine.add_arguments, engine.run)
    return parser
