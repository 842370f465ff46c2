"""Existing gateways route through a pair of simulated engines, unchanged. Optional: they are not dependencies.

`SMG_PYTHON` and `SGLANG_ROUTER_PYTHON` name the Python interpreters of the environments that have them installed.
"""

import asyncio
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from sim_pair import PATIENCE_S, Pair, running_pair, sse, until, words

GATEWAYS = {
    "smg": ("SMG_PYTHON", "smg.launch_router", ["--disable-tokenizer-autoload"]),
    "sglang-router": ("SGLANG_ROUTER_PYTHON", "sglang_router.launch_router", []),
}
MODEL = "sim-model"
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"text": "x" * 40, "sampling_params": {"max_new_tokens": 4}}),
    ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": 4}),
    ("/v1/completions", {"model": MODEL, "prompt": "x" * 40, "max_tokens": 4}),
]

pytestmark = pytest.mark.peers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def gateway(name: str, pair: Pair, *more: str) -> AsyncIterator[str]:
    """The gateway in front of the pair; its URL, once a request gets through."""
    variable, module, flags = GATEWAYS[name]
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} does not name a Python that has {name}")
    port, metrics_port = free_port(), free_port()
    command = [python, "-m", module, "--pd-disaggregation", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--prefill", pair.prefill.url, str(pair.prefill.bootstrap_port), "--decode", pair.decode.url]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port), *flags, *more]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: ASYNC220 - does not block
        try:
            for _ in range(240):
                try:
                    if (await pair.http.post(url + REQUESTS[0][0], json=REQUESTS[0][1])).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                assert process.poll() is None, f"{name} ended: {tail(log)}"
                await asyncio.sleep(0.25)
            else:
                pytest.fail(f"{name} let nothing through: {tail(log)}")
            yield url
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-2000:].decode(errors="replace"))


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_routes_every_endpoint_through_the_pair(name: str) -> None:
    async def run() -> None:
        async with asyncio.timeout(4 * PATIENCE_S), running_pair(model=MODEL) as pair, gateway(name, pair) as url:
            await until(lambda: pair.prefill.open_requests == pair.decode.open_requests == 0)
            pair.prefill.records.clear()
            pair.decode.records.clear()
            for path, body in REQUESTS:
                whole = await pair.http.post(url + path, json=body)
                assert whole.status_code == 200, whole.text
                assert words(4) in whole.text
                assert '"completion_tokens":4' in whole.text.replace(" ", "")
                stream = await pair.http.post(url + path, json={**body, "stream": True})
                assert stream.status_code == 200, stream.text
                assert streamed_text(path, sse(stream.text)) == words(4)
            for engine in (pair.prefill, pair.decode):
                await until(lambda engine=engine: {record.outcome for record in engine.records} == {"finished"})
                assert [record.path for record in engine.records] == [path for path, _ in REQUESTS for _ in range(2)]
            for prefill, decode in zip(pair.prefill.records, pair.decode.records, strict=True):
                assert prefill.bootstrap_room == decode.bootstrap_room
                assert (prefill.bootstrap_host, prefill.bootstrap_port) == ("127.0.0.1", pair.prefill.bootstrap_port)

    asyncio.run(run())


def test_ranks_that_smg_chooses_are_where_the_requests_run() -> None:
    async def run() -> None:
        flags = ("--dp-aware", "--dp-minimum-tokens-scheduler")
        async with (
            asyncio.timeout(4 * PATIENCE_S),
            running_pair(model=MODEL) as pair,
            gateway("smg", pair, *flags) as url,
        ):
            for _ in range(8):
                path, body = REQUESTS[1]
                assert (await pair.http.post(url + path, json=body)).status_code == 200
            await until(lambda: pair.prefill.open_requests == pair.decode.open_requests == 0)
            by_room = {record.bootstrap_room: record for record in pair.prefill.records}
            for decode in pair.decode.records:
                assert decode.outcome == "finished"
                assert decode.rank == decode.routed_dp_rank
                prefill = by_room[decode.bootstrap_room]
                assert prefill.rank == prefill.routed_dp_rank == decode.disagg_prefill_dp_rank

    asyncio.run(run())


@pytest.mark.parametrize("name", GATEWAYS)
def test_a_gateway_passes_an_engines_error_on(name: str) -> None:
    async def run() -> None:
        async with asyncio.timeout(4 * PATIENCE_S), running_pair(model=MODEL) as pair, gateway(name, pair) as url:
            answer = await pair.http.post(url + "/v1/completions", json={"model": MODEL, "prompt": "", "max_tokens": 4})
            assert answer.status_code >= 400

    asyncio.run(run())


def streamed_text(path: str, chunks: list[Any]) -> str:
    if path == "/generate":
        return str(chunks[-1]["text"])
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    if path == "/v1/completions":
        return "".join(choice["text"] for choice in choices)
    return "".join(choice["delta"].get("content") or "" for choice in choices)
