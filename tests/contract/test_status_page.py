"""The status page and `/debug/decisions` of a composed service, without a browser."""

import asyncio
import base64
import contextlib
import hashlib
import html.parser
import re
import socket
from dataclasses import replace

import httpx

from extproc.cli import main as extproc
from extproc.config import Config, WorkerConfig
from extproc.events import Ended, Finished, RequestBody, RequestHeaders
from extproc.exchange import Exchange
from extproc.model import Role
from extproc.server import Service

PROMPT = "the secret of the prompt"
BODY = b'{"text": "%s", "sampling_params": {"max_new_tokens": 8}}' % PROMPT.encode()
MARKUP = "<script>alert(1)</script>"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.asynccontextmanager
async def running(tmp_path):
    """A service and a client of its metrics port; its workers are nowhere, but it takes them to be well."""
    config = Config(
        prefill=(WorkerConfig(url="http://127.0.0.1:1"),),
        decode=(WorkerConfig(url="http://127.0.0.1:2"),),
        prometheus_port=free_port(),
    )
    service = Service(config, grpc_target=f"unix:{tmp_path}/ext_proc.sock")
    async with (
        asyncio.timeout(60),
        service.running() as addresses,
        httpx.AsyncClient(base_url=addresses.status) as client,
    ):
        yield service, client


def place(service: Service, request_id: str, body: bytes = BODY) -> Exchange:
    """Let a request be placed, on rank 0 or 1 of 2; nothing runs in between that could find the workers ill."""
    for state in service.table.states:
        service.table.worker_changed(replace(state.worker, dp_size=2), healthy=True)
    exchange = Exchange(service.gateway)
    headers = {":method": "POST", ":path": "/generate", "x-request-id": request_id}
    exchange.route(RequestHeaders(headers, end_of_stream=False))
    exchange.route(RequestBody(body))
    return exchange


def end(service: Service, exchange: Exchange) -> None:
    """The client leaves."""
    for effect in exchange.route(Ended()):
        if isinstance(effect, Finished):
            service.telemetry.finished(effect)


class Outline(html.parser.HTMLParser):
    """The tables of a page, and that every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scopes: list[str | None] = []
        self.captions = 0
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if tag not in {"meta", "br", "rect"}:
            self.open.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "th":
            self.scopes.append(dict(attributes).get("scope"))
        self.captions += tag == "caption"

    def handle_startendtag(self, tag, attributes):
        assert tag == "rect"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_decisions_of_running_and_ended_requests(tmp_path):
    async def main():
        async with running(tmp_path) as (service, client):
            assert (await client.get("/debug/decisions")).json() == {"decisions": []}
            first = place(service, "first")
            end(service, first)
            place(service, "second")
            refused = place(service, "refused", b"no JSON")
            end(service, refused)
            answer = await client.get("/debug/decisions")
            assert answer.headers["content-type"].startswith("application/json")
            assert PROMPT not in answer.text
            second, first = answer.json()["decisions"]
            assert (second["request_id"], second["outcome"]) == ("second", "running")
            assert (first["request_id"], first["outcome"]) == ("first", "aborted")
            assert first["prefill"]["worker"] == "127.0.0.1:1"
            assert {first["prefill"]["dp_rank"], second["prefill"]["dp_rank"]} <= {0, 1}
            assert 0 <= second["age_s"] <= first["age_s"] < 60
            assert int(first["room"]) % 2 == first["prefill"]["dp_rank"]

    asyncio.run(main())


def test_the_page_shows_the_table_whole_and_accessible(tmp_path):
    async def main():
        async with running(tmp_path) as (service, client):
            end(service, place(service, "first"))
            place(service, MARKUP)
            answer = await client.get("/")
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            page = answer.text
            for text in ("127.0.0.1:1", "127.0.0.1:2", "Prefill", "Decode", "Last decisions", "aborted", "running"):
                assert text in page
            assert MARKUP not in page
            assert MARKUP.replace("<", "&lt;").replace(">", "&gt;") in page
            assert PROMPT not in page
            assert "$" not in page  # every placeholder of the template is filled
            outline = Outline(page)
            assert not outline.open
            assert set(outline.scopes) == {"col", "row", "rowgroup"}
            assert outline.captions == 3

    asyncio.run(main())


def test_the_page_may_load_and_run_nothing_but_itself(tmp_path):
    async def main():
        async with running(tmp_path) as (_, client):
            answer = await client.get("/")
            policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == "'none'"
            assert policy["connect-src"] == "'self'"
            for element in ("style", "script"):
                [content] = re.findall(f"<{element}>(.*?)</{element}>", answer.text, re.DOTALL)
                digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
                assert policy[f"{element}-src"] == f"'sha256-{digest}'"
            # A style or an event handler in an attribute would be blocked; another site's address would be loaded.
            attributes = Outline(answer.text).attributes
            assert not {name for name in attributes if name.startswith("on") or name in {"style", "src"}}
            assert "//" not in re.sub(r"<script>.*?</script>", "", answer.text, flags=re.DOTALL)

    asyncio.run(main())


def test_however_many_look_it_is_made_twice_a_second_at_most(tmp_path):
    async def main():
        async with running(tmp_path) as (service, client):
            made = []

            class Looks:
                def collect(self):
                    made.append(self)
                    return ()

            service.telemetry.registry.register(Looks())
            started_s = asyncio.get_running_loop().time()
            for _ in range(20):
                assert (await client.get("/")).status_code == 200
            took_s = asyncio.get_running_loop().time() - started_s
            assert 1 <= len(made) <= 1 + took_s / 0.5

    asyncio.run(main())


def test_top_shows_a_service_as_it_is(tmp_path, capsys):
    async def main():
        async with running(tmp_path) as (service, client):
            end(service, place(service, "first"))
            place(service, "second")
            for state in service.table.states:
                service.table.worker_changed(state.worker, healthy=state.worker.role is Role.DECODE)
            assert await asyncio.to_thread(extproc, ["top", "--once", "--status-url", str(client.base_url)]) == 0

    asyncio.run(main())
    lines = capsys.readouterr().out.splitlines()
    assert "NOT READY: no healthy pair" in lines[0]
    assert "1 running" in lines[1]
    assert "1 aborted" in lines[2]
    assert any(line.startswith(" 127.0.0.1:1 down") for line in lines)
    assert any(" 127.0.0.1:2/" in line and "aborted" in line for line in lines)
