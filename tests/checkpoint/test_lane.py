"""The thread that works in order and is gone when there is nothing to do."""

from __future__ import annotations

import threading
import time

import pytest

from runtime.checkpoint.lane import Lane


def test_calls_run_in_the_order_in_which_they_came() -> None:
    lane, done = Lane("test"), []
    futures = [lane.submit(done.append, n) for n in range(100)]
    for future in futures:
        future.result(5)
    assert done == list(range(100))


def test_a_call_that_raises_does_so_at_its_future_and_the_next_one_runs() -> None:
    lane = Lane("test")
    first = lane.submit(int, "no number")
    assert lane.submit(int, "7").result(5) == 7
    with pytest.raises(ValueError, match="no number"):
        first.result(5)


def test_a_call_cancelled_before_its_turn_is_never_made() -> None:
    lane, gate, done = Lane("test"), threading.Event(), []
    lane.submit(gate.wait, 5)
    cancelled = lane.submit(done.append, "cancelled")
    last = lane.submit(done.append, "last")
    assert cancelled.cancel()
    gate.set()
    last.result(5)
    assert done == ["last"]


def test_there_is_a_thread_only_while_there_is_something_to_do() -> None:
    lane = Lane("a lane of this test")
    for _ in range(3):
        lane.submit(int).result(5)
        until = time.monotonic() + 5
        while any(t.name == "a lane of this test" for t in threading.enumerate()):
            assert time.monotonic() < until


def test_many_threads_may_submit_at_once() -> None:
    lane, done = Lane("test"), []
    threads = [
        threading.Thread(target=lambda: [lane.submit(done.append, 1) for _ in range(200)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lane.submit(int).result(5)
    assert len(done) == 1600
