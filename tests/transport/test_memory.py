"""The memory network: the contract, and what only it can do (parting, killing, delays in fake time)."""

from __future__ import annotations

import asyncio

import pytest

from runtime.errors import ConfigError
from runtime.transport.base import Record
from runtime.transport.memory import MemoryNetwork, NetworkSettings
from tests.contracts.transport_contract import Inbox, TransportContract, echo

pytestmark = pytest.mark.looptime


class TestContract(TransportContract):
    @pytest.fixture(params=["quick", "slow"])
    def network(self, request: pytest.FixtureRequest) -> MemoryNetwork:
        delay = (0.0, 0.0) if request.param == "quick" else (0.001, 0.01)
        return MemoryNetwork(seed=1, settings=NetworkSettings(delay_s=delay))


async def _pair(network: MemoryNetwork):
    a, b = network.transport("a.1"), network.transport("b.1")
    at_a, at_b = Inbox(), Inbox(echo)
    await a.start(at_a)
    await b.start(at_b)
    return a, at_a, b, at_b


async def _arrivals(seed: int) -> list[float]:
    network = MemoryNetwork(seed, NetworkSettings(delay_s=(0.5, 2.0)))
    a, at_a, b, _ = await _pair(network)
    link = a.connect("b.1", b.address)
    start, times = asyncio.get_running_loop().time(), []
    for i in range(10):
        link.send(Record(b"%d" % i))
        await at_a.until_count(i + 1)
        times.append(round(asyncio.get_running_loop().time() - start, 6))
    await a.close()
    await b.close()
    return times


async def test_delays_are_the_same_for_a_seed_and_pass_in_fake_time() -> None:
    first, again, other = await _arrivals(3), await _arrivals(3), await _arrivals(4)
    assert first == again != other
    assert 10 <= first[-1] <= 40


async def test_delayed_records_keep_their_order() -> None:
    network = MemoryNetwork(5, NetworkSettings(delay_s=(0.0, 1.0)))
    a, at_a, b, _ = await _pair(network)
    link = a.connect("b.1", b.address)
    for i in range(50):
        link.send(Record(b"%d" % i))
        await asyncio.sleep(0.01)
    await at_a.until_count(50)
    assert at_a.headers == [b"%d" % i for i in range(50)]
    await a.close()
    await b.close()


async def _arrival_order(seed: int) -> list[bytes]:
    network = MemoryNetwork(seed, NetworkSettings(delay_s=(0.0, 1.0)))
    a, _, b, at_b = await _pair(network)
    at_b.answer = None
    link = a.connect("b.1", b.address)
    for n in range(10):
        link.send(Record(b"in %d" % n, [bytes(2_000_000)]))
        link.send(Record(b"any %d" % n, [bytes(2_000_000 * (n % 2))]), ordered=False)
        await asyncio.sleep(0.01)
    await at_b.until_count(20)
    await a.close()
    await b.close()
    return at_b.headers


async def test_unordered_records_overtake_large_buffers_and_are_overtaken_the_same_way_for_a_seed() -> (
    None
):
    first, again, other = await _arrival_order(1), await _arrival_order(1), await _arrival_order(2)
    assert first == again != other
    ordered = [header for header in first if header.startswith(b"in")]
    assert ordered == [b"in %d" % n for n in range(10)]
    places = {n: first.index(b"any %d" % n) - first.index(b"in %d" % n) for n in range(10)}
    assert min(places.values()) < 0 < max(places.values())


async def test_parting_cuts_the_links_between_two_sides_only_until_it_heals() -> None:
    network = MemoryNetwork()
    a, at_a, b, at_b = await _pair(network)
    c, at_c = network.transport("c.1"), Inbox(echo)
    await c.start(at_c)
    to_b, to_c = a.connect("b.1", b.address), a.connect("c.1", c.address)
    to_b.send(Record(b"x"))
    to_c.send(Record(b"x"))
    await at_a.until_count(2)
    network.part(["a.1"], ["b.1"])
    to_b.send(Record(b"never"))
    await at_a.until(lambda: at_a.lost)
    await at_b.until(lambda: at_b.lost)
    assert at_a.lost == [(to_b, "the network is parted")]
    a.connect("b.1", b.address).send(Record(b"refused"))
    await at_a.until(lambda: len(at_a.lost) == 2)
    assert "connection refused" in at_a.lost[1][1]
    to_c.send(Record(b"y"))
    await at_a.until_count(3)
    network.heal()
    a.connect("b.1", b.address).send(Record(b"z"))
    await at_a.until_count(4)
    assert at_b.headers == [b"x", b"z"]
    for transport in (a, b, c):
        await transport.close()


async def test_a_killed_peer_flushes_nothing_and_is_noticed() -> None:
    network = MemoryNetwork(settings=NetworkSettings(delay_s=(0.5, 0.5)))
    a, at_a, b, at_b = await _pair(network)
    link = a.connect("b.1", b.address)
    link.send(Record(b"x"))
    await at_a.until_count(1)
    b.links[0].send(Record(b"on its way"))
    await asyncio.sleep(0.1)
    network.kill("b.1")
    await at_a.until(lambda: at_a.lost)
    await asyncio.sleep(2)
    assert at_a.headers == [b"x"]
    assert at_b.lost == []
    assert link.queued_bytes() == 0
    await a.close()


async def test_loss_ends_the_link_and_never_leaves_a_gap() -> None:
    network = MemoryNetwork(11, NetworkSettings(loss=0.05))
    a, _, b, at_b = await _pair(network)
    at_b.answer = None
    losses = 0
    for n in range(300):
        link = a.connect("b.1", b.address)
        link.send(Record(b"%d" % n))
        await asyncio.sleep(0.01)
        losses = len(at_b.lost)
    assert 3 < losses < 40
    assert at_b.headers == sorted(at_b.headers, key=int)
    await a.close()
    await b.close()


async def test_addresses_are_of_this_network() -> None:
    with pytest.raises(ConfigError, match="mem://"):
        MemoryNetwork().transport("a.1", "tcp://h:1")
