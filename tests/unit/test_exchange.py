"""Scripts: events in, effects out, read from top to bottom. What stays charged is checked at the end of each."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config import Config, WorkerConfig
from extproc.errors import ConfigError
from extproc.estimate import ASK_EVERY, ASK_FIRST
from extproc.events import (
    Answer,
    Broken,
    Effect,
    Ended,
    Extend,
    Finished,
    Immediate,
    Leg,
    LegEnd,
    Linger,
    Outcome,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Send,
    Trailers,
    Wake,
    Woken,
)
from extproc.exchange import EXTENSION_S, HOLD_S, REASON_S, VERDICT_S, Exchange, ProtocolViolation
from extproc.gateway import Gateway
from extproc.load import LoadTable
from extproc.model import Role, Worker
from extproc.request import MOST_PROMPTS
from extproc.schedule import Scheduler

BODY = b'{"text": "hello", "stream": true}'
PREFILLS = [Worker(f"p{i}:1", Role.PREFILL, f"http://p{i}:1", f"10.0.1.{i}:1", f"p{i}", 8998, 2) for i in range(2)]
DECODES = [Worker(f"d{i}:1", Role.DECODE, f"http://d{i}:1", f"10.0.2.{i}:1", dp_size=2) for i in range(2)]


def gateway(*, workers=(*PREFILLS, *DECODES), **settings) -> Gateway:
    ticks = itertools.count()

    def clock() -> float:
        return next(ticks) / 1000

    config = Config(**{"policy": "round_robin"} | settings)
    table = LoadTable(workers, clock, config.circuit_limits())
    for worker in workers:
        table.worker_changed(worker, True)
    return Gateway(config, table, Scheduler(config, table, random.Random(1)), clock)


def post(path="/generate", *, end_of_stream=False, **headers) -> RequestHeaders:
    base = {":method": "POST", ":path": path, "x-request-id": "r1"}
    return RequestHeaders(base | {name.replace("_", "-"): value for name, value in headers.items()}, end_of_stream)


def respond(status=200, **headers) -> ResponseHeaders:
    return ResponseHeaders({":status": str(status)} | headers)


def nothing_charged(gateway: Gateway) -> bool:
    ranks = [rank for state in gateway.table.states for rank in state.ranks]
    return (
        gateway.open_rooms == 0
        and all(state.in_flight == 0 for state in gateway.table.states)
        and all(rank.outstanding_tokens == rank.outstanding_requests == 0 for rank in ranks)
    )


def dispatch(gateway: Gateway, body=BODY, path="/generate", **headers) -> tuple[Exchange, Answer]:
    """A placed exchange, and the answer to its body."""
    exchange = Exchange(gateway)
    assert exchange.route(post(path, **headers)) == [Send(Leg.ROUTE, Answer(Phase.REQUEST_HEADERS))]
    send, *_ = exchange.route(RequestBody(body))
    assert send.leg is Leg.ROUTE
    assert isinstance(send.reply, Answer)
    return exchange, send.reply


CHAT = b'{"messages": [{"role": "user", "content": "hello"}]}'


def dispatch_chat(gateway: Gateway) -> tuple[Exchange, Answer]:
    """The same on an endpoint whose decode worker sends headers with the first token."""
    return dispatch(gateway, body=CHAT, path="/v1/chat/completions")


def start_prefill(gateway: Gateway, exchange: Exchange, answer: Answer) -> Answer:
    """The prefill stream arrives, carrying what was set on the route leg."""
    headers = RequestHeaders(dict(answer.set_headers), False)
    assert gateway.find(headers.headers["x-pd-room"]) is exchange
    [send] = exchange.prefill(headers)
    assert send.leg is Leg.PREFILL
    return send.reply


def settle(exchange: Exchange, *, well: bool = True) -> list[Effect]:
    """The route stream ends after a response; effects of the time that the verdict takes."""
    effects = exchange.route(Ended())
    assert effects[-1] == Linger(VERDICT_S)
    assert not (well and effects[1:])
    return exchange.route(Woken())


def test_the_normal_course():
    shared = gateway()
    exchange, answer = dispatch(shared)
    set_headers = dict(answer.set_headers)
    assert set_headers["x-pd-mode"] == "pd"
    assert answer.pick_route_again
    decode = json.loads(answer.body)
    assert int(set_headers["x-pd-room"]) == decode["bootstrap_room"]
    assert decode["bootstrap_room"] % 2 == decode["disagg_prefill_dp_rank"] == int(set_headers["x-pd-prefill-rank"])

    reply = start_prefill(shared, exchange, answer)
    assert reply.phase is Phase.REQUEST_HEADERS
    prefill = json.loads(reply.body)
    assert prefill["bootstrap_room"] == decode["bootstrap_room"]
    assert prefill["bootstrap_host"] == decode["bootstrap_host"] == "p0"
    assert dict(reply.set_headers) == {"x-pd-mode": "prefill"}

    assert exchange.prefill(respond()) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))]
    by_role = {state.worker.name: state.in_flight for state in shared.table.states}
    assert by_role == {"p0:1": 1, "p1:1": 0, "d0:1": 1, "d1:1": 0}
    assert exchange.prefill(Ended()) == []
    assert shared.table.states[0].in_flight == 0  # prefill is over, decode goes on

    assert exchange.route(respond()) == [Send(Leg.ROUTE, Answer(Phase.RESPONSE_HEADERS))]
    assert exchange.route(Ended()) == [Linger(VERDICT_S)]
    assert all(state.in_flight == 0 for state in shared.table.states)  # what is to come is a verdict, not work
    [finished] = exchange.route(Woken())
    assert finished.outcome is Outcome.OK
    assert (finished.prefill_end, finished.decode_end) == (LegEnd.OK, LegEnd.OK)
    assert finished.status == 200
    assert finished.prefill_s > 0
    assert nothing_charged(shared)


def test_response_headers_name_the_workers_where_switched_on():
    shared = gateway(response_headers=True)
    exchange, _ = dispatch_chat(shared)
    [send] = exchange.route(respond())
    assert dict(send.reply.set_headers)["x-pd-prefill"].startswith("p0:1;dp_rank=")


COUNTED = {"content-length": "40", "content-type": "application/json"}
ASK_FOR_BODY = Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS, want_response_body=True))


def test_prefills_answer_tells_how_long_the_prompt_was():
    shared = gateway()
    exchange, answer = dispatch(shared, body=b'{"text": "%s"}' % (b"x" * 400))
    start_prefill(shared, exchange, answer)
    assert exchange.prefill(respond(**COUNTED)) == [ASK_FOR_BODY]
    assert shared.table.states[0].in_flight == 1  # a stream's answer may still be under way
    assert exchange.prefill(ResponseBody(b'{"meta_info": {"prompt_tokens": 200}}')) == [
        Send(Leg.PREFILL, Answer(Phase.RESPONSE_BODY))
    ]
    assert shared.table.states[0].in_flight == 0  # with the whole answer here, prefill is done
    assert exchange.prefill(Ended()) == []
    exchange.route(respond())
    [finished] = settle(exchange)
    assert (finished.prompt_tokens, finished.counted_tokens) == (100, 200)
    assert nothing_charged(shared)
    # The next prompt is estimated better.
    another, _ = dispatch(shared, body=b'{"text": "%s"}' % (b"x" * 400))
    [finished] = another.route(Ended())
    assert 100 < finished.prompt_tokens < 200


@pytest.mark.parametrize("body", [b"", b"nonsense", b'{"meta_info": {}}', b'data: {"usage": null}', b"x" * 1_000_000])
def test_an_answer_without_a_count_changes_nothing(body):
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(**COUNTED))
    assert exchange.prefill(ResponseBody(body)) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_BODY))]
    exchange.prefill(Ended())
    exchange.route(respond())
    [finished] = settle(exchange)
    assert (finished.outcome, finished.counted_tokens) == (Outcome.OK, None)
    assert shared.estimator.known() == {}


def test_prefill_may_end_before_the_answer_that_was_asked_for():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(**COUNTED))
    assert exchange.prefill(Ended()) == []
    exchange.route(respond())
    [finished] = settle(exchange)
    assert finished.outcome is Outcome.OK
    assert nothing_charged(shared)


def test_a_client_that_leaves_ends_a_prefill_that_is_being_counted():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(**COUNTED))
    [abort] = exchange.route(Ended())
    assert (abort.leg, abort.reply.status) == (Leg.PREFILL, 499)
    assert exchange.prefill(ResponseBody(b"{}")) == []  # crossed
    exchange.prefill(Ended())
    assert nothing_charged(shared)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (BODY, {"content-type": "application/json"}),  # of unknown length
        (BODY, COUNTED | {"content-length": "1000000"}),
        (BODY, COUNTED | {"content-encoding": "gzip"}),
        (b'{"input_ids": [1, 2, 3]}', COUNTED),  # known
    ],
)
def test_what_cannot_be_read_cheaply_or_teaches_nothing_is_not_asked_for(body, headers):
    shared = gateway()
    exchange, answer = dispatch(shared, body=body)
    start_prefill(shared, exchange, answer)
    assert exchange.prefill(respond(**headers)) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))]
    exchange.prefill(Ended())
    exchange.route(Ended())
    assert nothing_charged(shared)


def test_after_the_first_ones_only_some_are_asked():
    shared = gateway()
    asked = 0
    for _ in range(ASK_FIRST + 10 * ASK_EVERY):
        exchange, answer = dispatch(shared)
        start_prefill(shared, exchange, answer)
        [send] = exchange.prefill(respond(**COUNTED))
        asked += send.reply.want_response_body
        exchange.prefill(Ended())
        exchange.route(Ended())
    assert asked == ASK_FIRST + 10
    assert nothing_charged(shared)


def test_the_loads_are_explained_where_switched_on():
    shared = gateway(explain=True)
    shared.table.charge(shared.table.states[0], 0, 500)
    exchange, _ = dispatch_chat(shared)
    [send] = exchange.route(respond())
    headers = dict(send.reply.set_headers)
    assert headers == {
        "x-pd-prefill-loads": "p0:1/0=500@-, p0:1/1*=0@-",
        "x-pd-decode-loads": headers["x-pd-decode-loads"],
    }
    [finished] = settle(exchange)
    assert finished.explanation.prefill == headers["x-pd-prefill-loads"]


def test_and_not_where_it_is_not():
    shared = gateway()
    exchange, _ = dispatch_chat(shared)
    [send] = exchange.route(respond())
    assert send.reply.set_headers == ()
    [finished] = settle(exchange)
    assert finished.explanation is None


@pytest.mark.parametrize(
    ("events", "status", "message"),
    [
        ([post(end_of_stream=True)], 400, "empty"),
        ([post(content_length="101")], 413, "limit of 100"),
        ([post(content_encoding="gzip")], 400, "uncompressed"),
        ([post(), RequestBody(b"")], 400, "empty"),
        ([post(), RequestBody(b"[]")], 400, "object"),
        ([post(), RequestBody(b'{"text": "x", "sampling_params": {"n": 2}}')], 400, "n separate requests"),
        ([post(), RequestBody(b'"' + b"x" * 100 + b'"')], 413, "limit of 100"),
    ],
)
def test_bad_input_is_answered_and_charges_nothing(events, status, message):
    shared = gateway(max_payload_size=100)
    exchange = Exchange(shared)
    for event in events:
        effects = exchange.route(event)
    [send] = effects
    assert isinstance(send.reply, Immediate)
    assert send.reply.status == status
    error = json.loads(send.reply.body)["error"]
    assert message in error["message"]
    assert error["code"] == status
    assert all(rank.charged_tokens == 0 for state in shared.table.states for rank in state.ranks)
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.REFUSED
    assert nothing_charged(shared)


@pytest.mark.parametrize(("model", "status"), [(None, 400), ("other", 404), ("served", None)])
def test_only_the_configured_model_is_served(model, status):
    shared = gateway(decode=(WorkerConfig(url="http://d", model="served"),))
    exchange = Exchange(shared)
    exchange.route(post("/v1/completions"))
    send, *_ = exchange.route(RequestBody(json.dumps({"prompt": "x"} | ({"model": model} if model else {})).encode()))
    assert getattr(send.reply, "status", None) == status


@pytest.mark.parametrize("missing", Role)
def test_without_a_healthy_pair_it_is_503_before_the_upload(missing):
    shared = gateway(workers=[worker for worker in (*PREFILLS, *DECODES) if worker.role is not missing])
    exchange = Exchange(shared)
    [send] = exchange.route(post())
    assert send.reply.status == 503
    assert dict(send.reply.headers)["retry-after"] == "1"
    assert f"no healthy {missing} worker" in json.loads(send.reply.body)["error"]["message"]
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.NO_WORKER


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("HEAD", "/v1/models?x=1"),
        ("GET", "/v1/models/some/adapter"),
        ("POST", "/tokenize"),
        ("OPTIONS", "/v1/chat/completions"),
    ],
)
def test_other_requests_go_to_one_decode_worker_untouched(method, path):
    shared = gateway()
    exchange = Exchange(shared)
    headers = {":method": method, ":path": path, "x-pd-room": "1", "x-override-rid": "2"}
    [send] = exchange.route(RequestHeaders(headers, method != "POST"))
    answer = send.reply
    assert dict(answer.set_headers) == {"x-pd-mode": "direct", "x-pd-decode-endpoint": "10.0.2.0:1"}
    assert answer.body is None
    assert answer.skip_request_body == (method == "POST")
    assert answer.remove_headers == ("x-pd-room", "x-override-rid")
    exchange.route(respond(404))
    [finished] = exchange.route(Ended())
    assert finished.endpoint == "other"
    assert finished.direct_worker == "d0:1"
    assert nothing_charged(shared)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/generate"),
        ("POST", "/generate/"),
        ("POST", "/v1/responses"),
        ("POST", "/flush_cache"),
        ("POST", "/abort_request"),
        ("POST", "/v1/models"),
        ("GET", "/v1/modelsx"),
        ("GET", "/server_info"),
        ("DELETE", "/"),
    ],
)
def test_what_is_not_listed_reaches_no_engine(method, path):
    shared = gateway()
    exchange = Exchange(shared)
    [send] = exchange.route(RequestHeaders({":method": method, ":path": path}, method == "GET"))
    assert send.reply.status == 404
    assert "POST" in json.loads(send.reply.body)["error"]["message"]
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.REFUSED


@pytest.mark.parametrize("entry", ["/v1/models", "get /x", "GET x", ""])
def test_a_path_that_is_no_path_is_a_configuration_error(entry):
    with pytest.raises(ConfigError, match="GET /v1/models"):
        gateway(direct_paths=(entry,))


def test_clients_cannot_steer():
    shared = gateway()
    _, answer = dispatch(shared, x_pd_room="5", x_data_parallel_rank="1", accept="*/*")
    assert answer.remove_headers == ("x-data-parallel-rank",)
    assert dict(answer.set_headers)["x-pd-room"] != "5"


def test_headers_alone_carry_the_placement_where_the_body_is_not_read():
    shared = gateway(injection="headers")
    exchange = Exchange(shared)
    client = {"content_length": "4000", "x_override_bootstrap_host": "evil", "x_override_rid": "1"}
    send, wake = exchange.route(post(**client))
    assert wake.leg is Leg.ROUTE
    answer = send.reply
    assert (answer.phase, answer.body, answer.skip_request_body) == (Phase.REQUEST_HEADERS, None, True)
    assert answer.remove_headers == ("x-override-rid",)
    headers = dict(answer.set_headers)
    room = int(headers["x-override-bootstrap-room"])
    assert headers | {"x-override-bootstrap-room": ""} == {
        "x-pd-mode": "pd",
        "x-pd-room": str(room),
        "x-pd-prefill-endpoint": "10.0.1.0:1",
        "x-pd-decode-endpoint": "10.0.2.0:1",
        "x-pd-prefill-rank": headers["x-pd-prefill-rank"],
        "x-pd-decode-rank": headers["x-pd-decode-rank"],
        "x-override-bootstrap-host": "p0",
        "x-override-bootstrap-port": "8998",
        "x-override-bootstrap-room": "",
        "x-override-disagg-prefill-dp-rank": headers["x-pd-prefill-rank"],
        "x-override-routed-dp-rank": headers["x-pd-decode-rank"],
    }
    reply = start_prefill(shared, exchange, answer)
    assert reply.body is None
    assert dict(reply.set_headers)["x-override-routed-dp-rank"] == headers["x-pd-prefill-rank"]
    assert ASK_FOR_BODY in exchange.prefill(respond(**COUNTED))
    exchange.prefill(ResponseBody(b'{"meta_info": {"prompt_tokens": 500}}'))
    exchange.prefill(Ended())
    exchange.route(respond())
    [finished] = settle(exchange)
    assert (finished.outcome, finished.prompt_tokens, finished.counted_tokens) == (Outcome.OK, 1000, 500)
    assert nothing_charged(shared)


@pytest.mark.parametrize(
    ("settings", "headers", "opaque"),
    [
        ({"injection": "headers"}, {"content_length": "9"}, True),
        ({"injection": "headers"}, {}, False),  # sent in chunks: how long the prompt is shows in the body only
        ({"injection": "headers"}, {"path": "/v1/completions", "content_length": "9"}, False),
        ({"injection": "auto"}, {"content_length": "9"}, True),
        ({"injection": "auto", "policy": "cache_aware"}, {"content_length": "9"}, False),
        ({"injection": "auto", "decode": (WorkerConfig(url="http://d"),)}, {"content_length": "9"}, False),
        (
            {"injection": "auto", "decode": (WorkerConfig(url="http://d", header_overrides=True),)},
            {"content_length": "9"},
            True,
        ),
        ({}, {"content_length": "9"}, False),
    ],
)
def test_where_bodies_are_not_read(settings, headers, opaque):
    exchange = Exchange(gateway(**settings))
    send, *_ = exchange.route(post(**headers))
    assert send.reply.skip_request_body is opaque
    exchange.route(Ended())


def test_a_policy_that_reads_prompts_and_bodies_that_are_not_read_contradict():
    with pytest.raises(ConfigError, match="auto or body"):
        gateway(injection="headers", policy="prefix_hash")


def test_unread_requests_keep_rooms_for_as_many_prompts_as_they_may_have():
    shared = gateway(injection="headers")
    rooms = []
    for _ in range(2):
        send, *_ = Exchange(shared).route(post(content_length="9"))
        rooms.append(int(dict(send.reply.set_headers)["x-pd-room"]))
    assert rooms[1] - rooms[0] >= MOST_PROMPTS


def test_prefill_fails_before_the_response_so_the_client_gets_an_error_to_retry_on():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    [go_on, abort] = exchange.prefill(respond(503))
    assert go_on == Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))
    assert abort.leg is Leg.ROUTE
    assert abort.reply.status == 502
    assert ("x-pd-retry", "prefill") in abort.reply.headers
    assert exchange.prefill(Ended()) == []
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.PREFILL_FAILED
    assert nothing_charged(shared)
    # The next attempt avoids the worker that failed, though it is its turn.
    _, again = dispatch(shared, x_envoy_attempt_count="2")
    assert dict(again.set_headers)["x-pd-prefill-endpoint"] == "10.0.1.1:1"
    _, again = dispatch(shared, x_envoy_attempt_count="2")
    assert dict(again.set_headers)["x-pd-prefill-endpoint"] == "10.0.1.1:1"


def test_prefill_that_breaks_off_without_an_answer():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    [abort] = exchange.prefill(Ended())
    assert abort.reply.status == 502
    exchange.route(Ended())
    assert nothing_charged(shared)


def test_prefills_4xx_reaches_the_client_word_for_word_and_is_not_retried():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    [wait] = exchange.prefill(respond(400))
    assert wait == Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS, want_response_body=True))
    [go_on, abort] = exchange.prefill(ResponseBody(b'{"error": "too long"}'))
    assert go_on.leg is Leg.PREFILL
    assert (abort.reply.status, abort.reply.body) == (400, b'{"error": "too long"}')
    assert "x-pd-retry" not in dict(abort.reply.headers)
    exchange.prefill(Ended())
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.ENGINE_REJECTED
    assert nothing_charged(shared)


def test_prefill_may_answer_a_moment_after_the_response_has_ended():
    shared = gateway()
    exchange, answer = dispatch_chat(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    assert exchange.route(Ended()) == [Linger(VERDICT_S)]
    assert exchange.prefill(respond()) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))]
    assert exchange.prefill(Ended()) == []
    [finished] = exchange.route(Woken())
    assert finished.outcome is Outcome.OK
    assert nothing_charged(shared)


def test_but_not_longer():
    shared = gateway()
    exchange, answer = dispatch_chat(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    [abort] = settle(exchange)
    assert (abort.leg, abort.reply.status) == (Leg.PREFILL, 499)
    [finished] = exchange.prefill(Ended())
    assert (finished.outcome, finished.prefill_end, finished.decode_end) == (Outcome.OK, "cancelled", "ok")
    assert nothing_charged(shared)


@pytest.mark.parametrize(
    ("by_client", "outcome", "ends", "circuit"),
    [
        (True, Outcome.ABORTED, ("cancelled", "cancelled"), "closed"),
        (False, Outcome.DECODE_FAILED, ("cancelled", "failed"), "open"),
    ],
)
@pytest.mark.parametrize("first", ["the log", "the end"])
def test_the_access_log_tells_who_broke_off_the_response(by_client, outcome, ends, circuit, first):
    shared = gateway(cb_failure_threshold=1)
    exchange, answer = dispatch_chat(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    broken = Broken(by_client, "XX")
    room = int(dict(answer.set_headers)["x-pd-room"])
    assert shared.broken(room) is exchange
    if first == "the log":
        assert exchange.route(broken) == []
        [abort] = exchange.route(Ended())
    else:
        assert exchange.route(Ended()) == [Linger(VERDICT_S)]
        [abort] = exchange.route(broken)
    assert (abort.leg, abort.reply.status) == (Leg.PREFILL, 499)  # at once
    [finished] = exchange.prefill(Ended())
    assert (finished.outcome, finished.status) == (outcome, 200)
    assert "(XX)" in finished.reason
    assert (finished.prefill_end, finished.decode_end) == ends
    assert circuits(shared)["d0:1"] == circuit
    assert shared.broken(room) is None
    assert nothing_charged(shared)


def wait_for_prefill(shared: Gateway) -> tuple[Exchange, Answer]:
    """Decode has sent the headers of a `/generate` stream while prefill was at work."""
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    limit_s = shared.config.prefill_timeout_secs + EXTENSION_S
    assert exchange.route(respond()) == [Send(Leg.ROUTE, Extend(limit_s))]
    return exchange, answer


def test_early_headers_wait_for_prefill():
    shared = gateway()
    exchange, _ = wait_for_prefill(shared)
    go_on, release = exchange.prefill(respond())
    assert go_on.leg is Leg.PREFILL
    assert release == Send(Leg.ROUTE, Answer(Phase.RESPONSE_HEADERS))
    assert exchange.prefill(Ended()) == []
    [finished] = settle(exchange)
    assert finished.outcome is Outcome.OK
    assert nothing_charged(shared)


@pytest.mark.parametrize("status", [500, 503, None])
def test_so_that_a_retry_is_possible_when_prefill_fails(status):
    shared = gateway()
    exchange, _ = wait_for_prefill(shared)
    abort = exchange.prefill(respond(status) if status else Ended())[-1]
    assert (abort.leg, abort.reply.status) == (Leg.ROUTE, 502)
    assert ("x-pd-retry", "prefill") in abort.reply.headers
    if status:
        exchange.prefill(Ended())
    effects = exchange.route(Ended())
    [finished] = effects if status != 500 else exchange.route(Woken())
    assert (finished.outcome, finished.prefill_end, finished.decode_end) == ("prefill_failed", "failed", "cancelled")
    assert nothing_charged(shared)


def test_and_prefills_4xx_reaches_the_client():
    shared = gateway()
    exchange, _ = wait_for_prefill(shared)
    assert len(exchange.prefill(respond(422))) == 1
    [_, abort] = exchange.prefill(ResponseBody(b"too odd"))
    assert (abort.leg, abort.reply.status, abort.reply.body) == (Leg.ROUTE, 422, b"too odd")
    exchange.prefill(Ended())
    [finished] = exchange.route(Ended())
    assert (finished.outcome, finished.prefill_end) == (Outcome.ENGINE_REJECTED, "rejected")
    assert nothing_charged(shared)


@pytest.mark.parametrize(
    ("word", "outcome"),
    [
        (Broken(True, "DC"), Outcome.ABORTED),
        (Broken(False, "UC"), Outcome.DECODE_FAILED),
        (Woken(), Outcome.ABORTED),
    ],
)
@pytest.mark.parametrize("first", ["the log", "the end"])
def test_a_stream_that_ends_while_it_waits_ends_prefill_at_once(word, outcome, first):
    shared = gateway()
    exchange, answer = wait_for_prefill(shared)
    told_before = first == "the log" and isinstance(word, Broken)
    if told_before:
        assert exchange.route(word) == []
    abort, *linger = exchange.route(Ended())
    assert (abort.leg, abort.reply.status) == (Leg.PREFILL, 499)
    if not told_before:
        assert linger == [Linger(VERDICT_S)]
        assert exchange.route(word) == []
    [finished] = exchange.prefill(Ended())
    assert finished.outcome is outcome
    # Had decode broken off, Envoy would try again, at another.
    _, again = dispatch(shared, x_envoy_attempt_count="2")
    decode = "x-pd-decode-endpoint"
    assert dict(again.set_headers)[decode] != dict(answer.set_headers)[decode]


@pytest.mark.parametrize("status", [200, 503])
def test_what_the_access_log_says_of_a_settled_attempt_changes_nothing(status):
    shared = gateway()
    exchange, _ = dispatch_chat(shared)
    assert exchange.route(Broken(False, "UC")) == []
    exchange.route(respond(status))
    effects = exchange.route(Ended())
    [finished] = effects if status == 503 else exchange.route(Woken())
    assert exchange.route(Broken(False, "UC")) == []
    assert finished.status == status
    assert nothing_charged(shared)


def test_the_prefill_leg_does_not_stream():
    """Once its stream had begun, a prefill engine could not say with a status that it failed."""
    shared = gateway()
    exchange, answer = dispatch(
        shared, body=b'{"text": "x", "stream": true, "stream_options": {"include_usage": true}}'
    )
    prefill = json.loads(start_prefill(shared, exchange, answer).body)
    assert (prefill["stream"], prefill["stream_options"]) == (False, None)
    assert json.loads(answer.body)["stream"] is True


@pytest.mark.parametrize("arrived", [True, False], ids=["running", "never arrived"])
@pytest.mark.parametrize("responding", [True, False])
def test_prefill_that_takes_too_long_is_a_504_for_the_client(arrived, responding):
    shared = gateway(prefill_timeout_secs=7)
    exchange = Exchange(shared)
    exchange.route(post())
    send, wake = exchange.route(RequestBody(BODY))
    assert wake == Wake(Leg.ROUTE, 7)
    if arrived:
        start_prefill(shared, exchange, send.reply)
    if responding:
        exchange.route(respond())  # a stream's early headers
    abort, *ended = exchange.route(Woken())
    assert (abort.leg, abort.reply.status) == (Leg.ROUTE, 504)
    assert "7 s" in json.loads(abort.reply.body)["error"]["message"]
    assert [send.leg for send in ended] == [Leg.PREFILL] * arrived
    exchange.route(Ended())
    if arrived:
        exchange.prefill(Ended())
    assert nothing_charged(shared)


def test_prefill_that_has_ended_is_never_overdue():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond())
    exchange.prefill(Ended())
    assert exchange.route(Woken()) == []


def circuits(shared: Gateway) -> dict[str, str]:
    return {state.worker.name: state.circuit.state for state in shared.table.states}


def test_only_the_worker_whose_leg_failed_is_blamed():
    """Ten failed prefills on p0 open its circuit; the decode workers that waited for it are as good as before."""
    shared = gateway(workers=(PREFILLS[0], *DECODES), cb_failure_threshold=10)
    for _ in range(10):
        exchange, answer = dispatch(shared)
        start_prefill(shared, exchange, answer)
        exchange.prefill(respond(503))
        exchange.prefill(Ended())
        exchange.route(Ended())
    assert circuits(shared) == {"p0:1": "open", "d0:1": "closed", "d1:1": "closed"}
    [send] = Exchange(shared).route(post())
    assert send.reply.status == 503
    assert nothing_charged(shared)


def test_rejected_requests_and_leaving_clients_blame_nobody():
    shared = gateway(cb_failure_threshold=1)
    for status in (400, None):
        exchange, answer = dispatch(shared)
        start_prefill(shared, exchange, answer)
        if status:
            exchange.prefill(respond(status))
            exchange.prefill(ResponseBody(b"{}"))
        exchange.route(Ended())
        exchange.prefill(Ended())
    assert set(circuits(shared).values()) == {"closed"}
    assert nothing_charged(shared)


def test_an_open_circuit_is_tried_again_with_one_request():
    shared = gateway(
        workers=(PREFILLS[0], DECODES[0]),
        cb_failure_threshold=1,
        cb_success_threshold=1,
        cb_timeout_duration_secs=0.001,
    )
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(503))
    exchange.prefill(Ended())
    exchange.route(Ended())
    trial, answer = dispatch(shared)  # the clock ticks with every look
    [refused] = Exchange(shared).route(post())
    assert refused.reply.status == 503
    start_prefill(shared, trial, answer)
    trial.prefill(respond())
    trial.prefill(Ended())
    assert circuits(shared)["p0:1"] == "closed"


@pytest.mark.parametrize(
    "limit", [{"max_worker_requests": 1}, {"max_rank_tokens": 5}], ids=lambda limit: next(iter(limit))
)
def test_overload_is_429_and_charges_nothing(limit):
    shared = gateway(workers=(PREFILLS[0], DECODES[0]), dp_minimum_tokens_scheduler=True, **limit)
    running = [dispatch(shared)[0] for _ in range(1 if "max_worker_requests" in limit else 2)]
    before = repr(shared.table)
    exchange = Exchange(shared)
    effects = exchange.route(post())
    if isinstance(effects[0].reply, Answer):
        effects = exchange.route(RequestBody(b'{"text": "%s"}' % (b"x" * 400)))
    [send] = effects
    assert send.reply.status == 429
    assert dict(send.reply.headers)["retry-after"] == "1"
    assert repr(shared.table) == before
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.OVERLOADED
    for exchange in running:
        exchange.route(Ended())
    assert nothing_charged(shared)


def test_a_client_that_leaves_ends_prefill():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    [abort] = exchange.route(Ended())
    assert abort.leg is Leg.PREFILL
    assert abort.reply.status == 499
    assert shared.table.states[0].in_flight == 1  # the prefill worker is busy until its leg has ended
    [finished] = exchange.prefill(Ended())
    assert finished.outcome is Outcome.ABORTED
    assert nothing_charged(shared)


def test_a_prefill_stream_that_comes_too_late_finds_the_room_closed():
    shared = gateway()
    exchange, answer = dispatch(shared)
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.ABORTED
    assert shared.find(dict(answer.set_headers)["x-pd-room"]) is None
    assert nothing_charged(shared)


def test_a_room_is_good_for_one_prefill_stream():
    shared = gateway()
    assert not shared.expecting
    exchange, answer = dispatch(shared)
    assert shared.expecting
    start_prefill(shared, exchange, answer)
    assert not shared.expecting
    assert shared.find(dict(answer.set_headers)["x-pd-room"]) is None


@pytest.mark.parametrize("room", ["", "-1", "x", "9" * 30, "7", "٣"])
def test_unknown_rooms(room):
    assert gateway().find(room) is None


@pytest.mark.parametrize(("status", "retried"), [(503, True), (502, True), (400, False)])
def test_decode_fails_before_the_response(status, retried):
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    [send, abort] = exchange.route(respond(status))
    assert ("x-pd-retry" in dict(send.reply.set_headers)) is retried
    assert abort.leg is Leg.PREFILL
    [] = exchange.route(Ended())
    [finished] = exchange.prefill(Ended())
    assert finished.outcome is (Outcome.DECODE_FAILED if status >= 500 else Outcome.ENGINE_REJECTED)
    assert nothing_charged(shared)


def hold(shared: Gateway) -> Exchange:
    """Decode has answered 500 while prefill was at work."""
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    assert exchange.route(respond(500)) == [Wake(Leg.ROUTE, HOLD_S)]
    return exchange


def test_decodes_500_waits_a_moment_for_prefills_word_and_then_goes_on_as_it_is():
    shared = gateway(cb_failure_threshold=1)
    exchange = hold(shared)
    [send, abort] = exchange.route(Woken())
    assert ("x-pd-retry", "decode") in send.reply.set_headers
    assert abort.leg is Leg.PREFILL
    assert exchange.route(Ended()) == [Linger(VERDICT_S)]
    exchange.prefill(Ended())
    assert set(circuits(shared).values()) == {"closed"}  # it may yet turn out to be an echo
    [finished] = exchange.route(Woken())
    assert finished.outcome is Outcome.DECODE_FAILED
    assert circuits(shared) == {"p0:1": "closed", "p1:1": "closed", "d0:1": "open", "d1:1": "closed"}
    assert nothing_charged(shared)


@pytest.mark.parametrize("guilty", [Role.PREFILL, Role.DECODE])
def test_a_500_is_not_blamed_on_the_partner_of_a_worker_that_fails_at_the_same_time(guilty):
    """16 requests in flight when an engine dies: some of its partners' 500s arrive before its own connections break."""
    shared = gateway(workers=(PREFILLS[0], DECODES[0]), cb_failure_threshold=8)
    running = []
    for _ in range(16):
        exchange, answer = dispatch(shared)
        start_prefill(shared, exchange, answer)
        running.append(exchange)
    for number, exchange in enumerate(running):
        if number % 2:  # the broken connection was first
            if guilty is Role.DECODE:
                exchange.route(respond(503))
            exchange.prefill(Ended())
            exchange.route(Ended())
        else:  # the echo was
            if guilty is Role.DECODE:
                exchange.prefill(respond(500))
                exchange.prefill(Ended())
            else:
                exchange.route(respond(500))
                exchange.route(Woken())
                exchange.prefill(Ended())
            assert exchange.route(Ended()) == [Linger(VERDICT_S)]
    for exchange in running[::2]:
        [_finished] = exchange.route(Woken())
    assert circuits(shared) == {
        "p0:1": "open" if guilty is Role.PREFILL else "closed",
        "d0:1": "open" if guilty is Role.DECODE else "closed",
    }
    assert nothing_charged(shared)


def test_decodes_500_was_the_echo_of_prefills_end():
    shared = gateway(cb_failure_threshold=1)
    exchange = hold(shared)
    [abort] = exchange.prefill(Ended())
    assert (abort.leg, abort.reply.status) == (Leg.ROUTE, 502)
    assert ("x-pd-retry", "prefill") in abort.reply.headers
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.PREFILL_FAILED
    assert circuits(shared) == {"p0:1": "open", "p1:1": "closed", "d0:1": "closed", "d1:1": "closed"}
    assert nothing_charged(shared)


def test_decodes_500_was_the_echo_of_prefills_4xx():
    shared = gateway()
    exchange = hold(shared)
    exchange.prefill(respond(422))
    assert exchange.route(Woken()) == [Wake(Leg.ROUTE, REASON_S)]  # the reason is under way
    [_, abort] = exchange.prefill(ResponseBody(b"too odd"))
    assert (abort.reply.status, abort.reply.body) == (422, b"too odd")
    exchange.route(Ended())
    exchange.prefill(Ended())
    assert nothing_charged(shared)


def test_prefills_reason_is_not_waited_for_longer():
    shared = gateway()
    exchange = hold(shared)
    exchange.prefill(respond(404))
    assert exchange.route(Woken()) == [Wake(Leg.ROUTE, REASON_S)]
    send, _abort = exchange.route(Woken())
    assert (send.leg, send.reply.phase) == (Leg.ROUTE, Phase.RESPONSE_HEADERS)
    exchange.prefill(Ended())
    exchange.route(Ended())
    exchange.route(Woken())
    assert nothing_charged(shared)


def test_trailers_that_cross_an_immediate_response_get_no_answer():
    shared = gateway()
    exchange, answer = dispatch_chat(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(503))  # ends the route leg
    assert exchange.route(Trailers(Phase.RESPONSE_TRAILERS)) == []
    exchange.route(Ended())  # and that the prefill leg
    assert exchange.prefill(Trailers(Phase.RESPONSE_TRAILERS)) == []
    exchange.prefill(Ended())
    assert nothing_charged(shared)


@pytest.mark.parametrize("name", ["content-length", "x-envoy-attempt-count"])
def test_numbers_of_thousands_of_digits_are_none(name):
    exchange = Exchange(gateway())
    headers = {":method": "POST", ":path": "/generate", name: "9" * 5000}
    [send] = exchange.route(RequestHeaders(headers, False))
    assert isinstance(send.reply, Answer)
    assert gateway().find("9" * 5000) is None


def test_a_prefill_stream_is_refused_once_decode_has_failed():
    shared = gateway()
    exchange, answer = dispatch(shared)
    exchange.route(respond(503))
    assert shared.find(dict(answer.set_headers)["x-pd-room"]) is None
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.DECODE_FAILED
    assert nothing_charged(shared)


def test_prefill_that_breaks_during_the_response_is_needed_no_more():
    """OpenAI's endpoints answer with the first token: decode has all it needs by then."""
    shared = gateway()
    exchange, answer = dispatch_chat(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    assert exchange.prefill(Ended()) == []
    [finished] = settle(exchange)
    assert (finished.outcome, finished.prefill_end) == (Outcome.OK, "failed")
    assert nothing_charged(shared)


def test_the_next_attempt_takes_another_pair():
    shared = gateway()
    exchange, answer = dispatch(shared)
    first = dict(answer.set_headers)
    exchange.route(respond(503))
    exchange.route(Ended())
    for _ in range(4):
        _, again = dispatch(shared, x_envoy_attempt_count="2")
        for name in ("x-pd-prefill-endpoint", "x-pd-decode-endpoint"):
            assert dict(again.set_headers)[name] != first[name]


def test_workers_cannot_set_our_response_headers():
    shared = gateway()
    exchange, _ = dispatch_chat(shared)
    [send] = exchange.route(respond(**{"x-pd-retry": "1", "content-type": "x"}))
    assert send.reply.remove_headers == ("x-pd-retry",)


def test_a_batch_reserves_its_rooms():
    shared = gateway()
    first, one = dispatch(shared, body=b'{"text": ["a", "b", "c"]}')
    _, two = dispatch(shared)
    rooms = [int(dict(answer.set_headers)["x-pd-room"]) for answer in (one, two)]
    assert rooms[1] >= rooms[0] + 3
    first.route(Ended())


def test_an_event_out_of_turn_is_named():
    exchange = Exchange(gateway())
    with pytest.raises(ProtocolViolation, match="RequestBody in state NEW"):
        exchange.route(RequestBody(b"{}"))


EVENTS = st.sampled_from(
    [
        (Leg.ROUTE, post()),
        (Leg.ROUTE, post("/v1/models")),
        (Leg.ROUTE, post("/v1/chat/completions")),
        (Leg.ROUTE, RequestBody(BODY)),
        (Leg.ROUTE, RequestBody(b"nonsense")),
        *((Leg.ROUTE, respond(status)) for status in (200, 400, 500, 503)),
        (Leg.ROUTE, Trailers(Phase.RESPONSE_TRAILERS)),
        (Leg.PREFILL, RequestHeaders({}, False)),
        *((Leg.PREFILL, respond(status)) for status in (200, 404, 500)),
        (Leg.PREFILL, respond(**COUNTED)),
        (Leg.PREFILL, ResponseBody(b"no")),
        (Leg.ROUTE, Woken()),
        (Leg.ROUTE, Broken(True, "DC")),
        (Leg.ROUTE, Broken(False, "UC")),
        (Leg.PREFILL, Ended()),
        (Leg.ROUTE, Ended()),
    ]
)


class Streams:
    """The shell's part: a stream starts with headers, ends once, and a prefill stream is matched by its room."""

    def __init__(self) -> None:
        self.gateway = gateway()
        self.exchange = Exchange(self.gateway)
        self.open = {Leg.ROUTE: True, Leg.PREFILL: False}
        self.had_prefill = False
        self.request_headers = {}
        self.lingers = False
        self.finished = []

    def feed(self, leg, event) -> None:
        if leg is Leg.PREFILL and not self.had_prefill:
            event = RequestHeaders(self.request_headers, False)
            self.had_prefill = self.open[leg] = self.gateway.find(event.headers.get("x-pd-room", "")) is self.exchange
        late = (isinstance(event, Broken) and self.gateway.open_rooms) or (isinstance(event, Woken) and self.lingers)
        if not self.open[leg] and not late:
            return
        if isinstance(event, Ended):
            self.open[leg] = False
        try:
            effects = self.exchange.route(event) if leg is Leg.ROUTE else self.exchange.prefill(event)
        except ProtocolViolation:
            return
        for effect in effects:
            if isinstance(effect, Finished):
                self.finished.append(effect)
                self.lingers = False
            elif isinstance(effect, Linger):
                self.lingers = True
            elif isinstance(effect, Send) and isinstance(effect.reply, Answer) and effect.leg is Leg.ROUTE:
                self.request_headers |= dict(effect.reply.set_headers)


@settings(max_examples=500)
@given(st.lists(EVENTS, max_size=12), st.permutations(list(Leg)))
def test_any_order_of_events_ends_with_nothing_charged(script, closing_order):
    streams = Streams()
    for leg, event in script:
        streams.feed(leg, event)
    for leg in closing_order:
        if streams.open[leg]:
            streams.feed(leg, Ended())
    if streams.lingers:
        streams.feed(Leg.ROUTE, Woken())
        if streams.open[Leg.PREFILL]:
            streams.feed(Leg.PREFILL, Ended())
    assert len(streams.finished) == 1
    assert nothing_charged(streams.gateway)
