"""The asyncio kit: services with a life, named tasks that somebody owns, backoff.

Everything that runs in the background belongs to a `Service`. A service is entered with `async with`
or opened by `start` and ended by `close`; its tasks live in one TaskGroup. What a service does when
it starts and ends is a subclass's business (`_on_start`, `_on_close`); here is what must never differ:
no task outlives its service, no task ends unseen, closing is bounded and may be asked for twice.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from random import Random
from types import TracebackType
from typing import Any, Self, TypeVar

from runtime.errors import Closed, MisuseError, RuntimeFault

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """Something that runs in the background, from `start` to `close`.

    `name` appears in logs and task names. `close_timeout` (seconds) bounds the graceful part of
    `close`, and again the wait for tasks that were cancelled.

    When a task fails, all others are cancelled, and the error comes out of `wait()` and out of the
    `async with` block (whose body is cancelled). `close()` does not raise it: it stands in the log.
    """

    def __init__(self, name: str = "", *, close_timeout: float = 5.0) -> None:
        self._name = name or type(self).__name__
        self._close_timeout = close_timeout
        self._group: asyncio.TaskGroup | None = None
        self._runner: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop: asyncio.Event | None = None
        self._finished: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._closing = False
        self._entered_by: asyncio.Task[Any] | None = None
        self._cancelled_body = False

    # -- life ---------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Started, and neither closing nor failed."""
        return self._group is not None and not self._closing and self._error is None

    async def start(self) -> None:
        """Begin to run. Again while running: nothing. After `close`: `MisuseError`."""
        if self._closing:
            raise MisuseError(
                f"{self._name} was closed; make a new one instead of starting it again"
            )
        if self._runner is not None:
            return
        self._stop, self._finished = asyncio.Event(), asyncio.Event()
        ready = asyncio.Event()
        self._runner = asyncio.get_running_loop().create_task(self._run(ready), name=self._name)
        try:
            await ready.wait()
            await self._on_start()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End: first gracefully (`_on_close`), then by cancelling. Idempotent, bounded, never raises
        what a task raised. A second caller waits for the first."""
        if self._closing:
            if self._finished is not None:
                await self._finished.wait()
            return
        self._closing = True
        if self._runner is None or self._stop is None or self._finished is None:
            return
        try:
            async with asyncio.timeout(self._close_timeout) as limit:
                await self._on_close()
        except TimeoutError:
            if not limit.expired():
                raise
            logger.warning("%s did not close within %g s", self._name, self._close_timeout)
        finally:
            self._stop.set()
            try:
                await self._stop_tasks(self._runner)
            finally:
                self._finished.set()

    async def wait(self) -> None:
        """Return once the service has ended. Raises the error of the task that failed, if one did."""
        if self._runner is None:
            return
        await asyncio.wait({self._runner})
        if self._error is not None:
            raise self._error

    async def __aenter__(self) -> Self:
        self._entered_by = asyncio.current_task()
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        body, self._entered_by = self._entered_by, None
        try:
            await self.close()
        finally:
            ours = self._cancelled_body and body is not None and body.uncancel() == 0
        if self._error is not None and (error is None or (ours and kind is asyncio.CancelledError)):
            raise self._error

    # -- tasks --------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work` as a task of this service. It may end; if it raises, the service fails."""
        return self._add(work, name, may_end=True)

    def serve(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Run `work`, which is to last as long as the service: ending by itself is a failure, too."""
        return self._add(work, name, may_end=False)

    def _add(self, work: Coroutine[Any, Any, T], name: str, may_end: bool) -> asyncio.Task[T]:
        if self._group is None or self._error is not None:
            work.close()
            raise Closed(f"{self._name} is not running; {name} cannot be started in it")
        full_name = f"{self._name}/{name}"
        task = self._group.create_task(self._guard(work, full_name, may_end), name=full_name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step never enters `work`.
        task.add_done_callback(lambda _: work.close())
        return task

    async def _guard(self, work: Coroutine[Any, Any, T], name: str, may_end: bool) -> T:
        try:
            result = await work
        except Exception as error:
            if not self._closing:
                self._fail(error, name)
            raise
        if not may_end and not self._closing:
            early = RuntimeFault(
                f"task {name} ended although it should run until its service closes"
            )
            self._fail(early, name)
            raise early
        return result

    def _fail(self, error: BaseException, name: str) -> None:
        if self._error is not None:
            return
        logger.error("%s failed: %s: %s", name, type(error).__name__, error, exc_info=error)
        self._error = error
        if self._entered_by is not None:
            self._cancelled_body = True
            self._entered_by.cancel()

    # -- for subclasses -----------------------------------------------------------------------

    async def _on_start(self) -> None:
        """Runs in `start`, when tasks can be spawned. Raising closes the service again."""

    async def _on_close(self) -> None:
        """The graceful part of `close`: tasks still run. Bounded by `close_timeout`; also called
        after a task has failed."""

    # -- the group ----------------------------------------------------------------------------

    async def _run(self, ready: asyncio.Event) -> None:
        # The group is entered and left by this one task, so that start() and close() may be called
        # by different ones.
        assert self._stop is not None
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                ready.set()
                await self._stop.wait()
                for task in self._tasks:
                    task.cancel()
        except* Exception as errors:  # noqa: BLE001 - the end of the line for errors of tasks
            # What made the service fail was logged by _fail; what tasks raise while they are being
            # cancelled is told here, once, since nobody awaits them any more.
            for error in errors.exceptions:
                if error is not self._error:
                    logger.warning(
                        "a task of %s raised while it was stopped: %r", self._name, error
                    )
        finally:
            self._group = None
            ready.set()

    async def _stop_tasks(self, runner: asyncio.Task[None]) -> None:
        _, pending = await asyncio.wait({runner}, timeout=self._close_timeout)
        if pending:
            names = sorted(task.get_name() for task in self._tasks)
            logger.error("%s: these tasks do not stop: %s", self._name, ", ".join(names))


@asynccontextmanager
async def background(work: Coroutine[Any, Any, T], name: str) -> AsyncIterator[asyncio.Task[T]]:
    """Run `work` as a task called `name` beside a block; it is cancelled when the block ends.

    If it fails, the block is cancelled and the error raised in its place. Errors are raised as they
    are, not as a group.
    """
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work, name=name)
            yield task
            task.cancel()
    except BaseExceptionGroup as errors:
        if len(errors.exceptions) != 1:
            raise
        raise errors.exceptions[0] from None


class Backoff:
    """Waits between attempts: doubling from `first` to `limit` seconds, each between half and whole.

    `random` is passed in, so that a test or a simulation knows what is drawn.
    """

    def __init__(
        self, random: Random, *, first: float = 0.05, factor: float = 2.0, limit: float = 2.0
    ) -> None:
        if not 0 < first <= limit or factor < 1:
            raise MisuseError(
                f"backoff first={first} factor={factor} limit={limit}: allowed are 0 < first <= limit "
                "and factor >= 1"
            )
        self._random, self._first, self._factor, self._limit = random, first, factor, limit
        self._delay = first

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        delay, self._delay = self._delay, min(self._delay * self._factor, self._limit)
        return delay * (0.5 + self._random.random() / 2)

    def reset(self) -> None:
        """An attempt succeeded: begin with `first` again."""
        self._delay = self._first

    async def wait(self) -> None:
        """Sleep for `next()` seconds."""
        await asyncio.sleep(self.next())
