"""`make chaos`: breaks a gateway in every way of the table, and prints what was seen. Real Envoy, simulated engines.

python tests/chaos/run.py [--rows 2,5] [--count 60]
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from chaos_clients import (
    PREFILL_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    client_leaves_rows,
    overload,
    prefill_hangs,
    stalled_prefill_reader,
    stalled_upload,
)
from chaos_field import Field, running_field
from chaos_fleet import DEATHS, PAGES, all_down, bad_pages, killed_under_load, run_death
from chaos_legs import CASES, run_case
from chaos_rows import Row, print_rows
from chaos_service import (
    apart,
    gateway_stopped,
    service_killed,
    service_stopped,
    worker_draining,
    wrong_prefill_streams,
)
from rich.console import Console

Step = tuple[int, Callable[[], Awaitable[Row | list[Row]]]]
EVERYTHING = tuple(range(1, 15))
TABLE_WIDTH = 200


def steps(field: Field, count: int) -> Iterable[Step]:
    """What can be done with a stack as it is."""
    for case in CASES:
        yield case.number, partial(run_case, field, case, count)
    for death in DEATHS:
        yield death.number, partial(run_death, field, death)
    yield 6, partial(client_leaves_rows, field, count)
    yield 7, partial(all_down, field, "prefill", count)
    yield 7, partial(all_down, field, "decode", count)
    yield 8, partial(killed_under_load, field, "prefill")
    yield 8, partial(killed_under_load, field, "decode")
    for kind in PAGES:
        yield 11, partial(bad_pages, field, kind)
    yield 12, partial(overload, field)
    yield 10, partial(worker_draining, field, "prefill")
    yield 10, partial(worker_draining, field, "decode")
    yield 10, partial(gateway_stopped, field)


def steps_with_time_out(field: Field, count: int) -> Iterable[Step]:
    """What ends by a time-out: the gateway's are short."""
    yield 3, partial(prefill_hangs, field, count)
    yield 13, partial(stalled_prefill_reader, field)
    yield 13, partial(stalled_upload, field, count)


async def run(numbers: Iterable[int], count: int, console: Console) -> list[Row]:
    """The rows with these numbers, in the order in which they were done."""
    rows: list[Row] = []

    async def do(planned: Iterable[Step]) -> None:
        for number, step in planned:
            if number in numbers:
                done = await step()
                for row in done if isinstance(done, list) else [done]:
                    console.print(f"{row.number:2} {row.fault}: {row.verdict}", markup=False)
                    rows.append(row)

    async with running_field() as field:
        await do(steps(field, count))
        if {9, 10, 14} & set(numbers):
            async with apart(field) as service:
                await do(
                    [
                        (14, partial(wrong_prefill_streams, field, service, count)),
                        (9, partial(service_killed, field, service, 3)),
                        (10, partial(service_stopped, field, service)),
                    ]
                )
        if {3, 13} & set(numbers):
            limits = [
                "--prefill-timeout-secs",
                str(PREFILL_TIMEOUT_S),
                "--request-timeout-secs",
                str(REQUEST_TIMEOUT_S),
            ]
            await field.do(lambda: field.stack.restart_gateway([*limits, "--disable-circuit-breaker"]))
            await do(steps_with_time_out(field, count))
    return sorted(rows, key=lambda row: row.number)


def main() -> int:
    """0 when everything holds that is there."""
    parser = argparse.ArgumentParser(description="Break a gateway in every way of the table, and measure.")
    parser.add_argument("--rows", default=EVERYTHING, type=_numbers, metavar="N,N", help="these only (default: all)")
    parser.add_argument("--count", default=60, type=int, metavar="N", help="requests a fault (default: 60)")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    rows = asyncio.run(run(options.rows, options.count, console))
    print_rows(rows, console)
    return int(any(row.failed for row in rows if not row.missing))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
