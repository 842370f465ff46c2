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
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request at info
    return httpx.AsyncClient(
        timeout=None,  # noqa: S113 - `fetch` bounds the whole exchange
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=keepalive_s),
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
