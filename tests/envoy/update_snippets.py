"""Writes what is printed into `envoy/filters/` and into the marked places of `envoy/examples/` (`make snippets`).

A place begins with `# -- extproc envoy FLAGS` and ends with `# -- end`. What somebody adds to it stands between
`# -- own` and `# -- end own`, and stays in front of the line that followed it.
"""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from extproc.cli.main import main
from extproc.envoy_config.snippets import SNIPPETS

ENVOY = Path(__file__).parents[2] / "envoy"
SETTINGS = ("--port", "8080")
"""Those of `envoy/envoy.yaml`; `--prometheus-port` and the service's port have their defaults."""
PLACE = re.compile(r"^( *)# -- extproc envoy (.*)\n(?s:(.*?))^ *# -- end\n", re.MULTILINE)
OWN = re.compile(r"^ *# -- own\n(?s:.*?)^ *# -- end own\n", re.MULTILINE)


def printed(*flags: str) -> str:
    """What `extproc envoy` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["envoy", *flags]) == 0
    return out.getvalue()


def files() -> Iterator[tuple[Path, str]]:
    """Each file that is kept so, and what it should hold."""
    for snippet in SNIPPETS:
        yield ENVOY / "filters" / f"{snippet.name}.yaml", printed(*SETTINGS, "--snippet", snippet.name)
    for path in sorted((ENVOY / "examples").iterdir()):
        yield path, PLACE.sub(filled, path.read_text())


def filled(place: re.Match[str]) -> str:
    """A marked place with what is printed for its flags, and with somebody's own additions."""
    indent, flags, old = place.groups()
    _, _, parts = printed(*shlex.split(flags)).partition("\n\n")
    text = "".join(f"{indent}{line}" for line in parts.splitlines(keepends=True))
    for own in OWN.finditer(old):
        before, after = OWN.sub("", old[: own.start()]), OWN.sub("", old[own.end() :])
        follower = after.splitlines(keepends=True)[0]
        earlier = before.splitlines(keepends=True).count(follower)
        at = [found.start() for found in re.finditer(f"^{re.escape(follower)}", text, re.MULTILINE)][earlier]
        text = text[:at] + own[0] + text[at:]
    return f"{indent}# -- extproc envoy {flags}\n{text}{indent}# -- end\n"


def without_places(text: str) -> str:
    """Somebody's file as it was before they pasted anything."""
    return PLACE.sub("", text)


if __name__ == "__main__":
    for path, text in list(files()):
        path.write_text(text)
