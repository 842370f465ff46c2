"""Scripts: events in, effects out, read from top to bottom. What stays charged is checked at the end of each."""

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.config import Config, WorkerConfig
from extproc.estimate import ASK_EVERY, ASK_FIRST
from extproc.events import (
    Answer,
    Ended,
    Finished,
    Immediate,
    Leg,
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
from extproc.exchange import HOLD_S, PREFILL_GRACE_S, Exchange, Gateway, ProtocolViolation
from extproc.load import LoadTable
from extproc.model import Role, Worker
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


def dispatch(gateway: Gateway, body=BODY, **headers) -> tuple[Exchange, Answer]:
    """A placed exchange, and the answer to its body."""
    exchange = Exchange(gateway)
    assert exchange.route(post(**headers)) == [Send(Leg.ROUTE, Answer(Phase.REQUEST_HEADERS))]
    send, *_ = exchange.route(RequestBody(body))
    assert send.leg is Leg.ROUTE
    assert isinstance(send.reply, Answer)
    return exchange, send.reply


def start_prefill(gateway: Gateway, exchange: Exchange, answer: Answer) -> Answer:
    """The prefill stream arrives, carrying what was set on the route leg."""
    headers = RequestHeaders(dict(answer.set_headers), False)
    assert gateway.find(headers) is exchange
    [send] = exchange.prefill(headers)
    assert send.leg is Leg.PREFILL
    return send.reply


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
    assert dict(reply.set_headers) == {"x-pd-mode": "prefill", "x-pd-prefill-endpoint": "10.0.1.0:1"}

    assert exchange.prefill(respond()) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))]
    by_role = {state.worker.name: state.in_flight for state in shared.table.states}
    assert by_role == {"p0:1": 1, "p1:1": 0, "d0:1": 1, "d1:1": 0}
    assert exchange.prefill(Ended()) == []
    assert shared.table.states[0].in_flight == 0  # prefill is over, decode goes on

    assert exchange.route(respond()) == [Send(Leg.ROUTE, Answer(Phase.RESPONSE_HEADERS))]
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.OK
    assert finished.status == 200
    assert finished.prefill_s > 0
    assert nothing_charged(shared)


def test_response_headers_name_the_workers_where_switched_on():
    shared = gateway(response_headers=True)
    exchange, _ = dispatch(shared)
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
    [finished] = exchange.route(Ended())
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
    [finished] = exchange.route(Ended())
    assert (finished.outcome, finished.counted_tokens) == (Outcome.OK, None)
    assert shared.estimator.known() == {}


def test_prefill_may_end_before_the_answer_that_was_asked_for():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.prefill(respond(**COUNTED))
    assert exchange.prefill(Ended()) == []
    exchange.route(respond())
    [finished] = exchange.route(Ended())
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
    exchange, _ = dispatch(shared)
    [send] = exchange.route(respond())
    headers = dict(send.reply.set_headers)
    assert headers == {
        "x-pd-prefill-loads": "p0:1/0=500@-, p0:1/1*=0@-",
        "x-pd-decode-loads": headers["x-pd-decode-loads"],
    }
    [finished] = exchange.route(Ended())
    assert finished.explanation.prefill == headers["x-pd-prefill-loads"]


def test_and_not_where_it_is_not():
    shared = gateway()
    exchange, _ = dispatch(shared)
    [send] = exchange.route(respond())
    assert send.reply.set_headers == ()
    [finished] = exchange.route(Ended())
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
    [("GET", "/v1/models"), ("GET", "/generate"), ("POST", "/flush_cache"), ("POST", "/v1/unknown"), ("DELETE", "/")],
)
def test_other_requests_go_to_one_decode_worker_untouched(method, path):
    shared = gateway()
    exchange = Exchange(shared)
    headers = {":method": method, ":path": path, "x-pd-room": "1", "x-override-rid": "2"}
    [send] = exchange.route(RequestHeaders(headers, method == "GET"))
    answer = send.reply
    assert dict(answer.set_headers) == {"x-pd-mode": "direct", "x-pd-decode-endpoint": "10.0.2.0:1"}
    assert answer.body is None
    assert answer.skip_request_body == (method != "GET")
    assert answer.remove_headers == ("x-pd-room", "x-override-rid")
    exchange.route(respond(404))
    [finished] = exchange.route(Ended())
    assert finished.endpoint == "other"
    assert finished.direct_worker == "d0:1"
    assert nothing_charged(shared)


def test_clients_cannot_steer():
    shared = gateway()
    _, answer = dispatch(shared, x_pd_room="5", x_data_parallel_rank="1", accept="*/*")
    assert answer.remove_headers == ("x-pd-room", "x-data-parallel-rank")
    assert dict(answer.set_headers)["x-pd-room"] != "5"


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
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    assert exchange.route(Ended()) == [Wake(Leg.PREFILL, PREFILL_GRACE_S)]
    assert exchange.prefill(respond()) == [Send(Leg.PREFILL, Answer(Phase.RESPONSE_HEADERS))]
    [finished] = exchange.prefill(Ended())
    assert finished.outcome is Outcome.OK
    assert nothing_charged(shared)


def test_but_not_longer():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    exchange.route(respond())
    exchange.route(Ended())
    [abort] = exchange.prefill(Woken())
    assert (abort.leg, abort.reply.status) == (Leg.PREFILL, 499)
    exchange.prefill(Ended())
    assert nothing_charged(shared)


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
        exchange.route(respond())
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
    exchange.prefill(respond(500))
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
    assert shared.find(RequestHeaders(dict(answer.set_headers), False)) is None
    assert nothing_charged(shared)


def test_a_room_is_good_for_one_prefill_stream():
    shared = gateway()
    exchange, answer = dispatch(shared)
    start_prefill(shared, exchange, answer)
    assert shared.find(RequestHeaders(dict(answer.set_headers), False)) is None


@pytest.mark.parametrize("room", ["", "-1", "x", "9" * 30, "7", "٣"])
def test_unknown_rooms(room):
    assert gateway().find(RequestHeaders({"x-pd-room": room}, False)) is None


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
    exchange.route(Ended())
    [finished] = exchange.prefill(Ended())
    assert finished.outcome is Outcome.DECODE_FAILED
    assert set(circuits(shared).values()) == {"closed"}  # it may have been an echo
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
    [_, abort] = exchange.prefill(ResponseBody(b"too odd"))
    assert (abort.reply.status, abort.reply.body) == (422, b"too odd")
    exchange.route(Ended())
    exchange.prefill(Ended())
    assert nothing_charged(shared)


def test_a_prefill_stream_is_refused_once_decode_has_failed():
    shared = gateway()
    exchange, answer = dispatch(shared)
    exchange.route(respond(503))
    assert shared.find(RequestHeaders(dict(answer.set_headers), False)) is None
    [finished] = exchange.route(Ended())
    assert finished.outcome is Outcome.DECODE_FAILED
    assert nothing_charged(shared)


@pytest.mark.parametrize(("path", "cut"), [("/generate", True), ("/v1/completions", False)])
def test_prefill_that_breaks_during_the_response(path, cut):
    """OpenAI's endpoints answer with the first token: decode has all it needs by then."""
    shared = gateway()
    exchange = Exchange(shared)
    exchange.route(post(path))
    send, *_ = exchange.route(RequestBody(b'{"text": "x", "prompt": "x"}'))
    start_prefill(shared, exchange, send.reply)
    exchange.route(respond())
    effects = exchange.prefill(Ended())
    assert [effect.reply.status for effect in effects] == [502] * cut
    exchange.route(Ended())
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
    exchange, _ = dispatch(shared)
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
        (Leg.ROUTE, RequestBody(BODY)),
        (Leg.ROUTE, RequestBody(b"nonsense")),
        *((Leg.ROUTE, respond(status)) for status in (200, 400, 503)),
        (Leg.ROUTE, Trailers(Phase.RESPONSE_TRAILERS)),
        (Leg.PREFILL, RequestHeaders({}, False)),
        *((Leg.PREFILL, respond(status)) for status in (200, 404, 500)),
        (Leg.PREFILL, respond(**COUNTED)),
        (Leg.PREFILL, ResponseBody(b"no")),
        (Leg.PREFILL, Woken()),
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
        self.finished = []

    def feed(self, leg, event) -> None:
        if leg is Leg.PREFILL and not self.had_prefill:
            event = RequestHeaders(self.request_headers, False)
            self.had_prefill = self.open[leg] = self.gateway.find(event) is self.exchange
        if not self.open[leg]:
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
    assert len(streams.finished) == 1
    assert nothing_charged(streams.gateway)
