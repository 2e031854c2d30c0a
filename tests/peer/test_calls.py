"""The call table, deadlines, lanes and the search for cycles: by calling functions."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.peer.calls import (
    CallTable,
    Cycle,
    Deadlines,
    Incoming,
    Lane,
    Outgoing,
    Owner,
    WaitGraph,
)
from runtime.wire.messages import Probe


class FakeChannel(NamedTuple):
    peer: str


class Method(NamedTuple):
    name: str


class Item:
    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline


def table_with(channel: Any, count: int) -> tuple[CallTable, list[Outgoing]]:
    table = CallTable()
    calls = [table.open("b-0", "f", None, 0.0) for _ in range(count)]  # type: ignore[arg-type]
    for call in calls:
        call.channel, call.sent = channel, True
    return table, calls


def test_an_answer_finds_its_call_once_and_is_late_after_that() -> None:
    channel = FakeChannel("b-0.1")
    table, (first, second) = table_with(channel, 2)
    assert table.answer(channel, first.id) is first
    assert table.answer(channel, first.id) is None
    assert table.late == 1
    assert first not in table
    assert second in table
    assert len(table) == 1


def test_an_answer_by_another_channel_is_nobodys() -> None:
    table, (call,) = table_with(FakeChannel("b-0.1"), 1)
    assert table.answer(FakeChannel("c-0.1"), call.id) is None
    assert call in table


def test_a_dropped_call_is_dropped_once() -> None:
    channel = FakeChannel("b-0.1")
    table, (call,) = table_with(channel, 1)
    assert table.drop(call)
    assert not table.drop(call)
    assert table.answer(channel, call.id) is None


def test_calls_that_were_sent_are_found_by_their_channel_in_order() -> None:
    channel = FakeChannel("b-0.1")
    table, calls = table_with(channel, 3)
    calls[1].sent = False
    assert table.sent_by(channel) == [calls[0], calls[2]]
    assert table.find(channel, calls[1].id) is calls[1]
    assert table.find(FakeChannel("c-0.1"), calls[0].id) is None
    assert table.all() == calls


def test_a_call_that_is_made_once_more_has_a_new_id_and_is_not_sent() -> None:
    channel = FakeChannel("b-0.1")
    table, (call,) = table_with(channel, 1)
    old = call.id
    table.renew(call)
    assert call.id != old
    assert table.answer(channel, old) is None
    assert call in table
    assert table.sent_by(channel) == []
    assert table.load("b-0") == 1


def test_what_is_due_comes_earliest_first_and_only_once() -> None:
    deadlines = Deadlines()
    items = [Item(when) for when in (3.0, 1.0, 2.0, 9.0)]
    for item in items:
        deadlines.add(item)
    assert deadlines.next() == 1.0
    assert deadlines.due(3.0) == [items[1], items[2], items[0]]
    assert deadlines.due(3.0) == []
    assert deadlines.next() == 9.0


def test_what_is_forgotten_is_never_due() -> None:
    deadlines = Deadlines()
    item, other = Item(1.0), Item(2.0)
    deadlines.add(item)
    deadlines.add(other)
    deadlines.forget(item)
    deadlines.forget(item)
    assert deadlines.due(5.0) == [other]
    assert len(deadlines) == 0


def test_long_deadlines_of_quick_calls_do_not_pile_up() -> None:
    deadlines = Deadlines()
    for _ in range(10_000):
        item = Item(3600.0)
        deadlines.add(item)
        deadlines.forget(item)
    assert len(deadlines._heap) < 200


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans())))
def test_deadlines_give_exactly_what_was_not_forgotten(spec: list[tuple[float, bool]]) -> None:
    deadlines = Deadlines()
    kept = []
    for when, keep in spec:
        item = Item(when)
        deadlines.add(item)
        if keep:
            kept.append(when)
        else:
            deadlines.forget(item)
    assert len(deadlines) == len(kept)
    found = []
    while (when := deadlines.next()) is not None:
        found += [when] * len(deadlines.due(when))
    assert found == sorted(kept)


def incoming(name: str = "f", id: int = 1) -> Incoming:
    return Incoming(FakeChannel("x-0.1"), id, Method(name), None)


def test_a_lane_starts_in_order_and_no_more_than_its_limit() -> None:
    lane = Lane(2)
    calls = [incoming() for _ in range(3)]
    for call in calls:
        lane.queue(call)
    for call in calls[:2]:
        assert lane.next() is call
        assert lane.start(call)
    assert lane.next() is None
    lane.finish(calls[0])
    assert lane.next() is calls[2]
    assert len(lane) == 1


def test_a_call_is_claimed_by_one_only() -> None:
    lane = Lane(1)
    call = incoming()
    lane.queue(call)
    assert lane.claim(call)
    assert not lane.start(call)
    assert not lane.claim(call)
    assert lane.holder is None
    assert lane.next() is None


# cycles


class Process:
    """One process's part of a wait graph, with handlers put into its plain lane by hand."""

    def __init__(self, name: str) -> None:
        self.peer = f"{name}.1"
        self.lane = Lane(1)
        self.graph = WaitGraph(Owner(self.peer, name), self.lane)
        self.calls: dict[int, Incoming] = {}

    def arrives(self, call: Outgoing, method: str, *, start: bool) -> Incoming:
        found = Incoming(FakeChannel("caller"), call.id, Method(method), None)
        self.calls[call.id] = found
        self.lane.queue(found)
        if start:
            assert self.lane.start(found)
        return found


_ids = iter(range(1, 10**6))


def call_to(process: Process) -> Outgoing:
    call = Outgoing(next(_ids), process.peer, "?", None, 0.0)  # type: ignore[arg-type]
    call.channel, call.sent = process, True
    return call


def deliver(forwards: list[Any]) -> list[Cycle]:
    """Carry probes until none is left; the cycles that they found."""
    cycles: list[Cycle] = []
    steps = 0
    while forwards:
        steps += 1
        assert steps < 1000, "a probe goes round for ever"
        process, probe = forwards.pop(0)
        subject = process.calls.get(probe.subject)
        if subject is None:
            continue
        found = process.graph.asked(subject, probe)
        if isinstance(found, Cycle):
            cycles.append(found)
        else:
            forwards += found
    return cycles


def test_a_chain_that_comes_back_is_a_cycle_named_in_full() -> None:
    a, b = Process("a-0"), Process("b-0")
    f = a.arrives(call_to(a), "f", start=True)
    to_g = call_to(b)
    f.waits = ([to_g],)
    g = b.arrives(to_g, "g", start=True)
    back = call_to(a)
    g.waits = ([back],)
    queued = a.arrives(back, "f", start=False)
    (cycle,) = deliver(a.graph.probe())
    assert cycle == (queued, ("a-0.f", "b-0.g", "a-0.f"))


def test_two_chains_that_cross_are_a_cycle() -> None:
    a, b = Process("a-0"), Process("b-0")
    af, bf = a.arrives(call_to(a), "f", start=True), b.arrives(call_to(b), "f", start=True)
    to_b, to_a = call_to(b), call_to(a)
    af.waits, bf.waits = ([to_b],), ([to_a],)
    b.arrives(to_b, "g", start=False)
    ag = a.arrives(to_a, "g", start=False)
    (cycle,) = deliver(a.graph.probe())
    assert cycle == (ag, ("a-0.f", "b-0.g (queued behind b-0.f)", "a-0.g"))


def test_a_handler_that_does_not_wait_yet_parks_the_probe_until_it_does() -> None:
    a, b = Process("a-0"), Process("b-0")
    f = a.arrives(call_to(a), "f", start=True)
    to_g = call_to(b)
    f.waits = ([to_g],)
    g = b.arrives(to_g, "g", start=True)
    back = call_to(a)
    queued = a.arrives(back, "f", start=False)
    assert deliver(a.graph.probe()) == []
    g.waits = ([back],)
    (cycle,) = deliver(b.graph.blocked(g))
    assert cycle.call is queued


def test_a_probe_parked_at_a_queued_call_goes_on_when_the_handler_before_it_waits() -> None:
    a, b = Process("a-0"), Process("b-0")
    af, bf = a.arrives(call_to(a), "f", start=True), b.arrives(call_to(b), "f", start=True)
    to_b, to_a = call_to(b), call_to(a)
    af.waits = ([to_b],)
    b.arrives(to_b, "g", start=False)
    ag = a.arrives(to_a, "g", start=False)
    assert deliver(a.graph.probe()) == []
    bf.waits = ([to_a],)
    assert deliver(b.graph.blocked(bf)) == [
        Cycle(ag, ("a-0.f", "b-0.g (queued behind b-0.f)", "a-0.g"))
    ]


def test_a_queue_behind_a_handler_that_will_end_is_no_cycle() -> None:
    a, b = Process("a-0"), Process("b-0")
    f = a.arrives(call_to(a), "f", start=True)
    to_g = call_to(b)
    f.waits = ([to_g],)
    b.arrives(to_g, "g", start=True)
    a.arrives(call_to(a), "h", start=False)
    assert deliver(a.graph.probe()) == []


def test_nobody_asks_when_nothing_queues_or_nothing_waits() -> None:
    a = Process("a-0")
    assert a.graph.probe() == []
    f = a.arrives(call_to(a), "f", start=True)
    f.waits = ([call_to(a)],)
    assert a.graph.probe() == []
    a.arrives(call_to(a), "g", start=False)
    f.waits = ()
    assert a.graph.probe() == []


def test_an_old_probe_of_a_handler_that_has_gone_on_finds_nothing() -> None:
    a, b = Process("a-0"), Process("b-0")
    f = a.arrives(call_to(a), "f", start=True)
    f.waits = ([call_to(b)],)
    queued = a.arrives(call_to(a), "g", start=False)
    (old,) = a.graph.probe()
    a.lane.finish(f)
    assert a.graph.asked(queued, old.probe) == []
    h = a.arrives(call_to(a), "h", start=True)
    h.waits = ([call_to(b)],)
    a.graph.probe()
    assert a.graph.asked(queued, old.probe) == []


def test_a_probe_that_meets_a_cycle_of_others_does_not_go_round_it_for_ever() -> None:
    a, b, c = Process("a-0"), Process("b-0"), Process("c-0")
    f = a.arrives(call_to(a), "f", start=True)
    a.arrives(call_to(a), "x", start=False)
    to_b, b_to_c, c_to_b = call_to(b), call_to(c), call_to(b)
    f.waits = ([to_b],)
    bf, cf = b.arrives(to_b, "f", start=True), c.arrives(b_to_c, "f", start=True)
    bf.waits, cf.waits = ([b_to_c],), ([c_to_b],)
    b.arrives(c_to_b, "g", start=False)
    assert deliver(a.graph.probe()) == []
    assert len(deliver(b.graph.probe())) == 1


def test_a_call_that_is_over_keeps_no_probe() -> None:
    a = Process("a-0")
    f = a.arrives(call_to(a), "f", start=True)
    assert a.graph.asked(f, Probe("z-0.1", ("z-0.f",), 1, f.id)) == []
    a.graph.over(f)
    f.waits = ([call_to(a)],)
    assert a.graph.blocked(f) == []


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("last", range(5))
def test_a_ring_is_found_whichever_handler_blocks_last(size: int, last: int) -> None:
    last %= size
    ring = [Process(f"p-{i}") for i in range(size)]
    handlers = [p.arrives(call_to(p), "f", start=True) for p in ring]
    edges = [call_to(ring[(i + 1) % size]) for i in range(size)]
    forwards: list[Any] = []
    for i, edge in enumerate(edges):
        ring[(i + 1) % size].arrives(edge, "g", start=False)
    order = [i for i in range(size) if i != last] + [last]
    cycles: list[Cycle] = []
    for i in order:
        handlers[i].waits = ([edges[i]],)
        forwards = ring[i].graph.blocked(handlers[i]) + ring[i].graph.probe()
        cycles += deliver(forwards)
    assert cycles
