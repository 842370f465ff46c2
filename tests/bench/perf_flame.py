"""A flame graph as one small SVG, of what py-spy counted: no script, and no package for it.

Bars lie on what called them, as wide as their share of the samples; narrow ones are left out.
"""

import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, ROW, CHARACTER = 1200, 17, 6.6
"""Pixels; the last one of the font."""
LEAST_SHARE = 0.002
"""Of all samples: what is narrower is not drawn."""
SAMPLES_PER_S = 400
COLOURS = {
    "extproc/lean": "#8fbf8f",
    "extproc/transport": "#8fbf8f",
    "extproc/wire": "#e0a060",
    "extproc/exchange": "#90b0e0",
    "extproc/service": "#b8c8e8",
    "extproc/schedule": "#e08f8f",
    "extproc/policy": "#e08f8f",
    "extproc/load": "#e08f8f",
    "extproc/mutation": "#d8c870",
    "extproc/request": "#d8c870",
    "extproc/telemetry": "#c09fd0",
    "prometheus_client": "#c09fd0",
}
PLAIN = "#cccccc"


@dataclass(slots=True)
class Node:
    """A function, called by way of one stack."""

    samples: int = 0
    below: dict[str, "Node"] = field(default_factory=dict)


def sampler() -> str | None:
    """The path of py-spy, if it is installed."""
    beside = Path(sys.executable).with_name("py-spy")
    return str(beside) if beside.exists() else shutil.which("py-spy")


def record(pid: int, seconds: float, target: Path) -> subprocess.Popen[bytes]:
    """Begin to sample a process; `target` is there when what is returned ends."""
    command = [sampler() or "py-spy", "record", "--pid", str(pid), "--format", "raw", "--output", str(target)]
    options = ("--rate", str(SAMPLES_PER_S), "--duration", str(max(1, round(seconds))), "--nonblocking")
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def read(raw: str) -> Node:
    """What py-spy wrote: `function (file:line);... samples`, outermost first. Lines of a function are put together."""
    root = Node()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        node, samples = root, int(count)
        node.samples += samples
        for frame in stack.split(";"):
            node = node.below.setdefault(_without_line(frame), Node())
            node.samples += samples
    return root


def without_common_root(root: Node) -> Node:
    """From the first function on that is not the only one: start-up code says nothing."""
    while len(root.below) == 1:
        [only] = root.below.values()
        if sum(node.samples for node in only.below.values()) < only.samples:
            break
        root = only
    return root


def own_shares(root: Node) -> list[tuple[str, float]]:
    """Functions by the share of samples in which they were innermost, the largest first."""
    own: Counter[str] = Counter()

    def visit(node: Node) -> None:
        for name, below in node.below.items():
            own[name] += below.samples - sum(deeper.samples for deeper in below.below.values())
            visit(below)

    visit(root)
    return [(name, samples / root.samples) for name, samples in own.most_common()]


def draw(root: Node, title: str) -> str:
    """The SVG."""
    rows = _depth(root, root.samples * LEAST_SHARE)
    height = (rows + 1) * ROW + 24
    bars = "\n".join(_bars(root, root, 0.0, 0))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="monospace" font-size="11">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        f'<text x="6" y="16" font-size="13">{escape(title)}</text>\n'
        f'<g transform="translate(0 24)">\n{bars}\n</g>\n</svg>\n'
    )


def _bars(root: Node, node: Node, left: float, row: int) -> Iterable[str]:
    for name, below in sorted(node.below.items()):
        share = below.samples / root.samples
        width = share * WIDTH
        if share >= LEAST_SHARE:
            yield _bar(name, share, left, row, width)
            yield from _bars(root, below, left, row + 1)
        left += width


def _bar(name: str, share: float, left: float, row: int, width: float) -> str:
    colour = next((colour for path, colour in COLOURS.items() if path in name), PLAIN)
    room = int((width - 4) / CHARACTER)
    label = name.partition(" (")[0]
    text = "" if room < 3 else label if len(label) <= room else f"{label[: room - 1]}…"
    shown = f'<text x="{left + 2:.1f}" y="{row * ROW + 12}">{escape(text)}</text>' if text else ""
    return (
        f'<g><title>{escape(name)} {share:.1%}</title><rect x="{left:.1f}" y="{row * ROW}" '
        f'width="{max(width - 0.5, 0.3):.1f}" height="{ROW - 1}" fill="{colour}"/>{shown}</g>'
    )


def _depth(node: Node, least: float) -> int:
    return max((1 + _depth(below, least) for below in node.below.values() if below.samples >= least), default=0)


def _without_line(frame: str) -> str:
    head, colon, line = frame.rpartition(":")
    return f"{head})" if colon and line.rstrip(")").isdigit() else frame
