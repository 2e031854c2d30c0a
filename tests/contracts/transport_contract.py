"""What every transport promises, as one suite. A subclass gives `network`: what makes transports by peer id."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable
from typing import Protocol

import pytest

from runtime.errors import Closed, ConfigError, MisuseError
from runtime.transport.base import Lane, Link, Record, Transport


class Network(Protocol):
    def transport(self, peer: str) -> Transport: ...


class Inbox:
    """A receiver that remembers everything, and can answer."""

    def __init__(self, answer: Callable[[Link, Record], None] | None = None) -> None:
        self.records: list[tuple[Link, Record]] = []
        self.lost: list[tuple[Link, str]] = []
        self.answer = answer
        self._news = asyncio.Event()

    def received(self, link: Link, record: Record) -> None:
        self.records.append((link, record))
        self._news.set()
        if self.answer is not None:
            self.answer(link, record)

    def link_lost(self, link: Link, reason: str) -> None:
        self.lost.append((link, reason))
        self._news.set()

    @property
    def headers(self) -> list[bytes]:
        return [record.header for _, record in self.records]

    async def until(self, condition: Callable[[], object], timeout: float = 10.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def until_count(self, count: int, timeout: float = 10.0) -> None:
        try:
            await self.until(lambda: len(self.records) >= count, timeout)
        except TimeoutError:
            found = f"{len(self.records)} of {count} records came, lost: {self.lost}"
            raise AssertionError(found) from None


def echo(link: Link, record: Record) -> None:
    link.send(record)


class Peers:
    """Started transports that are closed at the end of the test."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.made: list[Transport] = []

    async def start(
        self, peer: str, answer: Callable[[Link, Record], None] | None = None
    ) -> tuple[Transport, Inbox]:
        transport, inbox = self.network.transport(peer), Inbox(answer)
        self.made.append(transport)
        await transport.start(inbox)
        return transport, inbox

    async def close(self) -> None:
        for transport in self.made:
            await transport.close(0.2)


class LanesContract:
    """Lanes, and buffers of any size."""

    @pytest.fixture
    async def peers(self, network: Network):
        peers = Peers(network)
        yield peers
        await peers.close()

    async def test_each_lane_is_a_link_of_its_own_and_both_ends_know_which(
        self, peers: Peers
    ) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        links = {lane: a.connect("b.1", b.address, lane) for lane in (Lane.CONTROL, Lane.RPC)}
        assert a.connect("b.1", b.address, Lane.CONTROL) is links[Lane.CONTROL]
        assert a.connect("b.1", b.address) is links[Lane.RPC]
        for lane, link in links.items():
            assert link.lane is lane
            link.send(Record(lane.name.encode()))
        await inbox.until_count(2)
        assert {link.lane.name.encode(): r.header for link, r in inbox.records} == {
            b"CONTROL": b"CONTROL",
            b"RPC": b"RPC",
        }
        links[Lane.RPC].close()
        await inbox.until(lambda: inbox.lost)
        assert inbox.lost[0][0].lane is Lane.RPC
        links[Lane.CONTROL].send(Record(b"still there"))
        await inbox.until_count(3)
        async with asyncio.timeout(5):
            while a.statistics().links != 1:  # noqa: ASYNC110 - the good-bye is on its way back
                await asyncio.sleep(0.001)
        assert len(inbox.lost) == 1

    async def test_records_of_any_size_keep_their_order_and_come_back_as_they_were(
        self, peers: Peers
    ) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", echo)
        draw = random.Random(3)
        link, sent = a.connect("b.1", b.address), []
        for number in range(40):
            sizes = draw.choices([0, 10, 70_000, 2**20, 2**20 + 1, 2_500_000], k=number % 4)
            sent.append(Record(b"%d" % number, [draw.randbytes(size) for size in sizes]))
            link.send(sent[-1])
        await inbox.until_count(40, 30)
        assert inbox.headers == [record.header for record in sent]
        for (_, got), record in zip(inbox.records, sent, strict=True):
            assert [bytes(buffer) for buffer in got.buffers] == list(record.buffers)

    async def test_unordered_records_arrive_once_and_do_not_disturb_the_order_of_others(
        self, peers: Peers
    ) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", lambda link, record: link.send(record, ordered=False))
        link, sizes = a.connect("b.1", b.address), (1, 3_000_000, 100_000)
        for number in range(60):
            ordered = number % 4 < 2
            record = Record(
                b"%s %d" % (b"in" if ordered else b"any", number), [bytes(sizes[number % 3])]
            )
            link.send(record, ordered=ordered)
        await inbox.until_count(60, 30)
        assert len(set(inbox.headers)) == 60
        for _, record in inbox.records:
            assert len(record.buffers[0]) == sizes[int(record.header.split()[1]) % 3]

    async def test_ordered_records_stay_in_order_while_others_overtake(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        for number in range(200):
            size = 5_000_000 if number % 50 == 0 else 10
            link.send(Record(b"%d" % number, [bytes(size)]), ordered=number % 5 != 1)
        await inbox.until_count(200, 30)
        numbers = [int(header) for header in inbox.headers]
        assert sorted(numbers) == list(range(200))
        in_order = [number for number in numbers if number % 5 != 1]
        assert in_order == sorted(in_order)

    async def test_a_very_large_buffer_belongs_to_its_receiver(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        mine = bytearray(b"x" * 9_000_001)
        a.connect("b.1", b.address).send(Record(b"h", [mine, b"small"]))
        await inbox.until_count(1)
        view = memoryview(inbox.records[0][1].buffers[0])
        assert (len(view), view.readonly, view[-1]) == (9_000_001, False, ord("x"))
        view[0] = 0
        assert mine[0] == ord("x")

    async def test_control_passes_while_large_buffers_flow_both_ways(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", echo)
        data, loop = bytes(32 * 1024 * 1024), asyncio.get_running_loop()
        bulk, control = a.connect("b.1", b.address), a.connect("b.1", b.address, Lane.CONTROL)
        for _ in range(4):
            bulk.send(Record(b"large", [data]))
        worst = 0.0
        while inbox.headers.count(b"large") < 4:
            start, count = loop.time(), inbox.headers.count(b"c")
            control.send(Record(b"c"))
            await inbox.until(lambda n=count: inbox.headers.count(b"c") > n)
            worst = max(worst, loop.time() - start)
            await asyncio.sleep(0.002)
        assert worst < 1.0

    async def test_closing_a_link_flushes_its_large_buffers(self, peers: Peers) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        link.send(Record(b"hello"))
        await at_b.until_count(1)
        link.send(Record(b"large", [bytes(24_000_000)]))
        link.send(Record(b"last"))
        link.close()
        await at_b.until(lambda: at_b.lost)
        assert at_b.headers == [b"hello", b"large", b"last"]
        assert "closed by the peer" in at_b.lost[0][1]
        assert at_a.lost == []

    async def test_two_peers_that_dial_each_other_send_each_other_large_buffers(
        self, peers: Peers
    ) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        a.connect("b.1", b.address).send(Record(b"from a", [b"a" * 5_000_000]))
        b.connect("a.1", a.address).send(Record(b"from b", [b"b" * 5_000_000]))
        await at_a.until_count(1)
        await at_b.until_count(1)
        assert bytes(at_a.records[0][1].buffers[0]) == b"b" * 5_000_000
        assert bytes(at_b.records[0][1].buffers[0]) == b"a" * 5_000_000
        assert a.statistics().links == b.statistics().links == 2

    async def test_a_link_lost_in_the_middle_of_a_transfer_is_reported_once_and_keeps_nothing(
        self, peers: Peers
    ) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        link.send(Record(b"hello"))
        await at_b.until_count(1)
        met = at_b.records[0][0]
        for side in (link, met):
            for _ in range(8):
                side.send(Record(b"large", [bytes(32 * 1024 * 1024)]))
        await b.close(0.01)
        await at_a.until(lambda: at_a.lost)
        await asyncio.sleep(0.2)
        assert [lost for lost, _ in at_a.lost] == [link]
        assert at_b.lost == []
        assert link.queued_bytes() == met.queued_bytes() == 0
        assert a.statistics().links == 0


class TransportContract(LanesContract):
    """Links: how they are made, used and ended."""

    async def test_records_arrive_in_order_with_their_buffers(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        sent = [
            Record(b"%d" % i, [bytes([i % 251]) * (i * 37 % 5000 + 1)] * (i % 4))
            for i in range(500)
        ]
        for record in sent:
            link.send(record)
        await inbox.until_count(500)
        assert inbox.headers == [record.header for record in sent]
        for (_, got), record in zip(inbox.records, sent, strict=True):
            assert [bytes(buffer) for buffer in got.buffers] == list(record.buffers)

    async def test_both_ends_of_a_link_name_the_other_peer(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        link.send(Record(b"hi"))
        await inbox.until_count(1)
        met = inbox.records[0][0]
        assert (link.peer, link.outbound, met.peer, met.outbound) == ("b.1", True, "a.1", False)

    async def test_answers_travel_on_the_link_that_a_question_came_by(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", echo)
        link = a.connect("b.1", b.address)
        link.send(Record(b"hi"))
        await inbox.until_count(1)
        assert inbox.records[0][0] is link
        assert b.statistics().links == 1

    async def test_of_the_records_of_one_loop_pass_the_first_leaves_at_once_and_the_others_together(
        self, peers: Peers
    ) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", echo)
        link = a.connect("b.1", b.address)
        link.send(Record(b"first"))
        await inbox.until_count(1)
        before = a.statistics()
        for _ in range(100):
            link.send(Record(b"x"))
        await inbox.until_count(101)
        after = a.statistics()
        assert after.records_out - before.records_out == 100
        assert after.messages_out - before.messages_out <= 2

    async def test_many_talk_to_one_and_each_keeps_its_own_order(self, peers: Peers) -> None:
        b, inbox = await peers.start("b.1", echo)
        senders = [await peers.start(f"a{i}.1") for i in range(8)]
        links = [transport.connect("b.1", b.address) for transport, _ in senders]
        for n in range(200):
            for link in links:
                link.send(Record(b"%d" % n))
            if n % 20 == 0:
                await asyncio.sleep(0)
        for _, own in senders:
            await own.until_count(200)
            assert own.headers == [b"%d" % n for n in range(200)]
        assert len(inbox.records) == 1600

    async def test_a_large_buffer_arrives_bit_for_bit_beside_small_records(
        self, peers: Peers
    ) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        data = random.Random(7).randbytes(24 * 1024 * 1024)
        link = a.connect("b.1", b.address)
        link.send(Record(b"before"))
        link.send(Record(b"large", [data, b"", b"small"]))
        link.send(Record(b"after"))
        await inbox.until_count(3)
        assert inbox.headers == [b"before", b"large", b"after"]
        large, empty, small = inbox.records[1][1].buffers
        assert hashlib.sha256(large).digest() == hashlib.sha256(data).digest()
        assert (bytes(empty), bytes(small)) == (b"", b"small")

    async def test_what_arrives_belongs_to_the_receiver(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        mine = bytearray(b"x" * 100_000)
        a.connect("b.1", b.address).send(Record(b"h", [mine]))
        await inbox.until_count(1)
        view = memoryview(inbox.records[0][1].buffers[0])
        assert not view.readonly
        view[0] = 0
        assert mine[0] == ord("x")

    async def test_what_is_queued_counts_until_it_has_left(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, inbox = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        piece = bytes(1024 * 1024)
        for number in range(1, 41):
            link.send(Record(b"p", [piece]))
            assert 0 < link.queued_bytes() <= number * (len(piece) + 1)
        await inbox.until_count(40)
        async with asyncio.timeout(10):
            while link.queued_bytes():  # noqa: ASYNC110 - nothing tells when ZeroMQ lets go
                await asyncio.sleep(0.01)

    async def test_connect_gives_the_living_link(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        b, _ = await peers.start("b.1", echo)
        link = a.connect("b.1", b.address)
        assert a.connect("b.1", b.address) is link
        link.send(Record(b"x"))
        await inbox.until_count(1)
        assert a.connect("b.1", b.address) is link

    async def test_two_peers_that_dial_each_other_have_two_links(self, peers: Peers) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        from_a, from_b = a.connect("b.1", b.address), b.connect("a.1", a.address)
        for i in range(50):
            from_a.send(Record(b"a%d" % i))
            from_b.send(Record(b"b%d" % i))
        await at_a.until_count(50)
        await at_b.until_count(50)
        assert at_a.headers == [b"b%d" % i for i in range(50)]
        assert at_b.headers == [b"a%d" % i for i in range(50)]
        assert a.statistics().links == b.statistics().links == 2

    async def test_a_peer_can_call_itself(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        a.connect("a.1", a.address).send(Record(b"me"))
        await inbox.until_count(1)
        assert inbox.records[0][0].peer == "a.1"

    async def test_records_wait_for_a_peer_that_does_not_listen_yet(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        late = peers.network.transport("b.1")
        link = a.connect("b.1", late.address)
        link.send(Record(b"early"))
        await asyncio.sleep(0.1)
        inbox = Inbox()
        peers.made.append(late)
        await late.start(inbox)
        await inbox.until_count(1)

    async def test_nobody_there_is_a_lost_link_that_says_so(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        never = peers.network.transport("b.1")
        link = a.connect("b.1", never.address)
        link.send(Record(b"x"))
        await inbox.until(lambda: inbox.lost)
        assert inbox.lost[0][0] is link
        assert "connection refused" in inbox.lost[0][1]
        assert never.address.partition("?")[0] in inbox.lost[0][1]
        link.send(Record(b"y"))  # dropped in silence
        assert link.queued_bytes() == 0

    async def test_another_process_at_the_address_is_a_lost_link(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        b, at_b = await peers.start("b.2")
        a.connect("b.1", b.address).send(Record(b"for b.1 only"))
        await inbox.until(lambda: inbox.lost)
        assert "wrong peer" in inbox.lost[0][1]
        assert at_b.records == []

    async def test_closing_a_link_flushes_it_and_the_other_side_loses_it(
        self, peers: Peers
    ) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        link = a.connect("b.1", b.address)
        for i in range(300):
            link.send(Record(b"%d" % i, [bytes(10_000)]))
        link.close()
        link.send(Record(b"too late"))
        await at_b.until(lambda: at_b.lost)
        assert at_b.headers == [b"%d" % i for i in range(300)]
        assert "closed by the peer" in at_b.lost[0][1]
        await asyncio.sleep(0.05)
        assert at_a.lost == []
        assert a.statistics().links == b.statistics().links == 0

    async def test_an_inbound_link_can_be_closed_too(self, peers: Peers) -> None:
        def answer_and_close(link: Link, record: Record) -> None:
            link.send(Record(b"answer"))
            link.close()

        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1", answer_and_close)
        a.connect("b.1", b.address).send(Record(b"question"))
        await at_a.until(lambda: at_a.lost)
        assert at_a.headers == [b"answer"]
        assert at_b.lost == []

    async def test_a_closed_link_can_be_dialled_again(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        for i in range(20):
            link = a.connect("b.1", b.address)
            link.send(Record(b"%d" % i))
            await at_b.until_count(i + 1)
            link.close()
            await at_b.until(lambda n=i: len(at_b.lost) == n + 1)
        assert at_b.headers == [b"%d" % i for i in range(20)]

    async def test_closing_a_transport_flushes_and_its_peers_lose_their_links(
        self, peers: Peers
    ) -> None:
        a, at_a = await peers.start("a.1")
        b, at_b = await peers.start("b.1")
        c, at_c = await peers.start("c.1")
        c.connect("a.1", a.address).send(Record(b"hi"))
        await at_a.until_count(1)
        link = a.connect("b.1", b.address)
        for i in range(200):
            link.send(Record(b"%d" % i, [bytes(5_000)]))
        await a.close(2.0)
        await at_b.until_count(200)
        await at_b.until(lambda: at_b.lost)
        await at_c.until(lambda: at_c.lost)
        assert at_a.lost == []
        await a.close()  # twice is once

    async def test_a_restarted_peer_is_another_peer(self, peers: Peers) -> None:
        a, at_a = await peers.start("a.1")
        b, _ = await peers.start("b.1")
        first = a.connect("b.1", b.address)
        first.send(Record(b"x"))
        await b.close()
        await at_a.until(lambda: at_a.lost)
        again, at_again = await peers.start("b.2")
        second = a.connect("b.2", again.address)
        second.send(Record(b"y"))
        await at_again.until_count(1)
        assert [link for link, _ in at_a.lost] == [first]

    async def test_closing_does_not_wait_longer_than_it_may(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        never = peers.network.transport("b.1")
        a.connect("b.1", never.address).send(Record(b"x"))
        loop = asyncio.get_running_loop()
        start = loop.time()
        await a.close(0.3)
        assert loop.time() - start < 1.0

    async def test_misuse_is_refused_in_words(self, peers: Peers) -> None:
        a, inbox = await peers.start("a.1")
        with pytest.raises(MisuseError, match="started before"):
            await a.start(inbox)
        with pytest.raises(ConfigError, match="not an address"):
            a.connect("b.1", "nowhere")
        with pytest.raises(MisuseError, match="oversized header"):
            a.connect("a.1", a.address).send(Record(bytes(300_000)))
        unstarted = peers.network.transport("c.1")
        with pytest.raises(MisuseError, match="not started"):
            unstarted.connect("a.1", a.address)
        await a.close()
        with pytest.raises(Closed):
            a.connect("b.1", a.address)

    async def test_an_address_cannot_be_taken_twice(self, peers: Peers) -> None:
        a, _ = await peers.start("a.1")
        with pytest.raises(ConfigError, match=a.address.partition("?")[0]):
            await peers.start("a.1")
