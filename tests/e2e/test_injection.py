"""Placements in headers alone: real Envoy, engines that let headers override the body, no body byte in Python."""

import hashlib
import json
import uuid
from collections.abc import Iterator

import httpx
import pytest
from conftest import WAIT_S, metric, nothing_charged, until

from extproc.demo.stack import Stack

CHAT = {"model": "sim-model", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
GENERATE = {"text": "hello", "sampling_params": {"max_new_tokens": 2}}
LARGE_BYTES = 20_000_000


def running(injection: str, *more: str) -> Iterator[Stack]:
    with Stack(
        dp_size=2,
        engine_flags=["--time-scale", "1000", "--header-overrides"],
        up_flags=["--injection", injection, *more],
    ) as stack:
        yield stack


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    yield from running("headers")


@pytest.fixture(scope="module")
def reading() -> Iterator[Stack]:
    """The same, but bodies are read."""
    yield from running("body")


def post(stack: Stack, body: bytes, path: str = "/generate", **headers: str) -> tuple[dict, dict]:
    """Send it; both legs' records."""
    request_id = str(uuid.uuid4())
    response = httpx.post(
        stack.url + path,
        content=body,
        headers={"x-request-id": request_id, "content-type": "application/json", **headers},
        timeout=4 * WAIT_S,
    )
    assert response.status_code == 200, response.text

    def leg(engines):
        records = [record for engine in engines for record in engine.requests()]
        done = ("x-request-id", request_id)
        return [r for r in records if done in r["headers"].items() and r["outcome"] == "finished"]

    [prefill] = until(lambda: leg(stack.prefills), "the prefill leg")
    [decode] = until(lambda: leg(stack.decodes), "the decode leg")
    return prefill, decode


@pytest.mark.parametrize(("path", "body"), [("/generate", GENERATE), ("/v1/chat/completions", CHAT)])
def test_both_legs_get_the_clients_own_bytes_and_the_services_placement(stack, path, body):
    data = json.dumps(body | {"bootstrap_host": "6.6.6.6", "bootstrap_room": 666, "routed_dp_rank": 7}).encode()
    prefill, decode = post(stack, data, path)
    for leg in (prefill, decode):
        assert (leg["body_length"], leg["body_sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    headers = decode["headers"]
    rooms = {leg["bootstrap_room"] for leg in (prefill, decode)}
    assert rooms == {int(headers["x-override-bootstrap-room"])}
    assert 666 not in rooms
    assert prefill["routed_dp_rank"] == decode["disagg_prefill_dp_rank"]
    assert {prefill["routed_dp_rank"], decode["routed_dp_rank"]} <= {0, 1}
    assert headers["x-override-bootstrap-host"] != "6.6.6.6"
    until(lambda: nothing_charged(stack), "nothing is charged")


def test_where_engines_do_not_read_the_headers_the_body_is_spliced(stack):
    data = json.dumps({"model": "sim-model", "prompt": "hello", "max_tokens": 2}).encode()
    prefill, decode = post(stack, data, "/v1/completions")
    assert prefill["body_length"] > len(data)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"]


def test_a_stream(stack):
    with httpx.stream("POST", stack.url + "/generate", json=GENERATE | {"stream": True}, timeout=WAIT_S) as response:
        assert response.read().rstrip().endswith(b"data: [DONE]")


def test_a_failed_prefill_is_retried_with_another_pair(stack):
    faults = stack.prefills[0].url + "/sim/faults"
    httpx.put(faults, json=["status=503"]).raise_for_status()
    try:
        for _ in range(6):
            response = httpx.post(stack.url + "/generate", json=GENERATE, timeout=WAIT_S)
            assert response.status_code == 200, response.text
        until(lambda: metric(stack, "extproc_retries_total") > 0, "a retry")
    finally:
        httpx.put(faults, json=[]).raise_for_status()
    until(lambda: nothing_charged(stack), "nothing is charged")


def cpu_ticks(pid: int) -> int:
    """CPU time of a process so far, in ticks of 10 ms."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def cost_of_uploads(stack: Stack, size: int) -> int:
    """Ticks that the service takes for five of them."""
    body = b'{"text":"hi","sampling_params":{"max_new_tokens":1},"user":"%s"}' % (b"x" * size)
    before = cpu_ticks(stack.gateway.pid)
    for _ in range(5):
        post(stack, body)
    return cpu_ticks(stack.gateway.pid) - before


def test_a_large_upload_costs_python_no_more_than_a_small_one(stack, reading):
    small, large = (cost_of_uploads(stack, size) for size in (2_000, LARGE_BYTES))
    read = cost_of_uploads(reading, LARGE_BYTES)
    # A long upload leaves time for scrapes and health checks, some ticks of them.
    assert large - small < read / 4, f"ticks of 10 ms: {small=} {large=} {read=}"
