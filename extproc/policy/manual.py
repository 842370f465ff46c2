"""`manual`: a routing key stays with the worker it was first given.

Source: `manual` of SGLang's gateway 0.3.2 (header `x-smg-routing-key`): unlike `consistent_hashing`, no key moves
when a worker joins. A key whose worker is away gets a second one, and goes back when the first returns.
Parameters: `assignment_mode` (how a new key gets its worker), `max_idle_secs` (seconds without a request after which
a key is forgotten); `balance_rel_threshold` and `balance_abs_threshold` bound the load: above both, this one request
goes to the least loaded worker, and the key stays where it is.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

from extproc.load import WorkerState
from extproc.policy.base import Choice, PolicyContext, WorkerPolicy
from extproc.policy.fleet import Fleet
from extproc.request import GenerationRequest

MAX_KEYS: Final = 1 << 17
"""Keys remembered, the longest unused of more are forgotten. About 400 bytes each, 52 MB in all."""

MAX_WORKERS: Final = 2
"""Workers remembered for a key (the gateway's `MAX_CANDIDATE_WORKERS`)."""


class Sticky(NamedTuple):
    """What is known of a key."""

    workers: tuple[str, ...]
    """Names, the preferred first; at least one."""
    used_s: float


class Manual(WorkerPolicy):
    """The only state is the map of keys, in the order of their last use."""

    def __init__(self, context: PolicyContext, max_keys: int = MAX_KEYS) -> None:
        self._context = context
        self._fleet = Fleet(context)
        self._max_keys = max_keys
        self._keys = OrderedDict[bytes, Sticky]()
        self._groups = Counter[str]()

    def __len__(self) -> int:
        """Keys remembered."""
        return len(self._keys)

    def pick(self, states: Sequence[WorkerState], request: GenerationRequest | None) -> Choice:
        """The key's worker, or the least loaded while that is over its bound, and where there is no key."""
        self._fleet.see(states)
        if not (request and request.routing_key):
            return Choice(self._fleet.least_loaded(states))
        state = self._of_key(states, request.routing_key)
        return Choice(self._fleet.least_loaded(states) if self._fleet.over_balance(state) else state)

    def _of_key(self, states: Sequence[WorkerState], key: str) -> WorkerState:
        now_s = self._context.clock()
        self._forget(now_s)
        # A header may be long, and clients choose it: only its hash is kept.
        digest = blake2b(key.encode(), digest_size=16).digest()
        known = self._keys.pop(digest, None)
        names = known.workers if known else ()
        state = next((self._fleet.by_name[name] for name in names if name in self._fleet.by_name), None)
        if state is None:
            state = self._assign(states)
            if len(names) == MAX_WORKERS:
                self._leave(names[0])
                names = names[1:]
            names = (*names, state.worker.name)
            self._groups[state.worker.name] += 1
        self._keys[digest] = Sticky(names, now_s)
        self._forget(now_s)
        return state

    def _assign(self, states: Sequence[WorkerState]) -> WorkerState:
        match self._context.config.assignment_mode:
            case "random":
                return self._context.rng.choice(states)
            case "min_load":
                return self._fleet.least_loaded(states)
            case "min_group":
                drawn = self._fleet.draw(states)
                return self._fleet.least(drawn, [float(self._groups[state.worker.name]) for state in drawn])

    def _forget(self, now_s: float) -> None:
        """Drop the keys that are idle for too long, and the longest unused ones that there is no room for."""
        while self._keys:
            digest, sticky = next(iter(self._keys.items()))
            if len(self._keys) <= self._max_keys and now_s - sticky.used_s <= self._context.config.max_idle_secs:
                return
            del self._keys[digest]
            for name in sticky.workers:
                self._leave(name)

    def _leave(self, name: str) -> None:
        self._groups[name] -= 1
        if not self._groups[name]:
            del self._groups[name]
