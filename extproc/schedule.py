"""Request + load table → placement: a worker and a rank for both legs, a room, and the leases that pay for it.

No I/O, no `await`: what it picks is charged before the next request is looked at.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from extproc.config import Config
from extproc.errors import NoWorker
from extproc.load import Lease, LoadTable, WorkerState
from extproc.load_model import make_load_model
from extproc.model import Pick, Placement, Role
from extproc.policy import PolicyContext, make_rank_policy, make_worker_policy
from extproc.request import GenerationRequest
from extproc.rooms import Rooms


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A placement and what it has charged."""

    placement: Placement
    prefill: Lease
    decode: Lease


class Scheduler:
    """Composes the worker policy and the rank policy of each role."""

    def __init__(self, config: Config, table: LoadTable, rng: random.Random) -> None:
        """Raises ConfigError when the configuration names an unknown policy or load model."""
        context = PolicyContext(config, make_load_model(config.load_model, table.clock), rng, table.clock)
        self._table = table
        self._rooms = Rooms(rng)
        self._workers = {role: make_worker_policy(config.worker_policy(role), context) for role in Role}
        self._ranks = {role: make_rank_policy(config.rank_policy(role), context) for role in Role}

    def place(self, request: GenerationRequest, *, avoid: Collection[str] = ()) -> Scheduled:
        """Place a request and charge it. `avoid`: names of workers that failed it before, used only as a last resort.

        Raises NoWorker when a role has no healthy worker; then nothing is charged.
        """
        prefill, prefill_rank = self._pick(Role.PREFILL, request, avoid)
        decode, decode_rank = self._pick(Role.DECODE, request, avoid)
        if prefill_rank is None:
            room = self._rooms.draw(request.batch_size)
        else:  # so that an engine that goes by the room agrees with the pick
            room = self._rooms.draw(request.batch_size, modulus=prefill.worker.rank_count, residue=prefill_rank)
        return Scheduled(
            Placement(Pick(prefill.worker, prefill_rank), Pick(decode.worker, decode_rank), room),
            prefill=self._charge(prefill, prefill_rank, room, request),
            decode=self._charge(decode, decode_rank, room, request),
        )

    def pick_direct(self) -> WorkerState:
        """A decode worker for a request that generates nothing. Raises NoWorker."""
        return self._workers[Role.DECODE].pick(self._candidates(Role.DECODE), None).state

    def check_available(self) -> None:
        """Raise NoWorker unless both roles have a healthy worker."""
        for role in Role:
            self._candidates(role)

    def _candidates(self, role: Role, avoid: Collection[str] = ()) -> Sequence[WorkerState]:
        states = self._table.eligible(role)
        if not states:
            known = sum(state.worker.role is role for state in self._table.states)
            raise NoWorker(f"no healthy {role} worker ({known} configured): try again later")
        if avoid:
            return [state for state in states if state.worker.name not in avoid] or states
        return states

    def _pick(self, role: Role, request: GenerationRequest, avoid: Collection[str]) -> tuple[WorkerState, int | None]:
        """The worker, and the rank to ask for: None where there is nothing to choose, or the engine is to choose."""
        state, dp_rank = self._workers[role].pick(self._candidates(role, avoid), request)
        if state.worker.rank_count == 1:
            return state, None
        if dp_rank is None:
            dp_rank = self._ranks[role].select_dp_rank(state, request.prompt_tokens)
        return state, dp_rank

    def _charge(self, state: WorkerState, dp_rank: int | None, room: int, request: GenerationRequest) -> Lease:
        """Charge a leg to its rank; where the engine decides, that is the room modulo its ranks."""
        charged = room % len(state.ranks) if dp_rank is None else dp_rank
        role = state.worker.role
        self._workers[role].placed(request, state, charged)
        output_tokens = request.max_output_tokens if role is Role.DECODE else 0.0
        return self._table.charge(state, charged, request.prompt_tokens, output_tokens)
