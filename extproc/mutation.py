"""Placement → what changes in the request: headers and body of both legs.

Pure. The client's bytes stay as they were; the routing fields are spliced in before the closing brace, where they win
over a client's own: JSON decoders (Python's, orjson, pydantic's) keep the last of equal keys.
Field names: SGLang 0.5.23, `GenerateReqInput` and the OpenAI request classes.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from extproc.explain import Explanation
from extproc.model import Pick, Placement
from extproc.request import GenerationRequest

MODE = "x-pd-mode"
"""`pd`: two legs; `direct`: one decode worker, untouched; on the prefill leg `prefill`. Envoy's routes match on it."""
ROOM = "x-pd-room"
PREFILL_ENDPOINT = "x-pd-prefill-endpoint"
PREFILL_RANK = "x-pd-prefill-rank"
DECODE_ENDPOINT = "x-pd-decode-endpoint"
DECODE_RANK = "x-pd-decode-rank"
"""Request headers set by the service; the endpoints are `ip:port`, and Envoy dials what they say."""

PROCESS = "x-pd-process"
"""Where the service has several processes: the number of the one that has placed the request, for its prefill leg and
the access log, which have to come to the same one."""

PREFILL = "x-pd-prefill"
DECODE = "x-pd-decode"
"""Response headers, where switched on: `host:port;dp_rank=N` of the picked workers."""

PREFILL_LOADS = "x-pd-prefill-loads"
DECODE_LOADS = "x-pd-decode-loads"
"""Response headers, where switched on: the loads that the pick was made by (`explain.describe`)."""

RETRY = "x-pd-retry"
"""Response header: this attempt failed before the client got anything. Envoy retries on it, and removes it."""

OVERRIDE = "x-override-"
"""Prefix of headers that override an engine's body fields, where it allows that."""

RESERVED_PREFIXES = ("x-pd-", OVERRIDE)
RESERVED_NAMES = frozenset({"x-data-parallel-rank", "x-gateway-destination-endpoint"})
"""Headers that steer us, Envoy or an engine: a client may not set them."""

Headers = tuple[tuple[str, str], ...]

_EMPTY_OBJECT = re.compile(rb"\s*\{\s*\}")


@dataclass(frozen=True, slots=True)
class Mutation:
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
    bootstrap: dict[str, object] = {
        "bootstrap_host": prefill.worker.bootstrap_host,
        "bootstrap_port": prefill.worker.bootstrap_port,
        "bootstrap_room": placement.room,
    }
    # A field that the client set and we do not is overridden with null, which an engine takes for absent.
    fields = dict.fromkeys(request.client_fields) | bootstrap
    prefill_fields = fields | _rank("routed_dp_rank", prefill)
    if request.streams:
        # A prefill engine has one token to stream, and once a stream has begun it cannot answer with an error status.
        prefill_fields |= {"stream": False, "stream_options": None}
    decode_fields = fields | _rank("routed_dp_rank", decode) | _rank("disagg_prefill_dp_rank", prefill)
    return Mutation(
        headers=request_headers(placement),
        decode_body=splice(body, decode_fields),
        prefill_body=splice(body, prefill_fields),
    )


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
    headers = [
        (MODE, "pd"),
        (ROOM, str(placement.room)),
        (PREFILL_ENDPOINT, prefill.worker.endpoint or ""),
        (DECODE_ENDPOINT, decode.worker.endpoint or ""),
    ]
    if prefill.dp_rank is not None:
        headers.append((PREFILL_RANK, str(prefill.dp_rank)))
    if decode.dp_rank is not None:
        headers.append((DECODE_RANK, str(decode.dp_rank)))
    return tuple(headers)


def response_headers(placement: Placement) -> Headers:
    """The placement as response headers, for the client."""
    return (
        (PREFILL, _describe(placement.prefill)),
        (DECODE, _describe(placement.decode)),
        (ROOM, str(placement.room)),
    )


def explaining_headers(explanation: Explanation) -> Headers:
    """Why the placement is what it is, as response headers, for the client."""
    return ((PREFILL_LOADS, explanation.prefill), (DECODE_LOADS, explanation.decode))


def reserved(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a request's header names (lower case, as Envoy gives them) that a client may not set."""
    return tuple(name for name in names if name.startswith(RESERVED_PREFIXES) or name in RESERVED_NAMES)


def splice(body: bytes, fields: dict[str, object]) -> bytes:
    """A JSON object with `fields` added at its end; every byte of `body` is kept. `body` must be a valid object."""
    end = body.rindex(b"}")
    separator = b"" if _EMPTY_OBJECT.match(body) else b","
    added = msgspec.json.encode(fields)[1:-1]
    whole = memoryview(body)
    return b"".join((whole[:end], separator, added, whole[end:]))


def _rank(field: str, pick: Pick) -> dict[str, object]:
    return {} if pick.dp_rank is None else {field: pick.dp_rank}


def _describe(pick: Pick) -> str:
    return pick.worker.name if pick.dp_rank is None else f"{pick.worker.name};dp_rank={pick.dp_rank}"
