"""What a person sees while and after it runs: a progress bar on terminals, tables that fit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.lab.experiment import Case

WIDTH = 120
"""Columns where there is no terminal to ask."""


def output_console() -> Console:
    """Standard output, wide enough for the tables when it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


@contextmanager
def progress_bar(console: Console, total: int, hidden: bool = False) -> Iterator[Callable[[Case], None]]:
    """Yields what to call after each run."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    disable = hidden or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        bar = progress.add_task("", total=total)

        def done(case: Case) -> None:
            progress.update(bar, advance=1, description=f"{case.policy}, seed {case.seed}")

        yield done
