"""What `extproc top` and the status page make of a service's figures, and how the command behaves."""

import contextlib
import http.server
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
from msgspec import structs
from prometheus_client.parser import text_string_to_metric_families

from extproc.cli import main
from extproc.decisions_view import describe_decisions
from extproc.events import Finished, LegEnd, Outcome
from extproc.explain import Explanation
from extproc.histogram import Buckets, Totals, Window, read_totals
from extproc.load import LoadTable
from extproc.model import Pick, Placement, Role, Worker
from extproc.overview import Decisions, Loads, make_overview
from extproc.readable import duration, times, tokens
from extproc.status_page import render as render_page
from extproc.telemetry import KEPT_DECISIONS, Telemetry
from extproc.top.render import render

WAIT_S = 60
URL = "http://127.0.0.1:29000"
P = Worker("p:1", Role.PREFILL, "http://p:1", "10.0.0.1:1", "p", 8998, 2)
D = Worker("d:1", Role.DECODE, "http://d:1", "10.0.0.2:1")
RECORD = Finished(
    outcome=Outcome.OK,
    status=200,
    reason="",
    endpoint="/generate",
    request_id="abc",
    attempt=1,
    placement=Placement(Pick(P, 1), Pick(D, None), room=2**63 - 1),
    direct_worker=None,
    batch_size=1,
    prompt_tokens=1234.5,
    duration_s=1.5,
    decision_s=0.0001,
    response_headers_s=0.25,
    prefill_s=0.2,
    prefill_end=LegEnd.OK,
    decode_end=LegEnd.OK,
    started_s=88.5,
)


# Figures


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((None, "-"), (0, "0"), (0.4, "0"), (951, "951"), (999.4, "999"), (999.5, "1.0k"), (12_345, "12.3k")),
        *((99_949, "99.9k"), (99_951, "100k"), (999_499, "999k"), (999_960, "1.0M"), (2.5e6, "2.5M"), (3e9, "3000M")),
    ],
)
def test_tokens_are_short(count, text):
    assert tokens(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((None, "-"), (0, "0 ms"), (0.0004, "0 ms"), (0.12, "120 ms"), (0.9996, "1.0 s"), (9.94, "9.9 s")),
        *((9.96, "10 s"), (119, "119 s"), (150, "2 min"), (7_200, "2 h"), (math.inf, "too long")),
    ],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_ratios_are_short():
    assert [times(2), times(9.96), times(math.inf)] == ["2.0x", "10x", "alone"]


# Histograms and windows


@pytest.mark.parametrize(
    ("share", "seconds"),
    # 10 observations up to 0.1 s, 10 between 0.1 and 0.5 s, none up to 1 s, 5 beyond that.
    [(0.2, 0.05), (0.4, 0.1), (0.6, 0.3), (0.8, 0.5), (0.81, math.inf), (0.99, math.inf)],
)
def test_quantiles_lie_straight_between_the_bounds(share, seconds):
    buckets = Buckets({1.0: 20, 0.1: 10, math.inf: 25, 0.5: 20})
    assert buckets.quantile(share) == pytest.approx(seconds)


def test_no_observation_has_no_quantile():
    assert Buckets().quantile(0.5) is None
    same = Buckets({0.1: 3, math.inf: 3})
    assert same.since(same).quantile(0.99) is None


def page(attempts: float, slow: float = 0) -> Totals:
    """What the service counts after `attempts` quick requests, and `slow` ones."""
    return read_totals(
        text_string_to_metric_families(
            "# TYPE extproc_attempts counter\n"
            f'extproc_attempts_total{{endpoint="/generate",outcome="ok",status="200"}} {attempts}\n'
            f'extproc_attempts_total{{endpoint="/v1/completions",outcome="ok",status="200"}} {slow}\n'
            "# TYPE extproc_response_headers_seconds histogram\n"
            f'extproc_response_headers_seconds_bucket{{endpoint="/generate",le="0.1"}} {attempts}\n'
            f'extproc_response_headers_seconds_bucket{{endpoint="/generate",le="+Inf"}} {attempts}\n'
            f'extproc_response_headers_seconds_bucket{{endpoint="/v1/completions",le="0.1"}} 0\n'
            f'extproc_response_headers_seconds_bucket{{endpoint="/v1/completions",le="+Inf"}} {slow}\n'
        )
    )


def test_a_window_is_the_difference_of_two_looks_ten_seconds_apart():
    window = Window()
    for second in range(31):
        window.add(second, page(attempts=100 * second))
    assert window.length_s == 10
    assert window.totals.attempts == {"ok": 1000}
    window.add(31, page(attempts=3000, slow=1000))
    # Of the 1900 in it, 900 were quick: the median is among the slow ones, although most of all were quick.
    assert window.totals.response_headers.quantile(0.47) == pytest.approx(0.1, rel=0.01)
    assert window.totals.response_headers.quantile(0.5) == math.inf


def test_the_first_look_is_since_the_start_and_so_is_one_after_a_restart_or_a_pause():
    window = Window()
    window.add(0, page(attempts=5))
    assert (window.length_s, window.totals.attempts) == (None, {"ok": 5})
    window.add(1, page(attempts=8))
    assert (window.length_s, window.totals.attempts) == (1, {"ok": 3})
    window.add(2, page(attempts=2))
    assert (window.length_s, window.totals.attempts) == (None, {"ok": 2})
    window.add(100, page(attempts=9))
    assert (window.length_s, window.totals.attempts) == (None, {"ok": 9})


# Decisions


def test_the_service_remembers_its_last_decisions_and_no_bad_requests():
    telemetry = Telemetry(LoadTable([], lambda: 0.0), lambda: 0.0, lambda: 0)
    telemetry.finished(
        structs.replace(RECORD, outcome=Outcome.REFUSED, status=400, placement=None, reason="BadRequest(x)")
    )
    telemetry.finished(structs.replace(RECORD, placement=None, direct_worker="d:1", endpoint="other"))
    assert not telemetry.decisions
    for number in range(KEPT_DECISIONS + 5):
        telemetry.finished(structs.replace(RECORD, request_id=str(number)))
    telemetry.finished(structs.replace(RECORD, outcome=Outcome.NO_WORKER, status=503, placement=None))
    kept = [record.request_id for record in telemetry.decisions]
    assert kept == [*(str(number) for number in range(6, KEPT_DECISIONS + 5)), "abc"]


def test_decisions_are_told_newest_first_with_what_is_known():
    ended = [RECORD, structs.replace(RECORD, request_id="long", duration_s=60.0, started_s=37.0)]
    running = structs.replace(RECORD, request_id="now", started_s=98.0, response_headers_s=None, attempt=2)
    why = Explanation("p:1/1*=5@0.1", "d:1/0*=7@-")
    explained = structs.replace(RECORD, request_id="why", started_s=97.5, explanation=why)
    told = describe_decisions([*ended, explained], [running], now_s=100.0)["decisions"]
    assert [(each["request_id"], each["age_s"], each["outcome"]) for each in told] == [
        ("now", 2.0, "running"),
        ("why", 2.5, "ok"),
        ("abc", 11.5, "ok"),
        ("long", 63.0, "ok"),
    ]
    assert told[0]["prefill_end"] is None
    assert told[0]["attempt"] == 2
    assert told[1]["prefill_loads"] == "p:1/1*=5@0.1"
    assert told[2]["prefill"] == {"worker": "p:1", "dp_rank": 1}
    assert told[2]["decode"] == {"worker": "d:1", "dp_rank": None}
    assert told[2]["room"] == "9223372036854775807"


def test_a_clients_request_id_cannot_command_a_terminal():
    told = describe_decisions([structs.replace(RECORD, request_id="\x1b[2J\u202eé" + "x" * 100)], [], 90.0)
    assert told["decisions"][0]["request_id"] == "?[2J??" + "x" * 58


# The documentation

DOCS = Path(__file__).parents[2] / "docs"


def documented(section: str) -> set[str]:
    """The names in the first column of a section's table."""
    text = (DOCS / "observing.md").read_text(encoding="utf-8").split(f"## `GET {section}`")[1].split("\n## ")[0]
    return {name for line in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", line)}


def test_every_field_and_every_metric_is_documented():
    assert documented("/debug/decisions") == set(describe_decisions([RECORD], [], 90.0)["decisions"][0])
    page = Telemetry(LoadTable([], lambda: 0.0), lambda: 0.0, lambda: 0).registry.collect()
    # A counter's samples have a suffix that its name lacks.
    names = {metric.name + ("_total" if metric.type == "counter" else "") for metric in page}
    assert documented("/metrics") == names


# The overview


def rank(load: float, requests: int = 3, largest: float | None = None, **fields: object) -> dict:
    return {
        "dp_rank": 0,
        "load_tokens": load,
        "outstanding_tokens": load,
        "outstanding_requests": requests,
        "charged_tokens": 7.0,
        "largest_tokens": load / requests if largest is None else largest,
        "scrape_age_s": 0.5,
        "scraped": {"used_tokens": load, "queued_requests": 0.0},
        **fields,
    }


def worker(name: str, *ranks: dict, role: str = "prefill", **fields: object) -> dict:
    return {
        "worker": name,
        "role": role,
        "healthy": True,
        "draining": False,
        "circuit": "closed",
        "in_flight": 3,
        "ranks": [{**each, "dp_rank": number} for number, each in enumerate(ranks)],
        **fields,
    }


def loads(*workers: dict, load_model: str = "live") -> dict:
    policies = {
        f"{role}_{kind}policy": "minimum_tokens" if kind else "least_load" for role in Role for kind in ("", "rank_")
    }
    return {"settings": {"load_model": load_model, **policies}, "workers": workers}


def overview(*workers: dict, decisions: int = 0, not_ready: str = "", **settings: str):
    window = Window()
    window.add(0, page(attempts=5))
    shown = describe_decisions([RECORD] * decisions, [], 90.0)
    return make_overview(
        msgspec.convert(loads(*workers, **settings), Loads), msgspec.convert(shown, Decisions), window, not_ready
    )


def drowned(*workers: dict) -> list:
    """(worker, rank, times) of the marked ranks."""
    return [
        (of_worker.name, each.dp_rank, each.times_others)
        for role in overview(*workers).roles
        for of_worker in role.workers
        for each in of_worker.ranks
        if each.times_others is not None
    ]


def test_a_rank_with_more_than_the_others_is_marked():
    assert drowned(worker("a", rank(9000), rank(2000)), worker("b", rank(3000), rank(1000))) == [("a", 0, 4.5)]
    assert drowned(worker("a", rank(9000), rank(0, 1)), worker("b", rank(0, 1), rank(0, 1))) == [("a", 0, math.inf)]


@pytest.mark.parametrize(
    "workers",
    [
        [worker("a", rank(9000), rank(5000))],  # less than twice as much
        [worker("a", rank(900), rank(0, 1))],  # next to nothing
        [worker("a", rank(9000, largest=8500), rank(1000))],  # a single long request
        [worker("a", rank(9000))],  # no others
        [worker("a", rank(9000)), worker("b", rank(0, 1), healthy=False)],
        [worker("a", rank(9000)), worker("b", rank(0, 1), draining=True)],
        [worker("a", rank(9000)), worker("b", rank(0, 1), circuit="open")],
        [worker("a", rank(9000)), worker("b", rank(0, 1), role="decode")],  # compared within a role only
    ],
)
def test_a_rank_is_not_marked_for_what_no_policy_could_do_better(workers):
    assert not drowned(*workers)


def test_what_was_sent_is_what_the_load_model_counts():
    for load_model, expected in (("live", 9000.0), ("scraped", 7.0)):
        seen = overview(worker("a", rank(9000)), load_model=load_model)
        assert seen.roles[0].workers[0].ranks[0].sent_tokens == expected


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ({}, "up"),
        ({"healthy": False}, "down"),
        ({"draining": True}, "draining"),
        ({"circuit": "half_open", "healthy": False}, "down, circuit half open"),
    ],
)
def test_states_are_told_in_words(fields, state):
    seen = overview(worker("a", rank(5), **fields))
    assert seen.roles[0].workers[0].state == state
    assert f" a {state}, 3 in flight" in render(seen, url=URL, width=80).plain
    assert f">{state}</span>" in render_page(seen)


# The picture


def fleet(workers: int, ranks: int) -> list[dict]:
    """Of both roles, evenly loaded but for rank 0 of the last prefill worker."""
    return [
        worker(f"10.0.{role == 'decode':d}.{number}:30000", *(rank(2000 + number) for _ in range(ranks)), role=role)
        for role in Role
        for number in range(workers)
    ] + [worker("drowned:30000", rank(90_000), *(rank(2000) for _ in range(ranks - 1)))]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 2), (2, 8), (6, 8), (40, 8), (2, 64)])
def test_80_by_24_is_enough_and_shows_the_drowning_rank(workers, ranks, ascii_only):
    seen = overview(*fleet(workers, ranks), decisions=20)
    picture = render(seen, url=URL, width=80, height=24, ascii_only=ascii_only)
    lines = picture.split(allow_blank=True)
    assert len(lines) <= 24
    assert max(line.cell_len for line in lines) <= 80
    [marked] = [line.plain for line in lines if " << " in line.plain and "others" not in line.plain]
    assert re.search(r" << (0: )?\d+x +\d", marked)
    assert sum("p:1/1" in line.plain for line in lines) >= 3  # some decisions
    assert picture.plain.isascii() or not ascii_only
    if workers == 40:
        assert "workers with less load" in picture.plain


def test_without_a_height_everything_is_shown():
    picture = render(overview(*fleet(12, 8), decisions=20), url=URL, width=80).plain
    assert len(re.findall(r"^ +\d [█▏▎▍▌▋▊▉]", picture, re.MULTILINE)) == 25 * 8


def test_bars_are_to_scale_and_marks_survive_without_colour():
    seen = overview(worker("a", rank(8000), rank(4000), rank(2000), rank(0, 1)))
    full, half, quarter, empty = re.findall(r"^ +\d (█*)", render(seen, url=URL, width=80).plain, re.MULTILINE)
    assert (len(half), len(quarter), len(empty)) == (len(full) // 2, len(full) // 4, 0)


def test_nothing_known_is_no_zero():
    picture = render(overview(worker("a", rank(5, scraped=None, scrape_age_s=None))), url=URL, width=80).plain
    [line] = [line for line in picture.splitlines() if line.startswith("   0 ")]
    assert line.split()[-6:] == ["5", "5", "3", "-", "-", "-"]


def test_why_it_is_not_ready_stands_on_top():
    seen = overview(not_ready="no healthy pair <of> workers")
    assert "NOT READY: no healthy pair <of> workers" in render(seen, url=URL, width=80).plain.splitlines()[0]
    assert "not ready: no healthy pair &lt;of&gt; workers" in render_page(seen)


# The command


@contextlib.contextmanager
def pages(**contents: str):
    """A server with these pages (`debug_loads` is /debug/loads), 404 else; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = contents.get(self.path[1:].replace("/", "_"))
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


METRICS = 'extproc_attempts_total{endpoint="/generate",outcome="ok",status="200"} 5\n'
GOOD = {
    "debug_loads": json.dumps(loads(worker("a", rank(9000), rank(100)), worker("b", rank(5), role="decode"))),
    "debug_decisions": json.dumps(describe_decisions([RECORD], [], 90.0)),
    "metrics": METRICS,
    "ready": "ok\n",
}


def test_one_picture_for_scripts(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pages(**GOOD) as url:
        assert main(["top", "--once", "--status-url", url]) == 0
    picture = capsys.readouterr().out
    assert "\x1b" not in picture
    assert f"extproc top  {url}  ready" in picture
    assert "5 ok" in picture
    assert "<< 90x" in picture
    assert "p:1/1 " in picture
    assert max(map(len, picture.splitlines())) <= 90


def test_a_picture_for_documents_loads_nothing(tmp_path):
    with pages(**GOOD) as url:
        assert main(["top", "--svg", str(tmp_path / "top.svg"), "--status-url", url]) == 0
        missing = tmp_path / "no" / "top.svg"
        assert main(["top", "--svg", str(missing), "--status-url", url]) == 2
    picture = (tmp_path / "top.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "PREFILL" in picture
    assert "url(" not in picture.replace("url(#", "")
    assert "@font-face" not in picture


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "/debug/loads answers 404"),
        ({**GOOD, "debug_loads": "<html>"}, "/debug/loads: "),
        ({**GOOD, "debug_decisions": '{"decisions": [{}]}'}, "/debug/decisions: "),
        ({**GOOD, "metrics": "x{"}, "/metrics: "),
        ({**GOOD, "metrics": "extproc_attempts_total 5"}, "/metrics: "),
    ],
)
def test_something_else_on_that_port(capsys, contents, message):
    with pages(**contents) as url:
        assert main(["top", "--once", "--status-url", url]) == 1
    assert capsys.readouterr().err.startswith(f"extproc top: {url} is no metrics port of this version: {message}")


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no url", "http://[::1"])
def test_nobody_there(capsys, url):
    assert main(["top", "--once", "--status-url", url]) == 1
    assert f"extproc top: cannot ask {url}: " in capsys.readouterr().err


@pytest.mark.parametrize("interval", ["0", "nan", "inf", "-1", "x"])
def test_a_wrong_interval(capsys, interval):
    with pytest.raises(SystemExit) as error:
        main(["top", f"--interval={interval}"])
    assert error.value.code == 2
    assert "--interval" in capsys.readouterr().err


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "extproc", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(slave)
        self.output = b""

    def read_until(self, text: bytes) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while text not in self.output:
            assert time.monotonic() < deadline_s, self.output
            if select.select([self._master], [], [], 0.1)[0]:
                self.output += os.read(self._master, 65536)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal():
    """Starts commands in terminals; none is left."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Terminal:
            started = Terminal(*arguments)
            stack.callback(started.close)
            return started

        yield start


OTHER_SCREEN, BACK, CURSOR = b"\x1b[?1049h", b"\x1b[?1049l", b"\x1b[?25h"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_live_until_it_is_ended_and_the_terminal_is_as_before(terminal, number):
    with pages(**GOOD) as url:
        top = terminal("top", "--interval", "0.1", "--status-url", url)
        top.read_until(b"(last ")  # the second look
    top.read_until(b"trying again")  # the service is away now; what was there stays
    assert top.output.count(OTHER_SCREEN) == 1
    top.process.send_signal(number)
    top.read_until(BACK)
    assert CURSOR in top.output[top.output.rindex(b"trying again") :]
    assert top.process.wait(WAIT_S) == 0
    assert b"Traceback" not in top.output


def test_it_waits_for_a_service_that_is_not_up_yet(terminal):
    top = terminal("top", "--interval", "0.1", "--status-url", "http://127.0.0.1:1")
    top.read_until(b"trying again")
    assert b"cannot ask http://127.0.0.1:1" in top.output
    assert top.process.poll() is None


def test_no_colour(terminal):
    with pages(**GOOD) as url:
        top = terminal("top", "--interval", "0.1", "--no-color", "--status-url", url)
        top.read_until(b"(last ")
    assert not re.search(rb"\x1b\[[0-9;]*3[0-7][;m]", top.output)
