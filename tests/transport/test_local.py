"""The local lane: the contract over unix sockets, with and without an arena, and what only they do."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.transport.arena import Arena
from runtime.transport.arena_keeper import Keeper
from runtime.transport.base import Link, Record
from runtime.transport.link import SocketSettings
from runtime.transport.local import LocalTransport
from runtime.transport.local_link import LocalLink
from runtime.transport.stream import Decoder, encode, new_space
from runtime.wire import frames
from tests.contracts.transport_contract import Inbox, Network, Peers, TransportContract

SETTINGS = SocketSettings(connect_s=0.6)
MIB = 1024 * 1024
WITH_ARENA = (
    pytest.mark.may_block
)  # its lock is held by the thread that copies for some microseconds


class LocalNetwork:
    """`keeper`: the arena that all have in common."""

    def __init__(self, directory: Path, keeper: Keeper | None = None) -> None:
        self.directory = directory
        self.keeper = keeper
        self.arenas: list[Arena] = []

    def transport(self, peer: str) -> LocalTransport:
        arena = None
        if self.keeper is not None:
            arena = Arena(self.keeper.spec(len(self.arenas)))
            self.arenas.append(arena)
        return LocalTransport(peer, f"ipc://{self.directory}/{peer}", arena, SETTINGS)

    def nothing_held(self) -> bool:
        """Members find out about their own slots as they allocate."""
        assert self.keeper is not None
        gc.collect()
        for arena in self.arenas:
            arena.stage(bytes(64 * 1024))
        return self.keeper.statistics().rows == 0

    def close(self) -> None:
        for arena in self.arenas:
            arena.close()
        if self.keeper is not None:
            self.keeper.close()


@pytest.fixture
def shared(directory: Path) -> Iterator[LocalNetwork]:
    network = LocalNetwork(directory, Keeper(128 * MIB, 16))
    gc.freeze()  # so that `gc.collect` is quick
    yield network
    gc.unfreeze()
    network.close()


@pytest.fixture
async def peers(directory: Path) -> AsyncIterator[Peers]:
    peers = Peers(LocalNetwork(directory))
    yield peers
    await peers.close()


class TestContract(TransportContract):
    @pytest.fixture(params=["inline", pytest.param("arena", marks=WITH_ARENA)])
    def network(self, request: pytest.FixtureRequest, directory: Path) -> Iterator[Network]:
        keeper = Keeper(128 * MIB, 16) if request.param == "arena" else None
        network = LocalNetwork(directory, keeper)
        yield network
        network.close()


# the socket's file


async def test_the_socket_file_is_private_and_removed(directory: Path) -> None:
    transport = LocalTransport("a.1", f"ipc://{directory}/a")
    await transport.start(Inbox())
    assert os.listdir(directory) == ["a.u"]
    assert stat.S_IMODE(os.stat(directory / "a.u").st_mode) == 0o600
    await transport.close()
    assert os.listdir(directory) == []


async def test_a_file_left_by_a_dead_process_is_taken_over(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "a.u"))
    transport = LocalTransport("a.1", f"ipc://{directory}/a")
    await transport.start(Inbox())
    await transport.close()


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("tcp://h:1", "short ipc"),
        (f"ipc:///tmp/{'x' * 101}", "short ipc"),
        ("ipc:///nowhere/at/all", "/nowhere/at/all"),
    ],
)
async def test_an_address_that_cannot_be_used_is_named(address: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        await LocalTransport("a.1", address).start(Inbox())


# file descriptors


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def read_pipe(descriptor: int) -> bytes:
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        return file.read(100)


def piped(text: bytes) -> int:
    """A descriptor that `text` can be read from."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    return reading


async def connected(peers: Peers, inbox_answer=None) -> tuple[LocalLink, Inbox, Inbox]:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1", inbox_answer)
    link = a.connect("b.1", b.address)
    assert isinstance(link, LocalLink)
    link.send(Record(b"hello"))
    await at_b.until_count(1)
    return link, at_a, at_b


async def test_descriptors_come_in_order_each_with_its_record(peers: Peers) -> None:
    texts: list[tuple[bytes, list[bytes]]] = []

    def take(link: Link, record: Record) -> None:
        assert isinstance(link, LocalLink)
        texts.append((record.header, [read_pipe(fd) for fd in link.take_descriptors()]))

    link, _, inbox = await connected(peers, take)
    before = open_descriptors()
    expected = [(b"hello", [])]
    for number in range(60):
        own = [piped(b"%d.%d" % (number, place)) for place in range(number % 4)]
        record = Record(b"r%d" % number, [bytes(20_000)] if number % 5 == 0 else [])
        if own:
            link.send_descriptors(record, own)
        else:
            link.send(record)
        expected.append((record.header, [b"%d.%d" % (number, n) for n in range(len(own))]))
        for descriptor in own:
            os.close(descriptor)  # the link has its own
    await inbox.until_count(61)
    assert texts == expected
    assert open_descriptors() == before


async def test_descriptors_that_nobody_takes_or_that_never_leave_are_closed(peers: Peers) -> None:
    link, _, inbox = await connected(peers)
    before, own = open_descriptors(), piped(b"x")
    link.send_descriptors(Record(b"not taken"), [own] * 64)
    await inbox.until_count(2)
    for _ in range(30):  # more than the kernel takes at once
        link.send_descriptors(Record(b"cut", [bytes(MIB)]), [own])
    inbox.records[0][0].close()
    await asyncio.sleep(0)
    link.close()
    async with asyncio.timeout(5):
        while open_descriptors() != before - 2 + 1:  # noqa: ASYNC110 - nothing tells of descriptors
            await asyncio.sleep(0.01)
    link.send_descriptors(Record(b"too late"), [own])
    os.close(own)
    assert open_descriptors() == before - 2


async def test_descriptors_in_the_wrong_number_are_refused(peers: Peers) -> None:
    link, _, _ = await connected(peers)
    with pytest.raises(MisuseError, match="65 file descriptors; allowed are 1 to 64"):
        link.send_descriptors(Record(b"x"), [0] * 65)
    with pytest.raises(MisuseError, match="0 file descriptors"):
        link.send_descriptors(Record(b"x"), [])


async def test_answers_come_back_while_a_large_buffer_is_on_its_way(directory: Path) -> None:
    peers = Peers(LocalNetwork(directory))
    link, mine, inbox = await connected(peers)
    link.send(Record(b"large", [bytes(64 * MIB)]))
    inbox.records[0][0].send(Record(b"answer"), ordered=False)
    await mine.until_count(1)
    assert inbox.headers == [b"hello"], "it is on its way still"
    await inbox.until_count(2)
    await peers.close()


# the arena


@WITH_ARENA
async def test_large_buffers_go_by_the_arena_and_are_given_back(shared: LocalNetwork) -> None:
    peers = Peers(shared)
    link, _, inbox = await connected(peers)
    data = os.urandom(3 * MIB)
    sizes = [64 * 1024, 3 * MIB, 64 * 1024 - 1, 200_000]
    link.send(Record(b"h", [data[:size] for size in sizes]))
    await inbox.until_count(2)
    got = inbox.records[1][1].buffers
    assert [bytes(buffer) for buffer in got] == [data[:size] for size in sizes]
    assert peers.made[1].statistics().bytes_in < 70_000 + 64 * 1024 * 2 + sum(sizes)
    assert [shared.arenas[1].is_staged(buffer) for buffer in got] == [True, True, False, True]
    memoryview(got[1])[0:4] = b"mine"
    assert not shared.nothing_held()
    del got
    inbox.records.clear()
    assert shared.nothing_held()
    await peers.close()


@WITH_ARENA
async def test_what_was_received_is_sent_on_without_a_copy(shared: LocalNetwork) -> None:
    peers = Peers(shared)
    link, _, at_b = await connected(peers)
    c, at_c = await peers.start("c.1")
    link.send(Record(b"h", [b"x" * (2 * MIB)]))
    await at_b.until_count(2)
    peers.made[1].connect("c.1", c.address).send(at_b.records[1][1])
    await at_c.until_count(1)
    assert shared.keeper is not None
    assert shared.keeper.statistics().rows == 1
    assert bytes(at_c.records[0][1].buffers[0]) == b"x" * (2 * MIB)
    await peers.close()


@WITH_ARENA
async def test_small_and_unordered_records_overtake_a_copy_and_ordered_ones_do_not(
    shared: LocalNetwork,
) -> None:
    peers = Peers(shared)
    link, _, inbox = await connected(peers)
    link.send(Record(b"large", [bytes(40 * MIB)]))
    link.send(Record(b"behind"))
    link.send(Record(b"result"), ordered=False)
    assert link.queued_bytes() > 40 * MIB
    await inbox.until_count(4)
    assert inbox.headers[1:] == [b"result", b"large", b"behind"]
    assert link.queued_bytes() == 0
    await peers.close()


@WITH_ARENA
async def test_a_full_arena_is_no_error(directory: Path) -> None:
    network = LocalNetwork(directory, Keeper(8 * MIB, 4))
    peers = Peers(network)
    link, _, inbox = await connected(peers)
    for number in range(8):
        link.send(Record(b"%d" % number, [bytes([number]) * (5 * MIB)]))
    await inbox.until_count(9)
    for number, (_, record) in enumerate(inbox.records[1:]):
        assert record.buffers[0][0] == record.buffers[0][-1] == number
    await peers.close()
    network.close()


@WITH_ARENA
async def test_other_arenas_are_not_taken_for_ours(directory: Path) -> None:
    one, other = LocalNetwork(directory, Keeper(32 * MIB, 4)), LocalNetwork(directory)
    a, b = one.transport("a.1"), other.transport("b.1")
    inbox = Inbox()
    await a.start(Inbox())
    await b.start(inbox)
    a.connect("b.1", b.address).send(Record(b"h", [b"x" * MIB]))
    await inbox.until_count(1)
    assert bytes(inbox.records[0][1].buffers[0]) == b"x" * MIB
    await a.close()
    await b.close()
    one.close()


@WITH_ARENA
@pytest.mark.parametrize("ender", [0, 1])
async def test_a_link_that_ends_holds_nothing_in_the_arena(
    shared: LocalNetwork, ender: int
) -> None:
    peers = Peers(shared)
    link, _, inbox = await connected(peers)
    ends = [link, inbox.records[0][0]]
    buffer = shared.arenas[0].stage(b"x" * MIB)
    assert buffer is not None
    for _ in range(100):
        link.send(Record(b"h", [buffer]))
    ends[ender].close()
    for transport in peers.made:
        await transport.close(1.0 if ender == 0 else 0.0)
    del buffer, link, ends
    inbox.records.clear()
    assert shared.nothing_held()


# what comes in from others


class Stranger:
    """A plain socket at one end of a connection."""

    def __init__(self, path: Path | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.setblocking(False)
        if path is not None:
            self.socket.connect(str(path))

    async def say(self, kind: int, *texts: bytes) -> None:
        parts = frames.encode_batch([Record(text) for text in texts], kind)
        await self.write(b"".join(encode(parts, frozenset(), 0)))

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def read(self, most: int = 65536) -> bytes:
        async with asyncio.timeout(5):
            return await asyncio.get_running_loop().sock_recv(self.socket, most)


@pytest.fixture
def stranger(directory: Path, peers: Peers) -> Iterator[type[Stranger]]:
    made: list[Stranger] = []

    def make(path: Path | None = None) -> Stranger:
        made.append(Stranger(path))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.socket.close()


def message(kind: int) -> bytes:
    return b"".join(encode(frames.encode_batch([Record(b"x")], kind), frozenset(), 0))


HELLO = (b"s.1", b"b.1", b"1", b"", b"")
GOOD = message(frames.DATA)


@pytest.mark.parametrize(
    ("hello", "data", "phrase"),
    [
        (None, b"GET / HTTP/1.1\r\n\r\n", "oversized header"),
        (None, GOOD, "no hello"),
        (None, b"\x05\0\0\0" + bytes(8) + b"hello", "magic"),
        ((b"s.1", b"other.1", b"1", b"", b""), b"", "wrong peer"),
        ((b"s.1", b"b.1", b"9", b"", b""), b"", "malformed handshake"),
        ((b"s.1", b"b.1"), b"", "malformed handshake"),
        ((b"\xff", b"b.1", b"1", b"", b""), b"", "malformed handshake"),
        (HELLO, bytes(12), "truncated"),
        (HELLO, b"\xff" * 12, "oversized header"),
        (HELLO, b"".join(encode([b"h", b"handle"], frozenset({1}), 0)), "stale arena handle"),
        (HELLO, b"".join(encode([GOOD[12:]], frozenset(), 3)), "descriptors"),
        (HELLO, message(frames.HELLO), "unexpected message"),
    ],
)
async def test_garbage_ends_its_own_link_only_and_is_counted(
    peers: Peers, directory: Path, stranger, hello, data: bytes, phrase: str
) -> None:
    friend, _, inbox = await connected(peers)
    before = open_descriptors()
    one = stranger(directory / "b.1.u")
    if hello is not None:
        await one.say(frames.HELLO, *hello)
        if data:
            assert b"b.1" in await one.read()
    await one.write(data)
    while await one.read():
        pass
    assert peers.made[1].statistics().rejected == {phrase: 1}
    friend.send(Record(b"still fine"))
    await inbox.until_count(2)
    assert len(inbox.lost) == (1 if hello == HELLO else 0)
    assert open_descriptors() == before + 1


async def test_whoever_does_not_say_who_he_is_is_turned_away(
    peers: Peers, directory: Path, stranger
) -> None:
    b, inbox = await peers.start("b.1")
    silent, gone = stranger(directory / "b.1.u"), stranger(directory / "b.1.u")
    gone.socket.close()
    while await silent.read():
        pass
    assert b.statistics().rejected == {"no hello": 1}
    assert inbox.lost == []


async def test_a_second_link_of_a_living_peer_is_refused_and_of_a_dead_one_taken(
    peers: Peers, directory: Path, stranger
) -> None:
    b, inbox = await peers.start("b.1")
    first, second = stranger(directory / "b.1.u"), stranger(directory / "b.1.u")
    await first.say(frames.HELLO, *HELLO)
    assert b"b.1" in await first.read()
    await second.say(frames.HELLO, *HELLO)
    assert b"duplicate peer" in await second.read()
    third = stranger(directory / "b.1.u")
    await first.write(GOOD)
    first.socket.close()
    await third.say(frames.HELLO, *HELLO)
    assert b"b.1" in await third.read()
    assert inbox.headers == [b"x"]
    assert [reason for _, reason in inbox.lost] == ["connection lost"]
    assert b.statistics().links == 1


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "connection lost"),
        ((frames.WELCOME, b"other.1", b"", b""), "wrong peer"),
        ((frames.BYE, b"wrong peer (b.1 was wanted)"), "refused: wrong peer"),
        ((frames.DATA, b"x"), "no welcome"),
        ((frames.WELCOME, b"b.1", b"00", b"x"), None),
    ],
)
async def test_what_a_listener_may_do_to_a_dialler(
    peers: Peers, directory: Path, stranger, answer, reason: str | None
) -> None:
    a, inbox = await peers.start("a.1")
    listener = stranger()
    listener.socket.bind(str(directory / "b.1.u"))
    listener.socket.listen()
    link = a.connect("b.1", f"ipc://{directory}/b.1")
    link.send(Record(b"for b.1 only"))
    met = stranger()
    met.socket.close()
    met.socket, _ = await asyncio.get_running_loop().sock_accept(listener.socket)
    assert b"a.1" in await met.read()
    if answer is not None:
        await met.say(*answer)
    if reason is None:
        assert b"for b.1 only" in await met.read()  # an arena of others is none of ours
        return
    if answer is None:
        met.socket.close()
    await inbox.until(lambda: inbox.lost)
    assert reason in inbox.lost[0][1]
    assert link.queued_bytes() == 0


async def test_a_slow_reader_costs_its_sender_what_was_sent_and_nothing_is_lost(
    peers: Peers, directory: Path, stranger
) -> None:
    answered: list[Link] = []

    def answer(link: Link, record: Record) -> None:
        answered.append(link)

    b, _ = await peers.start("b.1", answer)
    slow = stranger(directory / "b.1.u")
    await slow.say(frames.HELLO, *HELLO)
    assert b"b.1" in await slow.read()
    await slow.write(GOOD)
    async with asyncio.timeout(5):
        while not answered:  # noqa: ASYNC110
            await asyncio.sleep(0)
    piece = os.urandom(MIB)
    for number in range(64):
        answered[0].send(Record(b"%d" % number, [piece]))
        answered[0].send(Record(b"small"))
    await asyncio.sleep(0)
    assert 62 * MIB < answered[0].queued_bytes() <= 64 * (MIB + 10)
    decoder, headers = Decoder(new_space(), frames.LIMITS), []
    while len(headers) < 128:
        room = decoder.room()
        data = await slow.read(len(room))
        assert data
        room[: len(data)] = data
        parts = decoder.next(len(data))
        while parts is not None:
            for record in frames.decode_batch(parts).records:
                headers.append(record.header)
                assert all(buffer == piece for buffer in record.buffers)
            parts = decoder.next()
    assert headers == [name for number in range(64) for name in (b"%d" % number, b"small")]
    assert answered[0].queued_bytes() == 0
    assert b.statistics().records_out == 128


async def test_a_closed_link_waits_for_a_slow_reader_no_longer_than_the_linger_time(
    directory: Path, stranger
) -> None:
    settings = SocketSettings(linger_s=0.2)
    b = LocalTransport("b.1", f"ipc://{directory}/b.1", settings=settings)
    inbox = Inbox()
    await b.start(inbox)
    slow = stranger(directory / "b.1.u")
    await slow.say(frames.HELLO, *HELLO)
    assert b"b.1" in await slow.read()
    await slow.write(GOOD)
    await inbox.until_count(1)
    link = inbox.records[0][0]
    link.send(Record(b"large", [bytes(4 * MIB)]))
    link.close()
    await asyncio.sleep(0.05)
    assert (b.statistics().links, link.queued_bytes() > 3 * MIB) == (1, True)
    await asyncio.sleep(0.3)
    assert (b.statistics().links, link.queued_bytes()) == (0, 0)
    assert inbox.lost == []
    await b.close()


@WITH_ARENA
async def test_where_the_budget_of_queues_is_full_their_buffers_travel_beside_the_arena(
    shared: LocalNetwork,
) -> None:
    peers = Peers(shared)
    link, _, inbox = await connected(peers)
    one, data = peers.made[0], os.urandom(8 * MIB)
    queued = []
    while shared.arenas[0].is_staged(last := one.stage(data, "queue")):
        queued.append(last)
    assert queued
    assert peers.made[0].stage(data) is not data, "calls have room"
    link.send(Record(b"put", [queued[0], last]))
    link.send(Record(b"call", [data]))
    await inbox.until_count(3)
    (_, (first, second)), (_, (third,)) = (record for _, record in inbox.records[1:])
    assert [bytes(got) == data for got in (first, second, third)] == [True] * 3
    assert [shared.arenas[1].is_staged(got) for got in (first, second, third)] == [
        True,
        False,
        True,
    ]
    del first, second, third
    inbox.records.clear()
    await peers.close()


@WITH_ARENA
async def test_a_copy_that_fails_does_not_hold_up_what_is_behind_it(
    shared: LocalNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = Peers(shared)
    link, _, inbox = await connected(peers)
    stage = shared.arenas[0].stage

    def broken(buffer, budget: str = "rpc"):
        raise OSError("no more mappings")

    monkeypatch.setattr(shared.arenas[0], "stage", broken)
    monkeypatch.setattr(shared.arenas[0], "share", lambda buffer, member: None)
    link.send(Record(b"large", [b"x" * (2 * MIB)]))
    link.send(Record(b"behind"))
    await inbox.until_count(3)
    assert inbox.headers[1:] == [b"large", b"behind"]
    monkeypatch.setattr(shared.arenas[0], "stage", stage)
    await peers.close()
