"""Placement → what changes in the request: headers and body of both legs.

Pure. The client's bytes stay as they were; the routing fields are spliced in before the closing brace, where they win
over a client's own: JSON decoders (Python's, orjson, pydantic's) keep the last of equal keys.
Field names: SGLang 0.5.23, `GenerateReqInput` and the OpenAI request classes.
"""

import functools
from collections.abc import Iterable
from typing import Final

import msgspec

from extproc.explain import Explanation
from extproc.model import Pick, Placement
from extproc.request import GenerationRequest
from extproc.values import Value

MODE: Final = "x-pd-mode"
"""`pd`: two legs; `direct`: one decode worker, untouched. Envoy's routes match on it. `prefill`: on the prefill leg,
once the service has answered there, too."""
ROOM: Final = "x-pd-room"
PREFILL_ENDPOINT: Final = "x-pd-prefill-endpoint"
PREFILL_RANK: Final = "x-pd-prefill-rank"
DECODE_ENDPOINT: Final = "x-pd-decode-endpoint"
DECODE_RANK: Final = "x-pd-decode-rank"
"""Request headers set by the service; the endpoints are `ip:port`, and Envoy dials what they say."""

PROCESS: Final = "x-pd-process"
"""Where the service has several processes: which one has placed the request (`process_mark`), as its prefill leg and
the access log have to come to the same one."""

PREFILL: Final = "x-pd-prefill"
DECODE: Final = "x-pd-decode"
"""Response headers, where switched on: `host:port;dp_rank=N` of the picked workers."""

PREFILL_LOADS: Final = "x-pd-prefill-loads"
DECODE_LOADS: Final = "x-pd-decode-loads"
"""Response headers, where switched on: the loads that the pick was made by (`explain.describe`)."""

RETRY: Final = "x-pd-retry"
"""Response header: this attempt failed before the client got anything. Envoy retries on it, and removes it."""

OVERRIDE: Final = "x-override-"
"""Prefix of headers that override an engine's body fields, where it allows that."""

RESERVED_PREFIXES: Final = ("x-pd-", OVERRIDE)
RESERVED_NAMES: Final = frozenset({"x-data-parallel-rank", "x-gateway-destination-endpoint"})
"""Headers that steer us, Envoy or an engine: a client may not set them."""

Headers = tuple[tuple[str, str], ...]


class Mutation(Value, frozen=True):
    """What both legs carry."""

    headers: Headers
    """Set on the request before it is mirrored, so both legs have them."""
    decode_body: bytes | None = None
    prefill_body: bytes | None = None
    """None: the client's own."""
    prefill_headers: Headers = ()
    """Set on the prefill leg alone."""


def mutate(request: GenerationRequest, placement: Placement, body: bytes) -> Mutation:
    """Headers and both bodies for a placed request. `body` is the client's, already parsed as a JSON object."""
    prefill, decode = placement.prefill, placement.decode
    worker, room = prefill.worker, b'"bootstrap_room":%d,' % placement.room
    for_prefill, for_decode = _members(
        worker.bootstrap_host, worker.bootstrap_port, prefill.dp_rank, request.client_fields, request.streams
    )
    if decode.dp_rank is not None:
        for_decode = b'%b,"routed_dp_rank":%d' % (for_decode, decode.dp_rank)
    prefill_body, decode_body = splice(body, room + for_prefill, room + for_decode)
    return Mutation(request_headers(placement), decode_body, prefill_body)


@functools.lru_cache(maxsize=4096)
def _members(
    bootstrap_host: str | None,
    bootstrap_port: int | None,
    prefill_rank: int | None,
    client_fields: tuple[str, ...],
    streams: bool,
) -> tuple[bytes, bytes]:
    """What is added to the body of the prefill leg and of the decode leg, but for the room and decode's own rank.

    The same for all requests of a prefill rank, so it is encoded once.
    """
    # A field that the client set and we do not is overridden with null, which an engine takes for absent.
    prefill: dict[str, object] = {name: None for name in client_fields if name != "bootstrap_room"}
    prefill["bootstrap_host"], prefill["bootstrap_port"] = bootstrap_host, bootstrap_port
    decode = dict(prefill)
    if prefill_rank is not None:
        prefill["routed_dp_rank"] = decode["disagg_prefill_dp_rank"] = prefill_rank
    if streams:
        # A prefill engine has one token to stream, and once a stream has begun it cannot answer with an error status.
        prefill |= {"stream": False, "stream_options": None}
    return msgspec.json.encode(prefill)[1:-1], msgspec.json.encode(decode)[1:-1]


def mutate_headers(placement: Placement) -> Mutation:
    """The same by headers alone, for engines that let these override the body (SGLang's `entrypoints/request_headers`).

    Every field that can be overridden is, so that nothing of the kind in the client's body counts: rank 0 is the only
    one of a worker without DP. On the prefill leg only its own rank differs.
    """
    prefill, decode = placement.prefill, placement.decode
    overrides: Headers = (
        (f"{OVERRIDE}bootstrap-host", prefill.worker.bootstrap_host or ""),
        (f"{OVERRIDE}bootstrap-port", str(prefill.worker.bootstrap_port)),
        (f"{OVERRIDE}bootstrap-room", str(placement.room)),
        (f"{OVERRIDE}disagg-prefill-dp-rank", str(prefill.dp_rank or 0)),
    )
    rank = f"{OVERRIDE}routed-dp-rank"
    return Mutation(
        headers=(*request_headers(placement), *overrides, (rank, str(decode.dp_rank or 0))),
        prefill_headers=((rank, str(prefill.dp_rank or 0)),),
    )


def request_headers(placement: Placement) -> Headers:
    """The placement as request headers."""
    prefill, decode = placement.prefill, placement.decode
    headers: Headers = (
        (MODE, "pd"),
        (ROOM, str(placement.room)),
        (PREFILL_ENDPOINT, prefill.worker.endpoint or ""),
        (DECODE_ENDPOINT, decode.worker.endpoint or ""),
    )
    if prefill.dp_rank is not None:
        headers += ((PREFILL_RANK, str(prefill.dp_rank)),)
    if decode.dp_rank is not None:
        headers += ((DECODE_RANK, str(decode.dp_rank)),)
    return headers


def response_headers(placement: Placement) -> Headers:
    """The placement as response headers, for the client."""
    return (
        (PREFILL, _describe(placement.prefill)),
        (DECODE, _describe(placement.decode)),
        (ROOM, str(placement.room)),
    )


def process_mark(process: int) -> str:
    """The value of `PROCESS`: the cluster by which Envoy mirrors what this process has placed."""
    return f"prefill_{process}"


def explaining_headers(explanation: Explanation) -> Headers:
    """Why the placement is what it is, as response headers, for the client."""
    return ((PREFILL_LOADS, explanation.prefill), (DECODE_LOADS, explanation.decode))


def reserved(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a request's header names (lower case, as Envoy gives them) that a client may not set."""
    return _reserved(tuple(names))


@functools.lru_cache(maxsize=1024)
def _reserved(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith(RESERVED_PREFIXES) or name in RESERVED_NAMES)


def splice(body: bytes, one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """A JSON object with encoded members added at its end: with `one`, and with the `other`. Every byte of `body` is
    kept, a valid object."""
    end = body.rindex(b"}")
    before, after = memoryview(body)[:end], body[end:]
    separator = b"," if body.find(b'"') >= 0 else b""  # members have names
    return b"".join((before, separator, one, after)), b"".join((before, separator, other, after))


def _describe(pick: Pick) -> str:
    return pick.worker.name if pick.dp_rank is None else f"{pick.worker.name};dp_rank={pick.dp_rank}"
