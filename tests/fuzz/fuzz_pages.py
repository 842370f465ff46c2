"""Targets `answer`, `loads`, `loads_json`, `info` and `usage`: what engines answer, in the background or to a request.

All but `answer`, which refuses what is no HTTP, are read without ever raising.
"""

import json
import math
from collections.abc import Hashable, Sequence

from fuzz_target import Target

from extproc import loads_json
from extproc.config import WorkerConfig
from extproc.discovery.http_response import Answer, ResponseError, ResponseReader
from extproc.discovery.info import MAX_DP_SIZE, MODES, merge, parse_info, problems
from extproc.loads_text import LOADS_FIELDS, METRICS_FIELDS, parse_loads
from extproc.model import RankLoad, Role, Worker
from extproc.usage import counted_tokens

FIGURES = RankLoad.__struct_fields__[1:]


LIMIT_BYTES = 100


def check_answer(data: bytes) -> Hashable:
    """First byte: the size of pieces. In pieces it is the same answer, and its body is within the limit."""
    step, page = 1 + (data[0] if data else 0), data[1:]
    whole, keep_alive, reason = _read([page])
    pieces, would_keep_alive, _ = _read([page[at : at + step] for at in range(0, len(page), step)])
    assert whole == pieces
    assert would_keep_alive or not keep_alive  # what follows the answer may be in a piece of its own
    if whole is None:
        return reason
    assert 200 <= whole.status < 600
    assert len(whole.body) <= LIMIT_BYTES
    return (whole.status // 100, keep_alive, bool(whole.body), bool(whole.content_type))


def _read(pieces: list[bytes]) -> tuple[Answer | None, bool, str]:
    """The answer, whether its connection can be asked again, and why there is none."""
    reader = ResponseReader(LIMIT_BYTES)
    try:
        for piece in pieces:
            answer = reader.feed(piece)
            if answer is not None:
                return answer, reader.keep_alive, ""
    except ResponseError as error:
        return None, False, str(error)
    return reader.end(), False, "cut short"


def check_loads(page: bytes) -> Hashable:
    """Figures are figures, a rank comes once, and the order of lines says nothing."""
    loads = parse_loads(page)
    *lines, rest = page.split(b"\n")
    backwards = b"\n".join([*reversed(lines), rest])
    assert parse_loads(backwards) == loads
    return _shown(loads)


def check_loads_json(page: bytes) -> Hashable:
    """The same of the other form; blanks around it say nothing."""
    loads = loads_json.parse_loads(page)
    assert loads_json.parse_loads(b" \n" + page + b"\t") == loads
    return _shown(loads)


def _shown(loads: Sequence[RankLoad]) -> Hashable:
    assert [load.dp_rank for load in loads] == sorted({load.dp_rank for load in loads})
    shown = []
    for load in loads:
        said = [field for field in FIGURES if getattr(load, field) is not None]
        assert said
        assert all(0 <= getattr(load, field) < math.inf for field in said)
        shown.append(frozenset(said))
    return (min(len(loads), 4), frozenset(shown))


WORKERS = (
    (Worker("p:1", Role.PREFILL, "http://p:1"), WorkerConfig(url="http://p:1")),
    (Worker("d:1", Role.DECODE, "http://d:1"), WorkerConfig(url="http://d:1", dp_size=2, model="m")),
)


def check_info(body: bytes) -> Hashable:
    """What is taken over is in range and is in the answer; what it means for a worker can be said."""
    info = parse_info(body)
    assert info.mode is None or info.mode in MODES
    assert info.dp_size is None or 1 <= info.dp_size <= MAX_DP_SIZE
    assert info.bootstrap_port is None or 1 <= info.bootstrap_port <= 65535
    for text in (info.model, info.load_balance_method, info.version):
        assert text is None or text
    if not info.empty:
        assert isinstance(json.loads(body), dict)
    said = []
    for worker, config in WORKERS:
        merged = merge(worker, config, info)
        assert merged.rank_count >= 1
        said.append(len(problems(worker, config, info)))
    known = tuple(getattr(info, field) is not None for field in type(info).__slots__)
    return (known, info.mode, tuple(said))


def check_usage(data: bytes) -> Hashable:
    """First byte: prompts of the request. A count is a count."""
    prompts = 1 + (data[0] % 3 if data else 0)
    tokens = counted_tokens(data[1:], prompts)
    assert tokens is None or tokens > 0, f"counted {tokens} tokens"
    form = data[1:].lstrip()[:1]
    return (tokens is None, prompts, form if form in {b"{", b"[", b"d"} else b"")


METRICS_PAGE = b"""# HELP sglang:num_used_tokens The number of used tokens.
# TYPE sglang:num_used_tokens gauge
sglang:num_used_tokens{engine_type="unified",model_name="m",dp_rank="0",pp_rank="0",tp_rank="0"} 12034.0
sglang:num_used_tokens{dp_rank="1",tp_rank="1",priority=""} 7.0 1763800000250
sglang:num_running_reqs{dp_rank="1",priority="5"} NaN
sglang:token_usage 0.02
"""
LOADS_PAGE = b"""sglang_timestamp{dp_rank="0"} 1763800000.25
sglang_num_used_tokens{dp_rank="0"} 12034
sglang_num_total_tokens{dp_rank="1"} 15
"""
LOADS_JSON = b"""{"timestamp": "2025-11-22T08:26:40+00:00", "loads": [{"timestamp": 1763800000.25, "dp_rank": 0,
"num_running_reqs": 3, "num_used_tokens": 12034, "token_usage": 0.03, "decode_moments": [1.0]}, {"dp_rank": 1,
"num_used_tokens": 7, "num_total_tokens": null}]}"""
HEADS = (
    b"\xffHTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 5\r\ncontent-type: a/b; c\r\n\r\nhello",
    b"\x06HTTP/1.1 503 Service Unavailable\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\na;b=c\r\n0123456789\r\n"
    b"0\r\nx: y\r\n\r\n",
    b"\x02HTTP/1.1 100 Continue\r\n\r\nHTTP/1.0 404 Not Found\r\nconnection: close\r\n\r\nno such page",
    b"\x10HTTP/1.1 204 No Content\r\n\r\n",
)
INFO = b"""{"disaggregation_mode": "prefill", "dp_size": 2, "served_model_name": "m", "model_path": "/m",
"disaggregation_bootstrap_port": "8998", "enable_metrics": true, "load_balance_method": "round_robin",
"version": "0.5.23", "internal_states": [{"dp_size": 2, "disaggregation_mode": "null"}, {}]}"""
ANSWERS = (
    b'\x00{"id": "x", "usage": {"prompt_tokens": 12, "completion_tokens": 1}}',
    b'\x01[{"text": "a", "meta_info": {"prompt_tokens": 5}}, {"meta_info": {"prompt_tokens": 6}}]',
    b'\x00data: {"choices": []}\n\ndata: {"usage": {"prompt_tokens": 9}}\n\ndata: [DONE]\n\n',
    b'\x01data: {"index": 0, "meta_info": {"prompt_tokens": 5}}\n\ndata: {"index": 1, "meta_info": '
    b'{"prompt_tokens": 6}}\n\n',
)
_LABELS = (b'dp_rank="', b'tp_rank="', b'priority="', b'"} ', b"{", b"}", b"\\", b'\\"', b"\n", b"NaN", b"+Inf", b"1_0")

TARGETS = (
    Target(
        "answer",
        check_answer,
        HEADS,
        (
            *(
                b"HTTP/1.1 ",
                b"HTTP/1.0 ",
                b"200 OK",
                b"100 ",
                b"304 ",
                b"\r\n",
                b"\r\n\r\n",
                b": ",
                b"; ",
                b", ",
                b"0\r\n",
            ),
            *(b"content-length", b"transfer-encoding", b"chunked", b"connection", b"close", b"keep-alive", b"gzip"),
            *(b"content-encoding", b"identity", b"ffffffff", b"65\r\n"),
        ),
        share=0.05,
        modules=("extproc.discovery.http_response",),
    ),
    Target(
        "loads_json",
        check_loads_json,
        (LOADS_JSON, b'{"loads": []}'),
        (
            *(b'"loads":', b'"dp_rank":', b'"num_used_tokens":', b'"num_total_tokens":', b'"timestamp":', b"true"),
            *(b"null", b"[", b"]", b"{", b"}", b",", b"-", b"1e9", b"0.5", b'"5"'),
        ),
        share=0.05,
        modules=("extproc.loads_json",),
    ),
    Target(
        "loads",
        check_loads,
        (METRICS_PAGE, LOADS_PAGE, METRICS_PAGE + LOADS_PAGE),
        (*METRICS_FIELDS, *LOADS_FIELDS, *_LABELS),
        share=0.05,
        modules=("extproc.loads_text",),
    ),
    Target(
        "info",
        check_info,
        (INFO, b"{}", b'{"model_path": "m"}'),
        (
            *(b'"disaggregation_mode":', b'"dp_size":', b'"model_path":', b'"internal_states":', b'"version":'),
            *(b'"enable_metrics":', b'"FALSE"', b'"decode"', b'"8998"', b"true", b"null", b"[", b"]", b"{", b"}", b","),
        ),
        share=0.1,
        modules=("extproc.discovery.info",),
    ),
    Target(
        "usage",
        check_usage,
        ANSWERS,
        (
            *(b"data:", b'"usage":', b'"meta_info":', b'"prompt_tokens":', b'"index":', b"[DONE]", b"\n\n"),
            *(b"{", b"}", b"[", b"]", b",", b"-", b"null"),
        ),
        share=0.05,
        modules=("extproc.usage",),
    ),
)
