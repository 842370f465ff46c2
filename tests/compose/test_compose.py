"""`docker compose up` for real: the image is built, the project comes up, serves, loses engines, and stops in order.

Runs where a Docker engine and Compose are; traffic stays on the machine. `BUILD_NETWORK=host`, `EXTPROC_COMPILE=0` and
pip's variables (`PIP_INDEX_URL`, …) reach the build.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import docker
import httpx
import pytest
from docker.errors import DockerException
from docker.models.containers import Container
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
FILE = ROOT / "compose/docker-compose.yaml"
ENGINES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
RUNNING = (*ENGINES, "extproc", "envoy")
BUILD_VARIABLES = (
    *("PYTHON_IMAGE", "EXTPROC_COMPILE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST"),
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
WAIT_S = 60.0
"""Generous: on a shared machine a container takes seconds to start."""
UP_S = STOP_S = 300.0
SHORT = {"text": "hello", "sampling_params": {"max_new_tokens": 4}}
COMPILERS = """
from importlib.util import find_spec
from shutil import which
print([*filter(which, ["cc", "gcc"]), *filter(find_spec, ["mypy", "mypyc", "setuptools"])])
"""


def until(condition, what: str):
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the Docker engine."""
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        if host.startswith("unix://"):
            # The SDK would leave its socket open when there is nobody.
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(host.removeprefix("unix://"))
        client = docker.from_env()
    except (OSError, DockerException) as error:
        pytest.skip(f"no Docker engine answers at {host}: {error}")
    with contextlib.closing(client):
        yield client


@pytest.fixture(scope="module")
def compose() -> list[str]:
    """The command: Compose as a plugin of `docker`, or the program of that name."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version"], capture_output=True, timeout=60, check=False)
            if asked.returncode == 0:
                return command
    pytest.skip("neither `docker compose` nor `docker-compose` is on this machine")


@pytest.fixture(scope="module")
def image(engine) -> Iterator[str]:
    """The image with Envoy, built from the tree as it is; the tag."""
    tag = f"extproc-test:{secrets.token_hex(4)}"
    arguments = {name: os.environ[name] for name in BUILD_VARIABLES if os.environ.get(name)}
    engine.images.build(
        path=str(ROOT), tag=tag, target="gateway", rm=True, forcerm=True, buildargs=arguments,
        network_mode=os.environ.get("BUILD_NETWORK", "default"),
    )  # fmt: skip
    yield tag
    engine.images.remove(tag)


class Events:
    """What happens to the project's containers while it is open: starts and changes of health, in order."""

    def __init__(self, engine: docker.DockerClient, project: str) -> None:
        filters = {"type": "container", "label": f"{PROJECT_LABEL}={project}", "event": ["start", "health_status"]}
        self._stream = engine.events(decode=True, filters=filters)
        self._thread = threading.Thread(target=self._collect)
        self.seen: list[tuple[str, str]] = []
        """(service, what), oldest first."""

    def __enter__(self) -> "Events":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._thread.join(WAIT_S)

    def _collect(self) -> None:
        for event in self._stream:
            self.seen.append((event["Actor"]["Attributes"][SERVICE_LABEL], event["Action"]))

    def at(self, service: str, what: str) -> int:
        """Position of the first such event."""
        return self.seen.index((service, what))


class Project:
    """The Compose project, up."""

    def __init__(self, engine: docker.DockerClient, command: list[str], name: str, environment: dict[str, str]) -> None:
        self._engine = engine
        self._command = [*command, "-f", str(FILE), "-p", name]
        self._environment = os.environ | environment
        self.name = name
        self.label = f"{PROJECT_LABEL}={name}"

    def run(self, *arguments: str) -> str:
        """Run Compose; what it said."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=UP_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + self.logs()
        return done.stdout

    def logs(self) -> str:
        """The last lines of each container."""
        containers = self._engine.containers.list(all=True, filters={"label": self.label})
        return "\n".join(f"{each.name}:\n{each.logs(tail=20).decode()}" for each in containers)

    def container(self, service: str) -> Container:
        """The container of a service."""
        labels = [self.label, f"{SERVICE_LABEL}={service}"]
        [container] = self._engine.containers.list(all=True, filters={"label": labels})
        return container

    def published(self, service: str, port: int) -> str:
        """URL of a published port, as seen from outside."""
        [binding] = self.container(service).attrs["NetworkSettings"]["Ports"][f"{port}/tcp"]
        return f"http://{binding['HostIp']}:{binding['HostPort']}"

    def healthy(self, service: str) -> bool:
        return self.container(service).attrs["State"]["Health"]["Status"] == "healthy"

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of the service's metric that have these labels."""
        text = httpx.get(self.published("extproc", 29000) + "/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def ask(self, times: int) -> list[int]:
        """Send requests one after the other; their statuses."""
        url = self.published("envoy", 8080) + "/generate"
        with httpx.Client(timeout=WAIT_S) as client:
            return [client.post(url, json=SHORT).status_code for _ in range(times)]


@pytest.fixture(scope="module")
def project(engine, compose, image) -> Iterator[Project]:
    """Up, with Envoy out of the same image and ports that the engine chooses."""
    environment = {
        "COMPOSE_PROFILES": "sim",
        "EXTPROC_IMAGE": image,
        "ENVOY_IMAGE": image,
        "GATEWAY_PORT": "0",
        "METRICS_PORT": "0",
    }
    project = Project(engine, compose, f"extproc-test-{secrets.token_hex(4)}", environment)
    try:
        with Events(engine, project.name) as project.events:
            project.run("up", "--detach", "--no-build")
            until(lambda: project.healthy("envoy"), "Envoy is healthy")
            until(lambda: ("envoy", "health_status: healthy") in project.events.seen, "its event")
        yield project
    finally:
        project.run("down", "--volumes", "--timeout", "10")


def test_the_image_is_compiled_and_has_nothing_to_compile_with(engine, image):
    said = engine.containers.run(image, ["--version"], remove=True).decode()
    assert ("(compiled)" in said) == (os.environ.get("EXTPROC_COMPILE", "1") == "1")
    found = engine.containers.run(image, ["-c", COMPILERS], entrypoint="python", remove=True).decode()
    assert found == "[]\n"


def test_each_starts_when_what_it_needs_is_healthy(project):
    events = project.events
    for name in ENGINES:
        assert events.at(name, "health_status: healthy") < events.at("extproc", "start")
    assert events.at("extproc", "health_status: healthy") < events.at("envoy", "start")
    assert events.at("envoy-config", "start") < events.at("envoy", "start")
    assert project.container("envoy-config").attrs["State"]["ExitCode"] == 0


@pytest.mark.parametrize("service", RUNNING)
def test_a_container_can_do_no_more_than_it_needs(project, service):
    container = project.container(service)
    code, status = container.exec_run(["grep", "-E", "^(Uid|Gid|CapEff|CapBnd|NoNewPrivs):", "/proc/1/status"])
    assert code == 0
    fields = dict(line.split(":\t") for line in status.decode().splitlines())
    assert fields == {
        "Uid": "10001\t10001\t10001\t10001",
        "Gid": "10001\t10001\t10001\t10001",
        "CapEff": "0" * 16,
        "CapBnd": "0" * 16,
        "NoNewPrivs": "1",
    }
    code, said = container.exec_run(["touch", "/opt/extproc/x"])
    assert code
    assert b"Read-only file system" in said


def test_only_gateway_and_metrics_are_published_and_on_loopback(project):
    published = {
        (service, port): {binding["HostIp"] for binding in bindings}
        for service in RUNNING
        for port, bindings in project.container(service).attrs["NetworkSettings"]["Ports"].items()
        if bindings
    }
    assert published == {("envoy", "8080/tcp"): {"127.0.0.1"}, ("extproc", "29000/tcp"): {"127.0.0.1"}}


def test_requests_from_outside_reach_all_engines(project):
    assert project.ask(24) == [200] * 24
    until(lambda: project.metric("extproc_attempts_total", outcome="ok") == 24, "all are counted")
    for name in ENGINES:
        assert project.metric("extproc_legs_ended_total", worker=f"{name}:30000", end="ok") > 0


@pytest.mark.parametrize("name", ["prefill-0", "decode-1"])
def test_a_killed_engine_costs_no_request_and_comes_back(project, name):
    worker = f"{name}:30000"
    container = project.container(name)
    container.kill()
    # The first ones still meet it, and are sent to another pair.
    assert project.ask(4) == [200] * 4
    until(lambda: project.metric("extproc_worker_healthy", worker=worker) == 0, "it is known to be down")
    served = project.metric("extproc_legs_ended_total", worker=worker)
    assert project.ask(4) == [200] * 4
    assert project.metric("extproc_legs_ended_total", worker=worker) == served
    container.start()
    until(lambda: project.metric("extproc_worker_healthy", worker=worker) == 1, "it is healthy again")
    served = project.metric("extproc_legs_ended_total", worker=worker, end="ok")
    until(
        lambda: (
            project.ask(1) == [200] and project.metric("extproc_legs_ended_total", worker=worker, end="ok") > served
        ),
        "it gets requests again",
    )


def test_a_killed_service_comes_back(project):
    container = project.container("extproc")
    container.kill()
    assert project.ask(1) == [503]
    container.start()
    until(lambda: project.ask(1) == [200], "requests are served again")


def test_a_worker_is_drained_from_inside_the_container(project):
    drain = project.container("extproc").exec_run(["extproc", "drain", "http://decode-0:30000", "--wait"])
    assert drain.exit_code == 0, drain.output
    assert b"none in flight: it may be stopped" in drain.output
    undo = project.container("extproc").exec_run(["extproc", "drain", "http://decode-0:30000", "--undo"])
    assert undo.exit_code == 0, undo.output


def answers(url: str) -> bool:
    """Whether a gateway serves; Docker's proxy accepts connections before anything listens behind it."""
    try:
        return httpx.post(url, json=SHORT, timeout=WAIT_S).status_code == 200
    except httpx.TransportError:
        return False


def test_the_image_alone_is_a_whole_gateway(project, engine, image):
    """`extproc up`, confined like the rest, with its image's own health check."""
    workers = ["--prefill", "http://prefill-0:30000", "--decode", "http://decode-0:30000"]
    container = engine.containers.run(
        image, ["up", *workers, "--shutdown-drain-delay-secs", "0"], detach=True, network=f"{project.name}_default",
        ports={"30000/tcp": ("127.0.0.1", None)}, read_only=True, tmpfs={"/tmp": ""}, cap_drop=["ALL"],
    )  # fmt: skip
    try:
        until(lambda: container.reload() or container.attrs["State"]["Health"]["Status"] == "healthy", "it is healthy")
        [binding] = container.ports["30000/tcp"]
        url = f"http://127.0.0.1:{binding['HostPort']}/generate"
        until(lambda: answers(url), "it has found its workers")
        container.stop(timeout=int(WAIT_S))
        assert container.wait()["StatusCode"] == 0, container.logs()
    finally:
        container.remove(force=True)


def test_stop_lets_a_stream_finish_and_goes_from_envoy_to_the_engines(project):
    """The last test of this module: nothing runs after it."""
    stop = threading.Thread(target=project.run, args=("stop",))
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 400}, "stream": True}
    with httpx.stream("POST", project.published("envoy", 8080) + "/generate", json=body, timeout=STOP_S) as response:
        events = (json.loads(line[6:]) if line[6:] != "[DONE]" else None for line in response.iter_lines() if line)
        next(events)
        stop.start()
        until(lambda: b"run-envoy: draining" in project.container("envoy").logs(), "it is told to stop")
        assert project.container("envoy").status == "running"
        *_, last, done = events
    stop.join(STOP_S)
    assert done is None
    assert last["meta_info"]["completion_tokens"] == 400
    states = {service: project.container(service).attrs["State"] for service in RUNNING}
    assert {service: state["ExitCode"] for service, state in states.items()} == dict.fromkeys(RUNNING, 0)
    # To the microsecond; Python reads no more digits than that.
    ended = {service: datetime.fromisoformat(state["FinishedAt"][:26]) for service, state in states.items()}
    assert ended["envoy"] < ended["extproc"] < min(ended[name] for name in ENGINES)


def test_down_leaves_nothing_behind(project, engine):
    project.run("down", "--volumes")
    assert engine.containers.list(all=True, filters={"label": project.label}) == []
    assert engine.networks.list(filters={"label": project.label}) == []
    assert engine.volumes.list(filters={"label": project.label}) == []
