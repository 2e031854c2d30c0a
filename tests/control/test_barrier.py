"""Barriers count members, not calls. The whole story stands in `cases/barrier.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.control.barrier import Barrier
from runtime.errors import BarrierBroken
from runtime.machine import Call, Effect, Fail, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask, tell


class TestBarrier(MachineContract):
    def make(self) -> Machine:
        return Barrier()

    def script(self) -> list[Step]:
        return [
            *(_member(0, f"t-{rank}", 0) for rank in range(2)),
            ask(1, "t-0.0", 1, "arrive", name="x"),
            ask(1, "t-0.0", 2, "arrive", name="x"),
            ask(2, "t-1.0", 1, "arrive", name="y", role="*"),
            ask(3, "t-1.0", 2, "arrive", name="x"),
            ask(4, "t-0.0", 3, "arrive", name="z"),
            _member(5, "t-1", 1, state="restarting"),
            _member(6, "t-1", 1, state="failed", gone=True, cause="SIGKILL"),
            ask(7, "t-0.0", 4, "arrive", name="z"),
            ask(7, "t-9.0", 1, "arrive", name="z"),
        ]

    def ended(self, done: Sequence[Step]) -> set[str]:
        return (
            {"t-1.0"} if any(step.message.get("state") == "restarting" for step in done) else set()
        )


def _member(now: float, name: str, incarnation: int, **more: Any) -> Step:
    facts = {"name": name, "role": "t", "peer": f"{name}.{incarnation}", "cause": ""}
    return tell(now, "member", **{**facts, "state": "running", "gone": False, **more})


def _barrier(count: int = 3) -> Barrier:
    machine = Barrier()
    TestBarrier().play(machine, [_member(0, f"t-{rank}", 0) for rank in range(count)])
    return machine


def _arrive(machine: Barrier, peer: str, number: int, name: str = "x") -> list[Effect]:
    return machine.handle({"op": "arrive", "name": name}, Call(peer, number), 0)


def _tell(machine: Barrier, name: str, incarnation: int, **more: Any) -> list[Effect]:
    return machine.handle(_member(0, name, incarnation, **more).message, None, 0)


def test_arrivals_of_one_member_never_complete_it() -> None:
    machine = _barrier(3)
    for number in range(5):
        assert _arrive(machine, "t-0.0", number) == []
    _arrive(machine, "t-1.0", 1)
    assert len(_arrive(machine, "t-2.0", 1)) == 7


def test_an_arrival_stands_until_its_last_call_is_given_up() -> None:
    machine = _barrier(2)
    _arrive(machine, "t-0.0", 1)
    _arrive(machine, "t-0.0", 2)
    machine.cancelled(Call("t-0.0", 1), 0)
    assert _arrive(machine, "t-1.0", 1) == [
        Reply(Call("t-0.0", 2), {"generation": 1}),
        Reply(Call("t-1.0", 1), {"generation": 1}),
    ]


def test_names_do_not_mix() -> None:
    machine = _barrier(2)
    assert _arrive(machine, "t-0.0", 1, "x") == []
    assert _arrive(machine, "t-1.0", 1, "y") == []
    assert len(_arrive(machine, "t-1.0", 2, "x")) == 2


def test_a_new_process_must_arrive_itself() -> None:
    machine = _barrier(2)
    _arrive(machine, "t-0.0", 1)
    _tell(machine, "t-0", 1)
    assert _arrive(machine, "t-1.0", 1) == []
    assert len(_arrive(machine, "t-0.1", 1)) == 2


def test_a_member_that_is_planned_later_is_waited_for() -> None:
    machine = _barrier(2)
    _arrive(machine, "t-0.0", 1)
    _tell(machine, "t-2", 0, state="expected", peer="")
    assert _arrive(machine, "t-1.0", 1) == []
    assert "t-2 (expected)" in str(machine.why(Call("t-1.0", 1)))


def test_breaking_tells_every_barrier_of_the_role_and_of_the_job() -> None:
    machine = _barrier(3)
    _arrive(machine, "t-0.0", 1, "x")
    machine.handle({"op": "arrive", "name": "y", "role": "*"}, Call("t-1.0", 1), 0)
    effects = _tell(machine, "t-2", 0, state="failed", gone=True, cause="SIGKILL")
    failed = [effect for effect in effects if isinstance(effect, Fail)]
    assert [effect.call for effect in failed] == [Call("t-0.0", 1), Call("t-1.0", 1)]
    for effect in failed:
        assert isinstance(effect.error, BarrierBroken)
        assert effect.error.missing == ["t-2"]
    assert machine.dump()["arrived"] == []


def test_another_role_is_not_touched() -> None:
    machine = _barrier(2)
    _tell(machine, "e-0", 0, role="e")
    _arrive(machine, "t-0.0", 1)
    assert _tell(machine, "e-0", 0, role="e", state="failed", gone=True) == []
    assert len(_arrive(machine, "t-1.0", 1)) == 2


def test_nothing_is_kept_of_names_that_were_used() -> None:
    machine = _barrier(2)
    for number in range(100):
        _arrive(machine, "t-0.0", number, f"step-{number}")
        _arrive(machine, "t-1.0", number, f"step-{number}")
    state = machine.dump()
    assert (state["arrived"], state["completed"]) == ([], 100)
