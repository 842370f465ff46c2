"""The one way to ask an engine something over HTTP: one GET, bounded in time and in bytes.

No redirect is followed, nothing is decompressed and proxy variables are not read: what answers is the worker itself.
"""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

MAX_PAGE_BYTES = 8 << 20
"""A `/metrics` page has about 20 KB a rank (measured, SGLang 0.5.23); 8 MiB is room for 400 ranks."""

CONNECTION_LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


class _PoolPerWorker(httpx.AsyncBaseTransport):
    """A connection pool for each worker instead of one for all.

    For each request httpcore 1.0 walks over all connections of its pool and polls the idle ones, so that with one pool
    a request costs more the more workers there are: 5.6 ms with 500 of them.
    """

    def __init__(self, keepalive_s: float) -> None:
        self._limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=keepalive_s)
        self._tls = httpx.create_ssl_context(trust_env=False)  # takes 20 ms: one for all
        self._pools = dict[tuple[str, str, int | None], httpx.AsyncHTTPTransport]()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        origin = (request.url.scheme, request.url.host, request.url.port)
        pool = self._pools.get(origin)
        if pool is None:
            pool = httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=self._limits)
            self._pools[origin] = pool
        return await pool.handle_async_request(request)

    async def aclose(self) -> None:
        for pool in self._pools.values():
            await pool.aclose()


class FetchError(Exception):
    """There is no usable answer; the message says why, in words for a log line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, whatever its status."""

    status: int
    content_type: str
    """In lower case, without parameters; empty when there was none."""
    body: bytes


def make_client(keepalive_s: float) -> httpx.AsyncClient:
    """The client that all checks and scrapes share: a kept connection a worker, no limit on how many workers.

    `keepalive_s` is how long an idle connection is kept: longer than the longest interval between two requests.
    Time-outs are `fetch`'s.
    """
    for name in ("httpx", "httpcore"):  # they log every request at info, and at debug what headers answers have
        logging.getLogger(name).setLevel(logging.WARNING)
    return httpx.AsyncClient(
        timeout=None,  # noqa: S113 - `fetch` bounds the whole exchange
        transport=_PoolPerWorker(keepalive_s),
        follow_redirects=False,
        trust_env=False,
    )


async def fetch(
    client: httpx.AsyncClient,
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
            except CONNECTION_LOST:
                # uvicorn, under SGLang, closes a connection after 5 idle seconds: with checks every 5 s, just as the
                # next one is on its way. That says nothing about the engine, and a GET can be repeated.
                return await _get(client, url, asked, limit_bytes)
    except TimeoutError:
        raise FetchError(f"no answer within {timeout_s:g} s") from None
    except httpx.ConnectError as error:
        raise FetchError(f"cannot connect ({error})") from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, UnicodeError) as error:
        raise FetchError(f"{type(error).__name__}: {error}") from error


async def _get(client: httpx.AsyncClient, url: str, headers: Mapping[str, str], limit_bytes: int) -> Answer:
    async with client.stream("GET", url, headers=headers, follow_redirects=False) as response:
        if response.headers.get("content-encoding", "identity") != "identity":
            # A few KB can hold gigabytes: better no answer than an unbounded one.
            raise FetchError("the answer is compressed, though that was not asked for")
        body = bytearray()
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > limit_bytes:
                raise FetchError(f"the answer is longer than {limit_bytes} bytes")
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        return Answer(response.status_code, content_type, bytes(body))
