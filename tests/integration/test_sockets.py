"""Sockets between real processes: a peer that is killed, and peers that do not speak our protocol."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from runtime.transport.base import Record
from runtime.transport.sockets import SocketSettings, SocketTransport
from runtime.wire import frames
from tests.contracts.transport_contract import Inbox, echo

pytestmark = pytest.mark.integration

CHILD = """
import asyncio, sys
from runtime.transport.sockets import SocketTransport
class Echo:
    def received(self, link, record): link.send(record)
    def link_lost(self, link, reason): pass
async def main(peer, address, other, other_address):
    transport = SocketTransport(peer, address)
    await transport.start(Echo())
    if other:
        from runtime.transport.base import Record
        transport.connect(other, other_address).send(Record(b"from the child"))
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
async def peer(directory: Path) -> AsyncIterator[tuple[SocketTransport, Inbox]]:
    transport, inbox = SocketTransport("a.1", f"ipc://{directory}/a"), Inbox()
    await transport.start(inbox)
    yield transport, inbox
    await transport.close(0.2)


class Child:
    def __init__(self, name: str, address: str, other: str = "", other_address: str = "") -> None:
        argv = [sys.executable, "-c", CHILD, name, address, other, other_address]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE)

    async def ready(self) -> None:
        assert self.process.stdout is not None
        line = await asyncio.to_thread(self.process.stdout.readline)
        assert line == b"ready\n"

    def kill(self, how: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, how)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


async def test_a_killed_peer_is_noticed_at_once_on_both_kinds_of_links(
    peer: tuple[SocketTransport, Inbox], directory: Path
) -> None:
    transport, inbox = peer
    address = f"ipc://{directory}/b"
    child = Child("b.1", address, "a.1", transport.address)
    try:
        await child.ready()
        outbound = transport.connect("b.1", address)
        outbound.send(Record(b"from here"))
        await inbox.until(lambda: {b"from here", b"from the child"} <= set(inbox.headers))
        loop = asyncio.get_running_loop()
        child.kill()
        start = loop.time()
        await inbox.until(lambda: len(inbox.lost) == 2)
        assert loop.time() - start < 0.5
        assert {link.outbound for link, _ in inbox.lost} == {True, False}
        assert all("connection lost" in reason for _, reason in inbox.lost)
        assert transport.statistics().links == 0
    finally:
        child.end()


async def test_a_new_incarnation_takes_over_the_place_of_a_killed_peer(
    peer: tuple[SocketTransport, Inbox], directory: Path
) -> None:
    transport, inbox = peer
    address = f"ipc://{directory}/b"
    for incarnation in (1, 2, 3):
        child = Child(f"b.{incarnation}", address)
        try:
            link = transport.connect(f"b.{incarnation}", address)
            link.send(Record(b"%d" % incarnation, [bytes(200_000)]))
            await inbox.until_count(incarnation)
            child.kill()
            await inbox.until(lambda n=incarnation: len(inbox.lost) == n)
        finally:
            child.end()
    assert inbox.headers == [b"1", b"2", b"3"]


async def test_a_peer_killed_while_it_is_sent_much_frees_what_was_queued(
    peer: tuple[SocketTransport, Inbox], directory: Path
) -> None:
    transport, inbox = peer
    address = f"ipc://{directory}/b"
    child = Child("b.1", address)
    try:
        await child.ready()
        link = transport.connect("b.1", address)
        link.send(Record(b"up"))
        await inbox.until_count(1)
        child.kill(signal.SIGSTOP)
        for _ in range(200):
            link.send(Record(b"x", [bytes(1024 * 1024)]))
        assert link.queued_bytes() > 100 * 1024 * 1024
        await asyncio.sleep(0.1)
        assert link.queued_bytes() > 100 * 1024 * 1024
        child.kill()
        await inbox.until(lambda: inbox.lost)
        assert link.queued_bytes() == 0
    finally:
        child.end()


async def test_a_stopped_peer_is_not_a_dead_one(
    peer: tuple[SocketTransport, Inbox], directory: Path
) -> None:
    transport, inbox = peer
    address = f"ipc://{directory}/b"
    child = Child("b.1", address)
    try:
        await child.ready()
        link = transport.connect("b.1", address)
        child.kill(signal.SIGSTOP)
        link.send(Record(b"patience"))
        await asyncio.sleep(0.5)
        child.kill(signal.SIGCONT)
        await inbox.until_count(1)
        assert inbox.lost == []
    finally:
        child.end()


def _hello(peer: str, wanted: str = "a.1", lane: str = "RPC") -> list[bytes]:
    records = [Record(text.encode()) for text in (peer, wanted, lane)]
    return [bytes(part) for part in frames.encode_batch(records, frames.HELLO)]


def _split(size: int) -> list[bytes]:
    """A record whose only buffer comes apart."""
    text = struct.pack("<?QIQ", True, 0, 0, size)
    return [bytes(p) for p in frames.encode_batch([Record(text), Record(b"large")], frames.SPLIT)]


def _piece(number: int, size: int, offset: int, data: bytes) -> list[bytes]:
    record = Record(struct.pack("<QQQ", number, size, offset), [data])
    return [bytes(part) for part in frames.encode_batch([record], frames.PIECE)]


def _data(*headers: bytes) -> list[bytes]:
    return [bytes(part) for part in frames.encode_batch([Record(h) for h in headers])]


class Stranger:
    """A raw zmq DEALER."""

    def __init__(self, address: str, name: bytes = b"") -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 500)
        if name:
            self.socket.setsockopt(zmq.ROUTING_ID, name)
        self.socket.connect(address)

    async def answer(self) -> frames.Batch:
        parts = await asyncio.to_thread(self._recv)
        return frames.decode_batch(parts)

    def _recv(self) -> list[bytes]:
        assert self.socket.poll(5000), "no answer came"
        return self.socket.recv_multipart()

    def close(self) -> None:
        self.socket.close()
        self._context.term()


@pytest.fixture
def stranger(peer: tuple[SocketTransport, Inbox]) -> Iterator[Stranger]:
    made = Stranger(peer[0].address)
    yield made
    made.close()


HEAD = _data()[0][:8]
GARBAGE = {
    "magic": [[b"GET / HTTP/1.1\r\n"]],
    "truncated": [[b""], [HEAD], [HEAD + b"\xdd\xff"]],
    "version": [[HEAD[:3] + b"\x63" + HEAD[4:] + b"\x90"]],
    "kind": [[HEAD[:4] + b"\x77" + HEAD[5:] + b"\x90"]],
    "oversized header": [[bytes(2 * 1024 * 1024)], [HEAD + msgpack.packb([bytes(300_000)])]],
    "buffer count": [[HEAD + msgpack.packb([b"x", 5]), b"one"], [*_data(b"x", b"y"), b"stray"]],
    "malformed header": [[HEAD + b"\x91" * 3000], [HEAD + msgpack.packb({"a": 1})]],
    "no hello": [_data(b"x")],
    "wrong peer": [_hello("x.1", "somebody.else")],
    "no link": [_hello("x.1", lane="BULK")],
    "malformed handshake": [
        [_hello("x.1")[0][:8] + msgpack.packb([b"one"])],
        _hello("x.1", lane="FAST"),
    ],
}


@pytest.mark.parametrize(
    ("reason", "message"), [(reason, m) for reason, some in GARBAGE.items() for m in some]
)
async def test_garbage_ends_that_connection_only_and_is_counted(
    peer: tuple[SocketTransport, Inbox],
    directory: Path,
    stranger: Stranger,
    caplog: pytest.LogCaptureFixture,
    reason: str,
    message: list[bytes],
) -> None:
    transport, inbox = peer
    inbox.answer = echo
    friend, at_friend = SocketTransport("f.1", f"ipc://{directory}/f"), Inbox()
    await friend.start(at_friend)
    link = friend.connect("a.1", transport.address)
    link.send(Record(b"before"))
    await at_friend.until_count(1)
    stranger.socket.send_multipart(message)
    answer = await stranger.answer()
    assert answer.kind == frames.BYE
    assert answer.records[0].header.decode().startswith(reason)
    for _ in range(5):
        stranger.socket.send_multipart(message)
    link.send(Record(b"after"))
    await at_friend.until_count(2)
    assert transport.statistics().rejected == {reason: 1}
    assert len([r for r in caplog.records if "dropped the connection" in r.message]) == 1
    assert (inbox.headers, inbox.lost, at_friend.lost) == ([b"before", b"after"], [], [])
    await friend.close()


async def test_a_good_bye_whose_hello_was_lost_with_a_connection_is_no_breach(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger, caplog: pytest.LogCaptureFixture
) -> None:
    transport, inbox = peer
    stranger.socket.send_multipart(
        [bytes(part) for part in frames.encode_batch([Record(b"closed by the peer")], frames.BYE)]
    )
    assert (await stranger.answer()).kind == frames.BYE
    stranger.socket.send_multipart(_hello("x.1"))
    again = Stranger(transport.address)
    again.socket.send_multipart(_hello("x.1"))
    assert (await again.answer()).kind == frames.WELCOME  # the first is ignored from then on
    again.close()
    await inbox.until(lambda: inbox.lost)
    assert transport.statistics().rejected == {}
    assert caplog.records == []


async def test_a_link_that_turns_bad_is_lost_and_what_follows_is_ignored(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger
) -> None:
    transport, inbox = peer
    stranger.socket.send_multipart(_hello("x.1"))
    assert (await stranger.answer()).kind == frames.WELCOME
    stranger.socket.send_multipart(_data(b"good"))
    await inbox.until_count(1)
    stranger.socket.send_multipart([b"bad"])
    stranger.socket.send_multipart(_data(b"ignored"))
    await inbox.until(lambda: inbox.lost)
    assert "broke the protocol: magic" in inbox.lost[0][1]
    assert inbox.lost[0][0].peer == "x.1"
    await asyncio.sleep(0.1)
    assert inbox.headers == [b"good"]
    again = Stranger(transport.address)
    again.socket.send_multipart(_hello("x.1"))
    assert (await again.answer()).kind == frames.WELCOME
    again.close()


async def _with_bulk(stranger: Stranger, address: str) -> Stranger:
    """Introduce `stranger` on the RPC lane; the same peer on the BULK lane."""
    bulk = Stranger(address)
    for one, lane in ((stranger, "RPC"), (bulk, "BULK")):
        one.socket.send_multipart(_hello("x.1", lane=lane))
        assert (await one.answer()).kind == frames.WELCOME
    return bulk


async def test_a_transfer_by_hand_is_delivered_and_a_bad_piece_ends_both_links(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger
) -> None:
    transport, inbox = peer
    bulk = await _with_bulk(stranger, transport.address)
    bulk.socket.send_multipart(_piece(0, 10, 0, b"before"))
    stranger.socket.send_multipart(_split(10))
    stranger.socket.send_multipart(_data(b"behind"))
    bulk.socket.send_multipart(_piece(0, 10, 6, b"hand"))
    await inbox.until_count(2)
    assert inbox.headers == [b"large", b"behind"]
    assert bytes(inbox.records[0][1].buffers[0]) == b"beforehand"
    assert transport.statistics().links == 1
    bulk.socket.send_multipart(_piece(7, 10, 0, b"what?"))
    await inbox.until(lambda: inbox.lost)
    assert len(inbox.lost) == 1
    assert "broke the protocol: unknown transfer" in inbox.lost[0][1]
    assert transport.statistics()[:2] == (0, {"unknown transfer": 1})
    for socket in (stranger, bulk):
        assert (await socket.answer()).kind == frames.BYE
    bulk.close()


@pytest.mark.parametrize("message", [_piece(0, 3, 0, b"abc"), _split(0)])
async def test_pieces_on_the_wrong_lane_and_bad_lists_end_the_link(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger, message: list[bytes]
) -> None:
    _, inbox = peer
    stranger.socket.send_multipart(_hello("x.1"))
    assert (await stranger.answer()).kind == frames.WELCOME
    stranger.socket.send_multipart(message)
    await inbox.until(lambda: inbox.lost)
    assert "broke the protocol" in inbox.lost[0][1]


async def test_a_bulk_link_that_ends_in_a_transfer_ends_the_link_of_its_record(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger
) -> None:
    transport, inbox = peer
    bulk = await _with_bulk(stranger, transport.address)
    stranger.socket.send_multipart(_split(10))
    bulk.socket.send_multipart(_piece(0, 10, 0, b"before"))
    bulk.close()
    await inbox.until(lambda: inbox.lost)
    assert (inbox.records, len(inbox.lost)) == ([], 1)
    assert "connection lost" in inbox.lost[0][1]
    assert (await stranger.answer()).kind == frames.BYE


@pytest.mark.parametrize("way", ["there", "back"])
async def test_a_peer_killed_in_the_middle_of_a_transfer_is_lost_once(
    peer: tuple[SocketTransport, Inbox], directory: Path, way: str
) -> None:
    transport, inbox = peer
    address = f"ipc://{directory}/b"
    child = Child("b.1", address)
    try:
        await child.ready()
        link = transport.connect("b.1", address)
        link.send(Record(b"up", [bytes(3_000_000)]))
        await inbox.until_count(1)
        seen = transport.statistics()
        for _ in range(4):
            link.send(Record(b"x", [bytes(64 * 1024 * 1024)]))

        def moved() -> bool:
            now = transport.statistics()
            gone, come = now.bytes_out - seen.bytes_out, now.bytes_in - seen.bytes_in
            return (gone if way == "there" else come) > 20_000_000

        while not moved():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)
        child.kill()
        await inbox.until(lambda: inbox.lost)
        await asyncio.sleep(0.3)
        assert [lost for lost, _ in inbox.lost] == [link]
        assert link.queued_bytes() == 0
        assert transport.statistics().links == 0
    finally:
        child.end()


async def test_a_second_peer_with_the_same_id_does_not_take_over(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger
) -> None:
    transport, inbox = peer
    stranger.socket.send_multipart(_hello("x.1"))
    assert (await stranger.answer()).kind == frames.WELCOME
    impostor = Stranger(transport.address)
    impostor.socket.send_multipart(_hello("x.1"))
    answer = await impostor.answer()
    assert answer.kind == frames.BYE
    assert b"duplicate peer" in answer.records[0].header
    impostor.close()
    stranger.socket.send_multipart(_data(b"still me"))
    await inbox.until_count(1)
    assert inbox.lost == []


async def test_a_peer_that_comes_back_before_its_end_was_noticed_is_let_in(
    peer: tuple[SocketTransport, Inbox], stranger: Stranger
) -> None:
    transport, inbox = peer
    first = Stranger(transport.address)
    first.socket.send_multipart(_hello("x.1"))
    assert (await first.answer()).kind == frames.WELCOME
    first.close()  # from here on the loop sees nothing
    stranger.socket.send_multipart(_hello("x.1"))
    time.sleep(0.3)  # noqa: ASYNC251
    assert (await stranger.answer()).kind == frames.WELCOME
    await inbox.until(lambda: inbox.lost)
    stranger.socket.send_multipart(_data(b"here I am"))
    await inbox.until_count(1)
    assert transport.statistics()[:2] == (1, {})


async def test_a_dialled_peer_that_speaks_nonsense_is_a_lost_link(
    peer: tuple[SocketTransport, Inbox], directory: Path
) -> None:
    transport, inbox = peer
    context = zmq.Context()
    fake = context.socket(zmq.ROUTER)
    fake.bind(f"ipc://{directory}/fake")

    def serve() -> None:
        for answer in (b"nonsense", _data(b"too early")[0]):
            kind, route = -1, b""
            while kind != frames.HELLO:  # our good-byes come, too
                route, *parts = fake.recv_multipart()
                kind = frames.decode_batch(parts).kind
            fake.send_multipart([route, answer])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for reason in ("magic", "no welcome"):
            before = len(inbox.lost)
            transport.connect("fake.1", f"ipc://{directory}/fake").send(Record(b"secret"))
            await inbox.until(lambda n=before: len(inbox.lost) > n)
            assert reason in inbox.lost[-1][1]
        assert transport.statistics().rejected == {"magic": 1, "no welcome": 1}
    finally:
        await asyncio.to_thread(thread.join)
        fake.close(0)
        context.term()


async def test_a_listener_that_never_answers_is_a_lost_link(directory: Path) -> None:
    context = zmq.Context()
    silent = context.socket(zmq.ROUTER)
    silent.bind(f"ipc://{directory}/silent")
    settings = SocketSettings(connect_s=0.3)
    transport, inbox = SocketTransport("a.1", f"ipc://{directory}/a", settings), Inbox()
    await transport.start(inbox)
    transport.connect("s.1", f"ipc://{directory}/silent").send(Record(b"x"))
    await inbox.until(lambda: inbox.lost)
    assert "no answer from" in inbox.lost[0][1]
    await transport.close()
    silent.close(0)
    context.term()


async def test_a_receiver_that_raises_does_not_stop_the_socket(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail_once(link: object, record: Record) -> None:
        if record.header == b"bad":
            raise ValueError("a bug")

    a, b = (
        SocketTransport("a.1", f"ipc://{directory}/a"),
        SocketTransport("b.1", f"ipc://{directory}/b"),
    )
    inbox = Inbox(fail_once)
    await a.start(Inbox())
    await b.start(inbox)
    for header in (b"good", b"bad", b"better"):
        a.connect("b.1", b.address).send(Record(header))
    await inbox.until_count(3)
    assert "raised" in caplog.text
    await a.close()
    await b.close()
