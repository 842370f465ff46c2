"""Through a real Envoy: what the service learns from prefill's answers, and how it explains its picks."""

import json
import re
import uuid

import httpx
import pytest
from conftest import metric, nothing_charged, until

from extproc.demo.stack import Stack

pytestmark = pytest.mark.envoy

BATCH = 40
"""More than the first 32 that are asked for."""
LOADS = re.compile(r"(\S+?)/(\d+)(\*?)=(\d+)@(\d+\.\d|-)")


@pytest.fixture(scope="module")
def stack():
    flags = ("--explain", "--worker-load-check-interval", "0.2")
    with Stack(prefill=2, decode=1, dp_size=2, up_flags=flags, engine_flags=["--time-scale", "20"]) as running:
        yield running


def debug_loads(stack):
    return httpx.get(stack.status_url + "/debug/loads").raise_for_status().json()


def estimate(stack, endpoint):
    found = [each for each in debug_loads(stack)["estimates"] if each["endpoint"] == endpoint]
    return found[0] if found else None


def line_of(stack, response):
    request_id = response.headers["x-request-id"]
    until(lambda: request_id in stack.gateway_log, "the request's log line")
    return next(line for line in stack.gateway_log.splitlines() if request_id in line and "outcome=" in line)


def text(size: int) -> str:
    """Text that JSON does not escape; never the same twice."""
    return (str(uuid.uuid4()) + " lorem ipsum" * size)[:size]


def generate(body_text, **fields):
    return "/generate", {"text": body_text, "sampling_params": {"max_new_tokens": 2}} | fields


def complete(body_text, **fields):
    return "/v1/completions", {"model": "sim-model", "prompt": body_text, "max_tokens": 2} | fields


def chat(body_text, **fields):
    messages = [{"role": "user", "content": body_text}]
    return "/v1/chat/completions", {"model": "sim-model", "messages": messages, "max_tokens": 2} | fields


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("make", [generate, complete, chat])
def test_engines_counts_calibrate_the_estimate(stack, client, make, stream):
    """The simulated tokenizer makes a token of 4 bytes of *text*: that of a chat has a JSON frame of 30 bytes."""
    for number in range(BATCH // 2):
        # OpenAI's streams say their usage only to clients that ask for it.
        usage = {"stream_options": {"include_usage": True}} if stream and make is not generate else {}
        path, body = make(text(200 + 20 * number), stream=stream, **usage)
        assert client.post(path, json=body).status_code == 200
    known = until(lambda: estimate(stack, path), "an estimate")
    assert known["learned"] >= 16
    text_bytes = 390  # the mean
    frame_bytes = (
        len(json.dumps(body["messages"], separators=(",", ":"))) - len(body["messages"][0]["content"])
        if make is chat
        else 0
    )
    assert known["bytes_per_token"] == pytest.approx(4 * (text_bytes + frame_bytes) / text_bytes, rel=0.03)
    until(lambda: nothing_charged(stack), "nothing charged")


def test_the_next_prompts_are_estimated_by_it(stack, client):
    """Chinese: 3 bytes a character, of which the engine makes a token for every 4; escaped it has 6."""
    for _ in range(BATCH):
        body = json.dumps({"model": "other", "messages": [{"role": "user", "content": "中文" * 400}], "max_tokens": 1})
        response = client.post("/v1/chat/completions", content=body)
    line = line_of(stack, response)
    estimated = float(re.search(r" tokens=(\d+)", line)[1])
    assert estimated == pytest.approx(2 * 3 * 400 / 4, rel=0.15)  # by 4 bytes a token it would be twice that
    assert metric(stack, "extproc_prompt_estimate_ratio_count", endpoint="/v1/chat/completions") >= 32


def test_an_answer_beyond_envoys_buffer_fails_nothing(stack, client):
    """A stream with 100,000 logprobs, more than the 1 MiB that Envoy buffers: read in part, and the request is well."""
    path, body = generate(text(400_000), stream=True, return_logprob=True, logprob_start_len=0)
    response = client.post(path, json=body | {"model": "fresh"})
    assert response.status_code == 200
    assert response.text.rstrip().endswith("[DONE]")
    assert "outcome=ok" in line_of(stack, response)
    until(lambda: nothing_charged(stack), "nothing charged")


def test_the_client_and_the_log_are_told_the_loads(stack, client):
    def known_by_all():
        ranks = [rank for worker in debug_loads(stack)["workers"] for rank in worker["ranks"]]
        return all(rank["news_age_s"] is not None for rank in ranks)

    until(known_by_all, "figures of all ranks")
    path, body = generate(text(100))
    response = client.post(path, json=body)
    headers = response.headers
    for role, workers in (("prefill", stack.prefills), ("decode", stack.decodes)):
        loads = LOADS.findall(headers[f"x-pd-{role}-loads"])
        assert (
            ", ".join(f"{name}/{rank}{mark}={load}@{age}" for name, rank, mark, load, age in loads)
            == headers[f"x-pd-{role}-loads"]
        )
        # `least_load` compares all workers, so each of their ranks is there.
        assert {(name, rank) for name, rank, *_ in loads} == {
            (worker.address, rank) for worker in workers for rank in "01"
        }
        [chosen] = [f"{name};dp_rank={rank}" for name, rank, mark, *_ in loads if mark]
        assert headers[f"x-pd-{role}"] == chosen
        assert all(age != "-" for *_, age in loads)
    line = line_of(stack, response)
    assert f'prefill_loads="{headers["x-pd-prefill-loads"]}"' in line
    assert f'decode_loads="{headers["x-pd-decode-loads"]}"' in line


def test_the_table_shows_a_request_while_it_runs(stack, client):
    body = {"text": text(2_000), "stream": True, "sampling_params": {"max_new_tokens": 4_000}}
    with client.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()  # kept: without it the response would be closed
        next(lines)
        worker, rank = re.fullmatch(r"(.+);dp_rank=(\d)", response.headers["x-pd-decode"]).groups()
        view = debug_loads(stack)
        assert view["settings"]["load_model"] == "live"
        [decode] = [each for each in view["workers"] if each["worker"] == worker]
        assert (decode["role"], decode["healthy"], decode["dp_size"]) == ("decode", True, 2)
        assert decode["in_flight"] == 1
        assert decode["ranks"][int(rank)]["outstanding_requests"] == 1
        assert decode["ranks"][int(rank)]["load_tokens"] > 400
        assert decode["ranks"][1 - int(rank)]["outstanding_tokens"] == 0

        def measured():
            [now] = [each for each in debug_loads(stack)["workers"] if each["worker"] == worker]
            return now["ranks"][int(rank)]["request_tokens_per_s"]

        until(measured, "the request's speed")
        assert list(lines)[-2:] == ["data: [DONE]", ""]  # of a stream that is left nothing is learned
    until(lambda: nothing_charged(stack), "nothing charged")
    until(lambda: debug_loads(stack)["mean_output_tokens"], "a mean output")
