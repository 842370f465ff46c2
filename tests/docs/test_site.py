"""The pages make a site without a warning, and a site that loads nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra [dev] has the site generator")

ROOT = Path(__file__).parents[2]
SOURCES = ("docs", "tools", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md")
LINKED = ("README.md", "LICENSE", "Dockerfile", "Makefile", "compose", "envoy", "tests", "extproc")
LOADED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*?\ssrc=["']([^"']+)|<link\b[^>]*?\shref=["']([^"']+)""")


def copy_of_the_sources(folder: Path) -> Path:
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy(source, folder)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def build(folder: Path) -> tuple[int, str]:
    """Exit status and output of what `make docs` runs."""
    output = ""
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    for command in (["tools/docs_site.py"], ["-m", "mkdocs", "build"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=300,
        )
        output += done.stdout
        if done.returncode:
            return done.returncode, output
    return 0, output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy_of_the_sources(tmp_path_factory.mktemp("repository"))
    status, output = build(folder)
    assert status == 0, output
    return folder / "site"


def test_every_page_is_there(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"changelog", "contributing"}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = {
        source or link
        for page in site.glob("*.html")
        for source, link in LOADED.findall(page.read_text(encoding="utf-8"))
    }
    assert any(address.endswith(".js") for address in loaded)
    assert not [address for address in loaded if re.match(r"(?:[a-z]+:)?//", address)]
    for style in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


@pytest.mark.parametrize(
    ("link", "complaint"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](loads.md#nothing)", "#nothing"),
        ("[x](../nowhere.txt)", "../nowhere.txt"),
        ("![x](img/none.png)", "img/none.png"),
    ],
)
def test_a_dead_link_is_an_error(tmp_path: Path, link: str, complaint: str) -> None:
    folder = copy_of_the_sources(tmp_path)
    with (folder / "docs" / "install.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{link}\n")
    status, output = build(folder)
    assert status != 0
    assert complaint in output
