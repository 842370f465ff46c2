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
from extproc.policy import make_rank_policy, make_worker_policy
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
        loads = make_load_model(config.load_model)
        self._table = table
        self._rooms = Rooms(rng)
        self._workers = {role: make_worker_policy(config.worker_policy(role), loads, rng) for role in Role}
        self._ranks = {role: make_rank_policy(config.rank_policy(role), loads) for role in Role}

    def place(self, request: GenerationRequest, *, avoid: Collection[str] = ()) -> Scheduled:
        """Place a request and charge it. `avoid`: names of workers that failed it before, used only as a last resort.

        Raises NoWorker when a role has no healthy worker; then nothing is charged.
        """
        prefill = self._workers[Role.PREFILL].pick(self._candidates(Role.PREFILL, avoid), request)
        decode = self._workers[Role.DECODE].pick(self._candidates(Role.DECODE, avoid), request)
        tokens = request.prompt_tokens
        prefill_rank = self._select_rank(prefill, tokens)
        decode_rank = self._select_rank(decode, tokens)
        if prefill_rank is None:
            room = self._rooms.draw(request.batch_size)
        else:  # so that an engine that goes by the room agrees with the pick
            room = self._rooms.draw(request.batch_size, modulus=prefill.worker.rank_count, residue=prefill_rank)
        return Scheduled(
            Placement(Pick(prefill.worker, prefill_rank), Pick(decode.worker, decode_rank), room),
            prefill=self._table.charge(prefill, _rank_or_room(prefill_rank, room, prefill), tokens),
            decode=self._table.charge(
                decode, _rank_or_room(decode_rank, room, decode), tokens, request.max_output_tokens
            ),
        )

    def pick_direct(self) -> WorkerState:
        """A decode worker for a request that generates nothing. Raises NoWorker."""
        return self._workers[Role.DECODE].pick(self._candidates(Role.DECODE), None)

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

    def _select_rank(self, state: WorkerState, tokens: float) -> int | None:
        """None for a worker with one rank, or an unknown number of them: nothing to choose."""
        return self._ranks[state.worker.role].select_dp_rank(state, tokens) if state.worker.rank_count > 1 else None


def _rank_or_room(dp_rank: int | None, room: int, state: WorkerState) -> int:
    """The rank to charge: where the engine decides, it takes the room modulo its ranks."""
    return room % len(state.ranks) if dp_rank is None else dp_rank
