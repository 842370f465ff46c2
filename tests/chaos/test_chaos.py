"""The short version of `make chaos`: every fault a few times, outcomes and generous bounds of time."""

import asyncio
from collections.abc import Iterator

import pytest
from chaos_client import CHAT, chat
from chaos_clients import client_leaves, half_an_upload
from chaos_field import Field, running_field
from chaos_fleet import DEATHS, Death, all_down, bad_pages, run_death
from chaos_legs import CASES, Case, run_case
from chaos_rows import Row
from chaos_service import apart, service_killed, service_stopped, worker_draining, wrong_prefill_streams

pytestmark = pytest.mark.envoy

COUNT = 12
"""Requests where one of two workers is at fault: one test in 4096 would not meet the fault at all."""
SLACK = 20
"""On a shared machine a process may not run for a while: 10 ms become 200 ms, 50 ms a second."""

LEFT_OUT = {
    "one prefill answers 500",
    "one prefill 500 mid-prefill, stream",
    "one prefill closes mid-prefill",
    "decode closes mid-stream",
}
"""Much like others that are here; for `make chaos` only."""


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for the module."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def field(runner: asyncio.Runner) -> Iterator[Field]:
    """A stack for the module; each row begins by calming it."""
    stack = running_field()
    slack, Row.slack = Row.slack, SLACK
    yield runner.run(stack.__aenter__())
    Row.slack = slack
    runner.run(stack.__aexit__(None, None, None))


def check(*rows: Row) -> None:
    """Everything that is promised holds."""
    for row in rows:
        assert not row.failed, f"{row.number} {row.fault}: {row.failed}, clients {row.clients}, {row.notes}"


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in LEFT_OUT], ids=lambda case: case.name)
def test_a_leg_fails(runner: asyncio.Runner, field: Field, case: Case) -> None:
    check(runner.run(run_case(field, case, 4 if case.everywhere else COUNT)))


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: death.name)
def test_an_engine_dies(runner: asyncio.Runner, field: Field, death: Death) -> None:
    check(runner.run(run_death(field, death, rounds=1)))


def test_the_client_leaves_before_headers(runner: asyncio.Runner, field: Field) -> None:
    check(runner.run(client_leaves(field, "before headers", lambda: chat(20, 8000), CHAT, COUNT, leave_after_s=0.06)))


def test_the_client_leaves_while_prefill_hangs(runner: asyncio.Runner, field: Field) -> None:
    leaving = client_leaves(field, "while prefill hangs", chat, CHAT, COUNT, prefill_fault="hang", leave_after_s=0.1)
    check(runner.run(leaving))


def test_the_client_leaves_mid_stream(runner: asyncio.Runner, field: Field) -> None:
    leaving = client_leaves(field, "mid-stream", lambda: chat(200, stream=True), CHAT, COUNT, leave_after_bytes=600)
    check(runner.run(leaving))


def test_the_client_leaves_during_its_upload(runner: asyncio.Runner, field: Field) -> None:
    row = runner.run(client_leaves(field, "during upload", half_an_upload, CHAT, COUNT, leave_after_s=0.1))
    check(row)
    assert row.notes == ["0 attempts at engines"]


def test_all_workers_of_a_role_are_down(runner: asyncio.Runner, field: Field) -> None:
    check(runner.run(all_down(field, "prefill", COUNT)))


@pytest.mark.parametrize("kind", ["garbage", "gzip-bomb"])
def test_metrics_pages_are_wrong(runner: asyncio.Runner, field: Field, kind: str) -> None:
    check(runner.run(bad_pages(field, kind, seconds=1.0)))


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_drains(runner: asyncio.Runner, field: Field, role: str) -> None:
    check(runner.run(worker_draining(field, role)))


def test_the_service_dies_stops_or_is_asked_nonsense(runner: asyncio.Runner, field: Field) -> None:
    async def all_of_them() -> list[Row]:
        async with apart(field) as service:
            return [
                *await wrong_prefill_streams(field, service, 3),
                await service_killed(field, service, 1),
                await service_stopped(field, service),
            ]

    check(*runner.run(all_of_them()))
