"""The plane: first answers, forgetting, fencing, handing on."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.control.messages import error_from, error_state
from runtime.control.plane import Entry, Plane, standard_machines
from runtime.errors import BarrierBroken, MisuseError, RuntimeFault, VersionConflict
from runtime.machine import Call, Effect, Emit, Fail, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask

_A, _B = "t-0.0", "t-1.0"
AGENT = "agent-0.x"
_PLAN = [{"name": f"t-{rank}", "role": "t", "rank": rank, "host": "h"} for rank in range(2)]


def _who(name: str, incarnation: int = 0) -> dict[str, Any]:
    return {"name": name, "incarnation": incarnation, "peer": f"{name}.{incarnation}"}


class TestPlane(MachineContract):
    def make(self) -> Machine:
        return Plane(standard_machines())

    def script(self) -> list[Step]:
        def plane(
            now: float, client: str, number: int, machine: str, op: str, **fields: Any
        ) -> Step:
            message = {"op": op, **fields}
            return ask(now, client, number, "ask", machine=machine, message=message, open=[])

        return [
            plane(0, AGENT, 1, "membership", "declare", actors=_PLAN),
            plane(0, AGENT, 2, "membership", "starting", **_who("t-0"), host="h", pid=7),
            plane(0, AGENT, 3, "membership", "starting", **_who("t-1"), host="h", pid=8),
            plane(1, "t-0.0", 1, "membership", "join", **_who("t-0"), address="mem://a"),
            plane(2, "t-0.0", 2, "barrier", "arrive", name="x"),
            plane(3, "t-1.0", 1, "kv", "put", key="k", value=1, ttl_s=2),
            ask(4, AGENT, 4, "why", id=9, open=[]),
            plane(
                5, AGENT, 5, "membership", "exited", **_who("t-1"), cause="x", code=1, final=True
            ),
            plane(6, "t-1.0", 2, "kv", "get", key="k"),
        ]

    def test_unknown_calls_and_peers_are_ignored(self) -> None:
        for machine, _, _, now in self.points():
            assert machine.lost("nobody", "SIGKILL", now) == []

    def test_an_unknown_operation_is_refused_and_changes_nothing(self) -> None:
        for machine, _, _, now in self.points():
            (failed,) = machine.handle({"op": "no such thing"}, None, now)
            assert "must be asked" in str(failed)


def _plane() -> Plane:
    """Two running trainers."""
    plane = Plane(standard_machines())
    plan = [{"name": f"t-{rank}", "role": "t", "rank": rank} for rank in range(2)]
    _ask(plane, "agent", 1, "membership", {"op": "declare", "actors": plan})
    for rank in range(2):
        who = {"name": f"t-{rank}", "incarnation": 0, "peer": f"t-{rank}.0"}
        _ask(plane, f"t-{rank}.0", 0, "membership", {"op": "join", **who, "address": "mem://x"})
    return plane


def _ask(
    plane: Plane,
    client: str,
    number: int,
    machine: str,
    message: Any,
    open: Any = (),
    now: float = 0,
) -> list[Effect]:
    command = {"op": "ask", "machine": machine, "message": message, "open": list(open)}
    return plane.handle(command, Call(client, number), now)


def _put(plane: Plane, number: int, open: Any = ()) -> list[Effect]:
    return _ask(plane, _A, number, "kv", {"op": "put", "key": "k", "value": number}, open)


def test_a_command_sent_again_gets_the_first_answer() -> None:
    plane = _plane()
    first = _put(plane, 1)
    assert first == [Reply(Call(_A, 1), {"version": 1})]
    assert _put(plane, 1) == first
    assert _put(plane, 2) == [Reply(Call(_A, 2), {"version": 2})]


def test_a_refusal_is_kept_like_any_answer() -> None:
    plane = _plane()
    _put(plane, 1)
    message = {"op": "put", "key": "k", "value": 0, "if_version": 0}
    (first,) = _ask(plane, _A, 2, "kv", message)
    (again,) = _ask(plane, _A, 2, "kv", message)
    assert isinstance(first, Fail)
    assert isinstance(again, Fail)
    assert isinstance(again.error, VersionConflict)
    assert (str(again.error), again.error.found) == (str(first.error), 1)


def test_a_command_sent_again_while_it_waits_waits_once() -> None:
    plane = _plane()
    arrive = {"op": "arrive", "name": "x"}
    assert _ask(plane, _A, 1, "barrier", arrive) == []
    assert _ask(plane, _A, 1, "barrier", arrive) == []
    released = _ask(plane, _B, 1, "barrier", arrive)
    assert [effect.call for effect in released] == [Call(_A, 1), Call(_B, 1)]  # type: ignore[union-attr]


def test_what_the_client_is_through_with_is_forgotten_and_never_run_again() -> None:
    plane = _plane()
    _put(plane, 1)
    _put(plane, 2, open=[1])
    assert plane.dump()["clients"][_A][3].keys() == {1, 2}
    _put(plane, 3, open=[1])
    assert plane.dump()["clients"][_A][3].keys() == {1, 3}
    assert _put(plane, 2) == []
    assert _put(plane, 1) == [Reply(Call(_A, 1), {"version": 1})]


def test_a_command_under_way_cannot_open_a_number_again() -> None:
    # Number 3 was sent while 1 was open; then 1 was answered, and 2 was sent anew and came first.
    plane = _plane()
    _put(plane, 1)
    _put(plane, 2, open=[])
    _put(plane, 3, open=[1, 2])
    assert _put(plane, 1) == []


def test_a_wait_that_the_client_no_longer_wants_is_withdrawn() -> None:
    plane = _plane()
    _ask(plane, _A, 1, "barrier", {"op": "arrive", "name": "x"})
    _put(plane, 2, open=[])
    assert _ask(plane, _B, 1, "barrier", {"op": "arrive", "name": "x"}) == []
    assert plane.why(Call(_A, 1)) is None


def test_a_withdrawal_brings_the_reason_or_the_answer_that_was_in_time() -> None:
    plane = _plane()
    arrive = {"op": "arrive", "name": "x"}
    _ask(plane, _A, 1, "barrier", arrive)
    (reply,) = plane.handle({"op": "withdraw", "id": 1, "open": [1]}, Call(_A, 2), 0)
    assert isinstance(reply, Reply)
    assert reply.value["answer"] is None
    assert "waiting for t-1" in reply.value["why"]
    _ask(plane, _A, 3, "barrier", arrive)
    _ask(plane, _B, 1, "barrier", arrive)
    (reply,) = plane.handle({"op": "withdraw", "id": 3, "open": [3]}, Call(_A, 4), 0)
    assert isinstance(reply, Reply)
    assert reply.value["answer"] == ["value", {"generation": 1}]


def test_a_cancellation_that_overtakes_its_command_still_counts() -> None:
    plane = _plane()
    assert plane.cancelled(Call(_A, 5), 0) == []
    assert _put(plane, 5) == []
    assert _ask(plane, _A, 6, "kv", {"op": "get", "key": "k"}) == [
        Reply(Call(_A, 6), {"value": None, "version": 0, "lease": None})
    ]


def test_a_lost_process_is_forgotten_everywhere_and_not_heard_again() -> None:
    plane = _plane()
    _ask(plane, _A, 1, "directory", {"op": "register", "name": "q", "value": 1})
    _ask(plane, _A, 2, "barrier", {"op": "arrive", "name": "x"})
    effects = plane.lost(_A, "SIGKILL", 1)
    assert {e.event["kind"] for e in effects if isinstance(e, Emit)} == {"lost", "member"}
    assert _A not in plane.dump()["clients"]
    assert plane.machines["directory"].dump()["names"] == {}
    (refused,) = _put(plane, 3)
    assert isinstance(refused, Fail)
    assert "declared lost (SIGKILL)" in str(refused.error)
    assert plane.lost(_A, "SIGKILL", 1) == []


def test_what_membership_decides_reaches_the_barrier_in_the_same_entry() -> None:
    plane = _plane()
    _ask(plane, _B, 1, "barrier", {"op": "arrive", "name": "x"})
    report = {"op": "exited", "name": "t-0", "incarnation": 0, "peer": _A, "cause": "SIGKILL"}
    effects = _ask(plane, "agent", 2, "membership", {**report, "code": -9, "final": True})
    broken = [e for e in effects if isinstance(e, Fail)]
    assert [e.call for e in broken] == [Call(_B, 1)]
    assert isinstance(broken[0].error, BarrierBroken)


def test_unknown_machines_and_operations_are_named() -> None:
    plane = _plane()
    (failed,) = _ask(plane, _A, 1, "queue", {"op": "x"})
    assert "no machine 'queue'; there are barrier, directory, kv" in str(failed)
    (failed,) = plane.handle({"op": "dance", "id": 1}, Call(_A, 2), 0)
    assert "the plane has no operation 'dance'; it has ask, why, withdraw" in str(failed)
    (refused,) = plane.handle({"op": "ask", "machine": "kv", "message": {"op": "get"}}, None, 0)
    assert isinstance(refused, Emit)
    assert refused.event["kind"] == "refused"


def test_log_time_never_goes_back() -> None:
    plane = _plane()
    _ask(plane, _A, 1, "kv", {"op": "put", "key": "k", "value": 1, "ttl_s": 5}, now=100)
    _ask(plane, _A, 2, "kv", {"op": "put", "key": "l", "value": 1, "ttl_s": 5}, now=50)
    assert plane.deadline() == 105
    plane.apply(Entry("tick", 104))
    assert plane.machines["kv"].dump()["entries"].keys() == {"k", "l"}
    plane.apply(Entry("tick", 105))
    assert plane.machines["kv"].dump()["entries"].keys() == set()


def test_memory_of_the_lost_is_bounded() -> None:
    plane = _plane()
    for number in range(5000):
        plane.lost(f"x.{number}", "exit 0", 0)
    assert len(plane.dump()["fenced"]) == 4096


@pytest.mark.parametrize(
    "error",
    [MisuseError("no"), VersionConflict("no", "k", 1, 2), BarrierBroken("no", "x", ["t-1"])],
)
def test_an_error_of_ours_survives_being_written_down(error: RuntimeFault) -> None:
    again = error_from(error_state(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_error_of_an_unknown_class_is_still_one_of_ours() -> None:
    again = error_from({"type": "os.system", "args": ["hm"], "state": {}})
    assert type(again) is RuntimeFault
    assert "os.system: hm" in str(again)
