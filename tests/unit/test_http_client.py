"""http_client: over real sockets, on both event loops, against servers that keep, close, hang up and lie."""

import asyncio
import base64
import contextlib
import shutil
import ssl
import subprocess

import pytest
import uvloop

from extproc.discovery import http_client
from extproc.discovery.fetch import FetchError, fetch, make_client
from extproc.discovery.http_client import CannotConnectError, ConnectionLostError, HttpClient, Origin, read_url
from extproc.discovery.http_response import Answer, ResponseError

PATIENCE_S = 10
LIMIT_BYTES = 100_000
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
HELLO = Answer(200, "text/plain", b"hello")


class Server:
    """Plays one script a connection, the last one for all that follow."""

    def __init__(self, *scripts):
        self._scripts = scripts
        self.connections = 0
        self.open = 0
        self.requests = list[str]()

    async def __call__(self, reader, writer):
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await script(self, reader, writer)
        finally:
            self.open -= 1
            writer.close()

    async def request(self, reader):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.requests.append(head)
        return head

    async def until(self, condition):
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 - what is waited for happens in the other end's kernel, too
                await asyncio.sleep(0.005)


def answers(*pages):
    """A script: one page a request, the last one again and again; each piece of a list in a write of its own."""

    async def script(server, reader, writer):
        number = 0
        while True:
            await server.request(reader)
            page = pages[min(number, len(pages) - 1)]
            for piece in page if isinstance(page, list) else [page]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
            number += 1

    return script


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def ask(request):
    """Runs `work(server, url, client)` against a server with these scripts."""

    def run(work, *scripts, keepalive_s=30.0, tls=None):
        async def main():
            server = Server(*scripts)
            listener = await asyncio.start_server(server, "127.0.0.1", 0, ssl=tls)
            port = listener.sockets[0].getsockname()[1]
            try:
                async with make_client(keepalive_s) as client:
                    return await work(server, f"http{'s' if tls else ''}://127.0.0.1:{port}", client)
            finally:
                listener.close()
                await server.until(lambda: not server.open)  # whatever there was, the client has closed it

        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(main())

    return run


def get(client, url, **headers):
    return client.get(url, headers, LIMIT_BYTES)


def test_one_connection_is_kept_for_all_requests(ask):
    async def work(server, url, client):
        for path in ("/a", "/b?c=d", ""):
            assert await get(client, url + path, authorization="Bearer x") == HELLO
        return server, url

    server, url = ask(work, answers(OK))
    assert server.connections == 1
    host = url.removeprefix("http://")
    fields = f"Host: {host}\r\nUser-Agent: extproc\r\nAccept-Encoding: identity\r\nauthorization: Bearer x\r\n\r\n"
    assert server.requests == [f"GET {target} HTTP/1.1\r\n{fields}" for target in ("/a", "/b?c=d", "/")]


@pytest.mark.parametrize(
    "page",
    [
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello",
        OK + b"HTTP/1.1 200 OK\r\n",
    ],
    ids=["close", "1.0", "surplus"],
)
def test_a_connection_that_ends_with_its_answer_is_not_asked_again(ask, page):
    async def work(server, url, client):
        assert [await get(client, url) for _ in range(3)] == [HELLO] * 3
        assert server.connections == 3
        await server.until(lambda: not server.open)

    ask(work, answers(page))


def test_a_connection_that_was_closed_while_idle_is_not_asked_again(ask):
    async def once(server, reader, writer):
        await server.request(reader)
        writer.write(OK)

    async def work(server, url, client):
        assert await get(client, url) == HELLO
        await server.until(lambda: not server.open)
        await asyncio.sleep(0.05)  # its end is on the way
        assert await get(client, url) == HELLO
        assert (server.connections, len(server.requests)) == (2, 2)

    ask(work, once, answers(OK))


def test_a_connection_that_is_closed_as_it_is_asked_is_lost_and_a_fetch_asks_again(ask):
    async def once_and_hang_up(server, reader, writer):
        await server.request(reader)
        writer.write(OK)
        await server.request(reader)

    async def work(server, url, client):
        assert await get(client, url) == HELLO
        with pytest.raises(ConnectionLostError, match="closed before"):
            await get(client, url)
        assert await get(client, url) == HELLO
        assert await fetch(client, url, timeout_s=PATIENCE_S) == HELLO
        assert (server.connections, len(server.requests)) == (3, 5)

    ask(work, once_and_hang_up, once_and_hang_up, answers(OK))


def test_a_connection_that_is_closed_before_it_is_asked_is_lost(ask):
    async def closed(*_):
        pass

    async def work(_, url, client):
        for _ in range(20):
            with pytest.raises(ConnectionLostError):
                await get(client, url)

    ask(work, closed)


def test_an_engine_that_only_hangs_up_is_asked_twice_a_fetch(ask):
    async def hang_up(server, reader, _):
        await server.request(reader)

    async def work(server, url, client):
        with pytest.raises(FetchError, match="connection lost"):
            await fetch(client, url, timeout_s=PATIENCE_S)
        assert server.connections == 2

    ask(work, hang_up)


def test_a_reset_in_mid_answer_is_a_lost_connection(ask):
    async def reset(server, reader, writer):
        await server.request(reader)
        writer.write(OK[:-1])
        await writer.drain()
        writer.transport.abort()

    async def work(_, url, client):
        with pytest.raises(ConnectionLostError):
            await get(client, url)

    ask(work, reset)


def test_what_nobody_asked_for_ends_a_connection(ask):
    async def farewell(server, reader, writer):
        await server.request(reader)
        writer.write(OK)
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await reader.read()

    async def work(server, url, client):
        assert await get(client, url) == HELLO
        await server.until(lambda: not server.open)
        assert await get(client, url) == HELLO

    ask(work, farewell, answers(OK))


def test_two_at_once_take_two_connections_and_both_are_kept(ask):
    async def work(server, url, client):
        for _ in range(3):
            assert await asyncio.gather(get(client, url), get(client, url)) == [HELLO] * 2
        assert server.connections == 2
        assert repr(client) == "<HttpClient, 2 idle connections to 1 hosts>"

    ask(work, answers(OK))


def test_connections_that_nobody_uses_are_closed(ask):
    async def work(server, url, client):
        await asyncio.gather(get(client, url), get(client, url))
        # One stays in use: the other is closed all the same.
        async with asyncio.timeout(PATIENCE_S):
            while server.open == 2:
                await get(client, url)
                await asyncio.sleep(0.01)
        assert server.connections == 2
        await server.until(lambda: not server.open)
        assert repr(client) == "<HttpClient, 0 idle connections to 0 hosts>"
        assert await get(client, url) == HELLO

    ask(work, answers(OK), keepalive_s=0.1)


def test_whoever_gives_up_closes_the_connection(ask):
    async def late(server, reader, writer):
        await server.request(reader)
        writer.write(OK[:-1])
        await reader.read()  # until the client closes

    async def work(server, url, client):
        with pytest.raises(FetchError, match=r"no answer within 0\.1 s"):
            await fetch(client, url, timeout_s=0.1)
        await server.until(lambda: not server.open)
        assert await get(client, url) == HELLO

    ask(work, late, answers(OK))


def test_an_answer_that_cannot_be_used_closes_the_connection(ask):
    async def lies(server, reader, writer):
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\nhello")
        await reader.read()

    async def work(server, url, client):
        with pytest.raises(ResponseError, match="no length"):
            await get(client, url)
        await server.until(lambda: not server.open)
        assert await get(client, url) == HELLO

    ask(work, lies, answers(OK))


@pytest.mark.parametrize(
    "page",
    [
        [OK[:10], OK[10:40], OK[40:]],
        [
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n2\r\n",
            b"he\r\n3\r\nllo\r\n",
            b"0\r\n",
            b"\r\n",
        ],
    ],
    ids=["length", "chunked"],
)
def test_answers_in_pieces(ask, page):
    async def work(server, url, client):
        assert [await get(client, url) for _ in range(2)] == [HELLO] * 2
        assert server.connections == 1

    ask(work, answers(page))


def test_an_answer_that_ends_with_its_connection(ask):
    async def until_close(server, reader, writer):
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhel")
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(b"lo")

    async def work(server, url, client):
        assert [await get(client, url) for _ in range(2)] == [HELLO] * 2
        assert server.connections == 2

    ask(work, until_close)


def test_a_long_page(ask):
    page = b"HTTP/1.1 200 OK\r\ncontent-length: 5000000\r\n\r\n" + b"x" * 5_000_000

    async def work(server, url, client):
        assert await client.get(url, {}, 5_000_000) == Answer(200, "", b"x" * 5_000_000)
        assert await client.get(url, {}, 5_000_000) == Answer(200, "", b"x" * 5_000_000)
        assert server.connections == 1

    ask(work, answers(page))


def test_no_redirect_is_followed(ask):
    async def work(server, url, client):
        assert (await get(client, url)).status == 302
        assert len(server.requests) == 1

    ask(work, answers(b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n"))


def test_all_addresses_of_a_name_are_tried(ask):
    """`localhost` may be ::1 first, where nobody listens."""

    async def work(_, url, client):
        return await get(client, url.replace("127.0.0.1", "localhost"))

    assert ask(work, answers(OK)) == HELLO


def test_nobody_listens_or_not_for_tls(ask):
    async def plain(_, reader, writer):
        await reader.read(1)
        writer.write(OK)

    async def work(_, url, client):
        with pytest.raises(CannotConnectError):
            await get(client, "http://127.0.0.1:1/")
        with pytest.raises(CannotConnectError, match=r"(?i)ssl"):
            await get(client, url.replace("http", "https"))

    ask(work, plain)


def test_no_header_can_add_another(ask):
    async def work(server, url, client):
        for value in ("x\r\ny: z", "x\ny", "x\r"):
            with pytest.raises(ValueError, match="line break") as raised:
                await get(client, url, authorization=value)
            assert value not in str(raised.value)
        assert not server.requests

    ask(work, answers(OK))


@pytest.fixture
def own_certificate(tmp_path, monkeypatch):
    """A server's TLS for 127.0.0.1, with a certificate that the system trusts for now."""
    crt, key = tmp_path / "server.crt", tmp_path / "server.key"
    command = [
        shutil.which("openssl") or pytest.skip("makes a certificate with openssl, which is not installed"),
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-noenc",
        "-days",
        "2",
    ]
    names = ["-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", str(key), "-out", str(crt)], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(crt, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(crt))
    http_client._tls.cache_clear()
    yield tls
    http_client._tls.cache_clear()


def test_tls(ask, own_certificate):
    async def work(server, url, client):
        assert [await get(client, url) for _ in range(3)] == [HELLO] * 3
        assert server.connections == 1
        with pytest.raises(CannotConnectError, match=r"(?i)certificate"):
            await get(client, url.replace("127.0.0.1", "localhost"))  # not its name

    ask(work, answers(OK), tls=own_certificate)


def test_a_certificate_that_nobody_trusts(ask, own_certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")

    async def work(server, url, client):
        with pytest.raises(CannotConnectError, match=r"(?i)certificate"):
            await get(client, url)
        assert not server.requests

    ask(work, answers(OK), tls=own_certificate)


@pytest.mark.parametrize(
    ("url", "origin", "line", "host"),
    [
        ("http://a", Origin(False, "a", 80), "/", "a"),
        ("http://a:80/", Origin(False, "a", 80), "/", "a"),
        ("https://a/", Origin(True, "a", 443), "/", "a"),
        ("https://a:80/", Origin(True, "a", 80), "/", "a:80"),
        ("http://A.B:30000/v1/loads?x=y&z", Origin(False, "a.b", 30000), "/v1/loads?x=y&z", "a.b:30000"),
        ("http://[::1]:30000/m", Origin(False, "::1", 30000), "/m", "[::1]:30000"),
        ("http://a?x=y", Origin(False, "a", 80), "/?x=y", "a"),
        ("http://a/m#part", Origin(False, "a", 80), "/m", "a"),
        ("http://a/é m%20n/<>", Origin(False, "a", 80), "/%C3%A9%20m%20n/%3C%3E", "a"),
        ("http://a/x?ü=\"", Origin(False, "a", 80), "/x?%C3%BC=%22", "a"),
        ("http://bücher/", Origin(False, "xn--bcher-kva", 80), "/", "xn--bcher-kva"),
        ("http://a/\r\nx: y", Origin(False, "a", 80), "/x:%20y", "a"),
    ],
)  # fmt: skip
def test_what_a_url_asks_for(url, origin, line, host):
    target = read_url(url)
    assert target.origin == origin
    assert target.head.decode().split("\r\n")[:2] == [f"GET {line} HTTP/1.1", f"Host: {host}"]
    assert target.login == ""


def test_user_and_password_of_a_url_are_sent_where_no_other_key_is(ask):
    async def work(server, url, client):
        url = url.replace("//", "//user:p%40ss@")
        await get(client, url)
        await get(client, url, authorization="Bearer x")
        basic = base64.b64encode(b"user:p@ss").decode()
        assert f"\r\nauthorization: Basic {basic}\r\n" in server.requests[0]
        assert f"\r\nHost: {url.partition('@')[2]}\r\n" in server.requests[0]
        assert "Basic" not in server.requests[1]

    ask(work, answers(OK))


@pytest.mark.parametrize(
    "url",
    ["", "a/b", "ftp://a/", "unix:///a", "http://", "http:///m", "http://a:99999/", "http://a:x/", "http://[::1", "http://ü..ä/"],
)  # fmt: skip
def test_urls_that_cannot_be_asked_for(url):
    async def work():
        async with make_client(30) as client:
            with pytest.raises(FetchError, match="the URL cannot be asked for"):
                await fetch(client, url, timeout_s=PATIENCE_S)

    asyncio.run(work())


def test_a_client_says_what_it_holds():
    async def work():
        client = HttpClient(30)
        try:
            return repr(client)
        finally:
            client.close()

    assert asyncio.run(work()) == "<HttpClient, 0 idle connections to 0 hosts>"
