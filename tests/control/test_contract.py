"""Every machine of the control plane keeps the contract of machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from runtime.control.barrier import Barrier
from runtime.control.directory import NameDirectory
from runtime.control.kv import Kv
from runtime.control.membership import Membership
from runtime.control.plane import Plane, standard_machines
from runtime.control.rendezvous import Rendezvous
from runtime.machine import Machine
from tests.contracts.machine_contract import MachineContract, Step, ask, tell

AGENT = "agent-0.x"
_PLAN = [{"name": f"t-{rank}", "role": "t", "rank": rank, "host": "h"} for rank in range(2)]


def _who(name: str, incarnation: int = 0) -> dict[str, Any]:
    return {"name": name, "incarnation": incarnation, "peer": f"{name}.{incarnation}"}


class TestMembership(MachineContract):
    def make(self) -> Machine:
        return Membership()

    def script(self) -> list[Step]:
        return [
            ask(0, AGENT, 1, "declare", actors=_PLAN),
            ask(0, AGENT, 2, "starting", **_who("t-0"), host="h", pid=7),
            ask(1, "t-1.0", 1, "resolve", name="t-0"),
            ask(1, "t-1.0", 2, "watch", since=3),
            ask(1, "t-1.0", 3, "resolve", name="t-1"),
            ask(2, "t-0.0", 1, "join", **_who("t-0"), address="mem://a"),
            ask(3, "t-1.0", 4, "fate", peer="t-0.0"),
            ask(3.5, "t-1.0", 5, "watch", since=4),
            ask(4, AGENT, 3, "exited", **_who("t-0"), cause="exit 1", code=1, final=False),
            ask(4, AGENT, 4, "heartbeat", progress={"t-0": {"step": 3}}),
            ask(5, AGENT, 5, "members"),
            ask(5, AGENT, 6, "join", **_who("t-0"), address="mem://a"),
        ]


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


class TestKv(MachineContract):
    def make(self) -> Machine:
        return Kv()

    def script(self) -> list[Step]:
        return [
            ask(0, "a.0", 1, "watch", key="k", since=0),
            ask(1, "a.0", 2, "put", key="k", value=[b"1"], ttl_s=5),
            ask(1, "b.0", 1, "watch", key="k", since=1),
            ask(2, "b.0", 2, "put", key="l", value="x", if_version=0),
            ask(2, "b.0", 3, "put", key="l", value="y", if_version=0),
            ask(3, "b.0", 4, "watch", key="l", since=2),
            ask(7, "b.0", 5, "get", key="k"),
            ask(8, "b.0", 6, "delete", key="l"),
            ask(8, "b.0", 7, "keys"),
            ask(9, "b.0", 8, "watch", key="k", since=0),
        ]


class TestDirectory(MachineContract):
    def make(self) -> Machine:
        return NameDirectory()

    def script(self) -> list[Step]:
        return [
            ask(0, "a.0", 1, "lookup", name="q"),
            ask(1, "b.0", 1, "register", name="q", value=1),
            ask(2, "c.0", 1, "register", name="q", value=2),
            ask(2, "c.0", 2, "unregister", name="q"),
            ask(3, "c.0", 3, "lookup", name="r"),
            ask(4, "c.0", 4, "names"),
            ask(5, "b.0", 2, "unregister", name="q"),
            ask(6, "a.0", 2, "lookup", name="q"),
        ]


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
