"""The demo from beginning to end: start everything, send the requests, check the answers, compare the spreads."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from extproc.config import Config
from extproc.demo import report
from extproc.demo.child import exit_reason
from extproc.demo.clients import send_all
from extproc.demo.spread import RankUse, use_of_ranks
from extproc.demo.stack import Stack, StackError
from extproc.demo.verify import EngineRecords, Result, verify
from extproc.demo.workload import Request, make_requests

IDLE_TIMEOUT_S = 10.0
"""After the last answer nothing is left to do; a prefill leg may end a moment later."""
LOG_LINES = 15


@dataclass(frozen=True, slots=True)
class Options:
    """What can be set on the command line."""

    prefill: int = 2
    decode: int = 2
    dp_size: int = 2
    requests: int = 160
    concurrency: int = 32
    seed: int = 1
    time_scale: float = 2.0
    """How much faster than the modelled GPU the engines are."""
    load_check_interval_s: float = 10.0
    """The service's default."""
    keep: bool = False
    log_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One run of all requests, checked."""

    results: Sequence[Result]
    problems: Sequence[str]
    """Those that belong to no request."""
    uses: Sequence[RankUse]
    repeated: int
    """Legs of attempts that failed and that the gateway made again elsewhere."""
    duration_s: float

    @property
    def right(self) -> bool:
        """Whether every request was answered right, and nothing else was wrong."""
        return not self.problems and not any(result.problems for result in self.results)


def show(options: Options, console: Console) -> bool:
    """Run the demo; whether every request was answered right. Raises StackError."""
    requests = make_requests(options.requests, options.seed)
    flags = ("--worker-load-check-interval", f"{options.load_check_interval_s:g}")
    report.say(
        console,
        f"Starting {options.prefill} prefill and {options.decode} decode engines (simulated SGLang, dp_size "
        f"{options.dp_size} each), the ext_proc service and an Envoy …",
    )
    with Stack(
        prefill=options.prefill,
        decode=options.decode,
        dp_size=options.dp_size,
        up_flags=flags,
        engine_flags=("--time-scale", f"{options.time_scale:g}"),
        log_dir=options.log_dir,
    ) as stack:
        report.print_processes(console, stack)
        prompts = sum(len(request.prompt_tokens) for request in requests)
        tokens = sum(sum(request.prompt_tokens) for request in requests)
        report.say(
            console,
            f"Sending {len(requests)} requests, {options.concurrency} at a time (seed {options.seed}): {prompts:,} "
            f"prompts of {tokens:,} tokens in all, log-normal, the longest of "
            f"{max(max(request.prompt_tokens) for request in requests):,}. The gateway picks DP ranks by "
            "minimum_tokens (--dp-minimum-tokens-scheduler) and scrapes the engines' loads every "
            f"{options.load_check_interval_s:g} s (--worker-load-check-interval). The engines run at "
            f"{options.time_scale:g}x the speed of the modelled GPU.",
        )
        batch = _run(stack, requests, options.concurrency, console, ranks_picked=True)
        report.print_results(console, batch.results)
        report.print_ranks(console, batch.uses)
        right = _judge(console, stack, batch)
        if right:
            right = _compare(stack, requests, options, flags, batch=batch, console=console)
        if options.keep:
            _keep(stack, console)
    return right


def _compare(
    stack: Stack,
    requests: Sequence[Request],
    options: Options,
    flags: Sequence[str],
    *,
    batch: Batch,
    console: Console,
) -> bool:
    """The same requests, in the same order, to the same engines, with the rank left to the engines."""
    report.say(
        console,
        "Now the same requests in the same order, with --no-dp-minimum-tokens-scheduler: the gateway picks no rank, "
        "and an engine takes room % dp_size.",
    )
    stack.restart_gateway([*flags, "--no-dp-minimum-tokens-scheduler"])
    baseline = _run(stack, requests, options.concurrency, console, ranks_picked=False)
    report.print_comparison(console, ("minimum_tokens", "room % dp_size"), (batch.uses, baseline.uses))
    report.say(
        console,
        "Compared: tokens that passed through each rank's KV cache during the run (prefill: prompts; decode: prompts "
        "and output), the largest over the mean: 1 is even. Which worker gets a request is up to the worker policy "
        f"({Config().policy}) both times, so totals of workers differ, and rows of all workers show both choices "
        "together. "
        "Without picked ranks each prompt of a batch has a rank of its own; with them a batch stays together.",
        style="dim",
    )
    right = _judge(console, stack, baseline)
    if options.keep:
        stack.restart_gateway(flags)
    return right


def _run(stack: Stack, requests: Sequence[Request], concurrency: int, console: Console, *, ranks_picked: bool) -> Batch:
    """Send all requests, then check them against what the engines recorded."""
    for engine in stack.engines:
        engine.forget_requests()
    started_s = time.perf_counter()
    with report.progress(console, "answered", len(requests)) as answered:
        answers = asyncio.run(send_all(stack.url, requests, concurrency, answered))
    duration_s = time.perf_counter() - started_s
    problems: list[str] = []
    engines = []
    for engine in stack.engines:
        records = []
        try:
            _wait_until_idle(stack, engine.label)
            records = engine.requests()
        except StackError as error:
            status = engine.process.exit_status
            problems.append(str(error) if status is None else f"engine {engine.label} ended: {exit_reason(status)}")
        engines.append(EngineRecords(engine.label, engine.role, engine.address, engine.dp_size, records))
    results = verify(requests, answers, engines, ranks_picked=ranks_picked)
    rooms = {answer.room for answer in answers}
    repeated = sum(bool(record["rooms"]) and record["rooms"][0] not in rooms for e in engines for record in e.records)
    return Batch(results, problems, use_of_ranks(engines), repeated, duration_s)


def _wait_until_idle(stack: Stack, label: str) -> None:
    """Until an engine has nothing open. Raises StackError when it has for too long, or does not answer."""
    engine = next(engine for engine in stack.engines if engine.label == label)
    deadline_s = time.monotonic() + IDLE_TIMEOUT_S
    while still_open := engine.state()["open"]:
        if time.monotonic() > deadline_s:
            raise StackError(f"engine {label} still has {still_open} prompts open after all answers have ended")
        time.sleep(0.05)


def _judge(console: Console, stack: Stack, batch: Batch) -> bool:
    """Say whether all was right, and if not, what was wrong."""
    if batch.repeated:
        report.say(console, f"{batch.repeated} legs failed and were sent again to another pair by the gateway.")
    if batch.right:
        report.say(
            console,
            f"All {len(batch.results)} answers are right (in {batch.duration_s:.1f} s): text, usage, and both legs "
            "recorded by the engines, with the same room, on the workers and ranks that the response headers name.",
            style="green",
        )
        return True
    wrong = sum(bool(result.problems) for result in batch.results)
    console.print(f"\n{wrong} of {len(batch.results)} requests were not answered right:", style="bold red")
    report.print_problems(console, batch.results, batch.problems)
    console.print("\nThe gateway's last lines:")
    for line in stack.gateway_log.splitlines()[-LOG_LINES:]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    return False


def _keep(stack: Stack, console: Console) -> None:
    """Leave everything running until Ctrl-C, or until the gateway ends. Raises StackError then."""
    body = '{"model": "sim-model", "stream": true, "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]}'
    console.print(f"\nThe gateway keeps running: {stack.url} (metrics: {stack.status_url}/metrics). Try:\n")
    command = f"curl -iN {stack.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
    console.print(command, soft_wrap=True, markup=False)
    console.print("\nCtrl-C stops everything.")
    console.file.flush()
    try:
        while stack.gateway.process.exit_status is None:
            time.sleep(0.5)
    except KeyboardInterrupt:
        console.print("Stopping.")
        return
    raise stack.gateway.process.failure("ended")
