"""The engine without its HTTP: which rank takes a request, which rooms are live, how far each rank has got.

No I/O, no clocks: the caller says what time it is (virtual seconds, never going back). A driver's loop is

    events = model.submit(job, now)        # and abort, announce, taken, received
    events = model.advance(now)            # up to now; events carry their own exact times
    wake_up_at(model.next_s())

The HTTP shell drives it with scaled real time; a discrete-event simulation drives it with its own.
"""

from extproc.sim import decode_rank, prefill_rank
from extproc.sim.decode_rank import DecodeRank
from extproc.sim.gpu import GpuModel
from extproc.sim.job import Event, Job, Phase, Rejected, Role
from extproc.sim.prefill_rank import PrefillRank
from extproc.sim.rank import Rank
from extproc.sim.snapshot import Figures
from extproc.sim.unified_rank import UnifiedRank

BOOTSTRAP_TIMEOUT_S = 300.0
"""`SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT`: how long prefill waits for decode."""
WAITING_TIMEOUT_S = 300.0
"""`SGLANG_DISAGGREGATION_WAITING_TIMEOUT`: how long decode waits for the KV cache."""


class EngineModel:
    """`dp_size` ranks of one role, and the rooms that are live on them."""

    def __init__(
        self,
        role: Role,
        dp_size: int = 1,
        gpu: GpuModel | None = None,
        bootstrap_timeout_s: float = BOOTSTRAP_TIMEOUT_S,
        waiting_timeout_s: float = WAITING_TIMEOUT_S,
    ) -> None:
        self.role = role
        self.gpu = gpu or GpuModel()
        self._rooms: set[int] = set()
        self._turn = 0
        self.prefill_ranks: list[PrefillRank] = []
        self.decode_ranks: list[DecodeRank] = []
        self.ranks: list[Rank] = []
        if role is Role.PREFILL:
            self.prefill_ranks = [PrefillRank(i, self.gpu, bootstrap_timeout_s) for i in range(dp_size)]
            self.ranks.extend(self.prefill_ranks)
        elif role is Role.DECODE:
            self.decode_ranks = [DecodeRank(i, self.gpu, waiting_timeout_s) for i in range(dp_size)]
            self.ranks.extend(self.decode_ranks)
        else:
            self.ranks.extend(UnifiedRank(i, self.gpu) for i in range(dp_size))

    def admit(self, job: Job) -> None:
        """Choose the rank, claim the room. Raises `Rejected`; then nothing is held.

        The rank is the explicit one, else `room % dp_size`, else round robin (`managers/data_parallel_controller.py`).
        """
        if job.routed_rank is not None and not 0 <= job.routed_rank < len(self.ranks):
            raise Rejected(400, f"routed_dp_rank={job.routed_rank} is out of range [0, {len(self.ranks)})")
        longest = self.gpu.kv_capacity_tokens
        if self.role is Role.DECODE:
            longest -= self.gpu.reserved_decode_tokens
        if job.prompt_tokens > longest:
            raise Rejected(
                400,
                f"Input length ({job.prompt_tokens} tokens) exceeds the maximum allowed length ({longest} tokens). "
                "Use a shorter input or enable --allow-auto-truncate.",
            )
        if job.room is not None:
            if job.room in self._rooms:
                # The real engine mixes the two requests up or hangs; a simulation had better say so.
                raise Rejected(500, f"bootstrap_room {job.room} is already in use on this {self.role.value} engine")
            self._rooms.add(job.room)
        if job.routed_rank is not None:
            job.rank = job.routed_rank
        elif job.room is not None:
            job.rank = job.room % len(self.ranks)
        else:
            job.rank = self._turn
            self._turn = (self._turn + 1) % len(self.ranks)

    def release(self, job: Job) -> None:
        """Give the room of an admitted job back. The caller's duty once, when the job has ended, however it ended."""
        if job.room is not None:
            self._rooms.discard(job.room)

    def submit(self, job: Job, now_s: float) -> list[Event]:
        """Queue an admitted job."""
        events: list[Event] = []
        rank = self.ranks[job.rank]
        rank.advance(now_s, events)
        job.arrived_s = now_s
        rank.submit(job, now_s, events)
        return events

    def abort(self, job: Job, now_s: float) -> list[Event]:
        """Drop a job, wherever it is; no event tells of it. Harmless when it has ended or was never submitted."""
        events: list[Event] = []
        rank = self.ranks[job.rank]
        rank.advance(now_s, events)
        if job.phase not in (Phase.NEW, Phase.DONE):
            job.generated_tokens = rank.generated(job)
            rank.abort(job, now_s, events)
        return events

    def announce(self, rank: int, room: int, now_s: float) -> list[Event]:
        """Prefill: a decode engine has allocated its side of `room` and waits for it at `rank`."""
        events: list[Event] = []
        self.prefill_ranks[rank].advance(now_s, events)
        self.prefill_ranks[rank].announce(room, now_s, events)
        return events

    def withdraw(self, rank: int, room: int) -> None:
        """Prefill: the decode engine no longer waits for a room whose request has not come."""
        self.prefill_ranks[rank].withdraw(room)

    def taken(self, job: Job, now_s: float) -> list[Event]:
        """Prefill: decode has the KV cache of this job."""
        events: list[Event] = []
        self.prefill_ranks[job.rank].advance(now_s, events)
        self.prefill_ranks[job.rank].taken(job, now_s, events)
        return events

    def received(self, job: Job, now_s: float) -> list[Event]:
        """Decode: the KV cache of this job has come."""
        events: list[Event] = []
        self.decode_ranks[job.rank].advance(now_s, events)
        self.decode_ranks[job.rank].received(job, now_s, events)
        return events

    def advance(self, now_s: float) -> list[Event]:
        """Let everything happen that is due by `now_s`."""
        events: list[Event] = []
        for rank in self.ranks:
            rank.advance(now_s, events)
        return events

    def next_s(self) -> float | None:
        """When something happens next, if nothing comes from outside; None: never."""
        return min((at_s for rank in self.ranks if (at_s := rank.next_s()) is not None), default=None)

    def generated(self, job: Job) -> int:
        """Tokens that an admitted job has so far."""
        return self.ranks[job.rank].generated(job)

    def failure(self, job: Job, reason: str) -> str:
        """What the engine says when the KV transfer of a job goes wrong."""
        if self.role is Role.DECODE:
            return decode_rank.transfer_failed(job.rank, job, reason)
        if job.phase is Phase.BOOTSTRAP:
            return prefill_rank.bootstrap_failed(job.rank, job, reason)
        return prefill_rank.transfer_failed(job.rank, job, reason)

    def figures(self, now_s: float) -> list[tuple[Figures, Figures]]:
        """For each rank what /metrics and what /v1/loads would show at `now_s`."""
        return [rank.figures(now_s) for rank in self.ranks]
