"""Target `wire`: any bytes as Envoy's messages, on to an exchange, and its replies back to bytes.

A stranger who reaches the gRPC port can send such bytes. What is no message is a WireError, what comes out of turn a
ProtocolViolation; nothing else may be raised, and nothing may stay charged. Replies are parsed again.
"""

import base64
import random
from collections.abc import Hashable

from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from fuzz_exchange import CONFIGS, WORKERS
from fuzz_target import Target
from google.protobuf.json_format import ParseDict

from extproc import wire
from extproc.events import (
    Answer,
    Broken,
    Ended,
    Extend,
    Immediate,
    Leg,
    Linger,
    Phase,
    Reply,
    RequestBody,
    RequestHeaders,
    Send,
    Woken,
)
from extproc.exchange import Exchange, ProtocolViolation
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.schedule import Scheduler

BETWEEN = b"\xff\xff\xff\xff"
"""Between two messages of an input: no field of protobuf begins so."""

KINDS = {
    Phase.REQUEST_HEADERS: "request_headers",
    Phase.REQUEST_BODY: "request_body",
    Phase.REQUEST_TRAILERS: "request_trailers",
    Phase.RESPONSE_HEADERS: "response_headers",
    Phase.RESPONSE_BODY: "response_body",
    Phase.RESPONSE_TRAILERS: "response_trailers",
}


def check_wire(data: bytes) -> Hashable:
    """First byte: what the messages are for: 0, 1: an access log; else a leg."""
    kind = data[0] % 8 if data else 0
    messages = data[1:].split(BETWEEN)
    if kind < 2:
        return tuple(_read_log(message) for message in messages[:4])
    table = LoadTable(WORKERS, lambda: 0.0)
    for worker in WORKERS:
        table.worker_changed(worker, True)
    gateway = Gateway(CONFIGS[0], table, Scheduler(CONFIGS[0], table, random.Random(1)), lambda: 0.0)
    exchange = Exchange(gateway)
    leg = Leg.ROUTE if kind < 5 else Leg.PREFILL
    if leg is Leg.PREFILL:
        _begin(gateway, exchange)
    shown = [_feed(gateway, exchange, leg, message) for message in messages]
    if leg is Leg.PREFILL:
        exchange.prefill(Ended())
    effects = exchange.route(Ended())
    if any(isinstance(effect, Linger) for effect in effects):
        exchange.route(Woken())
    assert gateway.open_rooms == 0
    assert all(state.in_flight == 0 for state in table.states)
    return (leg, *shown[:4])


def _begin(gateway: Gateway, exchange: Exchange) -> None:
    exchange.route(RequestHeaders({":method": "POST", ":path": "/generate"}, False))
    send, *_ = exchange.route(RequestBody(b'{"text": "x"}'))
    assert isinstance(send, Send)
    assert isinstance(send.reply, Answer)
    headers = RequestHeaders(dict(send.reply.set_headers), False)
    assert gateway.find(headers.headers["x-pd-room"]) is exchange
    exchange.prefill(headers)


def _feed(gateway: Gateway, exchange: Exchange, leg: Leg, message: bytes) -> Hashable:
    try:
        event = wire.decode(message)
    except wire.WireError:
        return "no message"
    if isinstance(event, RequestHeaders):  # as at the begin of a prefill stream
        assert gateway.find(event.headers.get("x-pd-room", "")) is None, "let in twice"
    try:
        effects = exchange.route(event) if leg is Leg.ROUTE else exchange.prefill(event)
    except ProtocolViolation:
        return type(event), "out of turn"
    replies = [effect.reply for effect in effects if isinstance(effect, Send)]
    for reply in replies:
        _check_encoded(reply)
    return (type(event), *(type(reply) for reply in replies))


def _read_log(message: bytes) -> Hashable:
    try:
        entries = wire.decode_access_log(message)
    except wire.WireError:
        return "no log"
    for room, event in entries:
        assert room >= 0
        assert isinstance(event, Broken)
        assert event.flags
    return len(entries)


def _check_encoded(reply: Reply) -> None:
    response = ProcessingResponse.FromString(wire.encode(reply))
    match reply:
        case Immediate():
            assert response.immediate_response.status.code == reply.status
            assert response.immediate_response.body == reply.body
        case Extend():
            assert response.HasField("override_message_timeout")
        case Answer():
            assert response.WhichOneof("response") == KINDS[reply.phase]


def _headers(**headers: str) -> dict[str, object]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    pairs = [
        {"key": name if name not in {"method", "path", "status"} else f":{name}", "rawValue": _base64(value)}
        for name, value in named.items()
    ]
    return {"headers": {"headers": pairs}}


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _message(**fields: object) -> bytes:
    data: bytes = ParseDict(fields, ProcessingRequest()).SerializeToString()
    return data


def _log() -> bytes:
    entry = {
        "commonProperties": {"responseFlags": {"upstreamConnectionTermination": True}},
        "request": {"requestHeaders": {"x-pd-room": "12345"}},
    }
    data: bytes = ParseDict({"httpLogs": {"logEntry": [entry, entry]}}, StreamAccessLogsMessage()).SerializeToString()
    return data


ROUTE = (
    _message(request_headers=_headers(method="POST", path="/generate", content_length="15", x_envoy_attempt_count="1")),
    _message(request_body={"body": _base64('{"text": "hi"}'), "endOfStream": True}),
    _message(response_headers=_headers(status="200", content_type="text/event-stream")),
    _message(response_trailers={}),
)
PREFILL = (
    _message(response_headers=_headers(status="200", content_length="40", content_type="application/json")),
    _message(response_body={"body": _base64('{"meta_info": {"prompt_tokens": 7}}')}),
)

TARGETS = (
    Target(
        "wire",
        check_wire,
        (
            b"\x00" + _log(),
            b"\x02" + BETWEEN.join(ROUTE),
            b"\x05" + BETWEEN.join(PREFILL),
            b"\x05" + _message(response_headers=_headers(status="400")),
            b"\x02" + _message(request_headers=_headers(method="GET", path="/v1/models")),
        ),
        (
            *(BETWEEN, b":status", b":method", b":path", b"content-length", b"x-pd-room", b"x-envoy-attempt-count"),
            *(b"content-encoding", b"x-smg-routing-key", b"/v1/chat/completions", b"POST", b"9" * 64, b"\xd9\xa3"),
            *ROUTE,
            *PREFILL,
        ),
        share=0.1,
        modules=("extproc.wire", "extproc.exchange", "extproc.usage"),
    ),
)
