"""Wheel and sdist: what is in them, and that the wheel's command runs."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import extproc

pytest.importorskip("build", reason="the extra [dev] has it")

ROOT = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(  # with the setuptools that is here: nothing is downloaded
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        check=True,
        timeout=BUILD_TIMEOUT_S,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"extproc", f"extproc-{extproc.__version__}.dist-info"}
    assert {"extproc/py.typed", "extproc/status_page.html", "extproc/sim/engine.py"} <= names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "extproc").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_the_sdist_holds_the_repository(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml", "docs/index.md"}
    wanted |= {"tests/unit/test_config.py", "envoy/envoy.yaml", "compose/docker-compose.yaml", "requirements-dev.lock"}
    wanted |= {"setup.py", "requirements-compile.lock"}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name]


def test_metadata_passes_the_index_check(dist: Path) -> None:
    files = [str(path) for path in dist.iterdir()]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_installed_command_runs(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the package that it may name is not the installed one
    venv.create(tmp_path)
    bin_folder = tmp_path / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    # Without its dependencies: neither needs any.
    version = f"extproc {extproc.__version__} (pure Python)\n"
    for flag, expected in (("--version", version), ("--help", "usage: extproc")):
        printed = subprocess.run(
            [bin_folder / "extproc", flag], capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path
        )
        assert printed.stdout.startswith(expected)
