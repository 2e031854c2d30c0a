"""Rendezvous: rounds, guests, last calls. The whole story stands in `cases/rendezvous.txt`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from runtime.control.rendezvous import Rendezvous
from runtime.errors import MisuseError, RendezvousError
from runtime.machine import Call, Effect, Fail, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask


class TestRendezvous(MachineContract):
    def make(self) -> Machine:
        return Rendezvous()

    def script(self) -> list[Step]:
        seat = {"role": "t", "slots": 2, "addr": "h", "port": 1}
        return [
            ask(0, "a.0", 1, "open", role="t", min=1, max=2),
            ask(1, "a.0", 2, "join", round=0, node="n0", **seat),
            ask(2, "c.0", 1, "join", round=0, node="n2", **seat),
            ask(2, "b.0", 1, "join", round=0, node="n1", timeout_s=3, **seat),
            ask(3, "a.0", 3, "join", round=0, node="n0", **seat),
            ask(9, "a.0", 4, "join", round=1, node="n0", **seat),
            ask(20, "a.0", 5, "status", role="t"),
            ask(21, "b.0", 2, "join", round=1, node="n1", **seat),
            ask(22, "a.0", 6, "close", role="t"),
            ask(23, "a.0", 7, "join", round=1, node="n1", **seat),
        ]


def _open(low: int, high: int, **more: Any) -> Rendezvous:
    machine = Rendezvous()
    machine.handle({"op": "open", "role": "t", "min": low, "max": high, **more}, None, 0)
    return machine


def _join(
    machine: Rendezvous, node: str, round: int = 0, now: float = 0, slots: int = 1, **more: Any
) -> list[Effect]:
    seat = {"slots": slots, "addr": f"addr-{node}", "port": 1000 + round}
    message = {"op": "join", "role": "t", "round": round, "node": node, **seat, **more}
    return machine.handle(message, Call(f"{node}.0", round), now)


def _places(effects: list[Effect]) -> dict[str, dict[str, Any]]:
    return {e.call.client: e.value for e in effects if isinstance(e, Reply)}


def test_ranks_run_through_the_nodes_in_their_order_whoever_came_first() -> None:
    machine = _open(4, 4)
    for node, slots in [("n10", 4), ("n2", 2), ("n1", 1)]:
        assert _join(machine, node, slots=slots) == []
    places = _places(_join(machine, "n9", slots=3))
    order = sorted(places.values(), key=lambda place: place["group_rank"])
    assert order[0]["nodes"] == ["n1", "n2", "n9", "n10"]
    assert [place["first_rank"] for place in order] == [0, 1, 3, 6]
    assert {place["world_size"] for place in order} == {10}
    assert {place["master_addr"] for place in order} == {"addr-n1"}
    assert all(a["group_rank"] + 1 == b["group_rank"] for a, b in pairwise(order))


def test_one_node_of_one_begins_at_once() -> None:
    assert len(_places(_join(_open(1, 1), "n0"))) == 1


def test_the_last_call_is_as_long_as_was_asked() -> None:
    machine = _open(1, 2, last_call_s=0.5)
    _join(machine, "n0", now=3)
    assert machine.deadline() == 3.5
    assert _places(machine.tick(3.5)).keys() == {"n0.0"}


def test_more_than_fit_wait_for_the_next_round() -> None:
    machine = _open(2, 2)
    _join(machine, "n5")
    _join(machine, "n6")
    _join(machine, "n0")
    assert (
        machine.why(Call("n0.0", 0)) == "round 0 of role 't' runs already; waiting for the next one"
    )
    assert machine.deadline() is None


def test_opening_a_newer_round_begins_it_with_the_guests() -> None:
    machine = _open(1, 1)
    _join(machine, "n0")
    _join(machine, "n1")
    effects = machine.handle({"op": "open", "role": "t", "min": 1, "max": 1, "round": 1}, None, 0)
    assert _places(effects)["n1.0"]["round"] == 1


def test_a_timeout_names_who_is_missing() -> None:
    machine = _open(3, 3, nodes=["n0", "n1", "n2"])
    _join(machine, "n1", timeout_s=10)
    (failed,) = machine.tick(10)
    assert isinstance(failed, Fail)
    assert isinstance(failed.error, RendezvousError)
    assert failed.error.missing == ["n0", "n2"]
    assert "no rendezvous within 10 s" in failed.error.reason


def test_a_closed_role_can_be_opened_again() -> None:
    machine = _open(1, 1)
    machine.handle({"op": "close", "role": "t"}, None, 0)
    with pytest.raises(RendezvousError, match="closed: the role has ended"):
        _join(machine, "n0")
    machine.handle({"op": "open", "role": "t", "min": 1, "max": 1}, None, 0)
    assert _join(machine, "n0")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"min": 0, "max": 1}, "1 <= min <= max"),
        ({"min": 1, "max": 1, "nodes": "n0"}, "list of node names"),
        ({"min": "1", "max": 1}, "needs 'min' of type int"),
        ({"min": True, "max": 1}, "needs 'min' of type int"),
    ],
)
def test_an_opening_that_makes_no_sense_is_refused(fields: Any, complaint: str) -> None:
    with pytest.raises(MisuseError, match=complaint):
        Rendezvous().handle({"op": "open", "role": "t", **fields}, None, 0)
