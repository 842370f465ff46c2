"""CPU time of processes and of the machine, from /proc. Linux only; elsewhere everything is None."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds since some origin: differences count."""

    machine_total: float
    machine_idle: float
    client: float
    gateway: float

    @classmethod
    def now(cls, gateway_pid: int) -> Self | None:
        """A look at this moment. `gateway_pid`: its children count, too."""
        try:
            fields = [int(field) / _TICKS_PER_S for field in (_PROC / "stat").read_text().split("\n")[0].split()[1:9]]
            gateway = sum(_process_s(pid) for pid in [gateway_pid, *_children(gateway_pid)])
        except OSError:
            return None
        return cls(sum(fields), fields[3] + fields[4], sum(os.times()[:2]), gateway)


def _process_s(pid: int) -> float:
    # The name in parentheses may hold spaces; utime and stime are fields 14 and 15 of proc(5).
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _children(pid: int) -> list[int]:
    children = []
    for task in (_PROC / str(pid) / "task").iterdir():
        children += [int(child) for child in (task / "children").read_text().split()]
    return [*children, *(grandchild for child in children for grandchild in _children(child))]
