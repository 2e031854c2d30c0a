"""Where plain handlers run: a `PlainRunner`, by default one thread that takes them in order.

A worker whose main thread has nothing else to do gives a runner of its own, that runs them there.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger(__name__)


class PlainRunner(Protocol):
    """Runs what is submitted one at a time, in order, on a thread that is not the loop's."""

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` soon. Called on the loop's thread; must not block."""
        ...


class ThreadRunner:
    """A `PlainRunner` of `threads` daemon threads, started with the first work.

    `prepare` is called first in each thread (it sets the rank's device). The threads are daemons: a
    handler that hangs must not keep a process alive that is to end.
    """

    def __init__(
        self, name: str, *, threads: int = 1, prepare: Callable[[], None] | None = None
    ) -> None:
        self._name = name
        self._prepare = prepare
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, work: Callable[[], None]) -> None:
        self._work.put(work)
        if len(self._threads) < self._wanted:
            number = len(self._threads)
            thread = threading.Thread(target=self._run, name=f"{self._name}-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End the threads after what they do now; what is still queued is not run."""
        while True:
            try:
                self._work.get_nowait()
            except queue.Empty:
                break
        for _ in self._threads:
            self._work.put(None)

    def alive(self) -> bool:
        """Does any thread still run?"""
        return any(thread.is_alive() for thread in self._threads)

    def _run(self) -> None:
        try:
            if self._prepare is not None:
                self._prepare()
        except Exception:  # user-visible set-up (a device): handlers can still say what they miss
            logger.exception("%s: preparing the thread for handlers failed", self._name)
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException:  # sys.exit() in a handler: answered; the thread goes on
                logger.exception("%s: a handler asked the thread to end", self._name)
            del work  # it may hold gigabytes, and the next may be long in coming
