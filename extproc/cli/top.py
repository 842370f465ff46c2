"""`extproc top`: shows workers and ranks of a running service, again and again, or once."""

import argparse
import io
import math
import re
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.live import Live
from rich.text import Text

from extproc.config import Config
from extproc.errors import ConfigError
from extproc.top.poll import Away, Poller
from extproc.top.render import MIN_WIDTH, render

EXIT_FAILED = 1
DEFAULT_INTERVAL_S = 1.0
MIN_INTERVAL_S = 0.1
SVG_WIDTH = 100
"""Columns of a picture for a document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which service, how often, and where to."""
    defaults = Config()
    parser.add_argument(
        "--status-url",
        default=f"http://{defaults.prometheus_host}:{defaults.prometheus_port}",
        metavar="URL",
        help="the gateway's metrics port (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=_interval,
        default=DEFAULT_INTERVAL_S,
        metavar="S",
        help="between looks (default: %(default)g)",
    )
    parser.add_argument(
        "--once", action="store_true", help="print one picture with every rank, and end; so it does without a terminal"
    )
    parser.add_argument("--no-color", action="store_true", help="as NO_COLOR in the environment does")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write one picture as SVG, and end")


def _interval(text: str) -> float:
    seconds = float(text)
    if not MIN_INTERVAL_S <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: at least {MIN_INTERVAL_S:g} s")
    return seconds


def run(args: argparse.Namespace) -> int:
    """0 when somebody ends it or the one picture is out, 1 when that is not to be had. Raises ConfigError."""
    console = Console(no_color=True if args.no_color else None, highlight=False)
    with Poller(args.status_url) as poller:
        if args.svg or args.once or not console.is_terminal:
            return _show_once(poller, console, args.svg)
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            _show(poller, console, args.interval)
        except KeyboardInterrupt:
            return 0  # the only way out
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM, too, leaves the terminal as it was."""
    raise KeyboardInterrupt


def _show_once(poller: Poller, console: Console, svg: Path | None) -> int:
    try:
        overview = poller.look()
    except Away as error:
        sys.stderr.write(f"extproc top: {error}\n")
        return EXIT_FAILED
    if svg is None:
        ascii_only = console.options.ascii_only
        console.print(render(overview, url=poller.url, width=console.width, ascii_only=ascii_only))
        return 0
    picture = Console(
        record=True, width=SVG_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    picture.print(render(overview, url=poller.url, width=SVG_WIDTH))
    # Without the web fonts of rich's template: a file that loads nothing.
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    try:
        svg.write_text(picture.export_svg(title="extproc top", code_format=form, unique_id="top"), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--svg: cannot write {svg}: {error.strerror or error}") from None
    return 0


def _show(poller: Poller, console: Console, interval_s: float) -> None:
    """Until an interrupt. On the terminal's other screen: afterwards it is as before."""
    picture = Text()
    overview = None
    seen_s = time.monotonic()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            began_s = time.monotonic()
            height, note = console.height, None
            try:
                overview = poller.look()
                seen_s = began_s
            except Away as error:
                ago = f", shown as {began_s - seen_s:.0f} s ago" if overview else ""
                note = Text(f"{error}: trying again{ago}", style="bold red")
                note.truncate(2 * max(console.width, 1))
            if overview:
                room = height - (2 if note else 0)
                ascii_only = console.options.ascii_only
                picture = render(overview, url=poller.url, width=console.width, height=room, ascii_only=ascii_only)
            if console.width < MIN_WIDTH:
                note = note or Text(f"{MIN_WIDTH} columns are needed, here are {console.width}", style="bold red")
            live.update(Text("\n").join([note, picture]) if note else picture, refresh=True)
            time.sleep(max(0.0, interval_s - (time.monotonic() - began_s)))
