"""GETs over HTTP/1.1, on connections that are kept: the shell around `http_response`.

Of our own because a thousand engines are asked each second, and every library costs several times as much a request
(docs/decisions.md). It knows what polling an engine needs and no more: one GET at a time on a connection, no redirects,
no proxies, no cookies, no compression.
"""

import asyncio
import base64
import functools
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

import aiohappyeyeballs

from extproc.discovery.http_response import Answer, ResponseError, ResponseReader

NEXT_ADDRESS_S = 0.25
"""How long one address of a host is waited for before the next is tried, too (RFC 8305, section 5)."""

PORTS = {"http": 80, "https": 443}

KEPT_URLS = 8192
"""URLs whose parts are remembered: three or four a worker are asked for."""

_UNQUOTED = "!$%&'()*+,-./:;=?@[]_~"
"""What may stand in a path and query as it is (RFC 3986, sections 3.3 and 3.4), `%` of what is quoted already."""


class ConnectionLostError(Exception):
    """A connection that was there broke off."""


class CannotConnectError(Exception):
    """There is none."""


class Origin(NamedTuple):
    """Whom a connection is to."""

    secure: bool
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL says."""

    origin: Origin
    head: bytes
    """Of the request, as far as it is the same for all requests for the URL."""
    login: str
    """The field line of the user and password in the URL, if there are any."""


class HttpClient:
    """Asks any number of hosts; to be made on a running event loop.

    A connection that was not used for `keepalive_s` to twice as long is closed.
    """

    def __init__(self, keepalive_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._keepalive_s = keepalive_s
        self._idle = dict[Origin, list[_Connection]]()
        """Connections to be asked, the one used last at the end."""
        self._next_sweep = self._loop.call_later(keepalive_s, self._sweep)

    def __repr__(self) -> str:
        return f"<HttpClient, {sum(map(len, self._idle.values()))} idle connections to {len(self._idle)} hosts>"

    async def get(self, url: str, headers: Mapping[str, str], limit_bytes: int) -> Answer:
        """The answer, whatever its status. Without a limit in time; when cancelled, the connection is closed.

        Raises ConnectionLostError, CannotConnectError, ResponseError; ValueError for a URL that cannot be asked.
        """
        target = read_url(url)
        fields = "" if "authorization" in headers else target.login
        for name, value in headers.items():
            if "\r" in value or "\n" in value:
                raise ValueError(f"the header {name} has a line break in it")
            fields += f"{name}: {value}\r\n"
        reader = ResponseReader(limit_bytes)
        connection = self._kept(target.origin) or await self._connect(target.origin)
        answer = await connection.ask(b"%b%b\r\n" % (target.head, fields.encode("latin-1")), reader)
        if connection.is_open:
            self._idle.setdefault(target.origin, []).append(connection)
        return answer

    def close(self) -> None:
        """Closes what is idle; who asks something has to be cancelled before."""
        self._next_sweep.cancel()
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()

    def _kept(self, origin: Origin) -> "_Connection | None":
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self, origin: Origin) -> "_Connection":
        try:
            addresses = await self._loop.getaddrinfo(
                origin.host, origin.port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG
            )
            connected = await aiohappyeyeballs.start_connection(
                addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1, loop=self._loop
            )
            try:
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self._loop),
                    sock=connected,
                    ssl=_tls() if origin.secure else None,
                    server_hostname=origin.host if origin.secure else None,
                )
            except BaseException:
                connected.close()
                raise
        except OSError as error:  # a failed TLS handshake is one, too
            raise CannotConnectError(str(error)) from error
        return connection

    def _sweep(self) -> None:
        """Closes what nobody has asked since the last sweep: hosts come and go, and so does a second connection."""
        for origin, connections in list(self._idle.items()):
            stale = [connection for connection in connections if connection.unused or not connection.is_open]
            for connection in stale:
                connection.abort()
                connections.remove(connection)
            for connection in connections:
                connection.unused = True
            if not connections:
                del self._idle[origin]
        self._next_sweep = self._loop.call_later(self._keepalive_s, self._sweep)


class _Connection(asyncio.Protocol):
    """One connection, which is asked one thing at a time."""

    __slots__ = ("_answer", "_loop", "_reader", "_transport", "unused")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader: ResponseReader | None = None
        """Of the answer that is waited for."""
        self._answer: asyncio.Future[Answer] | None = None
        self.unused = False
        """It was not asked since the client last looked."""

    @property
    def is_open(self) -> bool:
        """Whether it can be asked."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, reader: ResponseReader) -> Answer:
        """Sends a request and waits for its answer. Raises ConnectionLostError, ResponseError."""
        if self._transport is None:
            raise ConnectionLostError("closed before it was asked anything")
        self.unused = False
        self._reader = reader
        self._answer = self._loop.create_future()
        self._transport.write(request)
        try:
            return await self._answer
        except asyncio.CancelledError:
            self.abort()  # the answer would come later, and be taken for another's
            raise

    def abort(self) -> None:
        """Closes at once; nobody is told."""
        self._reader = self._answer = None
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`, as for all of these."""
        self._transport = transport  # type: ignore[assignment] # asyncio: a Transport, if it is a stream's

    def data_received(self, data: bytes) -> None:
        """Part of an answer; or, unasked for, a server's farewell (408, say)."""
        if self._reader is None:
            self.abort()
            return
        try:
            answer = self._reader.feed(data)
        except ResponseError as error:
            self._over(error)
            return
        if answer is not None:
            self._done(answer)

    def eof_received(self) -> None:
        """The peer has said all. The transport closes itself."""
        answer = None if self._reader is None else self._reader.end()
        if answer is not None:
            self._done(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Either side has closed it."""
        self._transport = None
        self._over(ConnectionLostError(str(exc) if exc else "closed before the answer was complete"))

    def _done(self, answer: Answer) -> None:
        reader, future = self._reader, self._answer
        self._reader = self._answer = None
        if future is not None and not future.done():
            future.set_result(answer)
        if reader is None or not reader.keep_alive:
            self.abort()

    def _over(self, error: Exception) -> None:
        future = self._answer
        self.abort()
        if future is not None and not future.done():
            future.set_exception(error)


@functools.lru_cache(maxsize=KEPT_URLS)
def read_url(url: str) -> Target:
    """What to ask whom. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError("expected http:// or https:// and a host")
    default = PORTS[parts.scheme]
    port = parts.port or default
    host = parts.hostname if parts.hostname.isascii() else parts.hostname.encode("idna").decode("ascii")
    authority = f"[{host}]" if ":" in host else host
    if port != default:
        authority += f":{port}"
    path = quote(parts.path or "/", safe=_UNQUOTED)
    query = f"?{quote(parts.query, safe=_UNQUOTED)}" if parts.query else ""
    lines = [f"GET {path}{query} HTTP/1.1", f"Host: {authority}", "User-Agent: extproc", "Accept-Encoding: identity"]
    head = "".join(f"{line}\r\n" for line in lines)
    login = ""
    if parts.username is not None:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        login = f"authorization: Basic {base64.b64encode(words.encode()).decode()}\r\n"
    return Target(Origin(parts.scheme == "https", host, port), head.encode("ascii"), login)


@functools.cache
def _tls() -> ssl.SSLContext:
    """Trusts whom the system trusts. Made when it is first needed: it reads some hundred certificates."""
    return ssl.create_default_context()
