"""A queue's machine as a whole: its contract, turns, rates, and any order of anything."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from runtime.data.buffer import QueueBuffer
from runtime.data.intake import HANDLE_BITS
from runtime.errors import Closed, LeaseLost, MisuseError
from runtime.machine import Call, Effect, Fail, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask
from tests.data.bench import Bench, bodies


class TestQueueBuffer(MachineContract):
    def make(self) -> Machine:
        return QueueBuffer("q", 4, 100, lease_s=5.0)

    def script(self) -> list[Step]:
        return [
            ask(0, "c.0", 1, "get", most=2, least=2, timeout=3),
            ask(0, "p.0", 1, "put", bodies=bodies("a"), version=1, credit=True),
            ask(1, "p.0", 2, "put", bodies=bodies("b", "c", "d", "e", "f", "g", "h")),
            ask(1, "p.1", 1, "put", bodies=bodies("x", "y"), buffers=[[b"1"], []], timeout=9),
            ask(1, "p.2", 1, "put", bodies=bodies("m", "n"), whole=True),
            ask(2, "c.0", 2, "took", about=1),
            ask(2, "c.1", 1, "get", most=3, least=1, lease=True),
            ask(2, "c.1", 2, "took", about=1),
            ask(3, "c.1", 3, "ack", leases=[0]),
            ask(3, "c.1", 4, "ack", leases=[0]),
            ask(3, "c.1", 5, "nack", leases=[2]),
            ask(3, "c.2", 1, "get", most=9, least=4, min_version=2),
            ask(3, "c.3", 1, "get", most=1, least=1, timeout=0),
            ask(4, "c.2", 2, "back", runs=[[1, 1, None, False]], bodies=bodies("b")),
            ask(4, "p.1", 2, "put", bodies=[b"z" * 101]),
            ask(5, "p.1", 3, "close"),
            ask(5, "p.1", 4, "put", bodies=bodies("late")),
            ask(5, "p.1", 5, "put", bodies=bodies("eager"), eager=True),
            ask(6, "c.3", 2, "get", most=50, least=1),
            ask(6, "c.3", 3, "statistics"),
            ask(8, "c.3", 4, "get", most=50, least=1),
            ask(9, "c.4", 1, "get", most=50, least=1, timeout=2),
        ]


def test_items_of_one_producer_come_out_in_their_order() -> None:
    bench = Bench()
    bench.put("p", "a", "b", "c")
    bench.put("p", "d")
    assert bench.get("c", 2) == ["a", "b"]
    assert bench.get("c", 5) == ["c", "d"]


def test_producers_take_turns() -> None:
    bench = Bench()
    bench.put("greedy", *"abcdefgh")
    bench.put("modest", "x")
    assert [bench.get("c")[0] for _ in range(3)] == ["a", "x", "b"]
    bench.put("modest", "y", "z")
    assert sorted(bench.get("c", 4)) == ["c", "d", "y", "z"]


def test_two_objects_of_one_process_are_two_producers() -> None:
    bench = Bench()
    bench.put("p", "a", "b", "c")
    bench._number = 1 << HANDLE_BITS
    bench.put("p", "x")
    assert bench.get("c", 1) + bench.get("c", 1) == ["a", "x"]


def test_dropping_makes_room_for_those_who_wait() -> None:
    bench = Bench(size=2)
    bench.put("p", "a", "b", version=1)
    bench.put("p", "c", version=2)
    assert bench.get("c", 9, min_version=2, timeout=5) == ["c"]


def test_a_group_that_does_not_fit_is_left_for_the_next() -> None:
    bench = Bench()
    bench.put("p", "a")
    bench.put("p", "x", "y", "z", whole=True)
    bench.put("p", "b")
    assert bench.get("c", 3) == ["a"]
    assert bench.get("c", 4) == ["x", "y", "z", "b"]


def test_rates_are_of_the_last_seconds() -> None:
    bench = Bench()
    for _ in range(20):
        bench.put("p", *"abcde")
        bench.get("c", 5)
        bench.now += 0.5
    figures = bench.figures()
    assert figures["put_total"] == figures["got_total"] == 100
    assert 8 <= figures["put_rate"] <= 12


class Model(RuleBasedStateMachine):
    """Any order of anything: what is put comes out once, or is still there, in order."""

    @initialize(size=st.integers(1, 12), lease_s=st.sampled_from([None, 2.0]))
    def begin(self, size: int, lease_s: float | None) -> None:
        self.size = size
        self.machine = QueueBuffer("q", size, None, lease_s)
        self.now, self.number = 0.0, 0
        self.acknowledged: list[int] = []
        self.put_calls: dict[Call, list[int]] = {}
        self.counts = dict.fromkeys("abc", 0)
        self.gets: dict[Call, bool] = {}
        self.answered: dict[Call, dict[str, Any]] = {}
        self.final: list[int] = []
        self.held: dict[int, tuple[str, int]] = {}
        self.closed = False

    def ask(self, who: str, op: str, **fields: Any) -> Call:
        self.number += 1
        call = Call(who, self.number)
        if op == "put":
            self.put_calls[call] = [int(body.decode()) for body in fields["bodies"]]
        if op == "get":
            self.gets[call] = bool(fields.get("lease"))
        try:
            self.see(self.machine.handle({"op": op, **fields}, call, self.now))
        except (Closed, LeaseLost, MisuseError):
            self.put_calls.pop(call, None)
            self.gets.pop(call, None)
        return call

    def see(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Fail):
                self.gets.pop(effect.call, None)
                self.put_calls.pop(effect.call, None)
            elif isinstance(effect, Reply) and effect.call in self.put_calls:
                items = self.put_calls.pop(effect.call)
                self.acknowledged += items[: effect.value["taken"]]
            elif isinstance(effect, Reply) and effect.call in self.gets:
                if effect.value["bodies"]:
                    self.answered[effect.call] = effect.value
                else:
                    del self.gets[effect.call]

    @rule(who=st.sampled_from("abc"), count=st.integers(1, 5), wait=st.sampled_from([None, 0, 1.0]))
    def put(self, who: str, count: int, wait: float | None) -> None:
        start = self.counts[who]
        self.counts[who] += count
        base = 1000 * "abc".index(who)
        items = [str(base + start + place).encode() for place in range(count)]
        self.ask(who, "put", bodies=items, timeout=wait)

    @rule(
        who=st.sampled_from("xyz"),
        most=st.integers(1, 6),
        lease=st.booleans(),
        wait=st.sampled_from([None, 0, 1.0]),
    )
    def get(self, who: str, most: int, lease: bool, wait: float | None) -> None:
        self.ask(who, "get", most=most, least=1, lease=lease, timeout=wait)

    @precondition(lambda self: self.answered)
    @rule(data=st.data(), takes=st.booleans())
    def receive(self, data: st.DataObject, takes: bool) -> None:
        call = data.draw(st.sampled_from(sorted(self.answered)))
        value, lease = self.answered.pop(call), self.gets.pop(call)
        if not takes:
            self.see(self.machine.cancelled(call, self.now))
            return
        self.ask(call.client, "took", about=call.id)
        items = [int(body.decode()) for body in value["bodies"]]
        if lease:
            for place, item in enumerate(items):
                self.held[value["lease"] + place] = (call.client, item)
        else:
            self.final += items

    @precondition(lambda self: self.held)
    @rule(data=st.data(), op=st.sampled_from(["ack", "nack"]))
    def settle(self, data: st.DataObject, op: str) -> None:
        lease = data.draw(st.sampled_from(sorted(self.held)))
        who, item = self.held.pop(lease)
        self.number += 1
        try:
            message = {"op": op, "leases": [lease]}
            self.see(self.machine.handle(message, Call(who, self.number), self.now))
        except LeaseLost:
            return
        if op == "ack":
            self.final.append(item)

    @rule(who=st.sampled_from("xyz"))
    def die(self, who: str) -> None:
        self.see(self.machine.lost(who, "SIGKILL", self.now))
        for call in [call for call in self.gets if call.client == who]:
            del self.gets[call]
            self.answered.pop(call, None)
        self.held = {n: held for n, held in self.held.items() if held[0] != who}

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = self.machine.deadline()
        if due is not None and due <= self.now:
            self.see(self.machine.tick(self.now))

    @rule()
    def reload(self) -> None:
        state = self.machine.dump()
        self.machine = QueueBuffer("q", self.size, None, self.machine._outlet._lease_s)
        self.machine.load(state)

    @invariant()
    def nothing_is_given_twice(self) -> None:
        if hasattr(self, "final"):
            assert len(self.final) == len(set(self.final))

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        for who in "xyz":
            self.die(who)
        rest: list[int] = []
        while self.machine._shelf.depth:
            call = self.ask("end", "get", most=100, least=1)
            value = self.answered.pop(call)
            rest += [int(body.decode()) for body in value["bodies"]]
            self.ask("end", "took", about=call.id)
        everything = self.final + rest
        assert len(everything) == len(set(everything))
        assert set(self.acknowledged) <= set(everything)
        for base in range(3):
            own = [item for item in rest if item // 1000 == base]
            assert own == sorted(own)


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
