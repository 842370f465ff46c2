"""`extproc drain`: takes a worker out of a running gateway, waits until nothing runs on it, puts it back."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from extproc.config import Config, WorkerConfig
from extproc.model import Role
from extproc.status import DRAIN_PATH

T = TypeVar("T")

EXIT_FAILED = 1
POLL_S = 0.5
"""How often `--wait` asks; the last of many requests seldom ends sooner after the one before."""
TIMEOUT_S = 5.0
"""For one answer of the gateway; it has them at hand."""


class State(msgspec.Struct, frozen=True):
    """One worker, as the gateway describes it."""

    worker: str
    role: Role
    healthy: bool
    draining: bool
    in_flight: int


class _Workers(msgspec.Struct, frozen=True):
    workers: tuple[State, ...]


class _Error(msgspec.Struct, frozen=True):
    error: str


class DrainError(Exception):
    """It could not be done; the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The worker, and where its gateway is asked."""
    defaults = Config()
    parser.add_argument("worker", metavar="URL_OF_WORKER", help="as in the configuration; HOST:PORT will do")
    parser.add_argument("--undo", action="store_true", help="let it get new requests again")
    parser.add_argument("--wait", action="store_true", help="return when none of its requests is left")
    parser.add_argument(
        "--status-url",
        default=f"http://{defaults.prometheus_host}:{defaults.prometheus_port}",
        metavar="URL",
        help="the gateway's metrics port; changes are taken from its own host only (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when the worker is (and with `--wait`: has) drained, 1 when not. Raises ConfigError for a URL that is none."""
    name = args.worker
    if "://" in name:
        name = WorkerConfig(url=name).to_worker(Role.DECODE).name  # names do not depend on the role
    with httpx.Client(base_url=args.status_url, timeout=TIMEOUT_S, trust_env=False) as client:
        try:
            _drain(client, name, undo=args.undo, wait=args.wait)
        except DrainError as error:
            sys.stderr.write(f"extproc drain: {error}\n")
            return EXIT_FAILED
    return 0


def _drain(client: httpx.Client, name: str, *, undo: bool, wait: bool) -> None:
    workers = _list(client)
    found = next((state for state in workers if state.worker == name), None)
    if found is None:
        raise DrainError(f"no worker {name}; there are {', '.join(state.worker for state in workers)}")
    path = DRAIN_PATH.format(role=found.role, name=quote(name, safe=""))
    state = _ask(client, "DELETE" if undo else "PUT", path, State)
    if undo:
        _say(f"{state.role} worker {name} gets new requests again" + ("" if state.healthy else " once it is healthy"))
        return
    _say(f"{state.role} worker {name} is draining: no new requests, {state.in_flight} in flight")
    if not any(other.role is state.role and other.healthy and not other.draining for other in _list(client)):
        _say(f"no other {state.role} worker is left: new requests get 503")
    if not wait:
        return
    while state.draining and state.in_flight:
        time.sleep(POLL_S)
        before, state = state, _ask(client, "GET", path, State)
        if state.in_flight not in {0, before.in_flight}:
            _say(f"{state.in_flight} in flight")
    if not state.draining:
        raise DrainError(f"worker {name} was put back meanwhile: it gets new requests")
    _say("none in flight: it may be stopped")


def _list(client: httpx.Client) -> Sequence[State]:
    return _ask(client, "GET", "/workers", _Workers).workers


def _ask(client: httpx.Client, method: str, path: str, kind: type[T]) -> T:
    try:
        answer = client.request(method, path)
        if answer.is_success:
            return msgspec.json.decode(answer.content, type=kind)
        said = msgspec.json.decode(answer.content, type=_Error).error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DrainError(f"cannot ask the gateway at {client.base_url}: {error or type(error).__name__}") from None
    except msgspec.MsgspecError:
        raise DrainError(f"{client.base_url} is not a gateway's metrics port") from None
    raise DrainError(said)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
