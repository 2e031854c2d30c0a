"""What a callee knows of one caller, record by record: links that overlap, cancels that overtake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from runtime.peer.endpoint import Endpoint
from runtime.transport.base import Lane, Record
from runtime.transport.memory import MemoryNetwork
from runtime.wire import codec, messages
from runtime.wire.messages import Credit, Message, Result, Resumed
from tests.peer.support import InlineRunner, settle

pytestmark = pytest.mark.looptime


class Wire:
    """The callee's end of a link, which keeps what is sent by it."""

    def __init__(self, peer: str = "a-0.1", lane: Lane = Lane.RPC) -> None:
        self.peer, self.lane, self.outbound = peer, lane, False
        self.sent: list[Message] = []
        self.closed = False

    def send(self, record: Record, ordered: bool = True) -> None:
        self.sent.append(messages.decode(record))

    def queued_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def answers(self) -> list[int]:
        return [message.id for message in self.sent if isinstance(message, Result)]


class Callee:
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.ran: list[int] = []
        endpoint.export("note", self.note)
        endpoint.export("hold", self.hold)

    async def note(self, number: int) -> int:
        self.ran.append(number)
        return number

    async def hold(self, number: int) -> None:
        self.ran.append(number)
        await asyncio.sleep(3600)

    def resume(self, wire: Wire, epoch: int, *ids: int) -> None:
        self.endpoint.received(wire, messages.encode_resume(epoch, ids))

    async def call(self, wire: Wire, id: int, method: str = "note") -> None:
        body, buffers = codec.encode_arguments((id,))
        self.endpoint.received(wire, messages.encode_call(id, method, body, buffers))
        await settle()


@asynccontextmanager
async def callee() -> AsyncIterator[Callee]:
    endpoint = Endpoint(MemoryNetwork().transport("b-0.1"), runner=InlineRunner())
    async with endpoint:
        yield Callee(endpoint)


async def test_calls_by_a_link_that_was_not_begun_are_not_heard() -> None:
    async with callee() as b:
        wire = Wire()
        await b.call(wire, 1)
        assert b.ran == []
        b.resume(wire, 1)
        await b.call(wire, 1)
        assert b.ran == [1]
        assert wire.answers() == [1]


async def test_what_comes_late_by_an_older_link_is_dropped() -> None:
    async with callee() as b:
        old, new = Wire(), Wire()
        b.resume(old, 1)
        b.resume(new, 2, 5)
        assert new.sent == [Resumed(2, (5,))], "it has not come, so send it again"
        await b.call(new, 5)
        b.endpoint.received(new, messages.encode_ack([5]))
        await b.call(old, 5)
        assert b.ran == [5], "the first one was on its way, and is dropped"
        b.resume(old, 1, 5)
        assert len(old.sent) == 0


async def test_an_older_link_that_is_first_seen_after_the_newer_one_is_not_taken_for_it() -> None:
    async with callee() as b:
        old, new = Wire(), Wire()
        b.resume(new, 2)
        b.resume(old, 1)
        await b.call(old, 4)
        await b.call(new, 5)
        assert b.ran == [5]
        b.endpoint.link_lost(old, "gone")
        await b.call(new, 6)
        assert new.answers() == [5, 6]


async def test_kept_answers_are_sent_again_and_others_are_let_go() -> None:
    async with callee() as b:
        old, new = Wire(), Wire()
        b.resume(old, 1)
        for id in range(1, 5):
            await b.call(old, id)
        b.endpoint.link_lost(old, "gone")
        b.resume(new, 2, 2, 4)
        assert new.answers() == [2, 4]
        newest = Wire()
        b.resume(newest, 3, 4)
        assert newest.answers() == [4]
        b.endpoint.received(newest, messages.encode_ack([4]))
        assert b.endpoint._handlers._clients.all()[0].kept == {}
        assert b.ran == [1, 2, 3, 4]


async def test_a_call_that_runs_has_its_credit_told_again_on_the_next_link() -> None:
    async with callee() as b:
        old, new = Wire(), Wire()
        b.resume(old, 1)
        await b.call(old, 1, "hold")
        await asyncio.sleep(0.1)
        assert any(isinstance(message, Credit) for message in old.sent)
        b.resume(new, 2, 1)
        await asyncio.sleep(0.1)
        assert new.sent == [Resumed(2, ()), Credit(0, (1,))]


async def test_a_cancel_on_the_control_lane_may_come_before_its_call() -> None:
    async with callee() as b:
        wire, control = Wire(), Wire(lane=Lane.CONTROL)
        b.resume(wire, 1)
        b.endpoint.received(control, messages.encode_cancel(7))
        b.endpoint.received(wire, messages.encode_cancel(8))
        for id in (7, 8):
            await b.call(wire, id)
        assert b.ran == [8], "on its own lane a cancel cannot come first"
        await asyncio.sleep(0.1)
        assert Credit(0, (7,)) in wire.sent
        for id in range(100, 3000):
            b.endpoint.received(control, messages.encode_cancel(id))
        (client,) = b.endpoint._handlers._clients.all()
        assert len(client.cancelled) == 1024


async def test_strangers_are_heard_and_change_nothing() -> None:
    async with callee() as b:
        wire = Wire("x-0.1")
        for record in (
            messages.encode_ack([1]),
            messages.encode_more(1, 5),
            messages.encode_cancel(1),
            messages.encode_goodbye("bye"),
            messages.encode_credit(5, [1]),
            messages.encode_resumed(1, [1]),
            messages.encode_item(1, b""),
        ):
            b.endpoint.received(wire, record)
        await settle()
        assert wire.sent == []
        assert b.endpoint._handlers._clients.all() == []


async def test_only_so_many_callers_that_are_gone_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("runtime.peer.clients._CLIENTS_KEPT", 3)
    async with callee() as b:
        wires = [Wire(f"a-{n}.1") for n in range(10)]
        for wire in wires:
            b.resume(wire, 1)
            await b.call(wire, 1)
            b.endpoint.received(wire, messages.encode_ack([1]))
            if wire is not wires[4]:
                b.endpoint.link_lost(wire, "gone")
        peers = {client.peer for client in b.endpoint._handlers._clients.all()}
        assert len(peers) == 3
        assert {"a-4.1", "a-9.1"} <= peers
