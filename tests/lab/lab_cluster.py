"""What the lab's tests share: small workloads, and the simulated engines' own model as a second opinion."""

import random
from collections.abc import Sequence

from extproc.lab.request import Flight, TraceRequest
from extproc.lab.settings import Settings
from extproc.sim.job import Event, EventKind, Job, Role
from extproc.sim.model import EngineModel

FOREVER_S = 1e9


def poisson(count: int, per_s: float, seed: int, longest_prompt: int = 20_000, longest_output: int = 800):
    """Poisson arrivals, uniform lengths."""
    rng = random.Random(seed)
    at_s, requests = 0.0, []
    for _ in range(count):
        requests.append(TraceRequest(at_s, rng.randint(1, longest_prompt), rng.randint(1, longest_output)))
        at_s += rng.expovariate(per_s)
    return requests


def step_by_step(settings: Settings, flights: Sequence[Flight]) -> list[Job]:
    """The same requests, sent to the same ranks, through `extproc.sim`'s engines: the decode jobs, with their times."""
    prefill = EngineModel(Role.PREFILL, settings.prefill.total_ranks, settings.gpu, bootstrap_timeout_s=FOREVER_S)
    decode = EngineModel(Role.DECODE, settings.decode.total_ranks, settings.gpu, waiting_timeout_s=FOREVER_S)
    prefill_jobs: list[Job] = []
    decode_jobs: list[Job] = []

    def carry_out(events: list[Event]) -> None:
        for event in events:
            room = event.job.room
            if event.kind is EventKind.KV_ALLOCATED:
                carry_out(prefill.announce(prefill_jobs[room].rank, room, event.at_s))
            elif event.kind is EventKind.KV_SENT:
                carry_out(decode.received(decode_jobs[room], event.at_s))
                carry_out(prefill.taken(event.job, event.at_s))
            else:
                assert event.kind is not EventKind.FAILED, event

    while True:
        number = len(decode_jobs)
        arrival_s = flights[number].arrival_s if number < len(flights) else None
        due = [at_s for at_s in (prefill.next_s(), decode.next_s(), arrival_s) if at_s is not None]
        if not due:
            return decode_jobs
        now_s = min(due)
        carry_out(prefill.advance(now_s))
        carry_out(decode.advance(now_s))
        if arrival_s is not None and arrival_s <= now_s:
            flight = flights[number]
            sent = Job(f"p{number}", flight.request.prompt_tokens, 1, number, flight.prefill_rank)
            wanted = Job(
                f"d{number}", flight.request.prompt_tokens, flight.request.output_tokens, number, flight.decode_rank
            )
            prefill.admit(sent)
            decode.admit(wanted)
            prefill_jobs.append(sent)
            decode_jobs.append(wanted)
            carry_out(prefill.submit(sent, now_s))
            carry_out(decode.submit(wanted, now_s))
