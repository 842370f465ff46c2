"""The status page of a running gateway in a real browser: a headless Chromium, where there is one."""

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable

import httpx
import pytest
from conftest import nothing_charged, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TIMEOUT_S = 120
LOOKING_MS = 100_000
"""Of virtual time, which stands still while the page fetches: enough for 100 refreshes, more than a second in all."""

AWAY = re.compile(r"The service does not answer: what follows is of \d")
"""What the script says, with the time; its source, which is in the page, has none."""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: on Debian, apt install chromium")


@pytest.fixture
def browse(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the browser once; its profile goes with the test."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [
            *(CHROMIUM, "--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
            *("--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage"),
            *(f"--user-data-dir={tmp_path}/profile", "--window-size=1100,1000"),
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium will not run as root with it
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)

    return run


@pytest.fixture
def served(stack, client):
    """A few requests of different lengths are behind the gateway; their ids."""
    ids = [f"request-{words}" for words in (5, 500, 5000)]
    for request_id in ids:
        body = {"text": "word " * int(request_id.rpartition("-")[2]), "sampling_params": {"max_new_tokens": 4}}
        assert client.post("/generate", json=body, headers={"x-request-id": request_id}).status_code == 200
    until(lambda: nothing_charged(stack), "nothing is charged any more")
    decisions = httpx.get(f"{stack.status_url}/debug/decisions").json()["decisions"]
    return [each["request_id"] for each in decisions]


def test_the_page_in_a_browser_shows_workers_and_requests_and_refreshes(stack, served, browse):
    seen = browse("--dump-dom", f"--virtual-time-budget={LOOKING_MS}", f"{stack.status_url}/")
    page = seen.stdout
    for engine in stack.engines:
        assert page.count(engine.address) >= 1
    for request_id in served:
        assert request_id in page
    assert page.count('scope="row"') == sum(engine.dp_size for engine in stack.engines)
    # The first picture is of the time since the start; what follows says so only if the script runs and fetches.
    assert "time to first token, last" in page
    assert not AWAY.search(page)
    blamed = [line for line in seen.stderr.splitlines() if "CONSOLE" in line]
    assert not blamed  # nothing that the page's own policy had to block, and no error of the script


def test_a_service_that_went_away_is_said_and_what_was_there_stays(stack, served, browse, tmp_path):
    """The page from a file: nobody answers what its script fetches."""
    copy = tmp_path / "page.html"
    copy.write_text(httpx.get(f"{stack.status_url}/").text)
    page = browse("--dump-dom", "--virtual-time-budget=5000", copy.as_uri()).stdout
    assert AWAY.search(page)
    assert served[0] in page


def test_it_can_be_seen(stack, served, browse, tmp_path):
    picture = tmp_path / "status.png"
    browse(f"--screenshot={picture}", f"{stack.status_url}/")
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1100, 1000)
    assert len(data) > 20_000  # an empty page of that size has about 5 KB
