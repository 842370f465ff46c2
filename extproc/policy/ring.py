"""A consistent-hash ring of worker names: a key keeps its worker while others come and go.

Source: Karger et al., "Consistent Hashing and Random Trees" (1997), with 160 points a worker (SGLang's gateway: 150).
The share of a worker then varies by 1/sqrt(160) = 8 %. Hashes are BLAKE2b, the same in every process, so that
replicas of the service agree.
"""

import struct
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from typing import Final

from extproc.load import WorkerState
from extproc.policy.fleet import Fleet

DIGEST_BYTES: Final = 64
DIGESTS: Final = 20
"""A name: one digest yields 8 points."""
POINTS: Final = DIGESTS * DIGEST_BYTES // 8
"""Points of a worker on the ring."""

MAX_STEPS: Final = 16
"""Workers that `bounded` tries. At most 1 in 1.25 can be above 1.25 times the mean, so 16 in a row are so in 3 % of the
walks at worst, and in practice never."""

_unpack: Final = struct.Struct(f">{DIGEST_BYTES // 8}Q").unpack


def key_point(key: bytes) -> int:
    """Where a key is on the ring."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")


def _points_of(name: str) -> Iterator[int]:
    for number in range(DIGESTS):
        yield from _unpack(blake2b(b"%d/%s" % (number, name.encode()), digest_size=DIGEST_BYTES).digest())


class Ring:
    """Points in order, each with the name it belongs to."""

    def __init__(self) -> None:
        self._points = array("Q")
        self._owners: list[str] = []
        self._members = set[str]()

    def __len__(self) -> int:
        """Names on the ring."""
        return len(self._members)

    def update(self, names: Collection[str]) -> None:
        """Make room for all of `names`.

        Others stay until they are more than half: a worker that a retry avoids, or that is away for a moment, costs
        nothing then. Skipping a name in a walk gives the same owner as taking its points out.
        """
        if len(self._members) > 2 * len(names):
            self._points, self._owners, self._members = array("Q"), [], set()
        added = [name for name in names if name not in self._members]
        if not added:
            return
        points, owners, start = array("Q"), list[str](), 0
        for point, owner in sorted((point, name) for name in added for point in _points_of(name)):
            end = bisect_left(self._points, point, start)
            points += self._points[start:end]
            owners += self._owners[start:end]
            points.append(point)
            owners.append(owner)
            start = end
        self._points = points + self._points[start:]
        self._owners = owners + self._owners[start:]
        self._members.update(added)

    def walk(self, point: int) -> Iterator[str]:
        """Every name once, in the order in which the ring has them from `point` on."""
        owners, seen = self._owners, set[str]()
        start = bisect_left(self._points, point)
        for index in range(start, start + len(owners)):
            name = owners[index % len(owners)]
            if name not in seen:
                yield name
                seen.add(name)
                if len(seen) == len(self._members):
                    return


def bounded(ring: Ring, fleet: Fleet, point: int, over: Callable[[WorkerState], bool]) -> WorkerState | None:
    """The first eligible worker from `point` on that is not `over` its bound; None when MAX_STEPS of them are.

    Source: Mirrokni, Thorup, Zadimoghaddam, "Consistent Hashing with Bounded Loads" (2016). As the walk is the same
    every time, what spills over from a worker also keeps together.
    """
    steps = 0
    for name in ring.walk(point):
        state = fleet.by_name.get(name)
        if state is not None:
            if not over(state):
                return state
            steps += 1
            if steps == MAX_STEPS:
                break
    return None
