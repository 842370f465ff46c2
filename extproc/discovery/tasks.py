"""One task a worker, all owned by one TaskGroup, with workers coming and going while it runs."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Generic, TypeVar

Target = TypeVar("Target")


class WorkerTasks(Generic[Target]):
    """Runs `work(target)` for each worker in the set, as long as it is in the set.

    A target that changed under the same name has its task replaced. An exception in a task is a bug: it ends `run`.
    """

    def __init__(self, work: Callable[[Target], Coroutine[Any, Any, None]]) -> None:
        self._work = work
        self._targets = dict[str, Target]()
        self._tasks = dict[str, asyncio.Task[None]]()
        self._group: asyncio.TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<WorkerTasks {len(self._targets)} workers, {'running' if self._group else 'stopped'}>"

    @property
    def names(self) -> tuple[str, ...]:
        """The workers in the set."""
        return tuple(self._targets)

    def set(self, targets: Mapping[str, Target]) -> None:
        """Makes `targets` (by worker name) the set: starts what is new, ends what is gone. At any time."""
        for name, target in self._targets.items():
            if targets.get(name) != target and name in self._tasks:
                self._tasks.pop(name).cancel()
        self._targets = dict(targets)
        self._start()

    async def run(self) -> None:
        """Runs until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._start()
                await asyncio.get_running_loop().create_future()  # never done: the group stays open for new workers
        finally:
            self._group = None
            self._tasks.clear()

    def _start(self) -> None:
        if self._group is None:
            return
        for name, target in self._targets.items():
            if name not in self._tasks:
                self._tasks[name] = self._group.create_task(self._work(target), name=f"worker {name}")
