"""A collector: takes spans over OTLP/HTTP, ours as JSON and Envoy's as Protobuf, and keeps them.

Reads both without `opentelemetry.proto`, of which there may be two copies (extproc/otlp_json.py).
"""

import asyncio
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

SERVER = 2
"""`SPAN_KIND_SERVER`"""


@dataclass(frozen=True)
class Span:
    """What the tests look at."""

    trace_id: bytes
    span_id: bytes
    parent_span_id: bytes
    trace_state: str
    name: str
    kind: int
    status: int
    attributes: dict[str, Any]


class Collector:
    """Serves in a thread of its own while the context is open."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = {}
        """By the name of the service that sent them, in the order they came."""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, service: str, trace_id: bytes) -> list[Span]:
        """A service's spans of one trace."""
        return [span for span in self.spans.get(service, []) if span.trace_id == trace_id]

    def __enter__(self) -> "Collector":
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app, access_log=None)
        self._thread.start()
        self._call(self._runner.setup())
        self._call(web.TCPSite(self._runner, "127.0.0.1", 0).start())
        self.port = self._runner.addresses[0][1]
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _take(self, request: web.Request) -> web.Response:
        read = {"application/json": from_json, "application/x-protobuf": from_protobuf}[request.content_type]
        for service, span in read(await request.read()):
            self.spans.setdefault(service, []).append(span)
        return web.Response(body=b"{}" if read is from_json else b"", content_type=request.content_type)


def from_json(body: bytes) -> Iterator[tuple[str, Span]]:
    """Each span with the name of its service."""
    for resource_spans in json.loads(body)["resourceSpans"]:
        service = said(resource_spans["resource"]["attributes"])["service.name"]
        for scope_spans in resource_spans["scopeSpans"]:
            for span in scope_spans["spans"]:
                yield (
                    service,
                    Span(
                        bytes.fromhex(span["traceId"]),
                        bytes.fromhex(span["spanId"]),
                        bytes.fromhex(span.get("parentSpanId", "")),
                        span.get("traceState", ""),
                        span["name"],
                        span["kind"],
                        span["status"]["code"],
                        said(span["attributes"]),
                    ),
                )


def said(attributes: list[dict[str, Any]]) -> dict[str, Any]:
    """Attributes in JSON as a dictionary."""
    read = {"stringValue": str, "intValue": int, "doubleValue": float, "boolValue": bool}
    return {each["key"]: read[kind](value) for each in attributes for kind, value in each["value"].items()}


def from_protobuf(body: bytes) -> Iterator[tuple[str, Span]]:
    """The same; numbers of fields from trace.proto, resource.proto and common.proto of OTLP 1."""
    for resource_spans in map(fields, fields(body)[1]):
        [resource] = map(fields, resource_spans[1])
        service = texts(resource[1])["service.name"]
        for scope_spans in map(fields, resource_spans[2]):
            for span in map(fields, scope_spans[2]):
                status = fields(last(span[15], b""))
                yield (
                    service,
                    Span(
                        last(span[1], b""),
                        last(span[2], b""),
                        last(span[4], b""),
                        last(span[3], b"").decode(),
                        last(span[5], b"").decode(),
                        last(span[6], 0),
                        last(status[3], 0),
                        texts(span[9]),
                    ),
                )


def texts(attributes: list[bytes]) -> dict[str, str]:
    """Those that are strings; all of Envoy's are."""
    found = {}
    for pair in map(fields, attributes):
        if value := fields(last(pair[2], b""))[1]:
            found[pair[1][0].decode()] = value[0].decode()
    return found


def last(values: list[Any], default: Any) -> Any:
    """A field that is there once at most."""
    return values[-1] if values else default


def fields(message: bytes) -> defaultdict[int, list[Any]]:
    """A Protobuf message: by the number of the field its values, as numbers or bytes."""
    found: defaultdict[int, list[Any]] = defaultdict(list)
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            found[number].append(varint())
            continue
        size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
        found[number].append(message[at : at + size])
        at += size
    return found
