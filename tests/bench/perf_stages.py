"""Where the time of one request goes in the service, without a transport: each step of an exchange, timed by itself.

Requests follow one another in one process, so that each step finds its data where the one before has left it: warmer
than in a service that other processes interrupt, colder than a step repeated in a loop.
"""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValue
from envoy_data_plane.envoy.service.ext_proc.v3 import HttpBody, HttpHeaders, ProcessingRequest
from perf_decision import make_scheduler
from perf_load import NUMBER, body_of

from extproc import wire
from extproc.config import Config
from extproc.events import Effect, Ended, Finished, RequestHeaders, Send, Woken
from extproc.exchange import Exchange
from extproc.gateway import Gateway
from extproc.mutation import ROOM
from extproc.telemetry import Telemetry

Result = TypeVar("Result")

POLICY = "least_load"
"""The default."""
WORKERS = 4
REQUESTS = 4000
WARM_UP = 500


@dataclass(frozen=True, slots=True)
class Stage:
    """One step, once a request or as often as it says."""

    name: str
    median_us: float
    """Wall-clock time; the steps are too short for the CPU clock."""


def stages() -> list[Stage]:
    """Time them all."""
    scheduler, table = make_scheduler(POLICY, WORKERS)
    gateway = Gateway(Config(), table, scheduler, time.monotonic)
    telemetry = Telemetry(table, time.monotonic, lambda: gateway.open_rooms)
    took: defaultdict[str, list[float]] = defaultdict(list)
    text, rng = body_of("2KB"), random.Random(1)
    for number in range(WARM_UP + REQUESTS):
        if number == WARM_UP:
            took.clear()
        _request(gateway, telemetry, text.replace(NUMBER.encode(), b"%08d" % number), f"{rng.getrandbits(128):x}", took)
    return [Stage(name, statistics.median(times) * 1e6) for name, times in took.items()]


def _request(
    gateway: Gateway, telemetry: Telemetry, body: bytes, request_id: str, took: Mapping[str, list[float]]
) -> None:
    """One that goes well."""

    def timed(stage: str, work: Callable[[], Result]) -> Result:
        began = time.perf_counter()
        result = work()
        took[stage].append(time.perf_counter() - began)
        return result

    fields = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "content-length": str(len(body)),
        "content-type": "application/json",
        "x-envoy-attempt-count": "1",
        "x-request-id": request_id,
    }
    answered = {":status": "200", "content-length": "612", "content-type": "application/json"}
    opening = bytes(ProcessingRequest(request_headers=_headers(fields)))
    upload = bytes(ProcessingRequest(request_body=HttpBody(body=body, end_of_stream=True)))
    response = bytes(ProcessingRequest(response_headers=_headers(answered)))

    exchange = Exchange(gateway)
    opened = timed("decode: request headers", lambda: wire.decode(opening))
    effects = timed("request headers", lambda: exchange.route(opened))
    timed("encode: go on, three times", lambda: [_encoded(effects) for _ in range(3)])
    uploaded = timed("decode: body", lambda: wire.decode(upload))
    effects = timed("body: parse, pick, charge, mutate", lambda: exchange.route(uploaded))
    timed("encode: headers and decode's body", lambda: _encoded(effects))
    (room,) = (value for name, value in effects[0].reply.set_headers if name == ROOM)  # type: ignore[union-attr]
    opening = bytes(ProcessingRequest(request_headers=_headers({ROOM: room})))
    mirrored = timed("decode: prefill's headers", lambda: wire.decode(opening))
    assert isinstance(mirrored, RequestHeaders)
    found = timed("prefill's headers: find the attempt", lambda: gateway.find(mirrored.headers[ROOM]))
    assert found is exchange
    effects = timed("prefill's headers", lambda: exchange.prefill(mirrored))
    timed("encode: prefill's body", lambda: _encoded(effects))
    told = timed("decode: response headers, twice", lambda: [wire.decode(response) for _ in range(2)])
    timed("prefill's response headers", lambda: exchange.prefill(told[0]))
    timed("prefill's end: release", lambda: exchange.prefill(Ended()))
    timed("response headers", lambda: exchange.route(told[1]))
    timed("the end: release", lambda: exchange.route(Ended()))
    (finished,) = timed("verdict and record", lambda: exchange.route(Woken()))
    assert isinstance(finished, Finished)
    timed("metrics", lambda: telemetry.finished(finished))


def _encoded(effects: list[Effect]) -> list[bytes]:
    return [wire.encode(effect.reply) for effect in effects if isinstance(effect, Send)]


def _headers(fields: Mapping[str, str]) -> HttpHeaders:
    values = [HeaderValue(key=name, raw_value=value.encode()) for name, value in fields.items()]
    return HttpHeaders(headers=HeaderMap(headers=values))
