"""Whatever a client sends, engines get the service's choice; and nothing of the gateway's inside reaches the client.

Tables of everything that could steer: headers, body fields, paths; HTTP/1.1 as raw bytes, and HTTP/2.
"""

import contextlib
import http.client
import itertools
import json
import re
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import httpx
import pytest
from conftest import legs, nothing_charged, until

from extproc.demo.child import Child
from extproc.demo.stack import START_TIMEOUT_S, Stack, free_port

pytestmark = pytest.mark.envoy

PATIENCE_S = 30
Headers = list[tuple[str, str]]
CHAT = b'{"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2%s}'
GENERATE = b'{"text": "hi", "sampling_params": {"max_new_tokens": 2}%s}'
COMPLETIONS = b'{"model": "sim-model", "prompt": "hi", "max_tokens": 2%s}'
BODIES = {"/generate": GENERATE, "/v1/chat/completions": CHAT, "/v1/completions": COMPLETIONS}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A gateway that names no workers to clients, as by default."""
    with Stack(up_flags=["--no-response-headers"], engine_flags=["--time-scale", "20"]) as running:
        yield running


@pytest.fixture(scope="module")
def trap() -> Iterator[tuple[str, list[str]]]:
    """Where a client would like its request to go: an address, and who came there."""
    visitors: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, peer = server.accept()
                    visitors.append(str(peer))
                    connection.close()

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}", visitors
        server.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE_S)


# -- clients that send just what they are told ----------------------------------------------------------------------


def http1(stack: Stack, method: str, target: str, headers: Headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """One request over HTTP/1.1, byte by byte as given; `content-length` is added."""
    lines = [f"{method} {target} HTTP/1.1", "Host: gateway", f"Content-Length: {len(body)}", "Connection: close"]
    head = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers), "", ""])
    return exchange(stack, head.encode("latin-1") + body)


def exchange(stack: Stack, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """These bytes, and the answer to them."""
    host, _, port = stack.url.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as connection:
        connection.sendall(sent)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def http2(  # noqa: PLR0917 - called as http1 is
    stack: Stack, method: str, target: str, headers: Headers, body: bytes, trailers: Headers | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request over HTTP/2 without TLS, by prior knowledge; nothing is checked before it is sent."""
    host, _, port = stack.url.removeprefix("http://").rpartition(":")
    config = h2.config.H2Configuration(
        client_side=True, header_encoding="latin-1", validate_outbound_headers=False, normalize_outbound_headers=False
    )
    connection = h2.connection.H2Connection(config)
    connection.initiate_connection()
    pseudo = [(":method", method), (":scheme", "http"), (":authority", "gateway"), (":path", target)]
    connection.send_headers(1, [*pseudo, *headers], end_stream=not body and not trailers)
    if body:
        connection.send_data(1, body, end_stream=not trailers)
    if trailers:
        connection.send_headers(1, trailers, end_stream=True)
    status, seen, received = 0, {}, b""
    with socket.create_connection((host, int(port)), PATIENCE_S) as link:
        link.sendall(connection.data_to_send())
        while data := link.recv(65536):
            for event in connection.receive_data(data):
                match event:
                    case h2.events.ResponseReceived():
                        seen = dict(event.headers)
                        status = int(seen[":status"])
                    case h2.events.DataReceived():
                        received += event.data
                    case h2.events.StreamEnded() | h2.events.StreamReset() | h2.events.ConnectionTerminated():
                        return status, seen, received
            link.sendall(connection.data_to_send())
    return status, seen, received


FROM_ENVOY = {
    "x-request-id",
    "x-forwarded-for",
    "x-forwarded-proto",
    "x-envoy-attempt-count",
    "x-envoy-external-address",
    "x-envoy-internal",  # of a mirrored request, whatever the client said
}
SEND: dict[str, Callable[..., tuple[int, dict[str, str], bytes]]] = {"HTTP/1.1": http1, "HTTP/2": http2}


# -- what must hold -------------------------------------------------------------------------------------------------


def check_legs(stack: Stack, request_id: str) -> tuple[dict, dict]:
    """Both legs say what the service chose, in headers and body, and nothing else that could steer."""
    prefill, decode = legs(stack, request_id)
    host, _, port = prefill["worker"].rpartition(":")
    engine = next(engine for engine in stack.prefills if engine.address == prefill["worker"])
    room = prefill["bootstrap_room"]
    assert isinstance(room, int)
    assert room % 2 == prefill["routed_dp_rank"], "the room agrees with the rank"
    for leg in (prefill, decode):
        own = {name: value for name, value in leg["headers"].items() if name.startswith("x-pd-")}
        assert own == {
            "x-pd-mode": "prefill" if leg is prefill else "pd",
            "x-pd-room": str(room),
            "x-pd-prefill-endpoint": f"{host}:{port}",
            "x-pd-decode-endpoint": decode["worker"],
            "x-pd-prefill-rank": str(prefill["routed_dp_rank"]),
            "x-pd-decode-rank": str(decode["routed_dp_rank"]),
        }
        others = {name for name in leg["headers"] if name.startswith("x-") and name not in own}
        assert others <= FROM_ENVOY | {"x-mine"}, "only what Envoy itself adds"
        assert leg["headers"]["x-envoy-attempt-count"] == "1"
        assert leg["headers"].get("x-envoy-external-address") in {None, "127.0.0.1"}, "the client's real address"
        fields = json.loads(leg["body"])  # the last of equal keys, as engines read it
        assert fields["bootstrap_host"] == leg["bootstrap_host"] == host
        assert fields["bootstrap_port"] == leg["bootstrap_port"] == int(engine.bootstrap_port)
        assert fields["bootstrap_room"] == leg["bootstrap_room"] == room
        assert fields["routed_dp_rank"] == leg["routed_dp_rank"]
        assert leg["routed_dp_rank"] in {0, 1}
        for name in ("data_parallel_rank", "bootstrap_pair_key", "decode_tp_size"):
            assert fields.get(name) is None, name
        rank = fields.get("disagg_prefill_dp_rank")
        assert rank == leg["disagg_prefill_dp_rank"] == (None if leg is prefill else prefill["routed_dp_rank"])
        assert leg["ranks"] == [leg["routed_dp_rank"]] * len(leg["ranks"])
        assert leg["rooms"] == [room + number for number in range(len(leg["rooms"]))]
    return prefill, decode


def check_answer(headers: dict[str, str], request_id: str | None = None) -> None:
    """Nothing of the inside is told to the client."""
    inside = {name for name in headers if name.startswith(("x-pd-", "x-envoy-", "x-override-", "x-gateway-"))}
    assert not inside
    assert request_id is None or headers["x-request-id"] == request_id


def seen_by_engines(stack: Stack, request_id: str) -> list[dict]:
    """Records of a generation request, on any engine."""
    records = [record for engine in stack.engines for record in engine.requests()]
    return [record for record in records if record["headers"].get("x-request-id") == request_id]


def check_refused(stack: Stack, request_id: str, status: int, statuses: set[int]) -> None:
    """The request got an error, and no engine has seen it."""
    assert status in statuses
    assert seen_by_engines(stack, request_id) == []


# -- headers --------------------------------------------------------------------------------------------------------

STEERING_HEADERS = {
    "x-pd-mode": "direct",
    "x-pd-room": "666",
    "x-pd-prefill-endpoint": "TRAP",
    "x-pd-decode-endpoint": "TRAP",
    "x-pd-prefill-rank": "9",
    "x-pd-decode-rank": "9",
    "x-pd-prefill": "TRAP",
    "x-pd-decode": "TRAP",
    "x-pd-retry": "decode",
    "x-pd-process": "prefill_0",
    "x-pd-": "1",
    "x-override-rid": "666",
    "x-override-bootstrap-host": "TRAP",
    "x-override-bootstrap-port": "666",
    "x-override-bootstrap-room": "666",
    "x-override-routed-dp-rank": "9",
    "x-override-disagg-prefill-dp-rank": "9",
    "x-override-priority": "9",
    "x-override-conversation-id": "666",
    "x-data-parallel-rank": "9",
    "x-gateway-destination-endpoint": "TRAP",
    "x-envoy-original-dst-host": "TRAP",
    "x-envoy-original-path": "/flush_cache",
    "x-envoy-attempt-count": "9",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-upstream-rq-per-try-timeout-ms": "1",
    "x-envoy-upstream-stream-duration-ms": "1",
    "x-envoy-upstream-alt-stat-name": "x",
    "x-envoy-expected-rq-timeout-ms": "1",
    "x-envoy-retry-on": "5xx",
    "x-envoy-retry-grpc-on": "cancelled",
    "x-envoy-max-retries": "9",
    "x-envoy-retriable-status-codes": "200",
    "x-envoy-retriable-header-names": "content-type",
    "x-envoy-hedge-on-per-try-timeout": "true",
    "x-envoy-decorator-operation": "x",
    "x-envoy-ip-tags": "x",
    "x-envoy-internal": "true",
    "x-envoy-external-address": "6.6.6.6",
    "x-envoy-force-trace": "true",
    "x-envoy-downstream-service-cluster": "x",
    "x-envoy-local-overloaded": "true",
}
"""What the service, engines (SGLang 0.5.23) and Envoy (router and connection manager) read."""


def mixed(name: str) -> str:
    return "".join(letter.upper() if number % 2 else letter for number, letter in enumerate(name))


SPELLINGS: dict[str, Callable[[str], list[str]]] = {
    "as it is": lambda name: [name],
    "UPPER": lambda name: [name.upper()],
    "mIxEd": lambda name: [mixed(name)],
    "twice": lambda name: [name, name],
    "under_scores": lambda name: [name.replace("-", "_")],
    "some under_scores": lambda name: [name.replace("-", "_", 1), name[::-1].replace("-", "_", 1)[::-1]],
}
LOWER_CASE_ONLY = {"UPPER", "mIxEd"}
"""Other letters than lower-case ones are malformed in HTTP/2 (RFC 9113, 8.2.1)."""


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("protocol", SEND)
def test_no_header_steers(stack, trap, protocol, spelling, path) -> None:
    if protocol == "HTTP/2" and spelling in LOWER_CASE_ONLY:
        status, _, _ = http2(stack, "POST", path, [(SPELLINGS[spelling]("x-pd-mode")[0], "direct")], BODIES[path] % b"")
        assert status in {0, 400}
        return
    address, visitors = trap
    request_id = str(uuid.uuid4())
    headers = [
        (name, value.replace("TRAP", address))
        for wanted, value in STEERING_HEADERS.items()
        for name in SPELLINGS[spelling](wanted)
    ]
    # 84 headers in all when each is there twice.
    status, answer, body = SEND[protocol](
        stack, "POST", path, [("x-request-id", request_id), ("x-mine", "stays"), *headers], BODIES[path] % b""
    )
    assert status == 200, body
    check_answer(answer, request_id)
    for leg in check_legs(stack, request_id):
        assert leg["headers"]["x-mine"] == "stays"
        assert address not in str(leg["headers"])
    assert visitors == []


@pytest.mark.parametrize("name", STEERING_HEADERS)
def test_no_header_steers_on_its_own(stack, trap, name) -> None:
    """One could hide another's effect."""
    address, visitors = trap
    request_id = str(uuid.uuid4())
    value = STEERING_HEADERS[name].replace("TRAP", address)
    status, answer, body = http1(
        stack, "POST", "/generate", [("x-request-id", request_id), (name, value)], GENERATE % b""
    )
    assert status == 200, body
    check_answer(answer, request_id)
    check_legs(stack, request_id)
    assert visitors == []


@pytest.mark.parametrize(
    "name", ["x-pd-decode-endpoint", "x-envoy-original-dst-host", "x-gateway-destination-endpoint"]
)
def test_no_header_steers_what_is_passed_on(stack, trap, name) -> None:
    address, visitors = trap
    for send in SEND.values():
        status, answer, body = send(stack, "GET", "/v1/models", [(name, address), ("x-pd-mode", "pd")], b"")
        assert status == 200, body
        check_answer(answer)
    assert visitors == []


@pytest.mark.parametrize("how", ["connection", "chunked trailers", "folded", "HTTP/2 trailers"])
def test_no_header_steers_by_a_trick_of_the_protocol(stack, trap, how) -> None:
    """Names that a hop is asked to drop, headers behind the body, a line that goes on."""
    address, visitors = trap
    request_id = str(uuid.uuid4())
    body = GENERATE % b""
    if how == "HTTP/2 trailers":
        trailers = [("x-pd-mode", "direct"), ("x-pd-decode-endpoint", address)]
        status, answer, _ = http2(stack, "POST", "/generate", [("x-request-id", request_id)], body, trailers)
    else:
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nx-request-id: {request_id}\r\n".encode()
        length = b"Content-Length: %d\r\n" % len(body)
        sent = {
            "connection": head
            + length
            + b"Connection: close, x-pd-mode, x-pd-room, x-pd-decode-endpoint\r\n\r\n"
            + body,
            "chunked trailers": head
            + b"Transfer-Encoding: chunked\r\nTrailer: x-pd-mode\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(body), body)
            + f"x-pd-mode: direct\r\nx-pd-decode-endpoint: {address}\r\n\r\n".encode(),
            "folded": head + length + f"x-mine: stays\r\n x-pd-decode-endpoint: {address}\r\n\r\n".encode() + body,
        }[how]
        status, answer, _ = exchange(stack, sent)
    assert status == 200
    check_answer(answer, request_id)
    check_legs(stack, request_id)
    assert visitors == []


def test_a_body_with_two_lengths_is_refused(stack) -> None:
    """Request smuggling: where one hop goes by the length and the next by the chunks."""
    request_id = str(uuid.uuid4())
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nx-request-id: {request_id}\r\n".encode()
    smuggled = b"0\r\n\r\nPOST /flush_cache HTTP/1.1\r\nHost: x\r\n\r\n"
    both = b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(smuggled)
    status, _, _ = exchange(stack, head + both + smuggled)
    check_refused(stack, request_id, status, {400})


# -- body fields ----------------------------------------------------------------------------------------------------

FIELDS: dict[str, bytes] = {
    "bootstrap_host": b'"6.6.6.6"',
    "bootstrap_port": b"666",
    "bootstrap_room": b"666",
    "routed_dp_rank": b"9",
    "disagg_prefill_dp_rank": b"9",
    "data_parallel_rank": b"9",
    "bootstrap_pair_key": b'"6.6.6.6:666"',
    "decode_tp_size": b"64",
}
"""What an engine reads that places a request or its KV cache (SGLang 0.5.23, `GenerateReqInput`)."""


def member(name: str, value: bytes) -> bytes:
    return b', "%s": %s' % (name.encode(), value)


def escaped(name: str) -> str:
    """The same name for a JSON parser: each letter that may be, as `\\u00XX`."""
    return "".join(f"\\u{ord(letter):04x}" for letter in name)


FORMS: dict[str, Callable[[str, bytes], bytes]] = {
    "as it is": member,
    "twice": lambda name, value: member(name, value) * 2,
    "null, then set": lambda name, value: member(name, b"null") + member(name, value),
    "escaped": lambda name, value: member(escaped(name), value),
    "one letter escaped": lambda name, value: member(name[:-1] + escaped(name[-1]), value),
    "plain and escaped": lambda name, value: member(name, value) + member(escaped(name), value),
    "in a list": lambda name, value: member(name, b"[%s]" % value),
    "as an object": lambda name, value: member(name, b'{"%s": %s}' % (name.encode(), value)),
    "as a string": lambda name, value: member(name, json.dumps(value.decode()).encode()),
    "other case": lambda name, value: member(name.upper(), value) + member(name.title(), value),
    "nested": lambda name, value: (
        member("extra_body", b'{"%s": %s}' % (name.encode(), value))
        + member("custom_params", b'{"%s": %s}' % (name.encode(), value))
    ),
    "in a string": lambda name, value: member("user", json.dumps('"}, ' + name + value.decode()).encode()),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", BODIES)
def test_no_body_field_steers(stack, path, form) -> None:
    added = b"".join(FORMS[form](name, value) for name, value in FIELDS.items())
    request_id = str(uuid.uuid4())
    status, answer, body = http1(stack, "POST", path, [("x-request-id", request_id)], BODIES[path] % added)
    assert status == 200, body
    check_answer(answer, request_id)
    check_legs(stack, request_id)


@pytest.mark.parametrize("protocol", SEND)
@pytest.mark.parametrize("name", FIELDS)
def test_no_body_field_steers_on_its_own(stack, name, protocol) -> None:
    request_id = str(uuid.uuid4())
    headers = [("x-request-id", request_id)]
    status, answer, body = SEND[protocol](stack, "POST", "/generate", headers, GENERATE % member(name, FIELDS[name]))
    assert status == 200, body
    check_answer(answer, request_id)
    check_legs(stack, request_id)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_no_field_steers_a_part_of_a_batch(stack, path) -> None:
    prompts = {"/generate": b'{"text": ["a", "b"], "sampling_params": {"max_new_tokens": 2}%s}'}.get(
        path, b'{"model": "sim-model", "prompt": ["a", "b"], "max_tokens": 2%s}'
    )
    added = b"".join(member(name, b"[%s, %s]" % (value, value)) for name, value in FIELDS.items())
    request_id = str(uuid.uuid4())
    status, answer, body = http1(stack, "POST", path, [("x-request-id", request_id)], prompts % added)
    assert status == 200, body
    check_answer(answer, request_id)
    prefill, decode = check_legs(stack, request_id)
    assert len(prefill["rooms"]) == len(decode["rooms"]) == 2


WRAPPED: dict[str, tuple[Callable[[bytes], bytes], int]] = {
    "white space around": (lambda body: b" \r\n\t" + body + b"\n\t ", 200),
    "byte order mark": (lambda body: b"\xef\xbb\xbf" + body, 400),
    "UTF-16": (lambda body: body.decode().encode("utf-16"), 400),
    "in a list": (lambda body: b"[" + body + b"]", 400),
    "two documents": (lambda body: body + body, 400),
    "a comment": (lambda body: body + b"// }", 400),
    "something behind": (lambda body: body + b"}", 400),
    "a NUL behind": (lambda body: body + b"\0", 400),
    "NaN": (lambda body: body.replace(b"666", b"NaN"), 400),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_what_is_around_the_object_changes_nothing(stack, how) -> None:
    wrap, expected = WRAPPED[how]
    added = b"".join(member(name, value) for name, value in FIELDS.items())
    request_id = str(uuid.uuid4())
    headers = [("x-request-id", request_id), ("content-type", "application/json")]
    status, answer, body = http1(stack, "POST", "/generate", headers, wrap(GENERATE % added))
    assert status == expected, body
    check_answer(answer, request_id)
    if expected == 200:
        check_legs(stack, request_id)
    else:
        check_refused(stack, request_id, status, {expected})


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "deflate", "identity, gzip"])
def test_an_encoded_body_is_refused_as_it_cannot_be_read(stack, encoding) -> None:
    request_id = str(uuid.uuid4())
    headers = [("x-request-id", request_id), ("content-encoding", encoding)]
    status, _, _ = http1(stack, "POST", "/generate", headers, GENERATE % b"")
    check_refused(stack, request_id, status, {400})


# -- paths ----------------------------------------------------------------------------------------------------------

GENERATES = [
    "/generate?bootstrap_room=666&bootstrap_host=6.6.6.6&routed_dp_rank=9&data_parallel_rank=9",
    "/generate?",
    "//generate",
    "/%67enerate",
    "/./generate",
    "/x/../generate",
    "/x/%2e%2e/generate",
    "http://6.6.6.6:666/generate",
]
"""Ways to write `/generate`: engines would understand each so, hence the service has to, too."""

NOT_SERVED = [
    "/generate/",
    "/generate//",
    "/generate%2f",
    "/GENERATE",
    "/generate;x",
    "/generate%3fx",
    "/%2567enerate",
    "/generate%20",
    "/v1/chat/completions/",
    "/v1/chat/completions/x",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/messages",
    "/api/chat",
    "/flush_cache",
    "/abort_request",
    "/update_weights_from_disk",
    "/update_weights_from_distributed",
    "/init_weights_update_group",
    "/release_memory_occupation",
    "/pause_generation",
    "/load_lora_adapter",
    "/set_internal_state",
    "/open_session",
    "/start_profile",
    "/stop_profile",
    "/server_info",
    "/get_server_info",
    "/configure_logging",
    "/metrics",
    "/v1/loads",
    "/get_load",
    "/sim/faults",
    "/sim/requests",
    "/sim/state",
    "/docs",
    "/openapi.json",
    "/v1/models/../../flush_cache",
    "/v1/models/..%2f..%2fflush_cache",
    "/v1/models/%2e%2e/%2e%2e/flush_cache",
    "/v1/models/..\\..\\flush_cache",
    "/health/../flush_cache",
    "/",
]


@pytest.mark.parametrize("protocol", SEND)
@pytest.mark.parametrize("target", GENERATES)
def test_a_path_that_engines_take_for_generate_is_scheduled(stack, target, protocol) -> None:
    if protocol == "HTTP/2" and target.startswith("http://"):
        pytest.skip("HTTP/2 has no such form")
    request_id = str(uuid.uuid4())
    status, answer, body = SEND[protocol](stack, "POST", target, [("x-request-id", request_id)], GENERATE % b"")
    assert status == 200, body
    check_answer(answer, request_id)
    check_legs(stack, request_id)


@pytest.mark.parametrize("protocol", SEND)
@pytest.mark.parametrize("target", NOT_SERVED)
def test_no_other_path_reaches_an_engine(stack, target, protocol) -> None:
    """A redirect would be an engine's (Starlette's for a slash at the end), so 404 says that none has seen it."""
    for method in ("GET", "POST", "PUT", "DELETE"):
        request_id = str(uuid.uuid4())
        status, answer, _ = SEND[protocol](stack, method, target, [("x-request-id", request_id)], GENERATE % b"")
        check_refused(stack, request_id, status, {404})
        check_answer(answer, request_id)
        assert "server" not in answer, "engines name themselves"
        assert "location" not in answer


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "post", "BREW"])
def test_no_other_method_generates(stack, method) -> None:
    """An engine may take another method for POST."""
    for path, body in BODIES.items():
        request_id = str(uuid.uuid4())
        headers = [("x-request-id", request_id), ("x-http-method-override", "POST")]
        status, _, _ = http1(stack, method, path, headers, body % b"")
        check_refused(stack, request_id, status, {400, 404, 405})


@pytest.mark.parametrize("target", ["/generate#x", "/generate%00", "*", "/\x01generate"])
def test_a_malformed_target_is_refused(stack, target) -> None:
    request_id = str(uuid.uuid4())
    status, _, _ = http1(stack, "POST", target, [("x-request-id", request_id)], GENERATE % b"")
    check_refused(stack, request_id, status, {400, 404})


def test_a_tunnel_is_refused(stack, trap) -> None:
    address, visitors = trap
    for sent in (
        f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n\r\n",
        "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
        f"GET http://{address}/v1/models HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n",
    ):
        status, answer, _ = exchange(stack, sent.encode())
        assert status == (200 if sent.startswith("GET http") else status)
        assert status in {200, 400, 403, 404}
        check_answer(answer)
    assert visitors == []


# -- answers --------------------------------------------------------------------------------------------------------

ENGINE_HEADERS = (
    b"x-pd-decode: 6.6.6.6:6\r\nX-PD-Room: 666\r\nx-pd-mode: pd\r\nx-pd-prefill-loads: x\r\nx-mine: stays\r\n"
)
_READY = re.compile(r"gateway on (http://\S+), metrics on (http://\S+)/metrics")


@contextlib.contextmanager
def talkative(address: str) -> Iterator[str]:
    """An engine's address behind a hop that adds headers to each answer."""
    host, _, port = address.rpartition(":")

    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(work: Callable[..., None], *args: object) -> None:
        threads.append(threading.Thread(target=work, args=args, daemon=True))
        threads[-1].start()

    def pump(source: socket.socket, sink: socket.socket, insert: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if insert and data.startswith(b"HTTP/1.1 "):
                    line, _, rest = data.partition(b"\r\n")
                    data = line + b"\r\n" + ENGINE_HEADERS + rest
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def listen(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = server.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                start(pump, near, far, False)
                start(pump, far, near, True)

    with socket.create_server(("127.0.0.1", 0)) as server:
        start(listen, server)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        threads[0].join(PATIENCE_S)
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(PATIENCE_S)
    for end in ends:
        end.close()


@pytest.mark.parametrize("flags", [("--no-response-headers",), ("--response-headers",)])
def test_an_engines_own_words_about_the_gateway_are_dropped(stack, tmp_path: Path, flags) -> None:
    told = {"x-pd-prefill", "x-pd-decode", "x-pd-room"} if flags == ("--response-headers",) else set()
    with talkative(stack.decodes[0].address) as decode:
        workers = ("--prefill", stack.prefills[0].url, "--decode", decode)
        ports = ("--host", "127.0.0.1", "--port", str(free_port()), "--prometheus-port", str(free_port()))
        gateway = Child("the gateway", ("up", *workers, *ports, *flags), tmp_path / "gateway.log")
        try:
            url = gateway.wait_until(lambda: _READY.search(gateway.log_text), "ready", START_TIMEOUT_S)[1]
            with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:

                def ready() -> bool:
                    with contextlib.suppress(httpx.HTTPError):
                        return client.get("/v1/models").status_code == 200
                    return False

                until(ready, "a decode worker")
                answers = [
                    client.get("/v1/models"),
                    client.post("/generate", content=GENERATE % b""),
                    client.post("/generate", content=GENERATE % b', "stream": true'),
                    client.post("/generate", content=b'{"text": 1}'),  # refused by the engine
                ]
            assert [answer.status_code for answer in answers[:3]] == [200] * 3
            for answer, expected in zip(answers, itertools.chain([set()], itertools.repeat(told)), strict=False):
                seen = {name for name in answer.headers if name.startswith("x-pd-")}
                assert seen <= expected
                assert "6.6.6.6" not in str(answer.headers)
                assert answer.headers.get("x-pd-room") != "666"
            assert answers[1].headers["x-mine"] == "stays", "the hop did add headers"
        finally:
            gateway.stop(15)


def test_nothing_is_left_charged(stack) -> None:
    until(lambda: nothing_charged(stack), "nothing charged")
