"""How other threads talk to the peer loop: in order, and with one wake-up for many messages.

Waking a loop costs a system call, so it is done only when the mailbox was empty. A `VisitedLoop` need not even be
woken: while it sleeps, other threads may act in its stead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import selectors
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from runtime.errors import Closed

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Doorkeeper(selectors.DefaultSelector):
    """Leaves a door open while the loop sleeps; otherwise the loop holds it, or `waits` for it.

    The door is an RLock for one thing: it knows who holds it. A handler of a signal may raise between any two
    steps, also while a lock is being taken, and a door that somebody else holds must not be opened then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.door = threading.RLock()
        self.door.acquire()
        self.waits = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        self.door.release()
        try:
            return super().select(timeout)
        finally:
            self.waits = True
            self.door.acquire()
            self.waits = False

    def close(self) -> None:
        """Nobody comes in any more, and who is `outside` gets on."""
        super().close()
        self.waits = True
        self.door.release()

    def inside(self) -> bool:
        """Is the calling thread a visitor?"""
        return self.door._is_owned() and threading.get_ident() != self.thread  # type: ignore[attr-defined]

    def visit(self, work: Callable[..., bool], *args: Any) -> bool:
        """See `Mailbox.visit`."""
        if self.waits or self.inside():
            return False
        try:
            return self.door.acquire(blocking=False) and work(*args)
        finally:
            if self.inside():
                self.door.release()

    def come_back(self) -> None:
        """Take the door again, whatever handlers of signals raise meanwhile: that is raised afterwards."""
        raised: BaseException | None = None
        while not self.inside():
            try:
                self.door.acquire()
            except BaseException as error:  # noqa: BLE001 - raised below
                raised = error
        if raised is not None:
            raise raised


class VisitedLoop(asyncio.SelectorEventLoop):
    """A loop whose state other threads may use while it sleeps; see `Mailbox.visit`. Made on the thread that runs it."""

    def __init__(self) -> None:
        self.keeper = _Doorkeeper()
        super().__init__(self.keeper)

    def outside(self, wait: Callable[..., T], *args: Any) -> T:
        """`wait(*args)`, during which the loop goes on though this thread may be visiting it: the handlers of
        signals run anywhere."""
        keeper = self.keeper
        if not keeper.inside():
            return wait(*args)
        try:
            keeper.door.release()
            return wait(*args)
        finally:
            try:
                keeper.come_back()
            finally:
                with contextlib.suppress(RuntimeError):  # it is closed by now
                    self.call_soon_threadsafe(
                        _nothing
                    )  # it sees to what the rest of the visit leaves


def _nothing() -> None: ...


class Mailbox:
    """Work for the loop from any thread. Made on the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._thread = threading.get_ident()
        self._queue: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._woken = False
        self._visited = loop if isinstance(loop, VisitedLoop) else None
        self.delivering = False
        """Does what runs on the loop now come from another thread?"""

    def on_loop_thread(self) -> bool:
        """Is the caller on the loop's own thread?"""
        return threading.get_ident() == self._thread

    def post(self, work: Callable[..., None], *args: Any) -> None:
        """Run `work(*args)` on the loop, after everything posted before it. Raises `Closed` when the
        loop is closed."""
        self._queue.append((work, args))
        try:
            if not self._woken:
                self._woken = True
                self.loop.call_soon_threadsafe(self._deliver)
            elif self.loop.is_closed():  # before it looked
                raise RuntimeError
        except RuntimeError as error:
            raise Closed("the peer loop of this process has been closed") from error

    def run(self, work: Callable[..., None], *args: Any) -> None:
        """From any thread: at once where this is the loop's, else as `post`."""
        if self.on_loop_thread():
            work(*args)
        else:
            self.post(work, *args)

    def visit(self, work: Callable[..., bool], *args: Any) -> bool:
        """On another thread: `work(*args)` here and now, if the loop sleeps and nothing was posted; else False.
        It may use what is the loop's, but must neither schedule anything (`post` does) nor take long."""
        loop = self._visited
        return loop is not None and not self._queue and loop.keeper.visit(self._called, work, args)

    def outside(self, wait: Callable[..., T], *args: Any) -> T:
        """`wait(*args)`, which blocks this thread until the loop has done something."""
        return wait(*args) if self._visited is None else self._visited.outside(wait, *args)

    def _called(self, work: Callable[..., bool], args: tuple[Any, ...]) -> bool:
        return not self._queue and work(*args)

    def _deliver(self) -> None:
        # The flag goes down first: whoever appends after this line wakes the loop again, whoever
        # appended before it is found below.
        self._woken = False
        queue = self._queue
        self.delivering = True
        for _ in range(len(queue)):
            work, args = queue.popleft()
            try:
                work(*args)
            except Exception:  # what one message does wrong must not keep back the others
                logger.exception("%r failed on the peer loop", work)
        self.delivering = False
        if queue and not self._woken:
            self._woken = True
            self.loop.call_soon(self._deliver)
