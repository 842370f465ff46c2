"""discovery: what engines say about themselves, where they are, and when they count as up."""

import asyncio
import json
import logging
import socket

import httpx
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from mocked_http import MockedClient
from virtual_time import now_s, run_for, run_virtual

from extproc.config import Config, WorkerConfig
from extproc.discovery.fetch import make_client
from extproc.discovery.health import Health, HealthMonitor
from extproc.discovery.info import WorkerInfo, merge, parse_info, problems, role_conflict
from extproc.discovery.probe import probe
from extproc.discovery.resolve import choose, resolve, system_lookup
from extproc.model import RankLoad, Role, Worker

# --- info: what an engine says

SERVER_INFO = {
    "model_path": "/models/r1",
    "served_model_name": "deepseek-ai/DeepSeek-R1",
    "tp_size": 8,
    "dp_size": 2,
    "enable_metrics": True,
    "disaggregation_mode": "prefill",
    "disaggregation_bootstrap_port": 8999,
    "load_balance_method": "follow_bootstrap_room",
    "api_key": "secret",
    "internal_states": [{"dp_size": 2, "last_gen_throughput": 1.5}, {"dp_size": 2}],
    "version": "0.5.23",
}
INFO = WorkerInfo(
    mode="prefill",
    dp_size=2,
    model="deepseek-ai/DeepSeek-R1",
    bootstrap_port=8999,
    metrics=True,
    load_balance_method="follow_bootstrap_room",
    version="0.5.23",
)


def info_of(**fields):
    return parse_info(json.dumps(fields).encode())


def test_server_info_is_read():
    assert parse_info(json.dumps(SERVER_INFO).encode()) == INFO


def test_model_info_is_read():
    answer = {"model_path": "/m", "is_generation": True, "served_model_name": "m", "disaggregation_mode": "decode"}
    assert info_of(**answer) == WorkerInfo(model="m", mode="decode")


def test_the_model_path_is_the_name_when_there_is_no_other():
    assert info_of(model_path="/m", served_model_name=None).model == "/m"


def test_what_is_missing_on_top_is_looked_for_in_the_ranks_states():
    states = [None, 5, {"dp_size": "x"}, {"dp_size": 4, "disaggregation_mode": "decode"}, {"dp_size": 8}]
    assert info_of(internal_states=states) == WorkerInfo(dp_size=4, mode="decode")
    assert info_of(dp_size=2, internal_states=states).dp_size == 2


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dp_size", "4", 4),
        ("dp_size", 0, None),
        ("dp_size", -1, None),
        ("dp_size", True, None),
        ("dp_size", 2.0, None),
        ("dp_size", 10**9, None),
        ("dp_size", "9" * 9999, None),
        ("dp_size", "²", None),
        ("dp_size", [2], None),
        ("disaggregation_bootstrap_port", "8999", 8999),
        ("disaggregation_bootstrap_port", 65536, None),
        ("disaggregation_mode", "null", "null"),
        ("disaggregation_mode", None, None),
        ("disaggregation_mode", ["prefill"], None),
        ("disaggregation_mode", "encode", None),
        ("enable_metrics", False, False),
        ("enable_metrics", "True", True),
        ("enable_metrics", 1, None),
        ("served_model_name", ["a"], None),
        ("served_model_name", "", None),
        ("version", "0.5.23", "0.5.23"),
    ],
)
def test_odd_values(field, value, expected):
    names = {
        "disaggregation_bootstrap_port": "bootstrap_port",
        "disaggregation_mode": "mode",
        "enable_metrics": "metrics",
        "served_model_name": "model",
    }
    assert getattr(info_of(**{field: value}), names.get(field, field)) == expected


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b"5", b'"x"', b"{", b"\xff", b"<html>", b"[" * 100_000, b'{"internal_states": {}}']
)
def test_garbage_says_nothing(body):
    assert parse_info(body).empty


@given(
    st.binary() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_no_answer_makes_it_raise(body):
    assert isinstance(parse_info(body), WorkerInfo)


PREFILL = WorkerConfig(url="http://p:30000")
DECODE = WorkerConfig(url="http://d:30001")


def merged(config, info, role=Role.PREFILL):
    return merge(config.to_worker(role), config, info)


def test_the_engine_completes_the_configuration():
    worker = merged(PREFILL, INFO)
    assert (worker.dp_size, worker.model, worker.bootstrap_port) == (2, "deepseek-ai/DeepSeek-R1", 8999)
    assert worker.bootstrap_host == "p"
    assert problems(worker, PREFILL, INFO) == ()


def test_the_configuration_wins_and_the_difference_is_named():
    config = WorkerConfig(url="http://p:30000", dp_size=4, model="mine", bootstrap_port=1234, bootstrap_host="h")
    worker = merged(config, INFO)
    assert (worker.dp_size, worker.model, worker.bootstrap_port, worker.bootstrap_host) == (4, "mine", 1234, "h")
    found = problems(worker, config, INFO)
    assert [text.split()[1] for text in found] == ["dp_size", "model", "bootstrap_port"]
    assert "4" in found[0]
    assert "engine says 2" in found[0]


def test_a_decode_worker_has_no_bootstrap_port():
    info = WorkerInfo(mode="decode", dp_size=2, bootstrap_port=8998)
    worker = merged(DECODE, info, Role.DECODE)
    assert worker.bootstrap_port is None
    assert problems(worker, DECODE, info) == ()


def test_an_unknown_bootstrap_port_is_sglangs_default():
    info = WorkerInfo(mode="prefill", dp_size=1)
    worker = merged(PREFILL, info)
    assert worker.bootstrap_port == 8998
    assert "8998 is assumed" in problems(worker, PREFILL, info)[0]


def test_the_other_role_is_a_conflict_and_no_role_is_advice():
    wrong = WorkerInfo(mode="decode", dp_size=1, bootstrap_port=8998)
    assert "--disaggregation-mode decode" in role_conflict(Role.PREFILL, wrong)
    assert problems(merged(PREFILL, wrong), PREFILL, wrong) == (role_conflict(Role.PREFILL, wrong),)
    plain = WorkerInfo(mode="null", dp_size=1, bootstrap_port=8998)
    assert role_conflict(Role.PREFILL, plain) is None
    assert "restart it with --disaggregation-mode prefill" in problems(merged(PREFILL, plain), PREFILL, plain)[0]
    assert role_conflict(Role.PREFILL, WorkerInfo()) is None


def test_metrics_off_is_advice_unless_they_are_elsewhere():
    info = WorkerInfo(mode="decode", dp_size=1, metrics=False)
    assert "--enable-metrics" in problems(merged(DECODE, info, Role.DECODE), DECODE, info)[0]
    config = WorkerConfig(url="http://d:30001", metrics_urls=("http://d:9/metrics",))
    assert problems(merged(config, info, Role.DECODE), config, info) == ()


def test_an_engine_that_says_nothing_is_one_problem():
    assert len(problems(merged(PREFILL, WorkerInfo()), PREFILL, WorkerInfo())) == 1


# --- resolve: where it is


@pytest.mark.parametrize(
    ("addresses", "previous", "expected"),
    [
        (["10.0.0.1"], None, "10.0.0.1:80"),
        (["fd00::1", "10.0.0.2", "10.0.0.1"], None, "10.0.0.2:80"),
        (["10.0.0.2", "10.0.0.1"], "10.0.0.1:80", "10.0.0.1:80"),
        (["10.0.0.2"], "10.0.0.1:80", "10.0.0.2:80"),
        (["fd00::1", "10.0.0.2"], "[fd00::1]:80", "[fd00::1]:80"),
        (["fe80::1%eth0", "fd00::2"], None, "[fd00::2]:80"),
        (["fe80::1%eth0"], None, None),
        ([], "10.0.0.1:80", None),
    ],
)
def test_choice_of_an_address(addresses, previous, expected):
    assert choose(addresses, 80, previous) == expected


def test_resolving():
    async def lookup(host, port):
        assert (host, port) == ("engine", 30000)
        return ["10.0.0.1"]

    async def fails(host, port):
        raise socket.gaierror("no such host")

    async def hangs(host, port):
        await asyncio.sleep(1e9)

    async def work():
        assert await resolve("http://engine:30000", None, lookup, 5) == "10.0.0.1:30000"
        assert await resolve("http://10.9.9.9", None, fails, 5) == "10.9.9.9:80"
        assert await resolve("http://[::1]:7", None, fails, 5) == "[::1]:7"
        assert await resolve("http://engine:30000", "10.0.0.1:30000", fails, 5) is None
        assert await resolve("http://engine:30000", None, hangs, 5) is None
        assert now_s() == 5

    run_virtual(work())
    assert asyncio.run(resolve("http://localhost:7", None, system_lookup, 5)) in ("127.0.0.1:7", "[::1]:7")
    assert asyncio.run(resolve(f"http://{'x' * 64}:7", None, system_lookup, 5)) is None


# --- health: the state machine


def walk(checks, failure_threshold=3, success_threshold=2):
    health, phases = Health(), []
    for passed in checks:
        health = health.after(passed == "+", failure_threshold=failure_threshold, success_threshold=success_threshold)
        phases.append(health.phase.value[0])
    return "".join(phases)


@pytest.mark.parametrize(
    ("checks", "phases"),
    [
        ("-----", "sssss"),
        ("++", "sh"),
        ("+-++", "sssh"),
        ("++--+--+---", "shhhhhhhhhu"),
        ("++---+-++", "shhhuuuuh"),
    ],
)
def test_phases(checks, phases):
    assert walk(checks) == phases


@given(st.text("+-", max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_phases_by_definition(checks, down_after, up_after):
    """Whenever the phase changes, exactly the run that the thresholds ask for has just ended."""
    phases = walk(checks, down_after, up_after)
    for at, (before, after) in enumerate(zip("s" + phases, phases, strict=False)):
        seen = checks[: at + 1]
        assert (before, after) in {("s", "s"), ("s", "h"), ("h", "h"), ("h", "u"), ("u", "u"), ("u", "h")}
        if after == "h":
            assert not seen.endswith("-" * down_after)
        else:
            assert not seen.endswith("+" * up_after)
        if before != after:
            assert seen.endswith("+" * up_after if after == "h" else "-" * down_after)


# --- health: the loop


class Sink:
    """A WorkerSink that remembers, with the loop's time of each call."""

    def __init__(self):
        self.changes = list[tuple[float, Worker, bool, str | None]]()

    def worker_changed(self, worker, healthy, reason):
        self.changes.append((now_s(), worker, healthy, reason))

    @property
    def brief(self):
        return [(time, worker.name, healthy) for time, worker, healthy, _ in self.changes]


class Engine:
    """A scripted engine: `health` is the status to answer (None: refuse the connection)."""

    def __init__(self, **info):
        self.health = 200
        self.info = {**SERVER_INFO, **info}
        self.paths = {"/server_info", "/model_info"}
        self.asked = list[tuple[float, str]]()
        self.delay_s = 0.0

    async def __call__(self, request):
        self.asked.append((now_s(), request.url.path))
        await asyncio.sleep(self.delay_s)
        if self.health is None:
            raise httpx.ConnectError("refused")
        if request.url.path == "/health":
            return httpx.Response(self.health)
        if request.url.path not in self.paths:
            return httpx.Response(404)
        return httpx.Response(200, json=self.info)

    def checks(self):
        return [time for time, path in self.asked if path == "/health"]


CONFIG = Config(
    prefill=(WorkerConfig(url="http://p:30000"),),
    worker_startup_check_interval=30,
    worker_startup_timeout_secs=100,
    health_check_interval_secs=5,
    health_check_timeout_secs=4,
    health_failure_threshold=3,
)
ADDRESSES = {"p": "10.0.0.1", "d": "10.0.0.2"}


async def addresses(host, port):
    if host not in ADDRESSES:
        raise socket.gaierror("no such host")
    return [ADDRESSES[host]]


def watch_for(seconds, engines, script=None, *, config=CONFIG, lookup=addresses, headers=lambda _: {}):
    """Runs a monitor over `engines` (host -> Engine) on virtual time; `script(monitor)` runs beside it."""

    async def route(request):
        return await engines[request.url.host](request)

    async def work():
        sink = Sink()
        client = MockedClient(route)
        monitor = HealthMonitor(config, client, sink, lookup=lookup, clock=now_s, headers=headers)
        beside = asyncio.ensure_future(script(monitor)) if script else None
        await run_for(seconds, monitor.run())
        if beside:
            await beside
        return sink

    return run_virtual(work())


def at(*steps):
    """A script: (seconds since the start, what to do)."""

    async def script(_):
        for time, step in steps:
            await asyncio.sleep(time - now_s())
            step()

    return script


def set_health(engine, status):
    return lambda: setattr(engine, "health", status)


def test_the_first_check_is_made_at_once_and_the_worker_is_known_when_announced():
    engine = Engine()
    sink = watch_for(11, {"p": engine})
    (change,) = sink.changes
    assert change == (
        0.0,
        Worker(
            name="p:30000",
            role=Role.PREFILL,
            url="http://p:30000",
            endpoint="10.0.0.1:30000",
            bootstrap_host="p",
            bootstrap_port=8999,
            dp_size=2,
            model="deepseek-ai/DeepSeek-R1",
        ),
        True,
        None,
    )
    assert engine.asked == [(0, "/health"), (0, "/server_info"), (5, "/health"), (10, "/health")]


def test_a_worker_that_starts_late_is_an_error_once_and_joins_all_the_same(caplog):
    caplog.set_level(logging.INFO, logger="extproc")
    engine = Engine()
    engine.health = 503
    sink = watch_for(400, {"p": engine}, at((299, set_health(engine, 200))))
    assert engine.checks()[:12] == [*range(0, 301, 30), 305]
    assert sink.brief == [(0, "p:30000", False), (300, "p:30000", True)]
    assert "status 503" in sink.changes[0][3]
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "INFO"]
    assert "not up yet" in caplog.messages[0]
    assert "has not come up in 100 s" in caplog.messages[1]
    assert "joins when it is up" in caplog.messages[1]


def test_unhealthy_after_the_threshold_and_back_with_other_flags(caplog):
    caplog.set_level(logging.INFO, logger="extproc")
    engine = Engine()

    def restart():
        engine.health = 200
        engine.info = {**SERVER_INFO, "dp_size": 8, "disaggregation_bootstrap_port": 9000}

    sink = watch_for(44, {"p": engine}, at((6, set_health(engine, None)), (33, restart)))
    assert sink.brief == [(0, "p:30000", True), (20, "p:30000", False), (35, "p:30000", True)]
    assert "cannot connect" in sink.changes[1][3]
    assert [(worker.dp_size, worker.bootstrap_port) for _, worker, *_ in sink.changes] == [(2, 8999)] * 2 + [(8, 9000)]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_a_restart_too_short_to_count_is_noticed_too():
    engine = Engine()

    def restart():
        engine.health = 200
        engine.info = {**SERVER_INFO, "dp_size": 4}

    sink = watch_for(30, {"p": engine}, at((6, set_health(engine, None)), (12, restart)))
    assert [(time, worker.dp_size, healthy) for time, worker, healthy, _ in sink.changes] == [
        (0, 2, True),
        (15, 4, True),
    ]


def test_configuration_wins_over_the_engine_and_the_problem_is_logged_once(caplog):
    caplog.set_level(logging.WARNING, logger="extproc")
    config = Config(prefill=(WorkerConfig(url="http://p:30000", dp_size=4),), health_check_interval_secs=5)
    engine = Engine()
    flaps = at((6, set_health(engine, None)), (12, set_health(engine, 200)))
    sink = watch_for(60, {"p": engine}, flaps, config=config)
    assert [worker.dp_size for _, worker, *_ in sink.changes] == [4]
    assert len(caplog.records) == 1
    assert "engine says 2" in caplog.text


def test_the_wrong_role_is_never_announced_as_healthy(caplog):
    caplog.set_level(logging.WARNING, logger="extproc")
    engine = Engine(disaggregation_mode="decode")
    sink = watch_for(70, {"p": engine})
    assert sink.brief == [(0, "p:30000", False)]
    assert "--disaggregation-mode decode" in sink.changes[0][3]
    assert len(caplog.records) == 1


def test_older_names_of_the_info_endpoints():
    engine = Engine()
    engine.paths = {"/get_server_info"}
    assert watch_for(1, {"p": engine}).changes[0][1].dp_size == 2
    assert [path for _, path in engine.asked] == ["/health", "/server_info", "/get_server_info"]
    engine.paths = {"/get_model_info"}
    assert watch_for(1, {"p": engine}).changes[0][1].model == "deepseek-ai/DeepSeek-R1"


def test_an_engine_that_says_nothing_is_used_and_asked_again(caplog):
    engine = Engine()
    engine.paths = set()
    sink = watch_for(71, {"p": engine}, at((50, lambda: engine.paths.add("/server_info"))))
    assert [(time, worker.dp_size, worker.bootstrap_port) for time, worker, *_ in sink.changes] == [
        (0, None, 8998),
        (60, 2, 8999),
    ]
    assert "did not say what it is" in caplog.text


def test_an_engine_that_falls_silent_is_taken_for_what_it_said():
    engine = Engine()

    def silent():
        engine.health = 200
        engine.paths = set()

    sink = watch_for(50, {"p": engine}, at((6, set_health(engine, None)), (31, silent)))
    assert sink.brief[-1] == (35, "p:30000", True)
    assert sink.changes[-1][1] == sink.changes[0][1]


def test_a_name_is_resolved_again_and_a_moved_worker_is_asked_what_it_is():
    engine = Engine()
    where = ["10.0.0.1"]
    calls = []

    async def lookup(host, port):
        calls.append(now_s())
        if not where:
            raise socket.gaierror("resolver is down")
        return where

    def move():
        where[:] = ["10.0.0.9"]
        engine.info = {**SERVER_INFO, "dp_size": 8}

    sink = watch_for(130, {"p": engine}, at((40, move), (70, where.clear)), lookup=lookup)
    assert [(time, worker.endpoint, worker.dp_size, healthy) for time, worker, healthy, _ in sink.changes] == [
        (0, "10.0.0.1:30000", 2, True),
        (60, "10.0.0.9:30000", 8, True),  # and it stays while the resolver is down
    ]
    assert sorted(set(calls)) == [0, 30, 60, 90, 120]


def test_a_worker_that_recovers_while_the_resolver_is_down_keeps_its_endpoint():
    engine = Engine()
    up = [True]

    async def lookup(host, port):
        if not up[0]:
            raise socket.gaierror("resolver is down")
        return ["10.0.0.1"]

    steps = at(
        (6, set_health(engine, None)), (7, up.clear), (7, lambda: up.append(False)), (31, set_health(engine, 200))
    )
    sink = watch_for(40, {"p": engine}, steps, lookup=lookup)
    assert sink.brief == [(0, "p:30000", True), (20, "p:30000", False), (35, "p:30000", True)]
    assert sink.changes[-1][1].endpoint == "10.0.0.1:30000"


def test_a_name_that_cannot_be_resolved_is_a_worker_that_is_not_up():
    config = Config(decode=(WorkerConfig(url="http://nowhere:1"),), worker_startup_check_interval=30)
    sink = watch_for(40, {"nowhere": Engine(disaggregation_mode="decode")}, config=config)
    assert sink.brief == [(0, "nowhere:1", False)]
    assert "cannot be resolved" in sink.changes[0][3]


def test_a_hanging_worker_times_out_and_delays_nobody():
    hanging, quick = Engine(), Engine(disaggregation_mode="decode")
    hanging.delay_s = 1e9
    config = Config(
        prefill=CONFIG.prefill,
        decode=(WorkerConfig(url="http://d:30001"),),
        health_check_timeout_secs=4,
        worker_startup_check_interval=6,
    )
    sink = watch_for(20, {"p": hanging, "d": quick}, config=config)
    assert sink.brief == [(0, "d:30001", True), (4, "p:30000", False)]
    assert sink.changes[1][3] == "no answer within 4 s"
    assert hanging.checks() == [0, 6, 12, 18]
    assert quick.checks() == [0, 5, 10, 15, 20][: len(quick.checks())]


def test_success_threshold_holds_back_a_worker_that_flickers():
    engine = Engine()
    config = Config(prefill=CONFIG.prefill, health_success_threshold=3, health_check_interval_secs=5)
    sink = watch_for(21, {"p": engine}, config=config)
    assert sink.brief == [(10, "p:30000", True)]
    assert engine.checks() == [0, 5, 10, 15, 20]  # one that answered is not waited for like one that is starting


def test_workers_come_and_go():
    prefill, decode = Engine(), Engine(disaggregation_mode="decode")

    async def script(monitor):
        await asyncio.sleep(7)
        monitor.set_workers([(Role.DECODE, DECODE)])

    sink = watch_for(14, {"p": prefill, "d": decode}, script)
    assert sink.brief == [(0, "p:30000", True), (7, "d:30001", True)]
    assert (prefill.checks(), decode.checks()) == ([0, 5], [7, 12])


def test_headers_go_with_every_request():
    seen = []

    async def engine(request):
        seen.append((request.url.path, request.headers.get("authorization")))
        return httpx.Response(200, json={})

    watch_for(1, {"p": engine}, headers=lambda name: {"authorization": f"Bearer of {name}"})
    assert {path for path, _ in seen} >= {"/health", "/server_info", "/get_server_info", "/model_info"}
    assert {value for _, value in seen} == {"Bearer of p:30000"}


def test_headers_are_asked_for_at_each_check():
    seen = []

    async def engine(request):
        seen.append(request.headers.get("authorization"))
        return httpx.Response(503)

    keys = iter(["old", "new"])
    watch_for(CONFIG.worker_startup_check_interval + 1, {"p": engine}, headers=lambda _: {"authorization": next(keys)})
    assert seen == ["old", "new"]


def test_an_infos_secrets_are_not_logged(caplog):
    caplog.set_level(logging.DEBUG)
    watch_for(20, {"p": Engine(disaggregation_mode="decode", dp_size="secret")})
    assert caplog.records
    assert "secret" not in caplog.text


# --- probe: over real sockets

METRICS = 'sglang:num_used_tokens{dp_rank="0"} 12034.0\nsglang:num_used_tokens{dp_rank="1"} 43034.0\n'


def probed(pages, role=Role.PREFILL, **entry):
    """Probes a toy server that answers `pages` (path -> text), and 404 elsewhere."""

    async def handler(request):
        text = pages.get(request.path)
        return web.Response(text=text) if text is not None else web.Response(status=404)

    async def work():
        app = web.Application()
        app.router.add_get("/{path:.*}", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with make_client(keepalive_s=30) as client:
                report = await probe(Config(), role, WorkerConfig(url=url, **entry), client)
                return url, report
        finally:
            await runner.cleanup()

    return asyncio.run(work())


def test_probe_of_an_engine_in_order():
    url, report = probed({"/health": "", "/server_info": json.dumps(SERVER_INFO), "/metrics": METRICS})
    assert report.healthy
    assert report.problems == ()
    assert report.info == INFO
    assert report.worker.endpoint == url.removeprefix("http://")
    assert report.worker.dp_size == 2
    assert report.metrics_url == f"{url}/metrics"
    assert report.loads == (RankLoad(0, used_tokens=12034), RankLoad(1, used_tokens=43034))


def test_probe_names_every_problem():
    info = {**SERVER_INFO, "disaggregation_mode": "decode", "enable_metrics": False}
    pages = {"/health": "", "/server_info": json.dumps(info), "/v1/loads": 'sglang_num_running_reqs{dp_rank="2"} 1\n'}
    url, report = probed(pages, dp_size=1)
    assert not report.healthy
    assert report.metrics_url == f"{url}/v1/loads?include=core"
    assert [
        any(word in problem for problem in report.problems)
        for word in ("--disaggregation-mode prefill", "engine says 2", "--enable-metrics", "num_used_tokens", "beyond")
    ] == [True] * 5


def test_probe_of_an_engine_without_loads():
    _, report = probed({"/health": "", "/server_info": json.dumps(SERVER_INFO)})
    assert report.healthy
    assert (report.metrics_url, report.loads) == (None, ())
    assert "gives no load figures" in report.problems[0]


def test_probe_of_what_is_not_there():
    _, report = probed({})
    assert not report.healthy
    assert report.problems == ("is not up: /health answered status 404",)

    async def nowhere():
        async def lookup(host, port):
            raise socket.gaierror

        async with make_client(keepalive_s=1) as client:
            return await probe(Config(), Role.DECODE, WorkerConfig(url="http://nowhere:1"), client, lookup=lookup)

    report = asyncio.run(nowhere())
    assert "cannot be resolved" in report.problems[0]
