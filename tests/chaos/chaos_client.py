"""A client that notes when things happened, and can leave at any moment. Times are seconds since 1970, as engines'."""

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp

CHAT = "/v1/chat/completions"
GENERATE = "/generate"
PATIENCE_S = 20.0
"""After this a client that waits is one that would wait forever."""


@dataclass
class Seen:
    """One request as its client saw it."""

    request_id: str
    status: int = 0
    """0: no answer."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    error: str = ""
    """How the connection failed; empty: it did not."""
    left: bool = False
    sent_unix: float = 0.0
    ended_unix: float = 0.0

    @property
    def total_ms(self) -> float:
        """From the request to the end of its answer."""
        return (self.ended_unix - self.sent_unix) * 1e3

    @property
    def done(self) -> bool:
        """Whether a stream came to its proper end."""
        return self.body.rstrip().endswith(b"data: [DONE]")

    def said(self, stream: bool = False) -> str:
        """In a few words."""
        if self.left:
            return "left"
        if not self.status:
            return self.error or "nothing"
        if self.error:
            return f"{self.status}, then {self.error}"
        if self.status == 200 and stream and not self.done:
            return "200, a clean end without [DONE]"
        return str(self.status)


def chat(tokens: int = 4, prompt_bytes: int = 400, stream: bool = False) -> dict[str, Any]:
    """The body of a chat request."""
    messages = [{"role": "user", "content": "x" * prompt_bytes}]
    return {"model": "sim-model", "messages": messages, "max_tokens": tokens, "stream": stream}


def generate(tokens: int = 4, prompt_bytes: int = 400, stream: bool = False) -> dict[str, Any]:
    """The body of a /generate request: its streams begin at once, before the first token."""
    return {"text": "x" * prompt_bytes, "sampling_params": {"max_new_tokens": tokens}, "stream": stream}


class Client:
    """Sends requests to one gateway. Use as an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def send(
        self,
        body: Any,
        path: str = CHAT,
        *,
        leave_after_s: float | None = None,
        leave_after_bytes: int | None = None,
        patience_s: float = PATIENCE_S,
    ) -> Seen:
        """The outcome, whatever it is. `body`: JSON, or an async iterator of bytes."""
        seen = Seen(str(uuid.uuid4()), sent_unix=time.time())
        try:
            async with asyncio.timeout(patience_s if leave_after_s is None else leave_after_s):
                await self._send(seen, body, path, leave_after_bytes)
        except TimeoutError:
            seen.left, seen.error = leave_after_s is not None, f"no answer within {patience_s:g} s"
        except (aiohttp.ClientError, ConnectionError) as error:
            seen.error = type(error).__name__
        seen.ended_unix = time.time()
        return seen

    async def _send(self, seen: Seen, body: Any, path: str, leave_after_bytes: int | None) -> None:
        content = {"json": body} if isinstance(body, dict) else {"data": body}
        headers = {"x-request-id": seen.request_id, "content-type": "application/json"}
        async with self._http.post(self._url + path, headers=headers, **content) as response:
            seen.status, seen.headers = response.status, {k.lower(): v for k, v in response.headers.items()}
            async for piece in response.content.iter_any():
                seen.body += piece
                if leave_after_bytes is not None and len(seen.body) >= leave_after_bytes:
                    seen.left = True
                    response.close()
                    return
