"""A progress bar over runs, on terminals only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extproc.lab.experiment import Case


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
