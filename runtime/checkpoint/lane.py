"""Calls one after the other in a thread that is there only while there are any.

Nobody has to close it: an idle manager holds no thread, and the interpreter waits at its end for what
was begun. After a fork the child begins with a thread of its own.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Lane:
    """`submit` from any thread; the calls run in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._thread: threading.Thread | None = None

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The future of `function(…)`. Cancelled before its turn, it is never called."""
        future: Future[T] = Future()
        with self._lock:
            self._waiting.append((future, lambda: function(*args, **kwargs)))
            if self._thread is None or not self._thread.is_alive():
                # No daemon: the interpreter's exit must not cut a write off.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=False)
                self._thread.start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
                future, call = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                _settle(future, call)
            del future, call  # or an idle moment would keep the saved bytes alive


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except BaseException as error:  # noqa: BLE001 - it is raised where the future is asked
        future.set_exception(error)
    else:
        future.set_result(result)
