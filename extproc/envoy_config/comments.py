"""What is said beside the settings of a printed snippet: comments by the path of keys to where they stand.

Where `envoy/envoy.yaml` has the same setting its words are the same; a test keeps the two together.
"""

import textwrap
from collections.abc import Iterator

import yaml

Path = tuple[str, ...]
"""Keys from the top; an element of a list stands under its `name`."""

WIDTH = 116

_TABLE = """
# The listeners

il_pd/bypass_overload_manager
    What has been let in is not refused half-way, nor is an internal connection a client's.
il_pd/per_connection_buffer_limit_bytes
    The body is collected here for the service, with 1 MiB for what it adds; a longer one gets 413.
il_pd/max_request_headers_kb
    Room for what Envoy and the service add: a leg refused for that would be missed.
il_pd/early_header_mutation_extensions
    What clients must not set, once more: for listeners that let it through.
envoy.http.early_header_mutation.header_mutation
    What clients must not set, in any letter case: what steers us or an engine, and Envoy's own knobs. Early: before
    Envoy itself reads any of it.
il_pd/envoy.http.early_header_mutation.header_mutation
il_pd/generate_request_id
    The request has one, of the listener that clients reach.
il_pd/stream_idle_timeout
    The public listener's timers watch the request; a second set could only disagree with them.
il_pd/delayed_close_timeout
    Long enough for an early answer (413) to be read, short enough for a broken stream to be known soon.
local_reply_config
    Errors that Envoy makes itself (413, 431, 503, 504 …) look like the service's and OpenAI's. What already says its
    content type (the service's immediate responses, `direct_response`) stays as it is.
mappers/headers_to_add
    Decode's connection was refused or broke before it answered: worth another pair.
envoy.access_loggers.http_grpc
    Requests that broke off, each at once: the ends of ext_proc streams do not tell why. Normal ones are not logged.

dynamic_stats
    Of clusters by status and time: each listener counts the same of what it answers.

# The ext_proc filters

extproc.route/disabled
    Off but for the routes that turn it on: requests on others never meet it.
extproc.route/skip_envoy_headers
    x-envoy-internal and x-forwarded-for would tell the service nothing.
extproc.route/response_trailer_mode
    A gRPC engine's status; no message where there are no trailers. Either way the stream stays open until the HTTP
    request ends: that is how the service learns of the end.
extproc.route/allow_mode_override
    Lets the service say "no body, please" for requests that it only passes on.
extproc.route/failure_mode_allow
    Running streams survive a dead service; new requests come out unmarked and meet the last route.
extproc.route/message_timeout
    Envoy's 200 ms are too short for 64 MiB over gRPC; only a hung service takes this long.
extproc.route/max_message_timeout
    Headers of a stream that begins before prefill is done wait for prefill: its time-out and 5 s.
extproc.route/forward_rules
    What the service looks at, and nothing else: no credentials, no cookies.
extproc.prefill
    Envoy drops the answers to a mirror. Here they pass a filter, so that the service sees the prefill leg's status,
    its failures and its end, and can end it.
extproc.prefill/forward_rules
    Whose prefill it is, how it was answered, and whether the answer can be read for its token counts. No `:method`: by
    that the service tells the two filters apart.
extproc.prefill/processing_mode
    The service answers the headers with prefill's whole body (CONTINUE_AND_REPLACE).
extproc.prefill/allow_mode_override
    Lets the service ask for the text of an error.
extproc.prefill_guard
    Goes on only with what the service has answered on this leg, too. The mirror comes marked `pd`, with decode's body:
    should the service die in between, that body must not reach prefill.
envoy.filters.http.upstream_codec
    Always the last of a cluster's filters.

# Routes by what the service has written

pd/headers
    Picked again after the service has answered (it clears the route cache).
pd/typed_per_filter_config
    Turns the filter on. In each route, as the one that matches first, before anybody has picked workers, decides.
direct
    Not a generation (/v1/models, …): one decode worker, untouched.
unscheduled
    Nobody has picked workers: the service is down or hangs.
unscheduled/cluster_header
    Names no cluster, as nothing sets that header: 503. Not a `direct_response`: this route matches first, and its limit
    is that of the body.
il_pd/route/timeout

# The way there

include_request_attempt_count
    x-envoy-attempt-count: the service sees which attempt it is asked about.
response_headers_to_remove
    The service's mark for a retry is between it and Envoy.
request_body_buffer_limit
    What may be held of a body, with 1 MiB for what the service adds. Not the connection's limit: that would let each
    slow reader of a stream hold as much, and over HTTP/2 the flow-control window would count instead.
route/timeout
    The whole request, streaming included, all attempts together.
route/idle_timeout
    A prompt may wait in an engine's queue for as long as the whole request may take.
route/retry_policy
    Another attempt with another pair, while the client has got nothing: when the service says so. Never a single leg: a
    bootstrap room is good for one attempt of both.
retry_policy/retry_back_off
    The next attempt goes to another pair: nothing to wait for.

# The clusters

il_pd/circuit_breakers
    Never reached: the default of 1024 would refuse requests that wait in engines' queues, as designed. Whom to admit is
    the service's decision.
il_pd/typed_extension_protocol_options
    HTTP/1.1: each request has a (user-space) connection to itself, so one that stalls holds up no other, and bodies may
    be as long as the listener's buffer.
original_dst_lb_config
    Each dials what its header says, whatever that is: hence the stripping.
decode/connect_timeout
    One lost SYN (sent again after 1 s) is survived; a dead host is another pair's chance.
decode/cleanup_interval
    Endpoints that no request named for a minute are forgotten.
decode/upstream_connection_options
    A peer that vanished without a word is noticed after a minute, also in the middle of a long prefill.
decode/common_http_protocol_options
    Below the 5 s after which SGLang's uvicorn closes an idle connection (SGLANG_TIMEOUT_KEEP_ALIVE): else a request now
    and then meets one that is just closing.
max_stream_duration
    Frees what an engine that neither reads nor answers would hold forever: prefill's time-out and 5 s.
extproc/per_connection_buffer_limit_bytes
    Never reached. Above it (1 MiB by default, a few prompts) Envoy holds the streams back, and crashes when one of them
    is of a cluster's filter (extproc.prefill).
extproc
    No active health check: a refused connection fails open at once, and a check that a busy service answers late would
    turn every request away.

# In front of a whole gateway

pd_gateway/health_checks
    At the gateway's metrics port, which the edge has to reach (`--prometheus-host`). Else leave it out: a gateway
    without workers answers 503 by itself.
pd_gateway/typed_extension_protocol_options
    HTTP/2: a gateway that drains says so (GOAWAY), and loses nothing.
llm/route/timeout
    The gateway's own limit and 5 s, so that its 504 comes first.
llm/route/retry_policy
    Only what no gateway has begun to work on; the rest it has retried itself.
"""


def _parsed(table: str) -> dict[Path, str]:
    comments: dict[Path, str] = {}
    path: Path = ()
    for line in table.splitlines():
        if line.startswith("    "):
            comments[path] = f"{comments[path]} {line.strip()}".strip()
        elif line and not line.startswith("#"):
            path = tuple(line.split("/"))
            comments[path] = ""  # without words: none of the more general ones either
    return comments


COMMENTS = _parsed(_TABLE)


def with_comments(text: str) -> str:
    """Block YAML as `to_yaml` writes it, with each comment above the first place that it is about."""
    said = set[Path]()
    above: dict[int, list[str]] = {}
    for path, line, column in _places(yaml.compose(text), ()):
        fitting = [key for key in COMMENTS if key[-1] == path[-1] and _in_order(key, path)]
        best = max(fitting, key=len, default=None)
        if best and COMMENTS[best] and best not in said:
            said.add(best)
            indent = " " * column + "# "
            above.setdefault(line, []).extend(
                textwrap.wrap(COMMENTS[best], WIDTH, initial_indent=indent, subsequent_indent=indent)
            )
    lines = text.splitlines()
    return "".join(f"{line}\n" for number, line in enumerate(lines) for line in (*above.get(number, ()), line))


def _places(node: yaml.Node | None, path: Path) -> Iterator[tuple[Path, int, int]]:
    """Every key and every named element of a list: its path, and where it begins."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, key.value)
            yield here, key.start_mark.line, key.start_mark.column
            yield from _places(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for element in node.value:
            name = _name(element)
            here = (*path, name) if name else path
            if name:
                yield here, element.start_mark.line, element.start_mark.column - len("- ")
            yield from _places(element, here)


def _name(node: yaml.Node) -> str | None:
    if isinstance(node, yaml.MappingNode):
        return next((str(value.value) for key, value in node.value if key.value == "name"), None)
    return None


def _in_order(key: Path, path: Path) -> bool:
    rest = iter(path)
    return all(part in rest for part in key)
