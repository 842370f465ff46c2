"""Requests through a real Envoy to simulated engines: what arrives there, and what comes back."""

import json
import uuid

import httpx
import openai
import pytest
from conftest import expected_body, legs, metric, nothing_charged, until

pytestmark = pytest.mark.envoy


def answer(tokens: int) -> str:
    """What a simulated engine says."""
    return " ".join(f"tok{number}" for number in range(tokens))


@pytest.fixture
def llm(stack):
    with openai.OpenAI(base_url=stack.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def check_legs(stack, request_id, response_headers, prompts=1):
    """Both legs carried the same room and the right ranks, and ran where the client was told."""
    prefill, decode = legs(stack, request_id)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"] == int(response_headers["x-pd-room"])
    assert 0 <= prefill["bootstrap_room"] < 2**63
    assert prefill["bootstrap_room"] % 2 == prefill["routed_dp_rank"] == decode["disagg_prefill_dp_rank"]
    host, _, port = prefill["worker"].rpartition(":")
    by_address = {engine.address: engine for engine in stack.engines}
    for leg in (prefill, decode):
        assert leg["bootstrap_host"] == host
        assert leg["bootstrap_port"] == int(by_address[f"{host}:{port}"].bootstrap_port)
        assert leg["rooms"] == [prefill["bootstrap_room"] + number for number in range(prompts)]
        assert leg["ranks"] == [leg["routed_dp_rank"]] * prompts
    assert response_headers["x-pd-prefill"] == f"{prefill['worker']};dp_rank={prefill['routed_dp_rank']}"
    assert response_headers["x-pd-decode"] == f"{decode['worker']};dp_rank={decode['routed_dp_rank']}"


def test_chat_with_the_openai_client(stack, llm):
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    raw = llm.chat.completions.with_raw_response.create(model="sim-model", messages=messages, max_tokens=5)
    completion = raw.parse()
    assert completion.choices[0].message.content == answer(5)
    assert completion.usage.completion_tokens == 5
    check_legs(stack, raw.headers["x-request-id"], raw.headers)


def test_streamed_chat_with_the_openai_client(stack, llm):
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    create = llm.chat.completions.with_streaming_response.create
    with create(model="sim-model", messages=messages, max_tokens=5, stream=True) as raw:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    assert text == answer(5)
    check_legs(stack, raw.headers["x-request-id"], raw.headers)


def test_completions_with_the_openai_client(stack, llm):
    raw = llm.completions.with_raw_response.create(model="sim-model", prompt=["one", "two", "three"], max_tokens=4)
    completion = raw.parse()
    assert [choice.text for choice in completion.choices] == [answer(4)] * 3
    check_legs(stack, raw.headers["x-request-id"], raw.headers, prompts=3)


@pytest.mark.parametrize("prompt", [{"text": "hello"}, {"input_ids": [1, 2, 3]}], ids=["text", "input_ids"])
def test_generate(stack, client, prompt):
    response = client.post("/generate", json=prompt | {"sampling_params": {"max_new_tokens": 3}})
    assert response.json()["text"] == answer(3)
    check_legs(stack, response.headers["x-request-id"], response.headers)


def test_a_stream_arrives_chunk_by_chunk(stack, client):
    """When the first chunk is here, the engine is still at work: nobody on the way has waited for the end."""
    body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 400}}
    with client.stream("POST", "/generate", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        first = next(lines)
        assert json.loads(first.removeprefix("data: "))["text"].startswith("tok0")
        records = [record for engine in stack.decodes for record in engine.requests()]
        mine = [record for record in records if record["headers"]["x-request-id"] == response.headers["x-request-id"]]
        assert [record["outcome"] for record in mine] == ["open"]
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["text"] == answer(400)


@pytest.mark.parametrize("size", [13, 1_000_000, 20_000_000])
@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_bodies_arrive_as_they_were_but_for_the_injected_fields(stack, size, chunked):
    small, large = b'{"text":"hi"}', b'{"text":"hi","user":"%s"}'
    body = small if size == len(small) else large % (b"x" * (size - len(large) + 2))
    assert len(body) == size
    pieces = (body[start : start + 65_536] for start in range(0, size, 65_536))
    request_id = str(uuid.uuid4())
    response = httpx.post(
        stack.url + "/generate",
        content=pieces if chunked else body,
        headers={"x-request-id": request_id, "content-type": "application/json"},
        timeout=120,
    )
    assert response.status_code == 200, response.text
    for engines, names in ((stack.prefills, []), (stack.decodes, ["disagg_prefill_dp_rank"])):

        def mine(engines=engines):
            records = [record for engine in engines for record in engine.requests()]
            return [record for record in records if record["headers"].get("x-request-id") == request_id]

        [record] = until(mine, "the leg's record")
        fields = {name: record[name] for name in ("bootstrap_room", "bootstrap_host", "bootstrap_port")}
        fields |= {name: record[name] for name in (*names, "routed_dp_rank")}
        assert (record["body_length"], record["body_sha256"]) == expected_body(body, fields)


BAD_BODIES = {
    "not JSON": (b"hello", 400, "not valid JSON"),
    "truncated": (b'{"text": "x"', 400, "not valid JSON"),
    "wrong top-level type": (b"[]", 400, "Expected `object`"),
    "empty": (b"", 400, "empty"),
    "deep nesting": (b'{"x":' + b"[" * 1_000 + b"]" * 1_000 + b"}", 400, "nested too deeply"),
    "invalid UTF-8": (b'{"text": "\xff"}', 400, "UTF-8"),
    "n > 1": (b'{"prompt": "x", "text": "x", "n": 2}', 400, "n > 1"),
}


def engine_requests(stack) -> int:
    return sum(len(engine.requests()) for engine in stack.engines)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_input_gets_an_openai_error_and_no_engine_sees_it(stack, client, path, case):
    body, status, words = BAD_BODIES[case]
    before = engine_requests(stack)
    response = client.post(path, content=body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert engine_requests(stack) == before
    until(lambda: nothing_charged(stack), "nothing charged")


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
def test_a_body_that_is_too_large_is_refused_as_json(stack, chunked):
    """By its content-length before the upload; without one only the bytes tell, and Envoy counts them."""
    before = engine_requests(stack)
    pieces = [b"x" * (1 << 20)] * 70
    content = iter(pieces) if chunked else b"".join(pieces)
    response = httpx.post(stack.url + "/generate", content=content, timeout=120)
    assert response.status_code == 413
    assert "limit" in response.json()["error"]["message"]
    assert engine_requests(stack) == before


def test_clients_cannot_steer(stack, client):
    fields = {
        "bootstrap_host": "10.9.9.9",
        "bootstrap_port": 1,
        "bootstrap_room": 666,
        "routed_dp_rank": 9,
        "disagg_prefill_dp_rank": 9,
        "data_parallel_rank": 9,
    }
    headers = {
        "X-PD-Room": "666",
        "x-pd-mode": "direct",
        "X-Pd-Decode-Endpoint": "10.9.9.9:1",
        "x-pd-prefill-endpoint": "10.9.9.9:1",
        "X-Data-Parallel-Rank": "9",
        "X-Gateway-Destination-Endpoint": "10.9.9.9:1",
        "X-Override-Bootstrap-Room": "666",
        "x-override-routed-dp-rank": "9",
    }
    body = {"text": "hello", "sampling_params": {"max_new_tokens": 2}} | fields
    response = client.post("/generate", json=body, headers=headers)
    assert response.status_code == 200
    request_id = response.headers["x-request-id"]
    check_legs(stack, request_id, response.headers)
    for leg in legs(stack, request_id):
        assert not {"x-data-parallel-rank", "x-gateway-destination-endpoint"} & set(leg["headers"])
        assert not [name for name in leg["headers"] if name.startswith("x-override-")]
        assert json.loads(leg["body"])["data_parallel_rank"] is None


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/get_model_info", "/model_info"])
def test_other_requests_reach_a_decode_engine(client, path):
    response = client.get(path)
    assert response.status_code == 200
    assert "x-pd-room" not in response.headers


def test_an_unknown_path_reaches_a_decode_engine_too(client):
    response = client.post("/no/such/path", content=b"anything")
    assert response.status_code == 404


def test_an_engines_own_refusal_reaches_the_client(stack, client):
    response = client.post("/generate", json={"input_ids": [1] * 200_000})
    assert response.status_code == 400
    assert response.json()["error"]["message"]
    until(lambda: nothing_charged(stack), "nothing charged")


def test_metrics_and_log_tell_what_happened(stack, client):
    before = metric(stack, "extproc_attempts_total", endpoint="/generate", outcome="ok", status="200")
    prompt = f"a secret prompt {uuid.uuid4()}"
    response = client.post("/generate", json={"text": prompt, "sampling_params": {"max_new_tokens": 2}})
    room = response.headers["x-pd-room"]
    until(lambda: f"room={room}" in stack.gateway_log, "the request's log line")
    [line] = [line for line in stack.gateway_log.splitlines() if f"room={room}" in line]
    assert "outcome=ok status=200 endpoint=/generate" in line
    assert response.headers["x-request-id"] in line
    assert prompt not in stack.gateway_log
    assert metric(stack, "extproc_attempts_total", endpoint="/generate", outcome="ok", status="200") > before
    assert metric(stack, "extproc_worker_healthy") == 4
    assert metric(stack, "extproc_prefill_leg_seconds_count") > 0
    assert metric(stack, "extproc_decision_seconds_count") > 0
    until(lambda: nothing_charged(stack), "nothing charged")


def test_a_client_that_leaves_frees_both_engines(stack, client):
    body = {"text": "hello", "stream": True, "sampling_params": {"max_new_tokens": 100_000}}
    with client.stream("POST", "/generate", json=body) as response:
        next(response.iter_lines())
        request_id = response.headers["x-request-id"]
    records = until(
        lambda: [
            record
            for engine in stack.decodes
            for record in engine.requests()
            if record["headers"].get("x-request-id") == request_id and record["outcome"] == "aborted"
        ],
        "decode noticed",
    )
    assert len(records) == 1
    until(lambda: nothing_charged(stack), "nothing charged")
