"""The threads that handlers run on."""

from __future__ import annotations

import threading
import time
import weakref

from runtime.peer.threads import ThreadRunner


class Work:
    def __init__(self) -> None:
        self.done = threading.Event()

    def run(self) -> None:
        self.done.set()


def test_a_thread_keeps_nothing_of_the_work_that_it_has_done() -> None:
    runner = ThreadRunner("test")
    work, until = Work(), time.monotonic() + 5
    runner.submit(work.run)
    assert work.done.wait(5)
    gone = weakref.ref(work)
    del work
    while gone() is not None and time.monotonic() < until:
        time.sleep(0.001)
    assert gone() is None
    runner.stop()
    while runner.alive():
        assert time.monotonic() < until
        time.sleep(0.001)
