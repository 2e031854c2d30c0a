"""One handler while it runs: who called it, what it waits for, and how its coroutine is stepped.

A handler's first step is taken at once, in the loop pass that brought the call: most handlers end in
it, and a Task for each of them would cost more than all else. Only a coroutine that suspends becomes
a Task, which goes on where the first step ended. During the first step a `Running` stands in for that
task, so that `asyncio.timeout` and `TaskGroup`, which ask for the current task, work from the start.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from typing import Any, NamedTuple, cast

from runtime.peer.calls import Incoming, Outgoing


class CallContext(NamedTuple):
    """What a handler may know about the call that it answers."""

    peer: str
    """Id of the calling process."""
    call_id: int
    """Id of the call, unique in that process; 0 for a one-way call."""
    deadline: float | None
    """When the caller gives up, on this process's loop clock; None for never."""


class Running:
    """A handler that runs. What `current_task()` gives in its first step; the task's face after it."""

    __slots__ = (
        "__weakref__",
        "_begun",
        "_blocked",
        "_ended",
        "_loop",
        "_requests",
        "call",
        "task",
    )

    def __init__(
        self,
        call: Incoming,
        loop: asyncio.AbstractEventLoop,
        blocked: Callable[[Incoming], None],
    ) -> None:
        self.call = call
        self.task: asyncio.Task[Any] | None = None
        self._loop = loop
        self._blocked = blocked
        self._requests = 0
        self._begun = self._ended = False

    @property
    def context(self) -> CallContext:
        call = self.call
        return CallContext(call.client.peer, call.id, call.deadline)

    # -- waits (see `future.Waiter`) ----------------------------------------------------------

    def wait_begins(self, calls: Sequence[Outgoing]) -> None:
        self.call.waits = (*self.call.waits, calls)
        self._blocked(self.call)

    def wait_ends(self, calls: Sequence[Outgoing]) -> None:
        waits = list(self.call.waits)
        for index, awaited in enumerate(waits):
            if awaited is calls:
                del waits[index]
                break
        self.call.waits = tuple(waits)

    # -- the first step, and what goes on after it --------------------------------------------

    def step(self, work: Coroutine[Any, Any, Any]) -> tuple[bool, Any]:
        """Take the first step of `work`: (True, result), or (False, what it suspended on)."""
        loop, me = self._loop, cast("asyncio.Task[Any]", self)
        asyncio.tasks._enter_task(loop, me)
        try:
            return False, work.send(None)
        except StopIteration as stop:
            return True, stop.value
        finally:
            asyncio.tasks._leave_task(loop, me)

    async def rest(self, work: Coroutine[Any, Any, Any], suspended_on: Any) -> Any:
        """Go on with `work` after its first step; runs as a Task."""
        self._begun = True
        for _ in range(self._requests):
            self._real.cancel()
        try:
            return await _resume(work, suspended_on)
        finally:
            # The task's context holds on to us: a circle, if we held on to the task.
            self._ended, self._begun, self.task = True, False, None

    @property
    def _real(self) -> asyncio.Task[Any]:
        assert self.task is not None
        return self.task

    # -- as a task ----------------------------------------------------------------------------

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the handler. Before its task has begun this is kept and done then: a task that is
        cancelled before its first step never enters its coroutine."""
        if self._begun:
            return self._real.cancel(msg)
        self._requests += 1
        return True

    def uncancel(self) -> int:
        if self._begun:
            return self._real.uncancel()
        self._requests = max(0, self._requests - 1)
        return self._requests

    def cancelling(self) -> int:
        return self._real.cancelling() if self._begun else self._requests

    def done(self) -> bool:
        return self._ended

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def get_name(self) -> str:
        return f"rpc {self.call.exported.name}"


@types.coroutine
def _resume(work: Coroutine[Any, Any, Any], suspended_on: Any) -> Generator[Any, Any, Any]:
    # `work` stands in its first await: what it yielded there is yielded to the task in its place.
    while True:
        try:
            yield suspended_on
        except GeneratorExit:
            work.close()
            raise
        except BaseException as error:  # noqa: BLE001 - handed on to `work`, whose it is
            try:
                suspended_on = work.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            return (yield from work)
