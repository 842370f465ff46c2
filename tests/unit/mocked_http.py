"""The client of checks and scrapes, with an httpx transport in place of a network."""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

import httpx

from extproc.discovery.fetch import CannotConnectError, ConnectionLostError, FetchError

LOST = (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)


@dataclass(frozen=True)
class MockedClient:
    """Asks a function."""

    answer: Callable[[httpx.Request], object]

    @contextlib.asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str]) -> AsyncIterator["MockedResponse"]:
        try:
            async with (
                httpx.AsyncClient(transport=httpx.MockTransport(self.answer)) as client,
                client.stream("GET", url, headers=dict(headers)) as response,
            ):
                yield MockedResponse(response)
        except httpx.ConnectError as error:
            raise CannotConnectError(str(error)) from error
        except LOST as error:
            raise ConnectionLostError(f"{type(error).__name__}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise FetchError(f"{type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class MockedResponse:
    response: httpx.Response

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    def chunks(self) -> AsyncIterator[bytes]:
        return self.response.aiter_bytes()
