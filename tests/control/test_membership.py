"""Membership: incarnations, who is awaited, who is gone. The whole story stands in `cases/membership.txt`."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.control.membership import Membership
from runtime.errors import MisuseError, PeerLostError
from runtime.machine import Call, Effect, Emit, Fail, Machine, Reply
from tests.contracts.machine_contract import MachineContract, Step, ask

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


def _started() -> Membership:
    """t-0 runs, t-1 is planned."""
    machine = Membership()
    TestMembership().play(
        machine,
        [
            ask(0, AGENT, 1, "declare", actors=_PLAN),
            ask(0, AGENT, 2, "starting", **_who("t-0"), host="h", pid=7),
            ask(0, "t-0.0", 1, "join", **_who("t-0"), address="mem://a"),
        ],
    )
    return machine


def _do(
    machine: Machine, client: str, number: int, op: str, now: float = 1, **more: Any
) -> list[Effect]:
    return machine.handle({"op": op, **more}, Call(client, number), now)


def _events(effects: list[Effect]) -> list[tuple[str, ...]]:
    return [
        (
            str(e.event["kind"]),
            str(e.event["name"]),
            *([str(e.event["state"])] if "state" in e.event else []),
        )
        for e in effects
        if isinstance(e, Emit)
    ]


@pytest.mark.parametrize("op", ["starting", "join", "leave"])
def test_what_an_older_incarnation_says_is_refused(op: str) -> None:
    machine = _started()
    _do(machine, AGENT, 3, "starting", **_who("t-0", 1))
    with pytest.raises(MisuseError, match=r"t-0.0 \(incarnation 0\) is refused: t-0 is t-0.1"):
        _do(machine, "t-0.0", 9, op, **_who("t-0"), address="mem://a")


def test_a_second_process_with_the_same_number_is_refused() -> None:
    machine = _started()
    other = {**_who("t-0"), "peer": "t-0.other"}
    with pytest.raises(MisuseError, match="is refused"):
        _do(machine, "t-0.other", 1, "join", **other, address="mem://b")


def test_a_newer_incarnation_means_the_older_is_dead() -> None:
    effects = _do(_started(), AGENT, 3, "starting", **_who("t-0", 1))
    assert _events(effects) == [
        ("lost", "t-0"),
        ("member", "t-0", "restarting"),
        ("member", "t-0", "starting"),
    ]


def test_a_join_that_overtakes_its_start_still_belongs_to_the_agent() -> None:
    machine = _started()
    _do(machine, "t-1.0", 1, "join", **_who("t-1"), address="mem://b")
    _do(machine, AGENT, 3, "starting", **_who("t-1"), host="h", pid=8)
    lost = machine.tick(10)
    assert ("lost", "t-1") in _events(lost)
    assert ("member", "t-1", "failed") in _events(lost)


def test_an_end_before_anybody_heard_of_the_start_counts() -> None:
    machine = _started()
    _do(machine, "t-0.0", 2, "resolve", name="t-1")
    effects = _do(
        machine, AGENT, 3, "exited", **_who("t-1"), cause="exit 127", code=127, final=True
    )
    (failed,) = [e for e in effects if isinstance(e, Fail)]
    assert isinstance(failed.error, PeerLostError)
    assert failed.error.cause == "exit 127"


def test_a_verdict_can_become_final_later_but_not_be_taken_back() -> None:
    machine = _started()
    for final in (False, True, False):
        _do(machine, AGENT, 3, "exited", **_who("t-0"), cause="exit 1", code=1, final=final)
    (failed,) = _do(machine, "t-1.0", 1, "resolve", name="t-0")
    assert isinstance(failed, Fail)


def test_one_that_was_gone_for_good_can_be_revived() -> None:
    machine = _started()
    _do(machine, AGENT, 3, "exited", **_who("t-0"), cause="exit 1", code=1, final=True)
    _do(machine, AGENT, 4, "starting", **_who("t-0", 1))
    assert _do(machine, "t-1.0", 1, "resolve", name="t-0") == []


def test_declaring_again_changes_nothing() -> None:
    machine = _started()
    before = machine.dump()
    _do(machine, AGENT, 9, "declare", actors=_PLAN)
    assert machine.dump() == before


def test_heartbeats_renew_all_that_an_agent_started() -> None:
    machine = _started()
    for now in range(5, 100, 5):
        assert not _events(machine.tick(now))
        _do(machine, AGENT, now, "heartbeat", now)
    assert machine.deadline() == 105
    assert ("member", "t-0", "failed") in _events(machine.tick(105))


def test_a_member_without_an_agent_is_gone_when_it_leaves() -> None:
    machine = _started()
    _do(machine, "t-1.0", 1, "join", **_who("t-1"), address="mem://b")
    reply, *rest = _do(machine, "t-1.0", 2, "leave", **_who("t-1"))
    assert reply == Reply(Call("t-1.0", 2), {})
    assert ("member", "t-1", "exited") in _events(rest)


def test_only_the_newest_ends_of_an_actor_are_kept() -> None:
    machine = _started()
    for number in range(1, 30):
        _do(machine, AGENT, number + 10, "starting", **_who("t-0", number))
    (news,) = _do(machine, "t-1.0", 1, "watch", since=0)
    assert isinstance(news, Reply)
    ended = news.value["changes"][0]["ended"]
    assert [end[1] for end in ended] == [f"t-0.{number}" for number in range(21, 29)]
