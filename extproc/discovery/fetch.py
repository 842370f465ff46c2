"""The one way to ask an engine something over HTTP: one GET, bounded in time and in bytes.

No redirect is followed, nothing is decompressed and proxy variables are not read: what answers is the worker itself.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from extproc.discovery.http_client import CannotConnectError, ConnectionLostError, HttpClient
from extproc.discovery.http_response import Answer, ResponseError

MAX_PAGE_BYTES = 8 << 20
"""A `/metrics` page has about 20 KB a rank (measured, SGLang 0.5.23); 8 MiB is room for 400 ranks."""


class FetchError(Exception):
    """There is no usable answer; the message says why, in words for a log line."""


class Client(Protocol):
    """Sends GETs. Follows no redirect; does not bound their time, which `fetch` does."""

    async def get(self, url: str, headers: Mapping[str, str], limit_bytes: int) -> Answer:
        """Raises ConnectionLostError, CannotConnectError, ResponseError, ValueError (the URL)."""


@contextlib.asynccontextmanager
async def make_client(keepalive_s: float) -> AsyncIterator[Client]:
    """The client that all checks and scrapes share: a kept connection a worker, no limit on how many workers.

    `keepalive_s` is how long an idle connection is kept: longer than the longest interval between two requests.
    """
    client = HttpClient(keepalive_s)
    try:
        yield client
    finally:
        client.close()


async def fetch(
    client: Client,
    url: str,
    *,
    timeout_s: float,
    headers: Mapping[str, str] | None = None,
    limit_bytes: int = MAX_PAGE_BYTES,
) -> Answer:
    """GETs `url`. Raises FetchError unless the whole answer came within `timeout_s` and `limit_bytes`."""
    try:
        async with asyncio.timeout(timeout_s):
            try:
                return await client.get(url, headers or {}, limit_bytes)
            except ConnectionLostError:
                # uvicorn, under SGLang, closes a connection after 5 idle seconds: with checks every 5 s, just as the
                # next one is on its way. That says nothing about the engine, and a GET can be repeated.
                return await client.get(url, headers or {}, limit_bytes)
    except TimeoutError:
        raise FetchError(f"no answer within {timeout_s:g} s") from None
    except CannotConnectError as error:
        raise FetchError(f"cannot connect ({error})") from error
    except ConnectionLostError as error:
        raise FetchError(f"connection lost ({error})") from error
    except ResponseError as error:
        raise FetchError(str(error)) from error
    except ValueError as error:
        raise FetchError(f"the URL cannot be asked for ({error})") from error
