"""The engine's HTTP answers, without disaggregation: shapes, streams, errors."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sim_pair import PATIENCE_S, sse, until, words

from extproc.sim import Engine, EngineConfig, GpuModel, Role

Test = Callable[[Engine, httpx.AsyncClient], Awaitable[None]]


def with_engine(test: Test, **settings: Any) -> None:
    async def run() -> None:
        config = EngineConfig(**{"time_scale": 500.0, **settings})
        async with asyncio.timeout(2 * PATIENCE_S), Engine(config) as engine:
            async with httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S) as http:
                await test(engine, http)
            await until(lambda: engine.open_requests == 0)

    asyncio.run(run())


def post(path: str, body: Any, **settings: Any) -> httpx.Response:
    """One request to a fresh engine."""
    answers = []

    async def test(_engine: Engine, http: httpx.AsyncClient) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answers.append(await http.post(path, content=content, headers={"content-type": "application/json"}))

    with_engine(test, **settings)
    return answers[0]


SLOW = GpuModel(decode_base_ms=200.0)
SLOW_STREAM = {"gpu": SLOW, "time_scale": 1.5}
"""Tokens so far apart that even a busy machine sees more than one chunk."""
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x" * 10}]}


def test_generate() -> None:
    answer = post("/generate", {"text": "x" * 9, "rid": "abc", "sampling_params": {"max_new_tokens": 4}}).json()
    assert answer["text"] == words(4)
    meta = answer["meta_info"]
    assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"]) == ("abc", 3, 4)
    assert meta["finish_reason"] == {"type": "length", "length": 4}


def test_generate_takes_token_ids_and_batches() -> None:
    one = post("/generate", {"input_ids": [5, 6, 7, 8, 9]}).json()
    assert (one["meta_info"]["prompt_tokens"], one["meta_info"]["completion_tokens"]) == (5, 128)
    body = {"input_ids": [[1], [1, 2, 3]], "sampling_params": [{"max_new_tokens": 2}, {"max_new_tokens": 3}]}
    two = post("/generate", body).json()
    assert [answer["text"] for answer in two] == [words(2), words(3)]
    assert [answer["meta_info"]["prompt_tokens"] for answer in two] == [1, 3]


def test_generate_streams_all_text_so_far_in_each_chunk() -> None:
    answer = post("/generate", {"text": "hi", "stream": True, "sampling_params": {"max_new_tokens": 5}}, **SLOW_STREAM)
    chunks = sse(answer.text)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(chunks) > 1
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(set(counts))
    assert [chunk["text"] for chunk in chunks] == [words(count) for count in counts]
    assert [chunk["meta_info"]["finish_reason"] is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]


def test_generate_returns_prompt_logprobs_where_asked() -> None:
    body = {"text": "x" * 12, "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 2}}
    meta = post("/generate", body).json()["meta_info"]
    assert len(meta["input_token_logprobs"]) == 3
    assert len(meta["output_token_logprobs"]) == 2


def test_chat() -> None:
    answer = post("/v1/chat/completions", {**CHAT, "max_tokens": 3}).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    [choice] = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert (choice["message"]["content"], choice["finish_reason"]) == (words(3), "length")
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 3, 6)


def test_chat_without_a_limit_stops_by_itself() -> None:
    answer = post("/v1/chat/completions", CHAT, chat_output_tokens=7).json()
    assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("stop", 7)


def test_chat_counts_text_parts_and_every_choice() -> None:
    parts = [{"type": "text", "text": "x" * 8}, {"type": "image_url", "image_url": {"url": "u"}}]
    messages = [{"role": "system", "content": "y" * 4}, {"role": "user", "content": parts}]
    answer = post("/v1/chat/completions", {"model": "m", "messages": messages, "n": 2, "max_tokens": 2}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (3, 4)


@pytest.mark.parametrize("include_usage", [True, False])
def test_chat_streams_deltas(include_usage: bool) -> None:
    body = {**CHAT, "max_completion_tokens": 6, "stream": True, "stream_options": {"include_usage": include_usage}}
    chunks = sse(post("/v1/chat/completions", body, **SLOW_STREAM).text)
    if include_usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 6)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta["content"] or "" for delta in deltas) == words(6)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]
    assert len(chunks) > 3


def test_completions_take_batches_and_default_to_16_tokens() -> None:
    answer = post("/v1/completions", {"model": "m", "prompt": ["x" * 8, "y"]}).json()
    assert answer["object"] == "text_completion"
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, words(16)), (1, words(16))]
    assert answer["usage"]["prompt_tokens"] == 3


def test_completions_stream_each_prompt_under_its_index() -> None:
    body = {"model": "m", "prompt": ["a", "b"], "max_tokens": 4, "stream": True}
    chunks = sse(post("/v1/completions", body, **SLOW_STREAM).text)
    for index in (0, 1):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == words(4)
        assert mine[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff{}", b"[" * 5000 + b"]" * 5000, b"{}"])
def test_a_body_that_does_not_fit_is_a_400(path: str, body: bytes) -> None:
    answer = post(path, body)
    assert answer.status_code == 400
    error = answer.json()
    if "error" in error:
        assert (path, body) == ("/generate", b"{}")
        assert error["error"]["message"]
    else:
        assert (error["object"], error["code"]) == ("error", 400)
        assert error["message"]


@pytest.mark.parametrize(
    ("path", "body", "part"),
    [
        ("/generate", {}, "Either text"),
        ("/generate", {"text": "a", "input_ids": [1]}, "mutually exclusive"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": -1}}, "must be at least 0"),
        ("/generate", {"text": "a", "routed_dp_rank": 1}, "out of range"),
        ("/generate", {"text": "a", "data_parallel_rank": 1}, "out of range"),
        ("/generate", {"text": "a" * 800}, "longer than the model's context length"),
        ("/generate", {"text": "a" * 200}, "maximum context length"),
        ("/v1/chat/completions", {"model": "m", "messages": []}, "Messages cannot be empty"),
        ("/v1/completions", {"model": "m", "prompt": ""}, "Prompt cannot be empty"),
        ("/v1/completions", {"model": "m", "prompt": "a", "routed_dp_rank": 9}, "out of range"),
    ],
)
def test_the_engine_says_what_it_refuses_in_the_shape_of_the_path(path: str, body: Any, part: str) -> None:
    answer = post(path, body, context_tokens=150)
    assert answer.status_code == 400
    if path == "/generate":
        assert part in answer.json()["error"]["message"]
    else:
        error = answer.json()
        assert part in error.pop("message")
        assert error == {"object": "error", "type": "BadRequestError", "param": None, "code": 400}


def test_a_refused_stream_is_an_event_on_generate_and_a_400_elsewhere() -> None:
    native = post("/generate", {"text": "a", "routed_dp_rank": 7, "stream": True})
    assert native.status_code == 200
    assert "out of range" in sse(native.text)[0]["error"]["message"]
    openai = post("/v1/completions", {"prompt": "a", "routed_dp_rank": 7, "stream": True})
    assert openai.status_code == 400


def test_the_rank_header_overrides_the_body_but_not_on_generate() -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        headers = {"X-Data-Parallel-Rank": "2"}
        for path, body in (
            ("/generate", {"text": "a"}),
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"prompt": "a"}),
        ):
            assert (await http.post(path, json={**body, "routed_dp_rank": 1}, headers=headers)).status_code == 200
        assert [record.rank for record in engine.records] == [1, 2, 2]
        bad = await http.post("/v1/completions", json={"prompt": "a"}, headers={"X-Data-Parallel-Rank": "two"})
        assert bad.status_code == 400

    with_engine(test, dp_size=4)


@pytest.mark.parametrize("allowed", [True, False])
def test_override_headers_count_only_where_they_are_switched_on(allowed: bool) -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        headers = {"x-override-routed-dp-rank": "3", "x-override-rid": "mine"}
        await http.post("/generate", json={"text": "a", "routed_dp_rank": 1}, headers=headers)
        await http.post("/v1/completions", json={"prompt": "a", "routed_dp_rank": 1}, headers=headers)
        assert [record.rank for record in engine.records] == [3 if allowed else 1, 1]
        assert (engine.records[0].rids == ["mine"]) is allowed

    with_engine(test, dp_size=4, header_overrides=allowed)


def test_the_engine_describes_itself() -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        for path in ("/health", "/health_generate", "/ready"):
            assert (await http.get(path)).status_code == 200
        for path in ("/server_info", "/get_server_info"):
            told = (await http.get(path)).json()
            assert (told["dp_size"], told["disaggregation_mode"]) == (3, "prefill")
            assert told["disaggregation_bootstrap_port"] == engine.bootstrap_port
            assert (told["served_model_name"], len(told["internal_states"])) == ("some/model", 3)
        for path in ("/model_info", "/get_model_info"):
            assert (await http.get(path)).json()["served_model_name"] == "some/model"
        assert [load["num_tokens"] for load in (await http.get("/get_load")).json()] == [0, 0, 0]
        assert (await http.get("/v1/models")).json()["data"][0]["id"] == "some/model"
        assert (await http.get("/nothing")).status_code == 404
        engine.set_healthy(False)
        assert (await http.get("/health")).status_code == 503

    with_engine(test, role=Role.PREFILL, dp_size=3, model="some/model")


def test_a_client_that_leaves_ends_its_request() -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        call = asyncio.create_task(
            http.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 9000}})
        )
        await until(lambda: engine.open_requests == 1)
        call.cancel()
        await until(lambda: engine.open_requests == 0)
        body = {"text": "a", "stream": True, "sampling_params": {"max_new_tokens": 9000}}
        async with http.stream("POST", "/generate", json=body) as response:
            async for line in response.aiter_lines():
                assert line.startswith("data: ")
                break
            assert engine.open_requests == 1
        await until(lambda: engine.open_requests == 0)
        await until(lambda: [record.outcome for record in engine.records] == ["aborted", "aborted"])
        assert 0 < engine.records[1].output_tokens[0] < 9000
        assert engine.model.ranks[0].kv_used_tokens == 0

    with_engine(test, gpu=SLOW, time_scale=20.0)


def test_abort_request_ends_all_requests_whose_id_starts_so() -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        calls = [
            asyncio.create_task(
                http.post("/generate", json={"text": "a", "rid": rid, "sampling_params": {"max_new_tokens": tokens}})
            )
            for rid, tokens in (("ab-1", 9000), ("ab-2", 9000), ("b-1", 5))
        ]
        await until(lambda: engine.open_requests == 3)
        assert (await http.post("/abort_request", json={"rid": "ab-"})).status_code == 200
        answers = [(await call).json() for call in calls]
        reasons = [answer["meta_info"]["finish_reason"]["type"] for answer in answers]
        assert reasons == ["abort", "abort", "length"]
        assert answers[0]["meta_info"]["completion_tokens"] < 9000
        assert [record.outcome for record in engine.records] == ["aborted", "aborted", "finished"]

    with_engine(test, gpu=SLOW, time_scale=20.0)


def test_records_tell_what_came_and_are_bounded() -> None:
    async def test(engine: Engine, http: httpx.AsyncClient) -> None:
        for i in range(5):
            content = json.dumps({"text": "x" * (100 * i), "stream": False}).encode()
            await http.post("/generate", content=content, headers={"x-test": str(i)})
        records = list(engine.records)
        assert [record.number for record in records] == [3, 4, 5]
        assert [record.headers["x-test"] for record in records] == ["2", "3", "4"]
        assert [record.body is None for record in records] == [False, True, True]
        assert [record.body_length for record in records] == [229, 329, 429]
        shown = (await http.get("/sim/requests")).json()
        assert [record["number"] for record in shown] == [3, 4, 5]
        assert json.loads(shown[0]["body"])["text"] == "x" * 200
        assert shown[0]["prompt_tokens"] == [50]
        assert records[0].arrived_s <= (records[0].first_token_s or 0) <= (records[0].finished_s or 0) <= engine.now_s
        await http.delete("/sim/requests")
        assert len(engine.records) == 0

    with_engine(test, keep_records=3, keep_body_bytes=300)


def test_an_intake_can_answer_in_the_engines_place() -> None:
    from aiohttp import web  # noqa: PLC0415 - only here

    async def intake(_request: web.Request, record: Any) -> web.StreamResponse | None:
        return web.Response(status=503, text="broken") if record.number == 1 else None

    async def run() -> None:
        async with Engine(EngineConfig(time_scale=500.0), intake) as engine, httpx.AsyncClient() as http:
            answers = [await http.post(engine.url + "/generate", json={"text": "a"}) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [503, 200]
            assert [record.outcome for record in engine.records] == ["replaced", "finished"]

    asyncio.run(run())
