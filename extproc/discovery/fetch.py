"""The one way to ask an engine something over HTTP: one GET, bounded in time and in bytes.

No redirect is followed, nothing is decompressed and proxy variables are not read: what answers is the worker itself.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

import aiohttp

MAX_PAGE_BYTES = 8 << 20
"""A `/metrics` page has about 20 KB a rank (measured, SGLang 0.5.23); 8 MiB is room for 400 ranks."""


class FetchError(Exception):
    """There is no usable answer; the message says why, in words for a log line."""


class ConnectionLostError(Exception):
    """A connection that was there broke off."""


class CannotConnectError(Exception):
    """There is none."""


class Response(Protocol):
    """An answer whose body is still to come."""

    @property
    def status(self) -> int:
        """HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Without regard to the case of names."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, not decompressed."""


class Client(Protocol):
    """Sends GETs. Follows no redirect; bounds neither time nor bytes, which `fetch` does."""

    def get(self, url: str, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Response]:
        """Raises ConnectionLostError, CannotConnectError, and FetchError for the rest; so does reading the body."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    content_type: str
    """In lower case, without parameters; empty when there was none."""
    body: bytes


@contextlib.asynccontextmanager
async def make_client(keepalive_s: float) -> AsyncIterator[Client]:
    """The client that all checks and scrapes share: a kept connection a worker, no limit on how many workers.

    `keepalive_s` is how long an idle connection is kept: longer than the longest interval between two requests.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=keepalive_s, use_dns_cache=False)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),  # `fetch` bounds the whole exchange
        auto_decompress=False,
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:
        yield _Aiohttp(session)


class _Aiohttp:
    """aiohttp: a twentieth of httpx's CPU a request (docs/decisions.md), and there are a thousand a second."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    @contextlib.asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str]) -> AsyncIterator[Response]:
        """See `Client`."""
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                yield _Response(response)
        except aiohttp.ClientConnectorError as error:
            raise CannotConnectError(str(error.os_error or error)) from error
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientPayloadError) as error:
            raise ConnectionLostError(f"{type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Response:
    response: aiohttp.ClientResponse

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    def chunks(self) -> AsyncIterator[bytes]:
        return self.response.content.iter_any()


async def fetch(
    client: Client,
    url: str,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    limit_bytes: int = MAX_PAGE_BYTES,
) -> Answer:
    """GETs `url`. Raises FetchError unless the whole answer came within `timeout_s` and `limit_bytes`."""
    asked = {"accept-encoding": "identity", **(headers or {})}
    try:
        async with asyncio.timeout(timeout_s):
            try:
                return await _get(client, url, asked, limit_bytes)
            except ConnectionLostError:
                # uvicorn, under SGLang, closes a connection after 5 idle seconds: with checks every 5 s, just as the
                # next one is on its way. That says nothing about the engine, and a GET can be repeated.
                return await _get(client, url, asked, limit_bytes)
    except TimeoutError:
        raise FetchError(f"no answer within {timeout_s:g} s") from None
    except CannotConnectError as error:
        raise FetchError(f"cannot connect ({error})") from error
    except ConnectionLostError as error:
        raise FetchError(str(error)) from error


async def _get(client: Client, url: str, headers: Mapping[str, str], limit_bytes: int) -> Answer:
    async with client.get(url, headers) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            # A few KB can hold gigabytes: better no answer than an unbounded one.
            raise FetchError("the answer is compressed, though that was not asked for")
        body = bytearray()
        async for chunk in response.chunks():
            body += chunk
            if len(body) > limit_bytes:
                raise FetchError(f"the answer is longer than {limit_bytes} bytes")
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return Answer(response.status, content_type, bytes(body))
