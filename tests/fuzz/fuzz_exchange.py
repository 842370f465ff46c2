"""Target `exchange`: requests side by side, their events in any order that Envoy can produce, and some that it cannot.

The input is a script, a choice a byte. When it is used up, all timers fire, and by then every message must have its
answer; then the streams end, and nothing may be charged or open any more. `fuzz_envoy` checks each step.
"""

import random
from collections.abc import Hashable

from fuzz_envoy import Request, check_vocabulary
from fuzz_json import Choices
from fuzz_target import Target

from extproc.config import Config
from extproc.events import (
    Broken,
    Ended,
    Event,
    Leg,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Trailers,
    Woken,
)
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.schedule import Scheduler

check_vocabulary()

CONFIGS = tuple(
    Config(**{"policy": "round_robin", **settings})
    for settings in (
        {},
        {"response_headers": True, "explain": True},
        {"max_worker_requests": 1},
        {"max_rank_tokens": 5},
        {"cb_failure_threshold": 1, "cb_success_threshold": 1, "cb_timeout_duration_secs": 0.5},
        {"policy": "least_load", "cb_failure_threshold": 2},
        {"dp_minimum_tokens_scheduler": False, "load_model": "scraped", "max_payload_size": 100},
    )
)
WORKERS = (
    *(Worker(f"p{i}:1", Role.PREFILL, f"http://p{i}:1", f"10.0.1.{i}:1", f"p{i}", 8998, 2) for i in range(2)),
    *(Worker(f"d{i}:1", Role.DECODE, f"http://d{i}:1", f"10.0.2.{i}:1", dp_size=2) for i in range(2)),
)
MOST_REQUESTS = 3
PATHS = ("/generate", "/v1/chat/completions", "/v1/completions", "/v1/models", "/nowhere")
BODIES = (
    b'{"text": "hello", "messages": [], "prompt": "hello", "stream": true}',
    b'{"text": ["a", "b"], "prompt": ["a", "b"], "bootstrap_room": 1}',
    b'{"input_ids": [1, 2, 3], "prompt": [1, 2, 3]}',
    b'{"text": "%s"}' % (b"x" * 200),
    b"nonsense",
    b"",
)
STATUSES = (200, 500, 503, 502, 400, 404, 429, 504, 204, 0)
ANSWERS = (
    {},
    {"content-length": "40", "content-type": "application/json"},
    {"content-type": "text/event-stream"},
    {"x-pd-retry": "1"},
)
COUNTS = (b'{"meta_info": {"prompt_tokens": 7}}', b'[{"meta_info": {"prompt_tokens": 7}}]', b"no", b"")
BREAKS = (Broken(True, "DC"), Broken(False, "UC"))
PAUSES_S = (0.01, 0.3, 2.0, 1000.0)


class World:
    """A service with its table, and some requests."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.chaos = choices.number(4) == 0
        """Events out of turn, too."""
        self._now_s = 0.0
        config = choices.one(CONFIGS)
        self.table = LoadTable(WORKERS, self.clock, config.circuit_limits())
        for worker in WORKERS:
            self.table.worker_changed(worker, True)
        self.gateway = Gateway(config, self.table, Scheduler(config, self.table, random.Random(1)), self.clock)
        self.requests: list[Request] = []

    def clock(self) -> float:
        """Time passes with each look, so that none is 0."""
        self._now_s += 0.001
        return self._now_s

    def step(self) -> None:
        """One thing happens."""
        choices = self.choices
        if not self.requests or (len(self.requests) < MOST_REQUESTS and choices.number(8) == 0):
            self.requests.append(Request(self.gateway))
            return
        request = choices.one(self.requests)
        match choices.number(16):
            case 0:
                self._now_s += choices.one(PAUSES_S)
            case 1:
                self.table.worker_changed(choices.one(WORKERS), choices.number(3) > 0)
            case 2:
                self._wake(request)
            case 3:
                if not request.broken and request.room is not None:
                    request.tell_broken(choices.one(BREAKS))
            case 4 | 5:
                if request.room is not None:
                    request.open_prefill()
            case 6:
                leg = choices.one(tuple(Leg))
                if request.streams[leg].open:
                    request.feed(leg, Ended())
            case 7 if self.chaos:
                leg = choices.one(tuple(Leg))
                if request.streams[leg].open and not request.streams[leg].immediate:
                    request.feed(leg, self._message(leg, choices.one(tuple(Phase)), request), legal=False)
            case _:
                legs = [leg for leg in Leg if request.streams[leg].next_messages()]
                if legs:
                    leg = choices.one(legs)
                    phase = choices.one(request.streams[leg].next_messages())
                    request.feed(leg, self._message(leg, phase, request))
        self._check_table()

    def _wake(self, request: Request) -> None:
        """One timer of the request fires."""
        for leg, stream in request.streams.items():
            if stream.wakes:
                stream.wakes -= 1
                request.feed(leg, Woken())
                return
        if request.lingers:
            request.lingers -= 1
            if not request.finished:
                request.feed(Leg.ROUTE, Woken())

    def _message(self, leg: Leg, phase: Phase, request: Request) -> Event:
        choices = self.choices
        match phase:
            case Phase.REQUEST_HEADERS:
                stream = request.streams[leg]
                stream.has_body = choices.number(8) > 0
                headers = {
                    ":method": "POST" if choices.number(8) else "GET",
                    ":path": choices.one(PATHS),
                    "x-request-id": choices.one(("r1", "r2", "")),
                    "x-envoy-attempt-count": choices.one(("1", "2", "")),
                }
                return RequestHeaders(headers, not stream.has_body)
            case Phase.REQUEST_BODY:
                return RequestBody(choices.one(BODIES))
            case Phase.RESPONSE_HEADERS:
                return ResponseHeaders({":status": str(choices.one(STATUSES)), **choices.one(ANSWERS)})
            case Phase.RESPONSE_BODY:
                return ResponseBody(choices.one(COUNTS))
            case _:
                return Trailers(phase)

    def _check_table(self) -> None:
        placed = sum(request.room is not None and not request.finished for request in self.requests)
        assert self.gateway.open_rooms == placed
        for state in self.table.states:
            assert state.in_flight >= 0
            for rank in state.ranks:
                assert rank.outstanding_requests >= 0
                assert rank.outstanding_tokens >= 0

    def end(self) -> None:
        """Timers fire, streams end, and then nothing is left."""
        while waiting := [r for r in self.requests if any(stream.wakes for stream in r.streams.values())]:
            self._wake(waiting[0])
        for request in self.requests:
            for leg, stream in request.streams.items():
                assert not stream.open or not stream.unanswered, f"{leg} waits for ever: {stream.unanswered}"
        while running := [r for r in self.requests if not r.over]:
            request = self.choices.one(running)
            legs = [leg for leg, stream in request.streams.items() if stream.open]
            if legs:
                request.feed(self.choices.one(legs), Ended())
            elif not request.broken and self.choices.number(3) == 0:
                request.tell_broken(self.choices.one(BREAKS))
            else:
                self._wake(request)
        for request in self.requests:
            assert len(request.finished) == 1, "not finished"
            if request.room is not None:
                assert not request.open_prefill(), "let in when all was over"
                request.tell_broken(BREAKS[0])
        assert self.gateway.open_rooms == 0
        for state in self.table.states:
            assert state.in_flight == 0, "a leg is in flight for ever"
            for rank in state.ranks:
                assert rank.outstanding_tokens == rank.outstanding_requests == 0, "charged for ever"
                assert not rank.leases


def check_exchange(data: bytes) -> Hashable:
    """Plays the script; returns the pairs of steps that were taken."""
    world = World(Choices(data))
    while world.choices:
        world.step()
    world.end()
    return frozenset().union(*(request.steps for request in world.requests))


NORMAL = bytes([1, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 4, 0, 0])
"""A request, and the beginning of its ordinary course."""

TARGETS = (
    Target(
        "exchange",
        check_exchange,
        (NORMAL, NORMAL * 4, bytes(range(256)), b"\x01" + bytes(200)),
        tuple(bytes([choice, argument]) for choice in range(16) for argument in range(4)),
        share=0.15,
    ),
)
