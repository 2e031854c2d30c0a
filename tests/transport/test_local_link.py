"""Links of the local lane while other threads send by them (see `peer.mailbox`)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from runtime.errors import Closed
from runtime.peer.mailbox import Mailbox, VisitedLoop
from runtime.transport.base import Record
from runtime.transport.local_link import LocalLink
from tests.contracts.transport_contract import Peers
from tests.transport.test_local import MIB, LocalNetwork, connected


async def test_a_link_is_visited_only_where_what_is_sent_leaves_at_once(
    directory: Path,
) -> None:
    peers = Peers(LocalNetwork(directory))
    a, _ = await peers.start("a.1")
    b, at_b = await peers.start("b.1")
    link = a.connect("b.1", b.address)
    assert isinstance(link, LocalLink)
    assert not link.enter()  # it is not up
    link.send(Record(b"hello"))
    await at_b.until_count(1)
    await asyncio.sleep(0)  # the pass in which something was sent is over
    assert link.enter()
    link.send(Record(b"1"))
    link.send(Record(b"2", [b"small"]))
    assert link.queued_bytes() == 0
    assert not link._hub.corked
    link.leave()
    link.send(Record(b"3"))
    assert not link.enter()  # this pass may send more, and that goes together
    await at_b.until_count(4)
    assert [record.header for _, record in at_b.records] == [b"hello", b"1", b"2", b"3"]
    link.send(Record(b"4", [bytes(16 * MIB)]))
    await asyncio.sleep(0)
    assert not link.enter()  # the kernel has not taken all of it
    await at_b.until_count(5)
    link.close()
    assert not link.enter()
    await peers.close()


class Outside:
    """Two transports on a loop that other threads visit."""

    def __init__(self, directory: Path) -> None:
        self.visits = 0
        self.seen: list[bytes] = []
        self._ready: Future[tuple[Mailbox, LocalLink]] = Future()
        self._directory = directory
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.mailbox, self.link = self._ready.result(10)

    def _run(self) -> None:
        self.loop = VisitedLoop()  # belongs to the thread that makes it
        self.loop.run_until_complete(self._live())
        self.loop.close()

    async def _live(self) -> None:
        self.end = asyncio.Event()
        peers = Peers(LocalNetwork(self._directory))
        link, _, at_b = await connected(peers)
        self.at_b = at_b
        self._ready.set_result((Mailbox(self.loop), link))
        await self.end.wait()
        self.seen = [record.header for _, record in at_b.records[1:]]
        await peers.close()

    def send(self, header: bytes) -> None:
        if self.mailbox.visit(self._visit, header):
            self.visits += 1
        else:
            self.mailbox.post(self.link.send, Record(header))

    def _visit(self, header: bytes) -> bool:
        if not self.link.enter():
            return False
        try:
            self.link.send(Record(header))
        finally:
            self.link.leave()
        return True

    def close(self) -> None:
        self.mailbox.post(self.end.set)
        self.thread.join(10)
        assert not self.thread.is_alive()


def test_what_many_threads_send_by_visits_and_by_the_loop_comes_once_and_in_order(
    directory: Path,
) -> None:
    outside = Outside(directory)

    def talk(name: int) -> None:
        for number in range(1500):
            outside.send(b"%d %d" % (name, number))
            if not number % 50:
                time.sleep(0.001)  # let the loop fall asleep

    threads = [threading.Thread(target=talk, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = asyncio.run_coroutine_threadsafe(outside.at_b.until_count(1 + 4500), outside.loop)
    done.result(20)
    outside.close()
    assert outside.visits
    for name in range(3):
        own = [int(text.split()[1]) for text in outside.seen if text.startswith(b"%d " % name)]
        assert own == list(range(1500))


@pytest.mark.parametrize("what", ["the link is cut", "the loop ends"])
def test_threads_that_visit_get_on_when(directory: Path, what: str) -> None:
    outside = Outside(directory)
    ends: list[str] = []
    begun = threading.Event()

    def talk() -> None:
        try:
            for number in range(1_000_000):
                outside.send(b"%d" % number)
                if number > 200:
                    begun.set()
                if outside.link.ended and what == "the link is cut":
                    break
        except Closed as error:
            ends.append(str(error))

    threads = [threading.Thread(target=talk) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait(10)
    if what == "the link is cut":
        assert outside.link.pipe is not None
        outside.mailbox.post(outside.link.pipe._socket.shutdown, socket.SHUT_RDWR)
    else:
        outside.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(ends) == (0 if what == "the link is cut" else 3)
    if what == "the link is cut":
        outside.close()
