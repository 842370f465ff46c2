"""What is compiled for a run: two small C programs that make the load, and this gateway's core."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from extproc.errors import ConfigError

SOURCES = Path(__file__).parent
ROOT = Path(__file__).parents[2]
COMPILER_FLAGS = ("-O2", "-Wall", "-Wextra")


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of executables."""

    wrk: str
    engine: str
    open_loop: str


def make_tools(directory: Path) -> Tools:
    """Compile into `directory`. Raises ConfigError for what is missing."""
    missing = [name for name in ("gcc", "wrk") if shutil.which(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not found: apt-get install gcc libc6-dev wrk")
    return Tools(
        wrk="wrk",
        engine=_compile("perf_engine.c", directory),
        open_loop=_compile("perf_open_loop.c", directory, "-lm"),
    )


def compile_core(directory: Path) -> Path:
    """A copy of the package with its core compiled (`setup.py`), for PYTHONPATH. Takes a minute. Raises ConfigError."""
    copy = directory / "compiled"
    shutil.copytree(ROOT / "extproc", copy / "extproc", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for words, environment in (
        (["setup.py", "--quiet", "build_ext", "--inplace"], {"EXTPROC_COMPILE": "1"}),
        (["-m", "extproc", "--version"], {}),
    ):
        done = subprocess.run(
            [sys.executable, *words],
            check=False,
            capture_output=True,
            text=True,
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy), **environment},
        )
        if done.returncode:
            raise ConfigError(f"the core cannot be compiled: {(done.stderr or done.stdout).strip()[-1000:]}")
    if "compiled" not in done.stdout:
        raise ConfigError(f"the core is not compiled, though it should be: {done.stdout.strip()}")
    return copy


def _compile(source: str, directory: Path, *libraries: str) -> str:
    target = directory / source.removesuffix(".c")
    command = ["gcc", *COMPILER_FLAGS, "-o", str(target), str(SOURCES / source), *libraries]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{source}: {done.stderr.strip()}")
    return str(target)
