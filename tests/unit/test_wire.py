"""Effects → bytes → what an independent implementation reads, and back."""

import contextlib

import betterproto2
import pytest
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderMap,
    HeaderValue,
)
from envoy_data_plane.envoy.config.core.v3 import (
    HeaderValueOptionHeaderAppendAction as HeaderAppendAction,
)
from envoy_data_plane.envoy.data.accesslog.v3 import (
    AccessLogCommon,
    HttpAccessLogEntry,
    HttpRequestProperties,
    ResponseFlags,
)
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import ProcessingModeBodySendMode
from envoy_data_plane.envoy.service.accesslog.v3 import (
    StreamAccessLogsMessage,
    StreamAccessLogsMessageHttpAccessLogEntries,
)
from envoy_data_plane.envoy.service.ext_proc.v3 import (
    CommonResponseResponseStatus,
    HttpBody,
    HttpHeaders,
    HttpTrailers,
    ProcessingRequest,
    ProcessingResponse,
)
from hypothesis import given
from hypothesis import strategies as st

from extproc import wire
from extproc.events import (
    Answer,
    Broken,
    Extend,
    Immediate,
    Phase,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    Trailers,
)


def http_headers(*pairs, raw=True, end_of_stream=False):
    values = [
        HeaderValue(key=key, raw_value=value.encode("latin-1")) if raw else HeaderValue(key=key, value=value)
        for key, value in pairs
    ]
    return HttpHeaders(headers=HeaderMap(headers=values), end_of_stream=end_of_stream)


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (
            ProcessingRequest(request_headers=http_headers((":path", "/"), ("a", "1"), ("a", "2"), end_of_stream=True)),
            RequestHeaders({":path": "/", "a": "1"}, True),
        ),
        (
            ProcessingRequest(request_headers=http_headers((":path", "/ü"), raw=True)),
            RequestHeaders({":path": "/ü"}, False),
        ),
        (ProcessingRequest(request_headers=http_headers(("a", "1"), raw=False)), RequestHeaders({"a": "1"}, False)),
        (ProcessingRequest(request_body=HttpBody(body=b"x\xff")), RequestBody(b"x\xff")),
        (
            ProcessingRequest(response_headers=http_headers((":status", "404"))),
            ResponseHeaders({":status": "404"}),
        ),
        (ProcessingRequest(response_body=HttpBody(body=b"x")), ResponseBody(b"x")),
        (ProcessingRequest(request_trailers=HttpTrailers()), Trailers(Phase.REQUEST_TRAILERS)),
        (ProcessingRequest(response_trailers=HttpTrailers()), Trailers(Phase.RESPONSE_TRAILERS)),
    ],
)
def test_decode(message, event):
    assert wire.decode(bytes(message)) == event


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x12\x05abc"])
def test_what_is_no_request(data):
    with pytest.raises(wire.WireError):
        wire.decode(data)


@pytest.mark.parametrize("status", ["h00", "\x1500", "-1", "1e2", "9" * 5000])
def test_a_status_that_is_no_number(status):
    with pytest.raises(wire.WireError, match=":status"):
        wire.decode(bytes(ProcessingRequest(response_headers=http_headers((":status", status)))))


@given(st.binary(max_size=300))
def test_any_bytes_are_an_event_or_a_wire_error(data):
    try:
        event = wire.decode(data)
    except wire.WireError:
        return
    assert isinstance(event, RequestHeaders | RequestBody | ResponseHeaders | ResponseBody | Trailers)


def encoded(reply):
    return ProcessingResponse.parse(wire.encode(reply))


@pytest.mark.parametrize(
    ("phase", "field"),
    [
        (Phase.REQUEST_HEADERS, "request_headers"),
        (Phase.REQUEST_BODY, "request_body"),
        (Phase.REQUEST_TRAILERS, "request_trailers"),
        (Phase.RESPONSE_HEADERS, "response_headers"),
        (Phase.RESPONSE_BODY, "response_body"),
        (Phase.RESPONSE_TRAILERS, "response_trailers"),
    ],
)
def test_an_answer_is_of_the_kind_of_the_question(phase, field):
    response = encoded(Answer(phase))
    assert betterproto2.which_one_of(response, "response")[0] == field
    assert response.mode_override is None


def test_a_body_brings_its_length_and_replaces_at_headers():
    for phase, status in (
        (Phase.REQUEST_HEADERS, CommonResponseResponseStatus.CONTINUE_AND_REPLACE),
        (Phase.REQUEST_BODY, CommonResponseResponseStatus.CONTINUE),
    ):
        response = encoded(Answer(phase, set_headers=(("a", "b"),), remove_headers=("c",), body=b"xyz"))
        common = (response.request_headers or response.request_body).response
        assert common.status is status
        assert common.body_mutation.body == b"xyz"
        options = {option.header.key: option.header.raw_value for option in common.header_mutation.set_headers}
        assert options == {"a": b"b", "content-length": b"3"}
        assert common.header_mutation.remove_headers == ["c"]
        assert not common.clear_route_cache


def test_an_empty_body_is_still_a_body():
    common = encoded(Answer(Phase.REQUEST_BODY, body=b"")).request_body.response
    assert common.body_mutation.body == b""


def test_mode_overrides():
    skip = encoded(Answer(Phase.REQUEST_HEADERS, skip_request_body=True, pick_route_again=True))
    assert skip.mode_override.request_body_mode is ProcessingModeBodySendMode.NONE
    assert skip.request_headers.response.clear_route_cache
    want = encoded(Answer(Phase.RESPONSE_HEADERS, want_response_body=True))
    assert want.mode_override.response_body_mode is ProcessingModeBodySendMode.BUFFERED_PARTIAL


def test_immediate():
    immediate = encoded(Immediate(502, (("content-type", "x"),), b"body", "why")).immediate_response
    assert (immediate.status.code, immediate.body, immediate.details) == (502, b"body", "why")
    assert immediate.headers.set_headers[0].header.raw_value == b"x"


@pytest.mark.parametrize("seconds", [605.0, 0.25])
def test_more_time(seconds):
    assert encoded(Extend(seconds)).override_message_timeout.total_seconds() == seconds


def entry(flags: ResponseFlags | None, room: str | None = "7") -> HttpAccessLogEntry:
    return HttpAccessLogEntry(
        common_properties=AccessLogCommon(response_flags=flags),
        request=HttpRequestProperties(request_headers={} if room is None else {"x-pd-room": room}),
    )


@pytest.mark.parametrize(
    ("logged", "broken"),
    [
        (entry(ResponseFlags(upstream_connection_termination=True)), [(7, Broken(False, "UC"))]),
        (entry(ResponseFlags(downstream_connection_termination=True)), [(7, Broken(True, "DC"))]),
        (
            entry(ResponseFlags(downstream_connection_termination=True, local_reset=True)),
            [(7, Broken(True, "DC,LR"))],
        ),
        (entry(ResponseFlags(no_route_found=True)), []),
        (entry(ResponseFlags(upstream_remote_reset=True), room=None), []),
        (entry(ResponseFlags(upstream_remote_reset=True), room="-1"), []),
        (entry(ResponseFlags(upstream_remote_reset=True), room="9" * 5000), []),
        (entry(None), []),
    ],
)
def test_the_access_log(logged, broken):
    message = StreamAccessLogsMessage(http_logs=StreamAccessLogsMessageHttpAccessLogEntries(log_entry=[logged]))
    assert wire.decode_access_log(bytes(message)) == broken


@given(st.binary())
def test_any_bytes_are_an_access_log_or_a_wire_error(data):
    with contextlib.suppress(wire.WireError):
        wire.decode_access_log(data)


NAMES = st.sampled_from(["x-pd-room", "x-pd-mode", "content-type", "a"])
HEADERS = st.lists(st.tuples(NAMES, st.text(max_size=300)), max_size=8).map(tuple)


@given(
    st.builds(
        Answer,
        st.sampled_from([Phase.REQUEST_HEADERS, Phase.REQUEST_BODY, Phase.RESPONSE_HEADERS, Phase.RESPONSE_BODY]),
        set_headers=HEADERS,
        remove_headers=st.lists(NAMES, max_size=3).map(tuple),
        body=st.none() | st.binary(max_size=300),
        pick_route_again=st.booleans(),
        skip_request_body=st.booleans(),
        want_response_body=st.booleans(),
    )
)
def test_an_answer_made_by_hand_is_what_an_independent_reader_reads(answer):
    read = encoded(answer)
    common = getattr(read, answer.phase.name.lower()).response
    mutation = common.header_mutation
    expected = list(answer.set_headers)
    if answer.body is not None:
        expected.append(("content-length", str(len(answer.body))))
        assert common.body_mutation.body == answer.body
    else:
        assert common.body_mutation is None
    replaces = answer.body is not None and answer.phase is Phase.REQUEST_HEADERS
    assert (common.status is CommonResponseResponseStatus.CONTINUE_AND_REPLACE) is replaces
    options = mutation.set_headers if mutation else []
    assert [(option.header.key, option.header.raw_value.decode()) for option in options] == expected
    assert {option.append_action for option in options} <= {HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD}
    assert (list(mutation.remove_headers) if mutation else []) == list(answer.remove_headers)
    assert common.clear_route_cache is answer.pick_route_again
    wants = answer.skip_request_body or answer.want_response_body
    assert (read.mode_override is not None) is wants


def test_headers_that_never_repeat_do_not_pile_up():
    for number in range(2 * wire.MAX_OPTIONS):
        wire.encode(Answer(Phase.REQUEST_HEADERS, set_headers=(("x-pd-decode-endpoint", f"10.0.0.1:{number}"),)))
    assert len(wire._options) <= wire.MAX_OPTIONS
