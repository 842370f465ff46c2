"""What the demo prints: tables for people, 100 columns wide, the same on a terminal and in a pipe."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from extproc.demo.spread import RankUse, spread
from extproc.demo.stack import Stack
from extproc.demo.verify import Result

TEXT_WIDTH = 100
TABLE_WIDTH = 160
"""The tables take less than 100 columns; where a figure is unusually long, a line may be longer, but nothing is cut."""
PLAIN_STEPS = 8
"""Lines of progress where there is no terminal."""
MAX_PROBLEMS = 20


def make_console() -> Console:
    """On standard output. Wider than it may be: a narrow terminal wraps lines, but rich would cut words."""
    return Console(highlight=False, width=TABLE_WIDTH)


def say(console: Console, text: str, style: str | None = None) -> None:
    """A paragraph of text."""
    console.print()
    console.print(textwrap.fill(text, TEXT_WIDTH, break_on_hyphens=False), style=style, markup=False)


@contextmanager
def progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress; call what it gives once for each step. A bar on a terminal, a few lines elsewhere."""
    done = 0
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return

    def step() -> None:
        nonlocal done
        done += 1
        if done * PLAIN_STEPS // total > (done - 1) * PLAIN_STEPS // total:
            console.print(f"  {what}: {done} of {total}")
            console.file.flush()

    yield step


def print_processes(console: Console, stack: Stack) -> None:
    """What runs where."""
    table = _table()
    for heading in ("", "role", "address", "pid"):
        table.add_column(heading)
    for engine in stack.engines:
        table.add_row(engine.label, f"{engine.role} engine, dp_size {engine.dp_size}", engine.url, str(engine.pid))
    table.add_row("", "gateway (Envoy and the ext_proc service)", stack.url, str(stack.gateway.pid))
    table.add_row("", "the service's own metrics", f"{stack.status_url}/metrics", "")
    console.print()
    console.print(table)


def print_results(console: Console, results: Sequence[Result]) -> None:
    """A line for each request."""
    table = _table(gap=1)
    table.add_column("#", justify="right")
    table.add_column("request")
    table.add_column("prefill")
    table.add_column("decode")
    for heading in ("room", "in", "out", "TTFT", "total"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for result in results:
        request, answer = result.request, result.answer
        table.add_row(
            str(request.number),
            request.title,
            str(result.prefill or "-"),
            str(result.decode or "-"),
            "-" if answer.room is None else str(answer.room),
            f"{sum(answer.prompt_tokens.values()):,}",
            f"{sum(answer.output_tokens.values()):,}",
            _ms(answer.first_token_s),
            _ms(answer.total_s),
            f"[red]{answer.status or 'none'} WRONG[/]" if result.problems else str(answer.status),
        )
    console.print()
    console.print(table)
    say(
        console,
        "P1/0: worker P1, DP rank 0. x3: a batch of three prompts. ids: the prompt is token ids. in, out: tokens as "
        "the engine counts them. TTFT: time to first token, where the answer is streamed; TTFT and total in ms, as the "
        "client sees them.",
        style="dim",
    )


def print_ranks(console: Console, uses: Sequence[RankUse]) -> None:
    """A line for each rank."""
    table = _table()
    table.add_column("rank")
    for heading in ("requests", "prompt tokens", "output tokens", "tokens in KV cache", "max/mean on its worker"):
        table.add_column(heading, justify="right")
    for _, ranks in _by_worker(uses):
        tokens = [use.tokens for use in ranks]
        for use in ranks:
            figures = (use.requests, use.prompt_tokens, use.output_tokens, use.tokens)
            last = _ratio(spread(tokens)) if use is ranks[-1] else ""
            table.add_row(f"{use.engine.label}/{use.dp_rank}", *(f"{figure:,}" for figure in figures), last)
    console.print()
    console.print(table)


def print_comparison(console: Console, names: Sequence[str], runs: Sequence[Sequence[RankUse]]) -> None:
    """The spread of the same requests under two ways to choose the rank, side by side."""
    table = _table()
    table.add_column("\nworker")
    for name in names:
        table.add_column(f"{name}\ntokens on each rank", justify="right")
        table.add_column("\nmax/mean", justify="right", style="bold")
    means = []
    rows: dict[str, list[str]] = {}
    for uses in runs:
        spreads = []
        for role, of_role in groupby(uses, lambda use: use.engine.role):
            listed = list(of_role)
            for label, ranks in _by_worker(listed):
                tokens = [use.tokens for use in ranks]
                ratio = spread(tokens)
                spreads += [] if ratio is None else [ratio]
                rows.setdefault(label, []).extend((" ".join(f"{figure:,}" for figure in tokens), _ratio(ratio)))
            everywhere = spread([use.tokens for use in listed])
            rows.setdefault(f"all {role} workers", []).extend(("", _ratio(everywhere)))
        means.append(sum(spreads) / len(spreads) if spreads else None)
    for label, cells in rows.items():
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("mean of the workers", *(cell for mean in means for cell in ("", _ratio(mean))))
    console.print()
    console.print(table)


def print_problems(console: Console, results: Sequence[Result], others: Sequence[str]) -> None:
    """Everything that was wrong."""
    lines = [f"request {r.request.number} ({r.request.title}): {problem}" for r in results for problem in r.problems]
    lines = [*others, *lines]
    for line in lines[:MAX_PROBLEMS]:
        console.print(line, style="red", markup=False)
    if len(lines) > MAX_PROBLEMS:
        console.print(f"and {len(lines) - MAX_PROBLEMS} problems more", style="red")


def _table(gap: int = 2) -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)


def _by_worker(uses: Sequence[RankUse]) -> Iterator[tuple[str, list[RankUse]]]:
    for label, ranks in groupby(uses, lambda use: use.engine.label):
        yield label, list(ranks)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.0f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
