"""What the load is made with: wrk, and two small C programs that are compiled here."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from extproc.errors import ConfigError

SOURCES = Path(__file__).parent
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


def _compile(source: str, directory: Path, *libraries: str) -> str:
    target = directory / source.removesuffix(".c")
    command = ["gcc", *COMPILER_FLAGS, "-o", str(target), str(SOURCES / source), *libraries]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{source}: {done.stderr.strip()}")
    return str(target)
