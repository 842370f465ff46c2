"""An engine with `--api-key`: what it answers without the key, and what is open anyway, as with the real one."""

import asyncio

import httpx
import pytest
from sim_pair import PATIENCE_S

from extproc.sim import Engine, EngineConfig

GOOD = {"authorization": "Bearer sk-1"}


def ask(*requests: tuple[str, str, dict[str, str]]) -> list[httpx.Response]:
    """Method, path and headers each, to one engine with the key `sk-1`."""

    async def run() -> list[httpx.Response]:
        config = EngineConfig(time_scale=500.0, api_key="sk-1")
        async with Engine(config) as engine, httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S) as http:
            body = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
            return [
                await http.request(method, path, headers=headers, json=body if method == "POST" else None)
                for method, path, headers in requests
            ]

    return asyncio.run(run())


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer sk-2"}, {"authorization": "sk-1"}])
def test_the_key_is_needed(headers: dict[str, str]) -> None:
    paths = ("/server_info", "/model_info", "/v1/models", "/v1/loads")
    answers = ask(*(("GET", path, headers) for path in paths), ("POST", "/generate", headers))
    assert [(answer.status_code, answer.json()) for answer in answers] == [(401, {"error": "Unauthorized"})] * 5


def test_with_the_key_all_is_open() -> None:
    answers = ask(("GET", "/server_info", GOOD), ("GET", "/v1/loads", GOOD), ("POST", "/generate", GOOD))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert answers[0].json()["api_key"] == "sk-1"


def test_health_and_metrics_are_open_anyway() -> None:
    answers = ask(*(("GET", path, {}) for path in ("/health", "/health_generate", "/metrics")))
    assert [answer.status_code for answer in answers] == [200] * 3


def test_the_configuration_does_not_show_the_key() -> None:
    assert "sk-1" not in repr(EngineConfig(api_key="sk-1"))
