"""An event loop whose clock jumps to the next timer instead of waiting for it: an hour of polling takes no time.

Nothing may wait for the outside world: a loop that has neither a callback nor a timer left is a test that hangs, and
fails.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing left that could ever happen")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._selector_with_clock = _Selector()
        super().__init__(self._selector_with_clock)

    def time(self) -> float:
        return self._selector_with_clock.now_s


def now_s() -> float:
    """The running loop's clock: 0 when the test started."""
    return asyncio.get_running_loop().time()


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in virtual time."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(work)


async def run_for(seconds: float, background: Coroutine[Any, Any, None]) -> None:
    """Lets `background` run for a while, then cancels it; its own exceptions come out here."""
    task = asyncio.ensure_future(background)
    await asyncio.wait([task], timeout=seconds)
    if task.done():
        await task
        raise AssertionError("ended by itself")
    task.cancel()
    await asyncio.wait([task])
