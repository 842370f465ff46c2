"""The `extproc` command: one module a subcommand, flags in `flags`."""

from extproc.cli.main import main

__all__ = ["main"]
