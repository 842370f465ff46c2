"""Sends requests as users do: with the `openai` client and with httpx, several at a time."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import httpx
import openai

from extproc.demo.answer import Answer
from extproc.demo.workload import Client, Request
from extproc.request import Endpoint

TIMEOUT_S = 60.0
"""For one request. None of them takes more than a few seconds."""


class Clients:
    """Both clients, with their connection pools. Use as an async context manager."""

    def __init__(self, url: str) -> None:
        # Nothing here goes through a proxy, and a client's own retries would hide errors.
        self._openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="not-needed",
            max_retries=0,
            timeout=TIMEOUT_S,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )
        self._httpx = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()
        await self._httpx.aclose()

    async def send(self, request: Request) -> Answer:
        """The answer, whatever it is: errors are part of it, not raised."""
        answer = Answer()
        started_s = time.perf_counter()
        try:
            if request.kind.client is Client.OPENAI:
                await self._send_by_openai(request, answer, started_s)
            else:
                await self._send_by_httpx(request, answer, started_s)
        except openai.APIStatusError as error:
            answer.take_headers(error.status_code, error.response.headers)
            answer.error = error.message
        except Exception as error:  # openai lets through whatever its HTTP library raises
            answer.error = f"{type(error).__name__}: {error}"
        answer.total_s = time.perf_counter() - started_s
        return answer

    async def _send_by_openai(self, request: Request, answer: Answer, started_s: float) -> None:
        # `Any`, as the client's types want a literal `stream` and typed messages.
        api: Any = self._openai.chat if request.kind.endpoint is Endpoint.CHAT else self._openai
        raw = await api.completions.with_raw_response.create(**request.body)
        answer.take_headers(raw.status_code, raw.headers)
        content = raw.parse()
        if not request.kind.stream:
            answer.take_openai(content.model_dump())
            return
        async for chunk in content:
            answer.take_openai(chunk.model_dump())
            _note_first_token(answer, started_s)

    async def _send_by_httpx(self, request: Request, answer: Answer, started_s: float) -> None:
        take = answer.take_generate if request.kind.endpoint is Endpoint.GENERATE else answer.take_openai
        async with self._httpx.stream("POST", request.kind.endpoint.value, json=request.body) as response:
            answer.take_headers(response.status_code, response.headers)
            if response.status_code != 200 or not request.kind.stream:
                content = await response.aread()
                if response.status_code == 200:
                    take(json.loads(content))
                else:
                    answer.error = content.decode(errors="replace")
                return
            last = ""
            async for line in response.aiter_lines():
                if not line:
                    continue
                last = line
                if line.startswith("data: {"):
                    take(json.loads(line.removeprefix("data: ")))
                    _note_first_token(answer, started_s)
            if last != "data: [DONE]" and not answer.error:
                answer.error = "the stream ended without [DONE]"


def _note_first_token(answer: Answer, started_s: float) -> None:
    if answer.first_token_s is None and answer.has_text:
        answer.first_token_s = time.perf_counter() - started_s


async def send_all(
    url: str, requests: Sequence[Request], concurrency: int, answered: Callable[[], None]
) -> list[Answer]:
    """Send the requests in their order, `concurrency` at a time; the answers in the same order.

    `answered` is called after each answer.
    """
    answers: dict[int, Answer] = {}
    queue = iter(requests)

    async def worker(queue: Iterator[Request]) -> None:
        for request in queue:
            answers[request.number] = await clients.send(request)
            answered()

    async with Clients(url) as clients, asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker(queue))
    return [answers[request.number] for request in requests]
