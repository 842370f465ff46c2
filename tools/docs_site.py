"""Puts the pages of the site together in build/docs, from where the site generator takes them (`make docs`).

The pages in docs/ are written to be read in the repository, too. On their way to the site

- CHANGELOG.md and CONTRIBUTING.md become pages,
- a link to another file of the repository becomes that file's name, as the site has no such page.

A link to a file that is not there is an error, in the READMEs, too.
"""

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
STAGED = ROOT / "build" / "docs"
TOP = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files at the top of the repository, and the pages they become."""
ELSEWHERE = ("README.md", "envoy/README.md")
"""Not of the site; their links are looked at, too."""

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)")


class NoSuchFileError(Exception):
    """A page has a link to a file that is not there."""


def main() -> int:
    """Exit status: 1 for a link to a file that is not there."""
    try:
        pages = {source.name: page(source) for source in DOCS.glob("*.md")}
        pages |= {name: page(ROOT / source) for source, name in TOP.items()}
        for source in ELSEWHERE:
            page(ROOT / source)
    except NoSuchFileError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    shutil.rmtree(STAGED, ignore_errors=True)
    shutil.copytree(DOCS, STAGED)
    for name, text in pages.items():
        (STAGED / name).write_text(text, encoding="utf-8")
    return 0


def page(source: Path) -> str:
    """A file's text with links as the site has them."""

    def site_link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if not target or "://" in target:
            return match[0]
        path = Path(os.path.normpath(source.parent / target))
        if not path.exists():
            raise NoSuchFileError(f"{source.relative_to(ROOT)}: link to {target}: there is no such file")
        if path.parent == DOCS:
            return f"[{text}]({path.name}{anchor})"
        if path.is_relative_to(DOCS):
            return match[0]
        name = str(path.relative_to(ROOT))
        if name in TOP:
            return f"[{text}]({TOP[name]}{anchor})"
        return f"`{name}`" if text.strip("`") == name else f"{text} (`{name}`)"

    return LINK.sub(site_link, source.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
