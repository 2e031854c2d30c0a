"""The way from other threads to the loop, and the link from a process to itself."""

from __future__ import annotations

import asyncio
import concurrent.futures
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from runtime.errors import Closed
from runtime.peer.loopback import Loopback
from runtime.peer.mailbox import Mailbox, VisitedLoop
from runtime.transport.base import Link, Record


async def test_messages_of_a_thread_come_in_order_with_one_wake_up_for_many() -> None:
    mailbox, seen, done = Mailbox(asyncio.get_running_loop()), [], asyncio.Event()
    wakes: list[int] = []
    deliver = mailbox._deliver

    def counted() -> None:
        wakes.append(len(mailbox._queue))
        deliver()

    mailbox._deliver = counted  # type: ignore[method-assign]

    def talk() -> None:
        for number in range(100):
            mailbox.post(seen.append, number)
        mailbox.post(done.set)

    thread = threading.Thread(target=talk)
    thread.start()
    thread.join()  # the loop is busy meanwhile
    await done.wait()
    assert seen == list(range(100))
    assert wakes == [101]


async def test_many_threads_lose_nothing() -> None:
    mailbox, seen = Mailbox(asyncio.get_running_loop()), []

    def talk(name: int) -> None:
        for number in range(500):
            mailbox.post(seen.append, (name, number))

    await asyncio.gather(*(asyncio.to_thread(talk, name) for name in range(4)))
    await asyncio.sleep(0)
    for name in range(4):
        assert [n for who, n in seen if who == name] == list(range(500))


async def test_a_message_that_fails_keeps_no_other_back(caplog: pytest.LogCaptureFixture) -> None:
    mailbox, seen = Mailbox(asyncio.get_running_loop()), []
    mailbox.post(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    mailbox.post(seen.append, 1)
    await asyncio.sleep(0.01)
    assert seen == [1]
    assert "failed on the peer loop" in caplog.text


async def test_what_is_posted_while_delivering_waits_for_the_next_pass() -> None:
    mailbox, seen = Mailbox(asyncio.get_running_loop()), []

    def again() -> None:
        seen.append("x")
        if len(seen) < 5:
            mailbox.post(again)

    mailbox.post(again)
    passes = 0
    while len(seen) < 5:
        await asyncio.sleep(0)
        passes += 1
    assert passes >= 5


def test_the_mailbox_of_a_closed_loop_is_closed() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    assert mailbox.on_loop_thread()
    loop.close()
    for _ in range(2):
        with pytest.raises(Closed, match="peer loop"):
            mailbox.post(print)


def test_a_mailbox_is_closed_too_where_its_loop_ended_before_it_looked() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    mailbox.post(print)
    loop.close()
    with pytest.raises(Closed):
        mailbox.post(print)


async def test_records_to_oneself_go_round_by_the_loop_and_are_copied() -> None:
    seen: list[tuple[Link, Record]] = []
    loop = asyncio.get_running_loop()
    out, into = Loopback.pair("a-0.1", loop, lambda link, record: seen.append((link, record)))
    mine = bytearray(b"mine")
    out.send(Record(b"1", [mine]))
    out.send(Record(b"2"))
    into.send(Record(b"3"))
    assert seen == []
    assert out.queued_bytes() == 4
    mine[:] = b"next"
    await asyncio.sleep(0)
    assert out.queued_bytes() == 0
    assert seen == [(into, (b"1", [b"mine"])), (into, (b"2", [])), (out, (b"3", []))]
    assert (out.outbound, into.outbound, out.peer) == (True, False, "a-0.1")
    out.send(Record(b"4"))
    out.close()
    await asyncio.sleep(0)
    assert len(seen) == 3


def _looping() -> tuple[Mailbox, threading.Thread]:
    """The mailbox of a loop that runs on a thread of its own, and that thread."""
    ready: concurrent.futures.Future[Mailbox] = concurrent.futures.Future()

    def run() -> None:
        loop = VisitedLoop()
        loop.call_soon(lambda: ready.set_result(Mailbox(loop)))
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    return ready.result(), thread


@pytest.fixture
def visited() -> Iterator[Mailbox]:
    """Of a loop that runs on a thread of its own."""
    mailbox, thread = _looping()
    yield mailbox
    mailbox.loop.call_soon_threadsafe(mailbox.loop.stop)
    thread.join()


def _come_in(mailbox: Mailbox, work: Callable[[], bool]) -> None:
    """The loop may not have gone to sleep yet."""
    while not mailbox.visit(work):
        time.sleep(0.001)


def test_a_visitor_works_on_its_own_thread_while_the_loop_sleeps(visited: Mailbox) -> None:
    seen: list[int] = []
    _come_in(visited, lambda: seen.append(threading.get_ident()) is None)
    assert seen == [threading.get_ident()]


def test_the_loop_wakes_only_after_its_visitor_has_left(visited: Mailbox) -> None:
    seen: list[str] = []

    def work() -> bool:
        visited.post(seen.append, "loop")
        time.sleep(0.05)
        seen.append("visitor")
        return True

    _come_in(visited, work)
    while len(seen) < 2:
        time.sleep(0.001)
    assert seen == ["visitor", "loop"]


def test_nobody_visits_a_busy_loop_nor_overtakes_what_was_posted(visited: Mailbox) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def busy() -> None:
        begun.set()
        go_on.wait()

    visited.post(busy)
    begun.wait()
    assert not visited.visit(lambda: True)
    go_on.set()
    _come_in(visited, lambda: True)
    visited._queue.append((lambda: None, ()))  # posted, not delivered
    assert not visited.visit(lambda: True)
    visited._queue.clear()
    _come_in(visited, lambda: True)


def test_a_wait_within_a_visit_lets_the_loop_go_on(visited: Mailbox) -> None:
    def work() -> bool:
        done = threading.Event()
        visited.post(done.set)
        return visited.outside(done.wait, 5.0)

    _come_in(visited, work)
    _come_in(visited, lambda: True)  # and the next one finds all as it was


def test_who_comes_back_is_inside_though_handlers_of_signals_raise_meanwhile(
    visited: Mailbox,
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    kept: list[bool] = []

    def interrupt(number: int, frame: object) -> None:
        go_on.set()
        raise KeyError(number)

    def other() -> None:
        def stay() -> bool:
            inside.set()
            return go_on.wait(5.0)  # the door is ours until the main thread was interrupted at it

        _come_in(visited, stay)

    def work() -> bool:
        thread = threading.Thread(target=other)
        try:
            visited.outside(lambda: (thread.start(), inside.wait(5.0), timer.start()))
        except KeyError:
            kept.append(visited.loop.keeper.inside())  # type: ignore[attr-defined]
        thread.join()
        return True

    timer = threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        _come_in(visited, work)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert kept == [True]
    _come_in(visited, lambda: True)


def test_who_waits_within_a_visit_gets_on_when_the_loop_ends_meanwhile() -> None:
    mailbox, thread = _looping()
    loop = mailbox.loop

    def work() -> bool:
        loop.call_soon_threadsafe(loop.stop)
        mailbox.outside(thread.join, 5.0)
        return not thread.is_alive()

    _come_in(mailbox, work)
    assert not mailbox.visit(lambda: True)
    with pytest.raises(Closed):
        mailbox.post(print)


async def test_other_loops_have_no_visitors() -> None:
    mailbox = Mailbox(asyncio.get_running_loop())
    assert not await asyncio.to_thread(mailbox.visit, lambda: True)
