"""The result of a call that is under way: for plain code, callbacks, and `await` on any loop.

A `Future` is settled once, by the peer loop or by `cancel`, under a lock of its own. Giving up the
wait (`result(timeout)`) is not giving up the call (`cancel`, or cancelling a task that awaits it).
How calls are made and what settles them stands in `outgoing` and `group`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

from runtime.errors import Closed, MisuseError, Timeout
from runtime.peer.calls import Outgoing
from runtime.peer.mailbox import Mailbox

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

SAY_AFTER_S = 10.0
"""A wait says once what it waits for after this long."""


class Waiter(Protocol):
    """The handler in which a wait happens; it is told, so that a cycle of waits can be found."""

    def wait_begins(self, calls: Sequence[Outgoing]) -> None: ...

    def wait_ends(self, calls: Sequence[Outgoing]) -> None: ...


current_waiter: ContextVar[Waiter | None] = ContextVar("runtime_rpc_handler", default=None)
"""The RPC handler that this code runs in, if any."""


class Future(Generic[T]):
    """What a call gives. `result`, `exception`, `done`, `cancel`, `add_done_callback`, or `await`."""

    __slots__ = (
        "__weakref__",
        "_abandon",
        "_callbacks",
        "_calls",
        "_cancelled",
        "_describe",
        "_done",
        "_error",
        "_lock",
        "_mailbox",
        "_unseen",
        "_value",
    )

    def __init__(
        self,
        mailbox: Mailbox,
        calls: Sequence[Outgoing],
        describe: Callable[[], str],
        abandon: Callable[[Sequence[Outgoing]], None],
    ) -> None:
        self._mailbox = mailbox
        self._calls = calls
        self._describe = describe
        self._abandon = abandon
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Future[T]], object]] = []
        self._done = self._cancelled = self._unseen = False
        self._value: Any = None
        self._error: BaseException | None = None

    # -- asking -------------------------------------------------------------------------------

    def done(self) -> bool:
        """Has it a result, an error, or been cancelled?"""
        return self._done

    def cancelled(self) -> bool:
        """Was it ended by `cancel`?"""
        return self._cancelled

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it, or raise what the call failed with.

        `timeout` in seconds bounds the wait, not the call: after `Timeout` the call goes on and may
        be asked again. Raises `MisuseError` on the peer loop's thread, where waiting would block
        every call of this process: `await` the future there. Raises
        `concurrent.futures.CancelledError` when it was cancelled.
        """
        self._wait(timeout)
        self._unseen = False
        if self._cancelled:
            raise concurrent.futures.CancelledError(f"cancelled: {self._describe()}")
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # or the error, by its traceback, would hold on to itself
        value: T = self._value
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the error instead of raising it; None when the call succeeded."""
        self._wait(timeout)
        self._unseen = False
        if self._cancelled:
            raise concurrent.futures.CancelledError(f"cancelled: {self._describe()}")
        return self._error

    def cancel(self) -> bool:
        """Give the call up: a queued one never starts, an `async` handler is cancelled over there.
        False when it is done already."""
        if not self._settle(None, None, cancelled=True):
            return False
        with contextlib.suppress(Closed):  # and its calls have ended with the loop
            # Behind what another thread may have posted: a call that is still to be made.
            self._mailbox.post(self._abandon, self._calls)
        return True

    def add_done_callback(self, callback: Callable[[Future[T]], object]) -> None:
        """Call `callback(self)` once it is done: at once if it is, else on the thread that settles
        it (mostly the peer loop's: be quick). What it raises is logged."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._call_back(callback)

    def __await__(self) -> Generator[Any, None, T]:
        if not self._done:
            yield from self._suspend()
        self._unseen = False
        if self._cancelled:
            raise asyncio.CancelledError
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # or the error, by its traceback, would hold on to itself
        value: T = self._value
        return value

    def __repr__(self) -> str:
        state = "cancelled" if self._cancelled else "done" if self._done else "pending"
        return f"<Future {state}: {self._describe()}>"

    def __del__(self) -> None:
        if self._unseen and not isinstance(self._error, Closed):
            logger.warning("nobody asked for the error of %s: %r", self._describe(), self._error)

    # -- settling -----------------------------------------------------------------------------

    def set_result(self, value: T) -> bool:
        """Settle with a value. False when it was settled (cancelled, mostly) before."""
        return self._settle(value, None)

    def set_exception(self, error: BaseException) -> bool:
        """Settle with an error. False when it was settled before."""
        return self._settle(None, error)

    def then(self, change: Callable[[T], U]) -> Future[U]:
        """A future of `change(result)`, or of what that raises; errors pass, and cancelling it cancels
        this one. `change` is called as callbacks are."""

        def settle(done: Future[T]) -> None:
            if done._cancelled:
                changed._settle(None, None, cancelled=True)
            elif done.exception() is not None:
                changed._settle(None, done._error)
            else:
                try:
                    changed._settle(change(done._value), None)
                except Exception as error:  # noqa: BLE001 - user code: what it raises is the result
                    changed._settle(None, error)

        def abandon(_: Sequence[Outgoing]) -> None:
            self.cancel()

        changed: Future[U] = Future(self._mailbox, self._calls, self._describe, abandon)
        self.add_done_callback(settle)
        return changed

    def _settle(self, value: Any, error: BaseException | None, cancelled: bool = False) -> bool:
        with self._lock:
            if self._done:
                return False
            self._value, self._error, self._cancelled = value, error, cancelled
            self._unseen = error is not None
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call_back(callback)
        return True

    def _call_back(self, callback: Callable[[Future[T]], object]) -> None:
        try:
            callback(self)
        except Exception:  # user code: its failure must not stop the peer loop
            logger.exception("a callback of %s raised", self._describe())

    # -- waiting ------------------------------------------------------------------------------

    def _wait(self, timeout: float | None) -> None:
        if self._done:
            return
        if self._mailbox.on_loop_thread():
            raise MisuseError(
                f"{self._describe()}: a blocking wait on the peer loop's own thread would never end; "
                "use `await` there (an `async def` method of a proxy, or `await group.call(...)`)"
            )
        waiter = current_waiter.get()
        if waiter is None:
            self._mailbox.outside(self._block, timeout)
            return
        waiter.wait_begins(self._calls)
        try:
            self._mailbox.outside(self._block, timeout)
        finally:
            waiter.wait_ends(self._calls)

    def _block(self, timeout: float | None) -> None:
        # A lock is the cheapest thing that a thread can wait for with a timeout, and signals (so
        # Ctrl-C) get through.
        gate = threading.Lock()
        gate.acquire()

        def open_gate(_: Future[T]) -> None:
            gate.release()

        self.add_done_callback(open_gate)
        begun = time.monotonic()
        patience = SAY_AFTER_S if timeout is None else max(0.0, min(SAY_AFTER_S, timeout))
        if gate.acquire(timeout=patience):
            return
        if timeout is None or timeout > SAY_AFTER_S:
            self._say_waiting()
            if gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout - patience)):
                return
        with self._lock:
            if open_gate in self._callbacks:
                self._callbacks.remove(open_gate)
        waited = time.monotonic() - begun
        raise Timeout(f"no result within {timeout:g} s: {self._describe()}", waited)

    def _suspend(self) -> Generator[Any, None, None]:
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake(_: Any = None) -> None:
            if not woken.done():
                woken.set_result(None)

        def wake_from_afar(_: Any) -> None:
            if loop is self._mailbox.loop and self._mailbox.on_loop_thread():
                wake()
                return
            try:
                loop.call_soon_threadsafe(wake)
            except RuntimeError:
                logger.debug("the loop that awaited %s is closed", self._describe())

        self.add_done_callback(wake_from_afar)
        long = loop.call_later(SAY_AFTER_S, self._say_waiting)
        waiter = current_waiter.get()
        if waiter is not None:
            waiter.wait_begins(self._calls)
        try:
            yield from woken
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            long.cancel()
            if waiter is not None:
                waiter.wait_ends(self._calls)

    def _say_waiting(self) -> None:
        logger.warning("waiting for %g s for %s", SAY_AFTER_S, self._describe())
