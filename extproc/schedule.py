"""Request + load table → placement: a worker and a rank for both legs, a room, and the leases that pay for it.

No I/O, no `await`: what it picks is charged before the next request is looked at.
"""

import random
from collections.abc import Collection, Sequence

from extproc.config import Config
from extproc.errors import NoWorker, Overloaded
from extproc.explain import Explanation, Recorder, describe
from extproc.load import Lease, LoadTable, WorkerState
from extproc.load_model import make_load_model
from extproc.model import DECODE, PREFILL, Pick, Placement, Role
from extproc.policy import PolicyContext, make_rank_policy, make_worker_policy
from extproc.request import GenerationRequest
from extproc.rooms import Rooms
from extproc.values import Value


class Scheduled(Value, frozen=True):
    """A placement and what it has charged."""

    placement: Placement
    prefill: Lease
    decode: Lease
    explanation: Explanation | None = None
    """Where that is switched on."""


class Scheduler:
    """Composes the worker policy and the rank policy of each role."""

    def __init__(self, config: Config, table: LoadTable, rng: random.Random) -> None:
        """Raises ConfigError when the configuration names an unknown policy or load model."""
        self.loads = make_load_model(config.load_model, table.clock)
        """What the policies compare by."""
        self._recorder = Recorder(self.loads) if config.explain else None
        context = PolicyContext(config, self._recorder or self.loads, rng, table.clock)
        self._table = table
        self._most_in_flight = config.max_concurrent_requests
        self._max_requests = config.max_worker_requests
        self._max_tokens = config.max_rank_tokens
        self._rooms = Rooms(rng)
        self._workers = {role: make_worker_policy(config.worker_policy(role), context) for role in Role}
        self._ranks = {role: make_rank_policy(config.rank_policy(role), context) for role in Role}
        self._closed = False

    @property
    def reads_prompts(self) -> bool:
        """Whether a worker policy picks by the text of prompts."""
        return any(policy.reads_prompts for policy in self._workers.values())

    def close(self) -> None:
        """Pick nothing more: NoWorker for whatever comes now."""
        self._closed = True

    def place(self, request: GenerationRequest, *, avoid: Collection[str] = ()) -> Scheduled:
        """Place a request and charge it. `avoid`: names of workers that failed it before, used only as a last resort.

        Raises NoWorker when a role has no healthy worker, Overloaded when it has no room; then nothing is charged.
        """
        self._check_concurrency()
        recorder = self._recorder
        prefill, prefill_rank = self._pick(PREFILL, request, avoid)
        compared = recorder.take() if recorder else ()
        decode, decode_rank = self._pick(DECODE, request, avoid)
        if prefill_rank is None:
            room = self._rooms.draw(request.rooms)
        else:  # so that an engine that goes by the room agrees with the pick
            room = self._rooms.draw(request.rooms, modulus=len(prefill.ranks), residue=prefill_rank)
        # Where the engine decides, it goes by the room, modulo its ranks.
        prefill_charged = room % len(prefill.ranks) if prefill_rank is None else prefill_rank
        decode_charged = room % len(decode.ranks) if decode_rank is None else decode_rank
        if self._max_tokens is not None:
            self._check_room_for(request, prefill, prefill_charged, self._max_tokens)
            self._check_room_for(request, decode, decode_charged, self._max_tokens)
        explanation = None
        if recorder:
            now_s = self._table.clock()
            explanation = Explanation(
                describe(self.loads, (prefill, prefill_charged), compared, now_s),
                describe(self.loads, (decode, decode_charged), recorder.take(), now_s),
            )
        self._workers[PREFILL].placed(request, prefill, prefill_charged)
        self._workers[DECODE].placed(request, decode, decode_charged)
        table, limit, prompts = self._table, request.max_output_tokens, request.batch_size
        prefill_lease = table.charge(prefill, prefill_charged, request.prompt_tokens)
        decode_lease = table.charge(
            decode,
            decode_charged,
            request.prompt_tokens,
            table.expected_output(limit, prompts),
            after=prefill_lease if prompts == 1 else None,  # of a batch only the longest would show: nothing is learned
            max_output=limit,
        )
        placement = Placement(Pick(prefill.worker, prefill_rank), Pick(decode.worker, decode_rank), room)
        return Scheduled(placement, prefill_lease, decode_lease, explanation)

    def pick_direct(self) -> WorkerState:
        """A decode worker for a request that generates nothing. Raises NoWorker."""
        return self._workers[DECODE].pick(self._candidates(DECODE), None).state

    def check_available(self) -> None:
        """Raise NoWorker or Overloaded unless both roles have a healthy worker that may be sent something."""
        self._check_concurrency()
        self._candidates(PREFILL)
        self._candidates(DECODE)

    def _check_concurrency(self) -> None:
        """Raise Overloaded when as many requests are in flight as may be; one is until its decode leg ends."""
        if self._most_in_flight <= 0:
            return
        in_flight = self._table.in_flight[DECODE]
        if in_flight >= self._most_in_flight:
            raise Overloaded(f"{in_flight} requests are in flight, as many as may be: try again later")

    def _candidates(self, role: Role, avoid: Collection[str] = ()) -> Sequence[WorkerState]:
        if self._closed:
            raise NoWorker("this gateway is stopping: try again")
        states = self._table.eligible(role)
        if not states:
            known = [state for state in self._table.states if state.worker.role is role]
            draining = sum(state.draining for state in known)
            counts = f"{len(known)} configured, {draining} draining" if draining else f"{len(known)} configured"
            raise NoWorker(f"no healthy {role} worker ({counts}): try again later")
        if self._max_requests is not None:
            states = [state for state in states if state.in_flight < self._max_requests]
            if not states:
                raise Overloaded(f"every {role} worker has {self._max_requests} requests in flight: try again later")
        if avoid:
            return [state for state in states if state.worker.name not in avoid] or states
        return states

    def _check_room_for(self, request: GenerationRequest, state: WorkerState, dp_rank: int, most_tokens: int) -> None:
        """Raise Overloaded when the request would put more on the rank than is allowed; on an idle rank it may."""
        (loads,) = self.loads.rank_loads((state,)).tokens
        if loads[dp_rank] > 0 and loads[dp_rank] + request.prompt_tokens > most_tokens:
            raise Overloaded(f"the {state.worker.role} workers have as many tokens as they may have: try again later")

    def _pick(self, role: Role, request: GenerationRequest, avoid: Collection[str]) -> tuple[WorkerState, int | None]:
        """The worker, and the rank to ask for: None where there is nothing to choose, or the engine is to choose."""
        choice = self._workers[role].pick(self._candidates(role, avoid), request)
        state, dp_rank = choice.state, choice.dp_rank
        if len(state.ranks) == 1:
            return state, None
        if dp_rank is None:
            dp_rank = self._ranks[role].select_dp_rank(state, request.prompt_tokens, choice.rank_tokens)
        return state, dp_rank
