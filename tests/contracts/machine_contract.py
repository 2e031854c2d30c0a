"""What every machine must do, whatever it decides. Subclass it, name the class Test…, give it a script.

    class TestBarrier(MachineContract):
        def make(self): return Barrier()
        def script(self): return [tell(0, "member", name="t-0", …), ask(1, "t-0.0", 1, "arrive", name="x")]

Each test plays the script up to every point of it and does something there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgpack
import pytest

from runtime.control.messages import error_state
from runtime.errors import MisuseError, RuntimeFault
from runtime.machine import Call, Effect, Fail, Machine, Message, Reply


class Step(NamedTuple):
    """One message at a time; `call` None: nobody awaits an answer."""

    now: float
    message: Message
    call: Call | None


def ask(now: float, client: str, number: int, op: str, **fields: Any) -> Step:
    """A question."""
    return Step(now, {"op": op, **fields}, Call(client, number))


def tell(now: float, op: str, **fields: Any) -> Step:
    """A message that nobody awaits an answer to."""
    return Step(now, {"op": op, **fields}, None)


def plain(effects: Sequence[Effect]) -> list[Any]:
    """Effects such that two that say the same are equal, errors included."""
    return [("fail", e.call, error_state(e.error)) if isinstance(e, Fail) else e for e in effects]


class MachineContract:
    """The contract. `make` gives a new machine, `script` what it is told."""

    def make(self) -> Machine:
        raise NotImplementedError

    def script(self) -> list[Step]:
        raise NotImplementedError

    def ended(self, done: Sequence[Step]) -> set[str]:
        """Clients that these steps say are gone: their waits are forgotten without an answer."""
        return set()

    # -- playing ------------------------------------------------------------------------------

    def play(self, machine: Machine, steps: Sequence[Step]) -> list[Effect]:
        """Tick when something is due, then hand over; as the driver does."""
        effects: list[Effect] = []
        for now, message, call in steps:
            due = machine.deadline()
            if due is not None and due <= now:
                effects += machine.tick(now)
            try:
                effects += machine.handle(message, call, now)
            except RuntimeFault as error:
                effects += [] if call is None else [Fail(call, error)]
        return effects

    def points(self) -> Iterator[tuple[Machine, list[Effect], list[Step], float]]:
        """A machine at every point of the script, its effects so far, the steps to come, the time."""
        steps = self.script()
        for done in range(len(steps) + 1):
            machine = self.make()
            effects = self.play(machine, steps[:done])
            yield machine, effects, steps[done:], steps[done - 1].now if done else 0.0

    def waiting(self, effects: Sequence[Effect], steps: Sequence[Step]) -> list[Call]:
        """Calls that were made and not answered."""
        answered = {e.call for e in effects if isinstance(e, Reply | Fail)}
        calls = [step.call for step in steps if step.call is not None]
        ended = self.ended(steps)
        return [call for call in calls if call not in answered and call.client not in ended]

    # -- the contract -------------------------------------------------------------------------

    def test_no_call_is_answered_twice(self) -> None:
        answers = [
            e.call for e in self.play(self.make(), self.script()) if isinstance(e, Reply | Fail)
        ]
        assert len(answers) == len(set(answers))

    def test_an_unknown_operation_is_refused_and_changes_nothing(self) -> None:
        for machine, _, _, now in self.points():
            before = machine.dump()
            with pytest.raises(MisuseError, match="no operation 'no such thing'"):
                machine.handle({"op": "no such thing"}, Call("c", 1), now)
            assert machine.dump() == before

    def test_a_message_without_its_fields_is_refused_or_fine_but_never_half_done(self) -> None:
        for machine, _, rest, now in self.points():
            before = machine.dump()
            if not rest:
                continue
            try:
                machine.handle({"op": rest[0].message["op"]}, rest[0].call, now)
            except RuntimeFault:
                assert machine.dump() == before

    def test_a_state_that_was_written_down_and_read_back_goes_on_the_same(self) -> None:
        for machine, _, rest, now in self.points():
            state = msgpack.unpackb(msgpack.packb(machine.dump()), strict_map_key=False)
            twin = self.make()
            twin.load(state)
            assert msgpack.packb(twin.dump()) == msgpack.packb(machine.dump())
            assert twin.deadline() == machine.deadline()
            assert plain(self.play(twin, rest)) == plain(self.play(machine, rest))
            late = now + 1e6
            assert plain(twin.tick(late)) == plain(machine.tick(late))

    def test_every_waiting_call_can_say_why_and_no_other(self) -> None:
        steps = self.script()
        for machine, effects, rest, _ in self.points():
            done = steps[: len(steps) - len(rest)]
            waiting = self.waiting(effects, done)
            for step in done:
                if step.call is not None:
                    assert bool(machine.why(step.call)) == (step.call in waiting), step
        assert self.make().why(Call("nobody", 0)) is None

    def test_a_tick_does_all_that_is_due(self) -> None:
        for machine, _, _, now in self.points():
            for _ in range(100):
                due = machine.deadline()
                if due is None:
                    break
                now = max(now, due)
                machine.tick(now)
                after = machine.deadline()
                assert after is None or after > now

    def test_who_gave_up_is_never_answered(self) -> None:
        steps = self.script()
        for machine, effects, rest, now in self.points():
            for call in self.waiting(effects, steps[: len(steps) - len(rest)]):
                after = machine.cancelled(call, now)
                assert machine.why(call) is None
                after += self.play(machine, rest) + machine.tick(now + 1e6)
                assert call not in {e.call for e in after if isinstance(e, Reply | Fail)}
                break

    def test_who_is_lost_is_never_answered(self) -> None:
        steps = self.script()
        for machine, effects, rest, now in self.points():
            waiting = self.waiting(effects, steps[: len(steps) - len(rest)])
            for peer in sorted({call.client for call in waiting}):
                after = machine.lost(peer, "SIGKILL", now)
                gone = [call for call in waiting if call.client == peer]
                assert [machine.why(call) for call in gone] == [None] * len(gone)
                after += machine.tick(now + 1e6)
                assert not {e.call for e in after if isinstance(e, Reply | Fail)} & {*gone}

    def test_unknown_calls_and_peers_are_ignored(self) -> None:
        for machine, _, _, now in self.points():
            before = machine.dump()
            assert machine.cancelled(Call("nobody", 99), now) == []
            assert machine.lost("nobody", "SIGKILL", now) == []
            assert machine.dump() == before
