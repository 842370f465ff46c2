"""The client of checks and scrapes, with an httpx transport in place of a network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from extproc.discovery.fetch import FetchError
from extproc.discovery.http_client import CannotConnectError, ConnectionLostError
from extproc.discovery.http_response import Answer, ResponseReader

LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


@dataclass(frozen=True)
class MockedClient:
    """Asks a function, and reads what it answers as if it had come over a connection that ends with it."""

    answer: Callable[[httpx.Request], object]

    async def get(self, url: str, headers: Mapping[str, str], limit_bytes: int) -> Answer:
        reader = ResponseReader(limit_bytes)
        try:
            async with (
                httpx.AsyncClient(transport=httpx.MockTransport(self.answer)) as client,
                client.stream("GET", url, headers=dict(headers)) as response,
            ):
                answer = reader.feed(head(response))
                async for chunk in response.aiter_bytes():
                    answer = reader.feed(chunk)
        except httpx.ConnectError as error:
            raise CannotConnectError(str(error)) from error
        except LOST as error:
            raise ConnectionLostError(f"{type(error).__name__}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from error
        answer = answer or reader.end()
        assert answer is not None
        return answer


def head(response: httpx.Response) -> bytes:
    """Of an answer whose body ends with the connection."""
    lines = [f"HTTP/1.1 {response.status_code} {response.reason_phrase}"]
    lines += [
        f"{name}: {value}"
        for name, value in response.headers.items()
        if name not in {"content-length", "transfer-encoding"}
    ]
    return "\r\n".join([*lines, "", ""]).encode()
