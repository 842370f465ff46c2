"""Faults on command: what their specifications mean, and what a client meets on the wire."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from sim_pair import PATIENCE_S, until

from extproc.sim import Engine, EngineConfig, GpuModel
from extproc.sim.fault_effects import EXIT_STATUS
from extproc.sim.fault_pages import BOMB_BYTES, HUGE_BYTES
from extproc.sim.faults import BadFault, FaultPlan, Phase, parse_fault

Test = Callable[[Engine], Awaitable[None]]

SLOW = GpuModel(decode_base_ms=20.0)
"""A token in 20 ms: a stream with gaps, 20 tokens in 0.4 s."""
BODY = {"text": "hello", "sampling_params": {"max_new_tokens": 20}}
STREAM = {**BODY, "stream": True}


def with_engine(test: Test, *faults: str, **settings: Any) -> None:
    """Run a test against a fresh engine; afterwards no request may be open there."""

    async def run() -> None:
        config = EngineConfig(**{"gpu": SLOW, "faults": faults, **settings})
        async with asyncio.timeout(2 * PATIENCE_S), Engine(config) as engine:
            await test(engine)
            await until(lambda: engine.open_requests == 0)
            assert all(record.outcome != "open" for record in engine.records)

    asyncio.run(run())


async def raw(engine: Engine, body: Any) -> tuple[bytes, type[Exception] | None]:
    """What comes back on a fresh connection until it ends, and the error that ended it."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", engine.port)
    head = f"POST /generate HTTP/1.1\r\nhost: e\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    got = bytearray()
    try:
        while piece := await reader.read(65536):
            got += piece
    except ConnectionError as error:
        return bytes(got), type(error)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return bytes(got), None


@pytest.mark.parametrize(
    ("spec", "kind", "phase", "value"),
    [
        ("status=400", "status", Phase.ARRIVAL, "400"),
        ("status=503@work,delay=0.5", "status", Phase.WORK, "503"),
        ("reset", "reset", Phase.ARRIVAL, ""),
        ("close@stream,after=3", "close", Phase.STREAM, ""),
        ("hang@upload", "hang", Phase.UPLOAD, ""),
        ("die@work", "die", Phase.WORK, ""),
        ("health=down", "health", Phase.HEALTH, "down"),
        ("metrics=gzip-bomb", "metrics", Phase.METRICS, "gzip-bomb"),
    ],
)
def test_a_specification_is_read(spec: str, kind: str, phase: Phase, value: str) -> None:
    fault = parse_fault(spec)
    assert (fault.spec, fault.kind, fault.phase, fault.value) == (spec, kind, phase, value)


def test_options_of_a_specification() -> None:
    fault = parse_fault("reset@stream,p=0.25,count=7,after=3,delay=1.5")
    assert (fault.probability, fault.count, fault.after, fault.delay_s) == (0.25, 7, 3, 1.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "kind '' is not one of status, reset,"),
        ("explode", "kind 'explode' is not one of"),
        ("status", "status '' is not a number from 400 to 599"),
        ("status=200", "status '200' is not a number from 400 to 599"),
        ("status=500@stream", "phase 'stream' is too late for a status"),
        ("reset@", "phase '' is not one of upload, arrival, work, stream"),
        ("reset@health", "phase 'health' is not one of"),
        ("reset=1", "reset takes no value, got '1'"),
        ("metrics", "metrics '' is not one of down, slow,"),
        ("metrics=big", "metrics 'big' is not one of"),
        ("health=down@work", "health has no phase"),
        ("reset,often", "option 'often' is not one of p, count, after, delay"),
        ("reset,p=2", "p '2' is not a number from 0 to 1"),
        ("reset,p=nan", "p 'nan' is not a number"),
        ("reset,count=0", "count '0' is not a whole number from 1"),
        ("reset,count=x", "count 'x' is not a whole number"),
        ("reset@stream,after=", "after '' is not a whole number"),
        ("reset@work,delay=-1", "delay '-1' is not a number from 0"),
    ],
)
def test_a_wrong_specification_says_which_part(spec: str, message: str) -> None:
    with pytest.raises(BadFault) as caught:
        parse_fault(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)


def test_count_is_a_limit_and_the_first_fault_that_hits_wins() -> None:
    plan = FaultPlan(map(parse_fault, ["status=500,count=2", "reset,count=1", "health=down"]))
    hits = [plan.strike(Phase.ARRIVAL) for _ in range(4)]
    assert [fault and fault.kind for fault in hits] == ["status", "status", "reset", None]
    assert plan.strike(Phase.WORK) is None
    assert [(entry["hits"], entry["left"]) for entry in plan.as_json()] == [(2, 0), (1, 0), (0, None)]


def test_chance_is_seeded_and_near_its_share() -> None:
    def hits(seed: int) -> list[bool]:
        plan = FaultPlan([parse_fault("reset,p=0.2")], seed)
        return [plan.strike(Phase.ARRIVAL) is not None for _ in range(2000)]

    assert hits(1) == hits(1) != hits(2)
    assert 300 < sum(hits(1)) < 500  # 400 expected, standard deviation 18


@pytest.mark.parametrize("spec", ["status=400", "status=503@work,delay=0.05", "status=429@upload"])
def test_a_status_is_answered(spec: str) -> None:
    async def test(engine: Engine) -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            answer = await http.post(engine.url + "/generate", json=BODY)
        fault = engine.faults.faults[0]
        assert answer.status_code == fault.status
        assert answer.json()["message"] == f"simulated fault: {spec}"
        [record] = engine.records
        assert (record.fault, record.status, record.aborted_unix) == (spec, fault.status, None)
        assert record.fault_unix is not None
        assert abs(record.fault_unix - time.time()) < PATIENCE_S

    with_engine(test, spec)


@pytest.mark.parametrize(("kind", "error"), [("reset", ConnectionResetError), ("close", None)])
@pytest.mark.parametrize("phase", ["arrival", "work"])
def test_a_connection_ends_without_an_answer(kind: str, error: type[Exception] | None, phase: str) -> None:
    async def test(engine: Engine) -> None:
        assert await raw(engine, BODY) == (b"", error)
        await until(lambda: engine.records[0].outcome == "aborted")

    with_engine(test, f"{kind}@{phase}")


@pytest.mark.parametrize(("kind", "error"), [("reset", ConnectionResetError), ("close", None)])
def test_a_stream_breaks_off_after_some_chunks(kind: str, error: type[Exception] | None) -> None:
    async def test(engine: Engine) -> None:
        got, ended_by = await raw(engine, STREAM)
        assert ended_by is error
        assert got.startswith(b"HTTP/1.1 200")
        # A reset may overtake the last chunk; the end of a chunked body is never there.
        assert got.count(b"data: ") in ({3} if kind == "close" else {2, 3})
        assert b"[DONE]" not in got
        assert not got.endswith(b"0\r\n\r\n")

    with_engine(test, f"{kind}@stream,after=3")


def test_a_status_that_comes_too_late_for_a_stream_is_a_reset() -> None:
    async def test(engine: Engine) -> None:
        got, ended_by = await raw(engine, STREAM)
        assert got.startswith(b"HTTP/1.1 200")
        assert ended_by is ConnectionResetError

    with_engine(test, "status=500@work,delay=0.1")


@pytest.mark.parametrize(("phase", "body"), [("arrival", BODY), ("work", BODY), ("stream", STREAM)])
def test_a_hung_request_is_neither_answered_nor_closed(phase: str, body: dict[str, Any]) -> None:
    async def test(engine: Engine) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await raw(engine, body)
        await until(lambda: engine.records[0].aborted_unix is not None)

    with_engine(test, f"hang@{phase}")


def test_a_slow_reader_takes_no_more_of_the_body_and_notices_the_end() -> None:
    async def test(engine: Engine) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", engine.port)
        size = 50_000_000
        writer.write(f"POST /generate HTTP/1.1\r\nhost: e\r\ncontent-length: {size}\r\n\r\n".encode())
        writer.write(bytes(size))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await writer.drain()
        async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
            answer = (await http.get(engine.url + "/sim/state")).json()
            assert (answer["open"], answer["open_requests"]) == (0, 1)
            # With a reset, as its end would wait behind the data that nobody reads.
            linger = b"\1\0\0\0\0\0\0\0"
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            await until(lambda: engine.records[0].aborted_unix is not None)

    with_engine(test, "hang@upload,count=1")


def test_a_slow_reader_reads_on_when_the_fault_is_switched_off() -> None:
    async def test(engine: Engine) -> None:
        async with httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S) as http:
            held = asyncio.create_task(http.post("/generate", content=bytes(20_000_000)))
            await until(lambda: len(engine.records) == 1)
            await asyncio.sleep(0.2)
            held.cancel()
            await asyncio.sleep(0.2)
            assert engine.records[0].aborted_unix is None  # its end waits behind the data that nobody reads
            await http.delete("/sim/faults")
            await until(lambda: engine.records[0].aborted_unix is not None)

    with_engine(test, "hang@upload")


def test_the_process_dies() -> None:
    command = [sys.executable, "-m", "extproc.sim", "--port", "0", "--fault", "die@stream,after=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[3]
            with (
                pytest.raises(httpx.RemoteProtocolError),
                httpx.stream("POST", url + "/generate", json=STREAM, timeout=PATIENCE_S) as answer,
            ):
                answer.read()
            assert process.wait(PATIENCE_S) == EXIT_STATUS
            last = process.stdout.read()
        finally:
            process.kill()
    assert last.startswith("simulated fault: die@stream,after=2 at ")
    assert abs(float(last.split()[-1]) - time.time()) < PATIENCE_S


def test_faults_are_switched_at_run_time() -> None:
    async def test(engine: Engine) -> None:
        async with httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S) as http:
            assert (await http.get("/sim/faults")).json() == []
            put = await http.put("/sim/faults", json=["status=500,count=1", "health=down"])
            assert [entry["fault"] for entry in put.json()] == ["status=500,count=1", "health=down"]
            assert [(await http.post("/generate", json=BODY)).status_code for _ in range(2)] == [500, 200]
            assert (await http.get("/health")).status_code == 503
            for bad, part in (('["explode"]', "explode"), ('"reset"', "array"), ("[", "truncated")):
                answer = await http.put("/sim/faults", content=bad)
                assert answer.status_code == 400
                assert part in answer.json()["error"]
            assert [entry["hits"] for entry in (await http.get("/sim/faults")).json()] == [1, 1]
            assert (await http.delete("/sim/faults")).json() == []
            assert (await http.get("/health")).status_code == 200

    with_engine(test)


@pytest.mark.parametrize("path", ["/metrics", "/v1/loads"])
@pytest.mark.parametrize("kind", ["down", "garbage", "html", "redirect", "huge", "gzip-bomb", "slow"])
def test_pages_with_figures_go_wrong(kind: str, path: str) -> None:
    async def test(engine: Engine) -> None:
        async with (
            httpx.AsyncClient(base_url=engine.url, timeout=PATIENCE_S) as http,
            http.stream("GET", path) as answer,
        ):
            assert answer.status_code == {"down": 503, "redirect": 302}.get(kind, 200)
            if kind == "slow":
                chunks = [chunk async for chunk in take(answer.aiter_raw(), 2)]
                assert sum(map(len, chunks)) < 1000
                return
            if kind == "huge":
                assert sum([len(chunk) async for chunk in answer.aiter_raw()]) > 0.99 * HUGE_BYTES
                return
            body = b"".join([chunk async for chunk in answer.aiter_raw()])
            if kind == "gzip-bomb":
                assert answer.headers["content-encoding"] == "gzip"
                assert len(body) < BOMB_BYTES / 500
                unpacker, size = zlib.decompressobj(wbits=31), 0
                while body and size < BOMB_BYTES / 8:
                    size += len(unpacker.decompress(body, 1 << 20))
                    body = unpacker.unconsumed_tail
                assert size >= BOMB_BYTES / 8
            elif kind == "redirect":
                assert answer.headers["location"] == f"{path}?again"
            elif kind == "html":
                assert answer.headers["content-type"].startswith("text/html")

    with_engine(test, f"metrics={kind}")


async def take(source: Any, count: int) -> Any:
    async for item in source:
        yield item
        count -= 1
        if not count:
            return


def test_a_wrong_flag_is_explained() -> None:
    command = [sys.executable, "-m", "extproc.sim", "--fault", "reset@nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 2
    assert "phase 'nowhere' is not one of upload, arrival, work, stream" in done.stderr
