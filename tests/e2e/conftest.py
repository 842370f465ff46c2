"""One whole gateway for the module: real Envoy, service and simulated engines as processes."""

import hashlib
import json
import time
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from extproc.demo.stack import Stack

WAIT_S = 30.0
"""Generous: on a shared machine a process may not run for seconds."""


def until(condition, what: str):
    """The condition's first true value; engines and service answer within milliseconds, asked again until then."""
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {WAIT_S:g} s: {what}"
        time.sleep(0.01)
    return value


def metric(stack: Stack, name: str, **labels: str) -> float:
    """Sum of the samples of the service's own metric that have these labels."""
    text = httpx.get(stack.status_url + "/metrics").text
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def nothing_charged(stack: Stack) -> bool:
    """Whether nothing is in flight any more, as the service sees it and as the engines do."""
    names = ("extproc_outstanding_tokens", "extproc_legs_in_flight", "extproc_open_exchanges")
    return all(metric(stack, name) == 0 for name in names)


def legs(stack: Stack, request_id: str) -> tuple[dict, dict]:
    """The finished records of both legs of a request: prefill's and decode's."""

    def finished(engines):
        found = [
            (engine, record)
            for engine in engines
            for record in engine.requests()
            if record["headers"].get("x-request-id") == request_id and record["outcome"] == "finished"
        ]
        return found[0] if len(found) == 1 else None

    prefill_engine, prefill = until(lambda: finished(stack.prefills), f"one prefill leg of {request_id}")
    decode_engine, decode = until(lambda: finished(stack.decodes), f"one decode leg of {request_id}")
    return prefill | {"worker": prefill_engine.address}, decode | {"worker": decode_engine.address}


def expected_body(client_body: bytes, fields: dict) -> tuple[int, str]:
    """Length and SHA-256 of the client's body with these fields spliced in before its closing brace."""
    added = json.dumps(fields, separators=(",", ":"))[1:]
    body = client_body[:-1] + b"," + added.encode()
    return len(body), hashlib.sha256(body).hexdigest()


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """2 prefill and 2 decode engines with 2 DP ranks each, fast, and `extproc up` in front."""
    with Stack(prefill=2, decode=2, dp_size=2, engine_flags=["--time-scale", "20"]) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    """A client of the gateway."""
    with httpx.Client(base_url=stack.url, timeout=60) as client:
        yield client
