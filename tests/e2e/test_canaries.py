"""Nothing that a client or an operator wants to keep secret is written anywhere, at log level debug.

The canaries are in prompts, in every other part of bodies, in headers and query strings, and in the engines' API keys.
Not in names of models: `/debug/loads` lists those whose tokens are estimated.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from conftest import until
from split_gateway import QUICK, START_S, STOP_S, Engines

from extproc.demo.child import Child
from extproc.demo.stack import free_port

pytestmark = pytest.mark.envoy

CANARY = "kanarienvogel"
"""Part of every secret."""
KEY = f"sk-{CANARY}-key"
PROMPT = f"{CANARY} in the prompt"
MAX_PAYLOAD_BYTES = 100_000

HEADERS = {
    "authorization": f"Bearer {KEY}",
    "cookie": f"session={CANARY}",
    "x-api-key": CANARY,
    "x-pd-prefill-endpoint": f"{CANARY}:1",
    "x-data-parallel-rank": CANARY,
    "user-agent": f"{CANARY}/1.0",
}

BODIES = {
    "text": {"text": PROMPT},
    "batch": {"text": [PROMPT, PROMPT]},
    "chat": {"messages": [{"role": "user", "content": PROMPT}], "user": CANARY, "max_tokens": 2},
    "completion": {"prompt": PROMPT, "max_tokens": 2},
    "unknown fields": {"text": PROMPT, CANARY: {CANARY: CANARY}},
    "a model that is not there": {"text": PROMPT, "prompt": PROMPT, "messages": [], "model": "unheard-of"},
    "wrong types": {"text": {CANARY: PROMPT}, "prompt": {CANARY: 1}, "messages": CANARY, "stream": CANARY},
    "a rank of the client's own": {"text": PROMPT, "prompt": PROMPT, "messages": [], "routed_dp_rank": CANARY},
    "a room of the client's own": {"text": PROMPT, "prompt": PROMPT, "bootstrap_room": CANARY, "rid": CANARY},
    "wrong parameters": {"text": PROMPT, "sampling_params": {"max_new_tokens": CANARY}, "max_tokens": CANARY},
    "many answers": {"text": PROMPT, "prompt": PROMPT, "messages": [], "n": 2},
}

RAW_BODIES = {
    "no JSON": PROMPT.encode(),
    "cut off": b'{"text": "' + PROMPT.encode(),
    "no object": json.dumps([PROMPT]).encode(),
    "twice": f'{{"text": "{PROMPT}", "text": "{PROMPT}"}}'.encode(),
    "not UTF-8": b'{"text": "' + PROMPT.encode() + b'\xff"}',
    "too deep": f'{{"{CANARY}":'.encode() + b"[" * 1000 + b"]" * 1000 + b"}",
    "too large": json.dumps({"text": PROMPT * (MAX_PAYLOAD_BYTES // len(PROMPT) + 1)}).encode(),
}

FAULTS = ("status=400", "status=500", "status=500@work", "status=503@upload", "reset", "close@work", "reset@stream")


class Echo(BaseHTTPRequestHandler):
    """An engine that is well, but answers every question with an error that quotes all it was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/health":
            return self._answer(200, "")
        if self.path in ("/server_info", "/get_server_info"):
            return self._answer(
                200, json.dumps({"api_key": KEY, "disaggregation_mode": self.server.role, "dp_size": 1})
            )
        return self._answer(401, f"{CANARY} {self.headers}")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode(errors="replace")
        self._answer(400, json.dumps({"object": "error", "message": f"bad request {body} {self.headers}", "code": 400}))

    def _answer(self, status, text):
        self.send_response(status, CANARY)
        self.send_header("content-length", str(len(text.encode())))
        self.send_header("www-authenticate", f"Bearer {CANARY}")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        """Nothing: standard error is the test's."""


class EchoEngines:
    """One of each role."""

    def __enter__(self):
        self._servers = {}
        for role in ("prefill", "decode"):
            server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
            server.role = role
            server.handle_error = lambda *_: None  # a gateway that has seen enough hangs up
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self._servers[role] = server
        return self

    def __exit__(self, *_):
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    @property
    def urls(self):
        return {role: f"http://127.0.0.1:{server.server_address[1]}" for role, server in self._servers.items()}


class Gateway:
    """`extproc up` that says as much as it can."""

    def __init__(self, folder, urls):
        key = folder / "key"
        key.write_text(KEY + "\n")
        self.access_log = folder / "access.log"
        port, status_port = free_port(), free_port()
        self.url, self.status_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{status_port}"
        settings = {f"--{name.replace('_', '-')}": str(value) for name, value in QUICK.items()} | {
            "--host": "127.0.0.1",
            "--port": str(port),
            "--prometheus-port": str(status_port),
            "--log-level": "debug",
            "--access-log": str(self.access_log),
            "--api-key-file": str(key),
            "--max-payload-size": str(MAX_PAYLOAD_BYTES),
            "--worker-load-check-interval": "0.2",
            "--retry-max-retries": "1",
            "--prefill": urls["prefill"],
            "--decode": urls["decode"],
        }
        words = [word for pair in settings.items() for word in pair]
        self.process = Child("the gateway", ("up", *words, "--explain", "--response-headers"), folder / "up.log")

    def __enter__(self):
        self.process.wait_until(self._ready, "ready", START_S)
        return self

    def __exit__(self, *_):
        self.process.stop(STOP_S)

    def _ready(self):
        try:
            return httpx.get(self.status_url + "/ready").status_code == 200 or None
        except httpx.HTTPError:
            return None

    def everything_written(self):
        """Output by where it is, logs of the whole life included."""
        admin = re.search(r"admin (http://\S+)", self.process.log_text)[1]
        pages = [self.status_url + path for path in ("/metrics", "/debug/loads", "/workers", "/health", "/ready")]
        pages += [admin + path for path in ("/stats", "/config_dump", "/clusters", "/listeners")]
        written = {url: httpx.get(url).text for url in pages}
        self.process.stop(STOP_S)
        return written | {"log": self.process.log_text, "access log": self.access_log.read_text()}


def ask_all(gateway):
    """Every body to every endpoint; the statuses that came back."""
    statuses = []
    with httpx.Client(base_url=gateway.url, headers=HEADERS, timeout=60) as client:
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            contents = [json.dumps(body).encode() for body in BODIES.values()] + list(RAW_BODIES.values())
            for content in contents:
                response = client.post(f"{path}?key={CANARY}", content=content)
                statuses.append(response.status_code)
        statuses.append(client.get(f"/v1/models?key={CANARY}").status_code)
    return statuses


def leaks(written):
    """Lines with a canary, by where they are."""
    return [f"{where}: {line}" for where, text in written.items() for line in text.splitlines() if CANARY in line]


def is_logged(gateway, outcome):
    until(lambda: f"outcome={outcome}" in gateway.process.log_text, f"an outcome {outcome} in the log")


def test_nothing_of_a_request_is_written(tmp_path):
    with (
        Engines(tmp_path, ["--api-key", KEY, "--time-scale", "5"]) as engines,
        Gateway(tmp_path, engines.urls) as gateway,
    ):
        statuses = ask_all(gateway)
        assert {200, 400, 413} <= set(statuses), statuses
        stream = {"text": PROMPT, "stream": True, "sampling_params": {"max_new_tokens": 5000}}
        with httpx.stream("POST", gateway.url + "/generate", json=stream, headers=HEADERS, timeout=60) as response:
            next(response.iter_lines())
        is_logged(gateway, "aborted")
        for fault in FAULTS:
            for role, url in engines.urls.items():
                httpx.put(url + "/sim/faults", json=[fault]).raise_for_status()
                body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 20}, "stream": "stream" in fault}
                try:
                    httpx.post(gateway.url + "/generate", json=body, headers=HEADERS, timeout=60)
                except httpx.RemoteProtocolError:
                    assert (fault, role) == ("reset@stream", "decode")
                httpx.delete(url + "/sim/faults").raise_for_status()
        is_logged(gateway, "prefill_failed")
        is_logged(gateway, "decode_failed")
        without_key = httpx.post(gateway.url + "/generate", json={"text": PROMPT}, timeout=60)
        assert without_key.status_code == 401
        written = gateway.everything_written()
    assert leaks(written) == []


def test_nothing_of_an_answer_is_written(tmp_path):
    with EchoEngines() as engines, Gateway(tmp_path, engines.urls) as gateway:
        statuses = ask_all(gateway)
        assert 400 in statuses
        written = gateway.everything_written()
    assert "status 401" in written["log"]  # of the scrapes
    assert leaks(written) == []
