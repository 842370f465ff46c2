"""scraper: each worker on its own clock, bounded pages, fallback, and one log line a change of state."""

import asyncio
import gzip
import logging
import random

import httpx
import pytest
from aiohttp import web
from mocked_http import MockedClient
from virtual_time import now_s, run_for, run_virtual

from extproc.config import Config, WorkerConfig
from extproc.discovery.fetch import FetchError, fetch, make_client
from extproc.scraper import Scraper, ScrapeTarget, read_loads, scrape_targets

METRICS = b'sglang:num_used_tokens{dp_rank="0"} 12034.0\nsglang:num_used_tokens{dp_rank="1"} 43034.0\n'
LOADS = b'sglang_num_used_tokens{dp_rank="0"} 100\n'
A = ScrapeTarget("a:1", ("http://a:1/metrics", "http://a:1/v1/loads?format=prometheus"))
B = ScrapeTarget("b:1", ("http://b:1/metrics",))


class Recorder:
    """A LoadSink that remembers, with the loop's time of each call."""

    def __init__(self) -> None:
        self.seen = list[tuple[float, str, dict[int, float | None], float, float]]()
        self.failed = list[tuple[float, str, str, float]]()

    def observe(self, worker_name, loads, at_s, duration_s):
        self.seen.append((now_s(), worker_name, {x.dp_rank: x.used_tokens for x in loads}, at_s, duration_s))

    def scrape_failed(self, worker_name, reason, duration_s):
        self.failed.append((now_s(), worker_name, reason, duration_s))

    def times(self, name):
        return [time for time, worker, *_ in self.seen if worker == name]


class Engines:
    """What each host answers: a page, a response, an exception, or a coroutine function that makes one of them."""

    def __init__(self, **by_host):
        self.pages = by_host
        self.requests = list[tuple[float, str]]()

    async def __call__(self, request):
        self.requests.append((now_s(), str(request.url)))
        answer = self.pages[request.url.host]
        if callable(answer):
            answer = await answer(request)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, content=answer) if isinstance(answer, bytes) else answer


class NoJitter(random.Random):
    def uniform(self, a, b):
        return a


def scrape_for(seconds, engines, *targets, interval_s=10.0, timeout_s=5.0, rng=None, during=None):
    """Runs a scraper on virtual time and returns what the sink got."""

    async def work():
        sink = Recorder()
        client = MockedClient(engines)
        scraper = Scraper(
            client,
            sink,
            interval_s=interval_s,
            timeout_s=timeout_s,
            clock=now_s,
            rng=rng or NoJitter(),
        )
        scraper.set_workers(targets)
        extra = asyncio.ensure_future(during(scraper)) if during else None
        await run_for(seconds, scraper.run())
        if extra:
            await extra
        return sink

    return run_virtual(work())


def test_scrapes_from_start_to_start_and_reports_when_it_asked():
    async def slowish(_):
        await asyncio.sleep(3)
        return METRICS

    sink = scrape_for(25, Engines(a=slowish), A)
    assert sink.seen == [
        (at + 3, "a:1", {0: 12034, 1: 43034}, at, 3) for at in (0.0, 10.0, 20.0)
    ]  # at_s: when the request was sent


def test_a_slow_worker_delays_nobody_but_itself():
    async def hangs(_):
        await asyncio.sleep(1e9)

    engines = Engines(a=hangs, b=METRICS)
    sink = scrape_for(100.5, engines, A, B, interval_s=1)
    assert sink.times("b:1") == [float(second) for second in range(101)]
    # Both URLs time out: 10 s a scrape, and the next one starts when the last one is over, never before.
    asked = [time for time, url in engines.requests if "//a:1" in url]
    assert asked == [5.0 * n for n in range(21)]
    assert [duration for *_, duration in sink.failed] == [10.0] * 10


def test_first_scrapes_are_spread_over_a_second():
    targets = [ScrapeTarget(f"w{n}:1", ("http://w/metrics",)) for n in range(100)]
    sink = scrape_for(1.5, Engines(w=METRICS), *targets, rng=random.Random(1))
    times = [time for time, *_ in sink.seen]
    assert len(times) == 100
    assert min(times) < 0.1
    assert 0.9 < max(times) < 1.0
    assert len(set(times)) > 90


def test_falls_back_in_order_remembers_and_starts_over_after_a_failure():
    metrics_on, loads_on = [False], [True]

    async def answer(request):
        on = metrics_on if request.url.path == "/metrics" else loads_on
        return httpx.Response(404) if not on[0] else METRICS if on is metrics_on else LOADS

    async def restart(_):
        await asyncio.sleep(25)
        metrics_on[0] = True
        await asyncio.sleep(10)
        loads_on[0] = False

    engines = Engines(a=answer)
    sink = scrape_for(55, engines, A, during=restart)
    asked = [(time, url.removeprefix("http://a:1").partition("?")[0]) for time, url in engines.requests]
    assert asked == [
        (0, "/metrics"),
        (0, "/v1/loads"),  # fallback
        (10, "/v1/loads"),  # remembered
        (20, "/v1/loads"),
        (30, "/v1/loads"),  # /metrics is back, but what works is kept
        (40, "/v1/loads"),
        (40, "/metrics"),  # failed: the others at once, in order
        (50, "/metrics"),
    ]
    assert [loads for _, _, loads, *_ in sink.seen] == [{0: 100}] * 4 + [{0: 12034, 1: 43034}] * 2
    assert sink.failed == []


def test_after_a_failed_scrape_the_first_url_is_tried_first_again():
    down = [False]

    async def answer(request):
        if down[0]:
            return httpx.ConnectError("refused")
        return httpx.Response(404) if request.url.path == "/metrics" else LOADS

    async def outage(_):
        await asyncio.sleep(5)
        down[0] = True
        await asyncio.sleep(10)
        down[0] = False

    engines = Engines(a=answer)
    scrape_for(25, engines, A, during=outage)
    assert [url.rpartition("/")[2][:7] for time, url in engines.requests if time == 20] == ["metrics", "loads?f"]


def test_a_page_with_used_tokens_is_preferred_to_one_without():
    async def answer(request):
        return b"sglang:num_running_reqs 1\n" if request.url.path == "/metrics" else LOADS

    assert scrape_for(5, Engines(a=answer), A).seen[0][2] == {0: 100}

    async def partial_only(request):
        return b"sglang:num_running_reqs 1\n" if request.url.path == "/metrics" else httpx.Response(404)

    engines = Engines(a=partial_only)
    assert [loads for _, _, loads, *_ in scrape_for(15, engines, A).seen] == [{0: None}] * 2
    assert len(engines.requests) == 4  # and both places are asked each time, as one may say more later


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "no SGLang load figures"),
        (b"vllm:num_requests_running 3\n", "no SGLang load figures"),
        (b"\x00\xff garbage", "no SGLang load figures"),
        (httpx.Response(503), "status 503"),
        (httpx.Response(302, headers={"location": "http://elsewhere/metrics"}), "status 302"),
        (httpx.Response(200, html="<p>sglang:num_used_tokens 5</p>\nsglang:num_used_tokens 5\n"), "an HTML page"),
        (
            httpx.Response(200, headers={"content-encoding": "gzip"}, content=gzip.compress(METRICS)),
            "compressed",
        ),
        (httpx.ConnectError("refused"), "cannot connect"),
        (httpx.RemoteProtocolError("bad chunk"), "RemoteProtocolError"),
        (httpx.UnsupportedProtocol("odd"), "UnsupportedProtocol"),
        (OSError("odd"), "OSError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_load_page_is_a_failed_scrape(answer, reason):
    engines = Engines(b=answer)
    sink = scrape_for(5, engines, B)
    assert sink.seen == []
    assert [(time, name) for time, name, *_ in sink.failed] == [(0, "b:1")]
    assert reason in sink.failed[0][2]
    assert "http://b:1/metrics" in sink.failed[0][2]
    assert {url for _, url in engines.requests} == {"http://b:1/metrics"}  # no redirect was followed


def test_one_warning_a_failure_and_one_line_a_recovery(caplog):
    caplog.set_level(logging.INFO, logger="extproc")
    up = [True]

    async def answer(_):
        return METRICS if up[0] else httpx.Response(500)

    async def flap(_):
        for seconds in (45, 50):
            await asyncio.sleep(seconds)
            up[0] = not up[0]

    sink = scrape_for(149, Engines(b=answer), B, during=flap)
    assert (len(sink.seen), len(sink.failed)) == (5 + 5, 5)
    assert [(record.levelname, record.name) for record in caplog.records] == [
        ("WARNING", "extproc.scraper"),
        ("INFO", "extproc.scraper"),
    ]
    assert "b:1" in caplog.text
    assert "status 500" in caplog.text


def test_workers_come_and_go_without_disturbing_the_others():
    async def change(scraper):
        await asyncio.sleep(15)
        scraper.set_workers([B, ScrapeTarget("c:1", ("http://c:1/metrics",))])
        await asyncio.sleep(10)
        scraper.set_workers([ScrapeTarget("c:1", ("http://a:1/other",)), B])
        assert "2 workers, running" in repr(scraper)

    engines = Engines(a=METRICS, b=METRICS, c=METRICS)
    scrape_for(44, engines, A, B, during=change)
    assert [time for time, url in engines.requests if url == "http://b:1/metrics"] == [0, 10, 20, 30, 40]
    assert [time for time, url in engines.requests if url == "http://a:1/metrics"] == [0, 10]
    assert [time for time, url in engines.requests if url == "http://c:1/metrics"] == [15]
    assert [time for time, url in engines.requests if url == "http://a:1/other"] == [25, 35]


def test_a_worker_removed_in_mid_scrape_is_never_reported():
    async def slow(_):
        await asyncio.sleep(2)
        return METRICS

    async def remove(scraper):
        await asyncio.sleep(1)
        scraper.set_workers([])

    sink = scrape_for(20, Engines(b=slow), B, during=remove)
    assert (sink.seen, sink.failed) == ([], [])


def test_headers_are_asked_for_each_request():
    seen = []

    async def answer(request):
        seen.append(request.headers["authorization"])
        return METRICS

    async def work():
        client = MockedClient(Engines(b=answer))
        tokens = iter("xy")
        scraper = Scraper(
            client,
            Recorder(),
            interval_s=1,
            timeout_s=1,
            headers=lambda name: {"authorization": f"Bearer {next(tokens)} for {name}"},
            clock=now_s,
            rng=NoJitter(),
        )
        scraper.set_workers([B])
        await run_for(1.5, scraper.run())

    run_virtual(work())
    assert seen == ["Bearer x for b:1", "Bearer y for b:1"]


def test_headers_are_for_the_worker_s_own_host():
    """Figures may be kept by somebody else, and a redirect may lead anywhere: neither gets the key."""
    seen = {}

    async def answer(request):
        seen.setdefault(str(request.url), request.headers.get("authorization"))
        if request.url.path == "/moved":
            return httpx.Response(302, headers={"location": "http://elsewhere:1/metrics"})
        return httpx.Response(503)

    async def work():
        client = MockedClient(answer)
        with pytest.raises(FetchError):
            await read_loads(
                client,
                ["http://b:1/metrics", "http://b:2/moved", "https://keeper:1/metrics", "http://b.keeper:1/metrics"],
                timeout_s=5,
                worker="b:1",
                headers={"authorization": "Bearer x"},
            )

    asyncio.run(work())
    assert seen == {
        "http://b:1/metrics": "Bearer x",
        "http://b:2/moved": "Bearer x",
        "https://keeper:1/metrics": None,
        "http://b.keeper:1/metrics": None,
    }


def test_a_connection_closed_while_idle_is_tried_once_more():
    answers = iter([httpx.RemoteProtocolError("Server disconnected"), METRICS])

    async def answer(_):
        return next(answers)

    sink = scrape_for(5, Engines(b=answer), B)
    assert [loads for _, _, loads, *_ in sink.seen] == [{0: 12034, 1: 43034}]


class Endless(httpx.AsyncByteStream):
    """A page of 100 MB that counts what was read of it; or one that comes in drops."""

    def __init__(self, pause_s=0.0):
        self.read_bytes = 0
        self.closed = False
        self.pause_s = pause_s

    async def __aiter__(self):
        for _ in range(100):
            await asyncio.sleep(self.pause_s)
            self.read_bytes += 1 << 20
            yield b"x" * (1 << 20)

    async def aclose(self):
        self.closed = True


def test_a_page_of_100_mb_is_given_up_at_the_limit():
    stream = Endless()

    async def answer(_):
        return httpx.Response(200, stream=stream)

    sink = scrape_for(5, Engines(b=answer), B)
    assert "longer than 8388608 bytes" in sink.failed[0][2]
    assert stream.read_bytes == 9 << 20
    assert stream.closed


def test_a_page_that_drips_is_given_up_in_time():
    async def answer(_):
        return httpx.Response(200, stream=Endless(pause_s=1))

    sink = scrape_for(9, Engines(b=answer), B)
    assert sink.failed[0][0] == 5
    assert "no answer within 5 s" in sink.failed[0][2]


def test_targets_of_a_configuration():
    config = Config(
        prefill=(
            WorkerConfig(url="http://p:30000"),
            WorkerConfig(url="http://q:30000", metrics_urls=("http://q:9090/m", "/metrics", "x")),
        ),
        decode=(WorkerConfig(url="http://[::1]:30001/", metrics_urls=()),),
    )
    assert scrape_targets(config) == [
        ScrapeTarget("p:30000", ("http://p:30000/v1/loads?include=core", "http://p:30000/metrics")),
        ScrapeTarget("q:30000", ("http://q:9090/m", "http://q:30000/metrics", "http://q:30000/x")),
        ScrapeTarget("[::1]:30001", ()),
    ]
    assert [target.name for target in scrape_targets(config)] == [worker.name for worker in config.workers()]


def test_without_urls_the_scrape_fails_and_says_so():
    sink = scrape_for(1, Engines(), ScrapeTarget("a:1", ()))
    assert sink.failed[0][2] == "no metrics URL is configured"


# --- over real sockets


def serve(handler, ask):
    """Runs `ask(base_url, client)` against a toy server on loopback."""

    async def work():
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            async with make_client(keepalive_s=30) as client:
                return await ask(f"http://127.0.0.1:{port}", client)
        finally:
            await runner.cleanup()

    return asyncio.run(work())


def test_the_form_is_what_the_page_says_it_is():
    pages = {
        "json": httpx.Response(200, json={"loads": [{"dp_rank": 1, "num_used_tokens": 7}]}),
        "text": httpx.Response(200, text=METRICS.decode()),
    }
    for name, loads in (("json", {1: 7}), ("text", {0: 12034, 1: 43034})):
        assert scrape_for(5, Engines(b=pages[name]), B).seen[0][2] == loads
    nothing = httpx.Response(200, headers={"content-type": "application/json"}, content=METRICS)
    assert "no SGLang load figures" in scrape_for(5, Engines(b=nothing), B).failed[0][2]


def test_reads_a_page_over_a_kept_connection():
    peers = set()

    async def handler(request):
        peers.add(request.transport.get_extra_info("peername"))
        assert request.headers["accept-encoding"] == "identity"
        return web.Response(body=METRICS, content_type="text/plain")

    async def ask(url, client):
        return [await read_loads(client, [f"{url}/metrics"], timeout_s=5) for _ in range(3)]

    scrapes = serve(handler, ask)
    assert [load.used_tokens for scrape in scrapes for load in scrape.loads] == [12034, 43034] * 3
    assert len(peers) == 1


def test_an_endless_answer_is_cut_and_its_connection_closed():
    sent = [0]
    ended = asyncio.Event()

    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while sent[0] < 100 << 20:
                await response.write(b"x" * 65536)
                sent[0] += 65536
        except ConnectionError:
            pass
        finally:
            ended.set()
        return response

    async def ask(url, client):
        with pytest.raises(FetchError, match="longer than 1000000 bytes"):
            await fetch(client, f"{url}/metrics", timeout_s=5, limit_bytes=1_000_000)
        await asyncio.wait_for(ended.wait(), 5)

    serve(handler, ask)
    assert sent[0] < 50 << 20


def test_nobody_listens():
    async def ask(_, client):
        with pytest.raises(FetchError, match="cannot connect"):
            await fetch(client, "http://127.0.0.1:1/metrics", timeout_s=5)

    async def handler(_):
        return web.Response()

    serve(handler, ask)
