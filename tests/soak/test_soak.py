"""The short version of `make soak`, and its arithmetic."""

import asyncio
from collections import Counter

import pytest
from soak import soak
from soak_accounts import Attempt, problems
from soak_report import draw
from soak_traffic import Sent
from soak_watch import Curve, slope

REQUESTS = 1500


@pytest.mark.envoy
def test_nothing_is_left_and_everything_adds_up():
    report = asyncio.run(soak(REQUESTS, seed=1))
    assert not report.problems, report.as_json()
    assert report.clients["200"] > 0.9 * REQUESTS
    assert report.clients["left"]
    assert report.clients["400"]
    assert report.fault_hits
    assert [curve.requests[-1] for curve in report.curves] == [REQUESTS] * 2


OK = Attempt("ok", 200, "/generate", 1)
METRICS = Counter({("/generate", "ok", 200): 1})


def test_what_adds_up():
    assert problems([Sent("chat", "a", 200, "200")], {"a": [OK]}, METRICS, 0) == []


@pytest.mark.parametrize(
    ("sent", "attempts", "metrics", "wrong"),
    [
        (Sent("chat", "a", 200, "200"), {"a": [OK]}, Counter(), "log and metrics differ"),
        (Sent("chat", "a", 200, "200"), {"a": [OK], "b": []}, METRICS, "that nobody sent"),
        (Sent("chat", "a", 200, "200"), {"-": [OK], "a": []}, METRICS, "without a request"),
        (Sent("chat", "a", 503, "503"), {"a": [OK]}, METRICS, "that the service did not give"),
        (Sent("chat", "a", 0, "ServerDisconnectedError"), {}, Counter(), "that the service did not give"),
        (Sent("nonsense for /generate", "a", 200, "200"), {"a": [OK]}, METRICS, "nonsense got a wrong answer"),
        (Sent("chat", "a", 200, "200, then reset"), {"a": [OK]}, METRICS, "only 0 faults struck"),
    ],
)
def test_what_does_not(sent, attempts, metrics, wrong):
    assert any(wrong in problem for problem in problems([sent], attempts, metrics, 0))


def curve(rss, fds) -> Curve:
    requests = list(range(0, 100_001, 1000))
    return Curve("service", 1, requests, [rss(n) for n in requests], [fds(n) for n in requests], [1] * 101)


def flat(_requests: int) -> int:
    return 50


@pytest.mark.parametrize(
    ("rss", "fds", "problem"),
    [
        (lambda n: 80_000_000 + n % 7 * 100_000, lambda n: 50 + n % 5, ""),
        (lambda n: 80_000_000 + min(n, 15_000) * 1000, flat, ""),  # a warm-up
        (lambda n: 80_000_000 + (n > 50_000) * 8_000_000, flat, ""),  # a step
        (lambda n: 80_000_000 + n * 100, flat, "memory grows by 100 bytes"),
        (flat, lambda n: 50 + n // 1000, "more file descriptors"),
    ],
)
def test_growth_is_told_from_noise(rss, fds, problem):
    found = curve(rss, fds).problems()
    assert bool(found) == bool(problem)
    assert problem in "".join(found)


def test_slope():
    assert slope([(n, 2 * n) for n in range(20)] + [(20, 1000)]) == 2
    assert slope([(5, 5)]) == 0


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw([curve(flat, flat)], tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
