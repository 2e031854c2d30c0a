"""Both ways of a host in one transport: the contract with both (with one, `test_sockets` has it), and who is
reached how."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.transport.base import Lane, Record
from runtime.transport.host import HostTransport
from runtime.transport.link import SocketLink, SocketSettings
from runtime.transport.local import LocalTransport
from runtime.transport.local_link import LocalLink
from runtime.transport.sockets import mint
from tests.contracts.transport_contract import Inbox, Network, Peers, TransportContract, echo

SETTINGS = SocketSettings(connect_s=0.6)


class HostNetwork:
    def __init__(self, directory: Path, local: bool) -> None:
        self.directory = directory
        self.local = local

    def transport(self, peer: str) -> HostTransport:
        address = f"ipc://{self.directory}/{peer}"
        return HostTransport(peer, address, local=self.local, arena=None, settings=SETTINGS)


class TestContract(TransportContract):
    @pytest.fixture
    def network(self, directory: Path) -> Network:
        return HostNetwork(directory, local=True)


@pytest.fixture
async def peers(directory: Path) -> AsyncIterator[Peers]:
    peers = Peers(HostNetwork(directory, local=True))
    yield peers
    await peers.close()


async def test_calls_within_a_host_take_the_local_lane_and_control_never_does(peers: Peers) -> None:
    a, _ = await peers.start("a.1")
    b, inbox = await peers.start("b.1")
    rpc, control = a.connect("b.1", b.address), a.connect("b.1", b.address, Lane.CONTROL)
    assert isinstance(rpc, LocalLink)
    assert isinstance(control, SocketLink)
    rpc.send(Record(b"x"))
    control.send(Record(b"y"))
    await inbox.until_count(2)
    assert {type(link) for link, _ in inbox.records} == {LocalLink, SocketLink}
    total = a.statistics()
    assert (total.links, total.records_out, total.messages_out) == (2, 2, 2)


async def test_without_the_local_lane_there_is_no_socket_for_it(directory: Path) -> None:
    peers = Peers(HostNetwork(directory, local=False))
    a, _ = await peers.start("a.1")
    b, _ = await peers.start("b.1")
    assert os.listdir(directory) in (["a.1", "b.1"], ["b.1", "a.1"])
    assert isinstance(a.connect("b.1", b.address), SocketLink)
    data = bytes(1_000_000)
    assert a.stage(data) is data, "no memory is shared there"
    await peers.close()


async def test_one_with_the_local_lane_and_one_without_reach_each_other(directory: Path) -> None:
    one, other = Peers(HostNetwork(directory, True)), Peers(HostNetwork(directory, False))
    a, at_a = await one.start("a.1")
    b, at_b = await other.start("b.1")
    a.connect("b.1", b.address).send(Record(b"to b"))
    b.connect("a.1", a.address).send(Record(b"to a"))
    await at_a.until_count(1)
    await at_b.until_count(1)
    await one.close()
    await other.close()


class Impostor:
    """Something else at the path of b.1's local socket."""

    def __init__(self, directory: Path) -> None:
        os.unlink(directory / "b.1.u")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.setblocking(False)
        self._listening.bind(str(directory / "b.1.u"))
        self._listening.listen()
        self.met: socket.socket | None = None

    async def meet(self, answer: bytes) -> None:
        loop = asyncio.get_running_loop()
        self.met, _ = await loop.sock_accept(self._listening)
        await loop.sock_recv(self.met, 1000)
        await loop.sock_sendall(self.met, answer)

    def close(self) -> None:
        self._listening.close()
        if self.met is not None:
            self.met.close()


@pytest.mark.parametrize("behaviour", ["silence", "garbage", "end"])
async def test_a_local_socket_that_does_not_answer_well_is_passed_by(
    peers: Peers, directory: Path, behaviour: str
) -> None:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1", echo)
    impostor = Impostor(directory)
    link = a.connect("b.1", b.address)
    sent = [Record(b"%d" % n, [bytes(50_000)] * (n % 3)) for n in range(100)]
    for record in sent[:50]:
        link.send(record)
    assert link.queued_bytes() > 0
    if behaviour == "garbage":
        await impostor.meet(b"HTTP/1.1 400 Bad Request\r\n")
    elif behaviour == "end":
        await impostor.meet(b"")
        impostor.close()
    await at_a.until_count(50)
    for record in sent[50:]:
        link.send(record)
    await at_a.until_count(100)
    assert at_b.headers == [record.header for record in sent]
    assert {met for met, _ in at_a.records} == {link}  # its owner knows no other
    assert at_a.lost == at_b.lost == []
    assert a.connect("b.1", b.address) is link
    assert link.queued_bytes() == 0
    with pytest.raises(MisuseError, match="ZeroMQ, which passes no file descriptors"):
        link.send_descriptors(Record(b"x"), [0])
    await b.close()
    await at_a.until(lambda: at_a.lost)
    assert [lost for lost, _ in at_a.lost] == [link]
    impostor.close()


async def test_another_process_at_an_equal_path_is_not_told_what_was_meant_for_the_peer(
    peers: Peers, directory: Path
) -> None:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1")
    os.unlink(directory / "b.1.u")
    other, at_other = LocalTransport("b.2", f"ipc://{directory}/b.1"), Inbox()
    await other.start(at_other)
    a.connect("b.1", b.address).send(Record(b"for b.1 only"))
    await at_b.until_count(1)
    assert isinstance(at_b.records[0][0], SocketLink)
    assert at_a.lost == at_other.lost == at_other.records == []
    await other.close()


async def test_a_peer_whose_local_link_was_cut_is_reached_by_zeromq_from_then_on(
    peers: Peers,
) -> None:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1")
    link = a.connect("b.1", b.address)
    link.send(Record(b"before"))
    await at_b.until_count(1)
    assert isinstance(link, LocalLink)
    assert link.pipe is not None
    link.pipe._socket.shutdown(socket.SHUT_RDWR)
    await at_a.until(lambda: at_a.lost)
    await at_b.until(lambda: at_b.lost)
    assert [lost for lost, _ in at_a.lost] == [link]
    again = a.connect("b.1", b.address)
    assert isinstance(again, SocketLink)
    again.send(Record(b"after"))
    await at_b.until_count(2)
    assert isinstance(b.connect("a.1", a.address), LocalLink)  # the other direction was not lost


async def test_a_link_that_ended_by_our_own_doing_is_made_anew_on_the_local_lane(
    peers: Peers,
) -> None:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1")
    link = a.connect("b.1", b.address)
    link.send(Record(b"before"))
    await at_b.until_count(1)
    assert isinstance(link, LocalLink)
    link.interrupted()
    assert [lost for lost, _ in at_a.lost] == [link]
    again = a.connect("b.1", b.address)
    again.send(Record(b"after"))
    await at_b.until_count(2)
    assert isinstance(again, LocalLink)


async def test_closing_a_link_that_took_the_other_way_flushes_it(
    peers: Peers, directory: Path
) -> None:
    a, at_a = await peers.start("a.1")
    b, at_b = await peers.start("b.1")
    impostor = Impostor(directory)
    link = a.connect("b.1", b.address)
    link.send(Record(b"1"))
    await impostor.meet(b"garbage that is none\0")
    await at_b.until_count(1)
    link.send(Record(b"2"))
    link.close()
    await at_b.until(lambda: at_b.lost)
    assert at_b.headers == [b"1", b"2"]
    assert at_a.lost == []
    fresh = a.connect("b.1", b.address)
    fresh.send(Record(b"3"))
    await at_b.until_count(3)
    impostor.close()


async def test_a_local_socket_that_cannot_be_bound_fails_the_start_and_leaves_nothing(
    directory: Path,
) -> None:
    os.mkdir(directory / "a.u")
    transport = HostTransport("a.1", f"ipc://{directory}/a", settings=SETTINGS)
    with pytest.raises(ConfigError, match=r"a\.u"):
        await transport.start(Inbox())
    assert os.listdir(directory) == ["a.u"]
    await transport.close()


async def test_a_peer_of_this_host_is_reached_by_the_local_lane_and_of_another_one_by_tcp(
    directory: Path,
) -> None:
    os.mkdir(directory / "there")
    settings = replace(SETTINGS, security=mint())
    made = {}
    for name in ("a", "b", "there/c"):
        text = f"tcp://127.0.0.1:0 ipc://{directory}/{name}"
        made[name] = HostTransport(f"{name}.1", text, settings=settings), Inbox(echo)
        await made[name][0].start(made[name][1])
    (a, _), (b, at_b), (c, at_c) = made.values()
    near, far = a.connect(b.peer, b.address), a.connect(c.peer, c.address)
    assert isinstance(near, LocalLink)
    assert isinstance(far, SocketLink)
    assert far.where.startswith("tcp://127.0.0.1:")
    for link in (near, far, a.connect(c.peer, c.address, Lane.CONTROL)):
        link.send(Record(b"x", [bytes(3_000_000)]))
    await at_b.until_count(1)
    await at_c.until_count(2)
    assert isinstance(c.connect(a.peer, a.address), SocketLink)
    assert at_b.lost == at_c.lost == []
    for transport, _ in made.values():
        await transport.close()
    assert os.listdir(directory) == ["there"]
