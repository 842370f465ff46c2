"""Placement → headers and bodies: the client's bytes stay, ours win."""

import json

from hypothesis import given
from hypothesis import strategies as st

from extproc.model import Pick, Placement, Role, Worker
from extproc.mutation import mutate, request_headers, reserved, response_headers, splice
from extproc.parse import parse
from extproc.request import ROUTING_FIELDS, Endpoint

PREFILL = Worker("p:1", Role.PREFILL, "http://p:1", "10.0.0.1:1", "p.example", 8998, 4)
DECODE = Worker("d:2", Role.DECODE, "http://d:2", "10.0.0.2:2", dp_size=2)
PLACEMENT = Placement(Pick(PREFILL, 3), Pick(DECODE, 1), room=2**63 - 1)
ONE_RANK = Placement(Pick(PREFILL, None), Pick(DECODE, None), room=5)


def bodies(body: bytes, placement: Placement = PLACEMENT):
    return mutate(parse(Endpoint.GENERATE, body), placement, body)


def test_both_legs_carry_the_room_and_their_own_rank():
    mutation = bodies(b'{"text": "x"}')
    shared = {"text": "x", "bootstrap_host": "p.example", "bootstrap_port": 8998, "bootstrap_room": 2**63 - 1}
    assert json.loads(mutation.prefill_body) == shared | {"routed_dp_rank": 3}
    assert json.loads(mutation.decode_body) == shared | {"routed_dp_rank": 1, "disagg_prefill_dp_rank": 3}


def test_no_rank_without_a_choice():
    mutation = bodies(b'{"text": "x"}', ONE_RANK)
    for body in (mutation.prefill_body, mutation.decode_body):
        assert set(json.loads(body)) == {"text", "bootstrap_host", "bootstrap_port", "bootstrap_room"}
    assert [name for name, _ in mutation.headers] == [
        "x-pd-mode",
        "x-pd-room",
        "x-pd-prefill-endpoint",
        "x-pd-decode-endpoint",
    ]


def test_a_clients_routing_fields_never_win():
    client = json.dumps({"text": "x"} | dict.fromkeys(ROUTING_FIELDS, 666)).encode()
    for placement in (PLACEMENT, ONE_RANK):
        mutation = bodies(client, placement)
        for body in (mutation.prefill_body, mutation.decode_body):
            assert 666 not in json.loads(body).values()


def test_headers():
    assert dict(request_headers(PLACEMENT)) == {
        "x-pd-mode": "pd",
        "x-pd-room": str(2**63 - 1),
        "x-pd-prefill-endpoint": "10.0.0.1:1",
        "x-pd-prefill-rank": "3",
        "x-pd-decode-endpoint": "10.0.0.2:2",
        "x-pd-decode-rank": "1",
    }
    assert dict(response_headers(PLACEMENT))["x-pd-decode"] == "d:2;dp_rank=1"
    assert dict(response_headers(ONE_RANK))["x-pd-prefill"] == "p:1"


def test_reserved_headers():
    names = ["x-pd-room", "x-override-rid", "x-data-parallel-rank", "x-gateway-destination-endpoint", "accept", "x-pd"]
    assert reserved(names) == tuple(names[:4])


WHITESPACE = st.text(" \t\r\n", max_size=5)
OBJECTS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()), max_size=5)


@given(OBJECTS, WHITESPACE, WHITESPACE, WHITESPACE)
def test_splice_keeps_every_byte(content, before, inside, after):
    text = json.dumps(content)
    body = f"{before}{text[:-1]}{inside}}}{after}".encode()
    fields = {"bootstrap_room": 2**63 - 1, "bootstrap_host": 'hö"st', "routed_dp_rank": None}
    for spliced, added in zip(
        splice(body, json.dumps(fields)[1:-1].encode(), b'"n":1'), (fields, {"n": 1}), strict=True
    ):
        assert json.loads(spliced) == content | added
        end = body.rindex(b"}")
        more = len(spliced) - len(body)
        assert spliced[:end] == body[:end]
        assert spliced[end + more :] == body[end:]


@given(st.integers())
def test_splice_keeps_numbers_of_any_size(number):
    for spliced in splice(b'{"seed": %d}' % number, b'"bootstrap_room": 1', b'"bootstrap_room": 2'):
        assert json.loads(spliced)["seed"] == number
