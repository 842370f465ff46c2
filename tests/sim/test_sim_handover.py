"""Two engines and the KV cache between them: what works, and how it fails when a request is placed wrongly."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import httpx
import msgspec
import pytest
from sim_pair import PATIENCE_S, Pair, running_pair, sse, until, with_pair, words

from extproc.sim import Engine, EngineConfig, GpuModel, Role
from extproc.sim.channel import WANT, Message
from extproc.sim.job import Phase

GENERATE = {"text": "x" * 400, "sampling_params": {"max_new_tokens": 5}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 5}
COMPLETION = {"model": "m", "prompt": "x" * 400, "max_tokens": 5}
PATHS = [("/generate", GENERATE), ("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
SHORT = {"bootstrap_timeout_s": 20.0, "waiting_timeout_s": 20.0, "bootstrap_retries": 3, "heartbeat_loss_s": 2.0}
LONG_PROMPT = {"text": "x" * 400_000, "sampling_params": {"max_new_tokens": 5}}
"""100,000 tokens take 15 s at time scale 1: time enough to break something meanwhile."""
SLOW = {"time_scale": 1.0, "heartbeat_loss_s": 0.2}


def text_of(path: str, answer: Any) -> str:
    if path == "/generate":
        return str(answer["text"])
    [choice] = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def phases(engine: Engine) -> list[Phase]:
    return [job.phase for job in engine.jobs]


def has_phase(engine: Engine, phase: Phase) -> Callable[[], bool]:
    return lambda: phase in phases(engine)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_both_legs_answer_and_run_where_they_were_placed(path: str, body: dict[str, Any]) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = await pair.send(path, body, room=1000, prefill_rank=1, decode_rank=0)
        assert (prefill.status_code, decode.status_code) == (200, 200)
        assert text_of(path, decode.json()) == words(5)
        assert text_of(path, prefill.json()) == words(1)
        [p], [d] = pair.prefill.records, pair.decode.records
        assert (p.rank, d.rank, p.rooms, d.rooms) == (1, 0, [1000], [1000])
        assert (p.outcome, d.outcome) == ("finished", "finished")
        assert (p.prompt_tokens, d.prompt_tokens, d.output_tokens) == ([100], [100], [5])
        assert d.disagg_prefill_dp_rank == 1

    with_pair(test)


@pytest.mark.parametrize("room", [2**63 - 2, 2**63 - 1, 0])
def test_without_ranks_both_engines_follow_the_room(room: int) -> None:
    async def test(pair: Pair) -> None:
        _, decode = await pair.send("/generate", GENERATE, room)
        assert decode.status_code == 200
        assert pair.prefill.records[0].rank == pair.decode.records[0].rank == room % 2

    with_pair(test)


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_the_legs_may_come_in_either_order(first: str) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(GENERATE, 7, 1, 0)
        sends = {"prefill": (pair.to_prefill, prefill), "decode": (pair.to_decode, decode)}
        engines = {"prefill": pair.prefill, "decode": pair.decode}
        second = "decode" if first == "prefill" else "prefill"
        early = asyncio.create_task(sends[first][0]("/generate", sends[first][1]))
        waits_in = Phase.BOOTSTRAP if first == "prefill" else Phase.TRANSFER
        await until(has_phase(engines[first], waits_in))
        late = await sends[second][0]("/generate", sends[second][1])
        assert (late.status_code, (await early).status_code) == (200, 200)

    with_pair(test)


def test_prefill_answers_only_when_decode_has_its_kv_cache() -> None:
    async def test(pair: Pair) -> None:
        await pair.send("/generate", GENERATE, 1)
        [p], [d] = pair.prefill.records, pair.decode.records
        # Two engines, two virtual clocks: compare in wall-clock time.
        scale = pair.prefill.config.time_scale
        prefill_done = p.arrived_unix + ((p.finished_s or 0) - p.arrived_s) / scale
        first_token = d.arrived_unix + ((d.first_token_s or 0) - d.arrived_s) / scale
        computed_s = GpuModel().prefill_s(100) + GpuModel().transfer_s(100)
        assert (p.finished_s or 0) - p.arrived_s >= computed_s
        assert (d.first_token_s or 0) - d.arrived_s >= computed_s
        assert first_token <= prefill_done + 1.0

    with_pair(test)


def test_streams_work_on_both_legs() -> None:
    async def test(pair: Pair) -> None:
        for room, (path, body) in enumerate(PATHS):
            prefill, decode = await pair.send(path, {**body, "stream": True}, room)
            assert (prefill.status_code, decode.status_code) == (200, 200)
            assert sse(prefill.text)
            chunks = sse(decode.text)
            if path == "/generate":
                assert chunks[-1]["text"] == words(5)
            elif path == "/v1/completions":
                assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == words(5)
            else:
                assert "".join(chunk["choices"][0]["delta"]["content"] or "" for chunk in chunks) == words(5)

    with_pair(test)


@pytest.mark.parametrize(("path", "body", "at_once"), [(path, body, path == "/generate") for path, body in PATHS])
def test_prefill_stream_headers_come_at_once_on_generate_only(path: str, body: dict[str, Any], at_once: bool) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies({**body, "stream": True}, 5)
        request = pair.http.build_request("POST", pair.prefill.url + path, json=prefill)
        answer = asyncio.create_task(pair.http.send(request, stream=True))
        await until(has_phase(pair.prefill, Phase.BOOTSTRAP))
        done, _ = await asyncio.wait({answer}, timeout=PATIENCE_S if at_once else 0.2)
        assert bool(done) is at_once
        assert (await pair.to_decode(path, decode)).status_code == 200
        response = await answer
        assert response.status_code == 200
        text = (await response.aread()).decode()
        assert sse(text)
        assert "abort" not in text
        assert "error" not in text

    with_pair(test)


def test_a_scalar_room_grows_over_a_batch_and_a_list_is_used_as_it_is() -> None:
    async def test(pair: Pair) -> None:
        batch = {"text": ["a" * 40, "b" * 80, "c"], "sampling_params": {"max_new_tokens": 3}}
        prefill, decode = await pair.send("/generate", batch, 10)
        assert (prefill.status_code, [answer["text"] for answer in decode.json()]) == (200, [words(3)] * 3)
        assert pair.decode.records[0].rooms == pair.prefill.records[0].rooms == [10, 11, 12]
        assert pair.prefill.records[0].ranks == [0, 1, 0]
        await pair.send("/generate", batch, [7, 100, 3], prefill_rank=1, decode_rank=0)
        assert pair.prefill.records[1].rooms == [7, 100, 3]
        assert (pair.prefill.records[1].ranks, pair.decode.records[1].ranks) == ([1, 1, 1], [0, 0, 0])
        wrong = await pair.to_decode("/generate", {**batch, "bootstrap_room": [1, 2]})
        assert wrong.status_code == 400

    with_pair(test)


@pytest.mark.parametrize(("path", "body"), PATHS)
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_request_without_a_room_is_refused(side: str, path: str, body: dict[str, Any]) -> None:
    async def test(pair: Pair) -> None:
        answer = await (pair.to_prefill if side == "prefill" else pair.to_decode)(path, body)
        assert answer.status_code == 400
        assert "received without bootstrap room id" in answer.text

    with_pair(test)


def test_more_than_one_choice_reuses_the_room() -> None:
    async def test(pair: Pair) -> None:
        for answer in await pair.send("/v1/completions", {**COMPLETION, "n": 2}, 5):
            assert answer.status_code == 500
            assert "bootstrap_room 5 is already in use" in answer.json()["message"]

    with_pair(test)


def test_a_live_room_cannot_be_used_again_but_a_finished_one_can() -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(GENERATE, 5, 0, 0)
        first = asyncio.create_task(pair.to_prefill("/generate", prefill))
        await until(has_phase(pair.prefill, Phase.BOOTSTRAP))
        assert (await pair.to_prefill("/generate", {**prefill, "routed_dp_rank": 1})).status_code == 500
        assert (await pair.to_decode("/generate", decode)).status_code == 200
        assert (await first).status_code == 200
        assert [answer.status_code for answer in await pair.send("/generate", GENERATE, 5)] == [200, 200]

    with_pair(test)


@pytest.mark.parametrize(("path", "body"), PATHS)
def test_a_wrong_room_makes_both_sides_wait_and_fail(path: str, body: dict[str, Any]) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(body, 4)
        answers = await asyncio.gather(
            pair.to_prefill(path, prefill), pair.to_decode(path, {**decode, "bootstrap_room": 6})
        )
        assert [answer.status_code for answer in answers] == [500, 500]
        assert "timed out after 20.0s in KVPoll.Bootstrapping" in answers[0].json()["message"]
        assert "timed out after 20.0s in KVPoll.WaitingForInput" in answers[1].json()["message"]
        assert answers[0].json()["object"] == "error"
        for engine in (pair.prefill, pair.decode):
            [record] = engine.records
            assert (record.outcome, record.status) == ("failed", 500)
            assert (record.finished_s or 0) - record.arrived_s >= 20.0

    with_pair(test, **SHORT)


def test_a_wrong_prefill_rank_makes_both_sides_wait_and_fail() -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(GENERATE, 4, prefill_rank=0)
        wrong = {**decode, "disagg_prefill_dp_rank": 1}
        answers = await asyncio.gather(pair.to_prefill("/generate", prefill), pair.to_decode("/generate", wrong))
        assert [answer.status_code for answer in answers] == [500, 500]
        assert "KVPoll.WaitingForInput" in answers[1].json()["message"]

    with_pair(test, **SHORT)


def test_a_rank_that_prefill_ignores_shows() -> None:
    """Decode without `disagg_prefill_dp_rank` looks where the room points, not where prefill was told to run."""

    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(GENERATE, 4, prefill_rank=1)
        del decode["disagg_prefill_dp_rank"]
        answers = await asyncio.gather(pair.to_prefill("/generate", prefill), pair.to_decode("/generate", decode))
        assert [answer.status_code for answer in answers] == [500, 500]

    with_pair(test, **SHORT)


def test_a_prefill_rank_that_does_not_exist_fails_at_once() -> None:
    async def test(pair: Pair) -> None:
        _, decode = pair.bodies(GENERATE, 4)
        answer = await pair.to_decode("/generate", {**decode, "disagg_prefill_dp_rank": 9})
        assert answer.status_code == 500
        assert "target_dp_group: 9" in answer.json()["message"]

    with_pair(test)


@pytest.mark.parametrize("wrong", ["port", "host", "missing host"])
def test_a_wrong_bootstrap_address_fails_after_some_attempts(wrong: str) -> None:
    async def test(pair: Pair) -> None:
        _, decode = pair.bodies(GENERATE, 4)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            if wrong == "port":
                decode["bootstrap_port"] = unused.getsockname()[1]
            elif wrong == "host":
                decode["bootstrap_host"] = "127.255.255.1"
            else:
                del decode["bootstrap_host"]
            answer = await pair.to_decode("/generate", decode)
        assert answer.status_code == 500
        assert "after 3 attempts" in answer.json()["message"]

    with_pair(test, **SHORT)


def test_a_server_that_is_no_bootstrap_server_fails_the_same_way() -> None:
    async def test(pair: Pair) -> None:
        _, decode = pair.bodies(GENERATE, 4)
        answer = await pair.to_decode("/generate", {**decode, "bootstrap_port": pair.prefill.port})
        assert answer.status_code == 500
        assert "after 3 attempts" in answer.json()["message"]

    with_pair(test, **SHORT)


@pytest.mark.parametrize("how", ["client leaves", "abort_request"])
@pytest.mark.parametrize("phase", [Phase.BOOTSTRAP, Phase.WAITING])
def test_when_prefill_is_aborted_decode_fails(how: str, phase: Phase) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(LONG_PROMPT, 4)
        # Two clients, so that the one that leaves takes only its own leg with it.
        async with httpx.AsyncClient(timeout=PATIENCE_S) as other:
            leg = asyncio.create_task(other.post(pair.prefill.url + "/generate", json={**prefill, "rid": "leg"}))
            await until(has_phase(pair.prefill, Phase.BOOTSTRAP))
            if phase is Phase.BOOTSTRAP:
                await end(pair.http, pair.prefill, leg, how)
            answer = asyncio.create_task(pair.to_decode("/generate", decode))
            if phase is Phase.WAITING:
                await until(has_phase(pair.prefill, Phase.WAITING))
                await end(pair.http, pair.prefill, leg, how)
            assert (await answer).status_code == 500
            message = (await answer).json()["message"]
            # Aborted before decode came, prefill cannot tell it: decode waits in vain. Afterwards it is told.
            expected = "KVPoll.WaitingForInput" if phase is Phase.BOOTSTRAP else "Failed to get kvcache from prefill"
            assert expected in message
        assert [record.outcome for record in pair.prefill.records] == ["aborted"]

    with_pair(test, **SLOW, waiting_timeout_s=2.0 if phase is Phase.BOOTSTRAP else 1e6)


@pytest.mark.parametrize("how", ["client leaves", "abort_request"])
def test_when_decode_is_aborted_prefill_fails(how: str) -> None:
    async def test(pair: Pair) -> None:
        prefill, decode = pair.bodies(LONG_PROMPT, 4)
        async with httpx.AsyncClient(timeout=PATIENCE_S) as other:
            leg = asyncio.create_task(other.post(pair.decode.url + "/generate", json={**decode, "rid": "leg"}))
            answer = asyncio.create_task(pair.to_prefill("/generate", prefill))
            await until(has_phase(pair.prefill, Phase.WAITING))
            await end(pair.http, pair.decode, leg, how)
            assert (await answer).status_code == 500
            assert "Prefill transfer failed for request rank=0" in (await answer).json()["message"]
        assert pair.prefill.records[0].outcome == "failed"

    with_pair(test, **SLOW)


async def end(http: httpx.AsyncClient, engine: Engine, leg: asyncio.Task[httpx.Response], how: str) -> None:
    if how == "abort_request":
        assert (await http.post(engine.url + "/abort_request", json={"rid": "leg"})).status_code == 200
        assert (await leg).status_code == 500
        assert "Aborted by AbortReq." in (await leg).json()["message"]
    else:
        leg.cancel()
    await until(lambda: engine.open_requests == 0)


def test_when_the_decode_engine_dies_prefill_fails() -> None:
    async def run() -> None:
        async with running_pair(**SLOW) as pair:
            prefill, decode = pair.bodies(LONG_PROMPT, 4)
            legs = [
                asyncio.create_task(pair.to_prefill("/generate", prefill)),
                asyncio.create_task(pair.to_decode("/generate", decode)),
            ]
            await until(has_phase(pair.prefill, Phase.WAITING))
            await pair.decode.__aexit__(None, None, None)
            answer = await legs[0]
            assert answer.status_code == 500
            assert "Prefill transfer failed" in answer.json()["message"]
            await asyncio.gather(*legs, return_exceptions=True)

    asyncio.run(run())


def test_a_line_that_breaks_without_a_word_fails_what_was_wanted_on_it() -> None:
    async def test(pair: Pair) -> None:
        prefill, _ = pair.bodies(LONG_PROMPT, 4)
        answer = asyncio.create_task(pair.to_prefill("/generate", prefill))
        line = f"http://127.0.0.1:{pair.prefill.bootstrap_port}/sim/kv"
        async with aiohttp.ClientSession() as session, session.ws_connect(line) as socket:
            await socket.send_bytes(msgspec.json.encode([Message(WANT, 0, 4), Message(WANT, 0, 6)]))
            await until(has_phase(pair.prefill, Phase.WAITING))
        assert (await answer).status_code == 500
        assert "Decode instance could be dead" in (await answer).json()["message"]
        # Room 6 had been wanted, too. It no longer is.
        late = asyncio.create_task(pair.to_prefill("/generate", {**prefill, "bootstrap_room": 6}))
        await until(lambda: pair.prefill.open_requests == 1)
        assert phases(pair.prefill) == [Phase.BOOTSTRAP]
        late.cancel()

    with_pair(test, **SLOW)


def test_when_the_prefill_engine_dies_decode_notices_and_finds_its_successor() -> None:
    async def run() -> None:
        async with running_pair(**SLOW) as pair:
            prefill, decode = pair.bodies(LONG_PROMPT, 4)
            legs = [
                asyncio.create_task(pair.to_prefill("/generate", prefill)),
                asyncio.create_task(pair.to_decode("/generate", decode)),
            ]
            await until(has_phase(pair.prefill, Phase.WAITING))
            old = pair.prefill
            await old.__aexit__(None, None, None)
            answer = await legs[1]
            assert answer.status_code == 500
            assert "might be dead" in answer.json()["message"]
            await asyncio.gather(*legs, return_exceptions=True)
            again = replace(old.config, port=old.port, bootstrap_port=old.bootstrap_port)
            async with Engine(again) as pair.prefill:
                answers = await pair.send("/generate", GENERATE, 4)
                assert [answer.status_code for answer in answers] == [200, 200]

    asyncio.run(run())


def test_decode_out_of_memory_holds_prefill_back() -> None:
    """A prompt is computed only when decode has room for its KV cache, as in the real engine."""

    async def test(pair: Pair) -> None:
        body = {"text": "x" * 2400, "sampling_params": {"max_new_tokens": 200}}
        first = asyncio.create_task(pair.send("/generate", body, 1, 0, 0))
        await until(has_phase(pair.decode, Phase.RUNNING))
        short = {**body, "sampling_params": {"max_new_tokens": 5}}
        second = asyncio.create_task(pair.send("/generate", short, 2, 0, 0))
        await until(has_phase(pair.decode, Phase.PREALLOC))
        await until(has_phase(pair.prefill, Phase.BOOTSTRAP))
        for answers in (await first, await second):
            assert [answer.status_code for answer in answers] == [200, 200]
        early, late = pair.decode.records
        assert (late.first_token_s or 0) >= (early.finished_s or 0)

    with_pair(test, gpu=GpuModel(kv_capacity_tokens=1500), time_scale=2.0)


def test_many_requests_at_once_all_get_their_own_answer() -> None:
    async def test(pair: Pair) -> None:
        async def one(i: int) -> None:
            body = {"text": "x" * (4 * (1 + i % 17)), "sampling_params": {"max_new_tokens": 1 + i % 13}}
            prefill, decode = await pair.send("/generate", body, i, i % 2, (i // 2) % 2)
            assert prefill.status_code == 200, prefill.text
            assert decode.status_code == 200, decode.text
            answer = decode.json()
            assert answer["text"] == words(1 + i % 13)
            assert answer["meta_info"]["prompt_tokens"] == 1 + i % 17
            assert answer["meta_info"]["dp_rank"] == (i // 2) % 2

        await asyncio.gather(*(one(i) for i in range(200)))
        assert {record.outcome for record in (*pair.prefill.records, *pair.decode.records)} == {"finished"}

    with_pair(test)


def test_the_bootstrap_server_answers_as_the_real_one() -> None:
    async def run() -> None:
        config = EngineConfig(role=Role.PREFILL, dp_size=2)
        async with Engine(config) as engine, httpx.AsyncClient(timeout=PATIENCE_S) as http:
            url = f"http://127.0.0.1:{engine.bootstrap_port}/route"
            sizes = (await http.get(url, params={"engine_rank": -1, "target_dp_group": -1})).json()
            assert (sizes["prefill_dp_size"], sizes["prefill_tp_size"]) == (2, 2)
            rank = await http.get(url, params={"engine_rank": 0, "target_dp_group": 1})
            assert rank.json().keys() == {"rank_ip", "rank_port"}
            assert (await http.get(url, params={"engine_rank": 0, "target_dp_group": 2})).status_code == 404
            assert (await http.get(url)).status_code == 400

    asyncio.run(run())
