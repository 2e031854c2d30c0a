"""Supervision by calling it: reports in, directives out."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from runtime.cluster.restart import Supervision
from runtime.errors import MisuseError
from runtime.machine import Call, Emit, Reply, Send

KILLED = {"code": 0, "signal": 9, "cause": "SIGKILL"}
WELL = {"code": 0, "signal": 0, "cause": "exit 0"}


def role(
    name: str, count: int, policy: str = "gang", most: int = 3, driver: bool = True
) -> dict[str, Any]:
    actors = [
        {"name": f"{name}-{i}", "rank": i, "agent": "agent-0", "host": "here"} for i in range(count)
    ]
    return {"name": name, "policy": policy, "max": most, "driver": driver, "actors": actors}


class Rig:
    """A machine, a clock, and what it has said."""

    def __init__(self, *roles: dict[str, Any], **settings: Any) -> None:
        self.machine = Supervision()
        self.now = 100.0
        self.incarnations: dict[str, int] = {}
        self.emitted: list[Any] = []
        agents = sorted({actor["agent"] for role in roles for actor in role["actors"]})
        begin = {"agents": agents, "roles": list(roles), "stop_timeout_s": 10.0}
        self.first = self.tell(op="begin", **begin, **settings)

    def tell(self, **message: Any) -> list[dict[str, Any]]:
        return self.sent(self.machine.handle(message, Call("agent-0", 1), self.now))

    def sent(self, effects: list[Any]) -> list[dict[str, Any]]:
        self.reply = next((e.value for e in effects if isinstance(e, Reply)), None)
        self.emitted += [e.event for e in effects if isinstance(e, Emit)]
        directives = [dict(e.message) for e in effects if isinstance(e, Send)]
        for directive in directives:
            if directive["op"] == "start":
                self.incarnations.update(directive["actors"])
        state = msgpack.unpackb(msgpack.packb(self.machine.dump()), strict_map_key=False)
        self.machine = Supervision()  # the state survives a copy at every step
        self.machine.load(state)
        return directives

    def exits(self, name: str, at: float | None = None, **how: Any) -> list[dict[str, Any]]:
        self.now += 1.0
        report: dict[str, Any] = {"at": at or self.now, "seen": self.now, "pid": 77, **how}
        return self.tell(op="exited", name=name, incarnation=self.incarnations[name], **report)

    def raises(
        self, name: str, kind: str = "ValueError", text: str = "bad", **more: Any
    ) -> list[dict[str, Any]]:
        error = {"type": kind, "message": text, "traceback": "line 3"}
        return self.exits(name, code=1, signal=0, cause="exit 1", error=error, **more)


def ops(directives: list[dict[str, Any]]) -> list[str]:
    return [directive["op"] for directive in directives]


def end_of(directives: list[dict[str, Any]]) -> dict[str, Any]:
    assert ops(directives) == ["end"], directives
    return directives[0]


def test_begin_starts_every_role_at_its_first_incarnation() -> None:
    rig = Rig(role("trainer", 2), role("judge", 1))
    assert [(d["role"], d["actors"]) for d in rig.first] == [
        ("trainer", {"trainer-0": 0, "trainer-1": 0}),
        ("judge", {"judge-0": 0}),
    ]


def test_begin_twice_is_refused() -> None:
    rig = Rig(role("a", 1))
    with pytest.raises(MisuseError, match="begun"):
        rig.tell(op="begin", agents=["agent-0"], roles=[role("a", 1)])


@pytest.mark.parametrize("roles", [[role("a", 1, driver=False)], [role("a", 0)]])
def test_a_job_without_drivers_is_refused(roles: list[dict[str, Any]]) -> None:
    with pytest.raises(MisuseError, match="driver"):
        Rig(*roles)


def test_the_job_ends_with_0_when_all_have_returned() -> None:
    rig = Rig(role("trainer", 2), timeout_s=50.0)
    assert rig.exits("trainer-0", **WELL) == []
    end = end_of(rig.exits("trainer-1", **WELL))
    assert (end["code"], end["first"], end["others"]) == (0, None, [])
    assert rig.machine.deadline() is None


def test_roles_that_are_no_drivers_are_stopped_at_the_end() -> None:
    rig = Rig(role("trainer", 1), role("judge", 2, driver=False))
    (stop,) = rig.exits("trainer-0", **WELL)
    assert (stop["op"], stop["names"], stop["grace_s"]) == ("stop", ["judge-0", "judge-1"], 10.0)
    assert rig.exits("judge-0", code=0, signal=15, cause="SIGTERM") == []
    assert end_of(rig.exits("judge-1", code=3, signal=0, cause="exit 3"))["code"] == 0


def test_a_gang_restarts_whole_once_all_have_stopped() -> None:
    rig = Rig(role("trainer", 3), restart_timeout_s=2.0)
    (stop,) = rig.exits("trainer-1", **KILLED)
    assert (stop["op"], stop["names"], stop["grace_s"]) == ("stop", ["trainer-0", "trainer-2"], 2.0)
    assert rig.reply == {"final": False}
    assert rig.exits("trainer-0", code=143, signal=0, cause="exit 143") == []
    (start,) = rig.exits("trainer-2", code=0, signal=9, cause="SIGKILL")
    assert start["op"] == "start"
    assert start["attempt"] == 1
    assert start["actors"] == {"trainer-0": 1, "trainer-1": 1, "trainer-2": 1}
    assert rig.reply == {"final": False}
    assert rig.emitted[-1]["failure"]["name"] == "trainer-1"


def test_one_that_had_returned_starts_again_with_its_gang() -> None:
    rig = Rig(role("trainer", 2))
    rig.exits("trainer-0", **WELL)
    (start,) = rig.exits("trainer-1", **KILLED)
    assert start["actors"] == {"trainer-0": 1, "trainer-1": 1}


def test_another_role_is_not_touched_by_a_gang_restart() -> None:
    rig = Rig(role("trainer", 2), role("judge", 1))
    (stop,) = rig.exits("trainer-0", **KILLED)
    assert stop["names"] == ["trainer-1"]


def test_a_gang_fails_when_its_budget_is_used_up() -> None:
    rig = Rig(role("trainer", 1, most=1))
    assert ops(rig.exits("trainer-0", **KILLED)) == ["start"]
    end = end_of(rig.exits("trainer-0", **KILLED))
    assert end["code"] == 137
    assert (end["first"]["incarnation"], end["first"]["signal"]) == (1, 9)
    assert end["others"] == []


def test_policy_one_restarts_only_the_one_and_counts_for_each() -> None:
    rig = Rig(role("w", 2, policy="one", most=1))
    (start,) = rig.exits("w-0", **KILLED)
    assert start["actors"] == {"w-0": 1}
    (start,) = rig.exits("w-1", **KILLED)
    assert start["actors"] == {"w-1": 1}
    (stop,) = rig.exits("w-0", **KILLED)
    assert (stop["op"], stop["names"]) == ("stop", ["w-1"])


def test_policy_never_ends_the_job_with_the_failing_code() -> None:
    rig = Rig(role("w", 2, policy="never", most=0))
    (stop,) = rig.exits("w-1", code=3, signal=0, cause="exit 3")
    assert stop["names"] == ["w-0"]
    end = end_of(rig.exits("w-0", code=0, signal=15, cause="SIGTERM"))
    assert (end["code"], end["first"]["name"], end["others"]) == (3, "w-1", [])


def test_who_was_stopped_is_no_failure_even_if_the_clock_of_its_host_is_behind() -> None:
    rig = Rig(role("w", 2, policy="never", most=0))
    rig.exits("w-1", code=3, signal=0, cause="exit 3")
    stopped = {"code": 0, "signal": 15, "cause": "SIGTERM", "seen": 1.0, "stopped": True}
    end = end_of(rig.exits("w-0", at=1.0, **stopped))
    assert (end["code"], end["first"]["name"], end["others"]) == (3, "w-1", [])


def test_the_earliest_error_is_the_first_failure_not_the_first_exit() -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-1", text="connection closed", at=90.5)
    end = end_of(rig.raises("w-0", text="the true one", at=90.1))
    assert end["first"]["name"] == "w-0"
    assert [other["name"] for other in end["others"]] == ["w-1"]


def test_a_death_by_signal_goes_before_an_error_of_the_same_moment() -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-1", at=90.00, seen=90.01)
    end = end_of(rig.exits("w-0", at=90.05, seen=90.05, **KILLED))
    assert (end["first"]["name"], end["code"]) == ("w-0", 137)
    assert [other["name"] for other in end["others"]] == ["w-1"]


@pytest.mark.parametrize(("code", "signal"), [(0, 15), (3, 0)])
def test_an_exit_or_the_signal_of_the_stop_is_the_stops_own_however_soon(
    code: int, signal: int
) -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-1", at=90.00, seen=90.01)
    end = end_of(rig.exits("w-0", at=90.05, seen=90.05, code=code, signal=signal, cause="x"))
    assert (end["first"]["name"], end["others"]) == ("w-1", [])


def test_a_kill_long_after_the_stop_is_the_stops_own() -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-1", at=90.00, seen=90.01)
    end = end_of(rig.exits("w-0", at=100.01, seen=100.01, **KILLED))
    assert (end["first"]["name"], end["others"]) == ("w-1", [])


def test_an_error_that_tells_of_anothers_death_is_its_consequence() -> None:
    rig = Rig(role("w", 11, policy="never", most=0))
    gone = "runtime.errors.PeerLostError"
    rig.raises("w-2", kind=gone, text="w-10 on here is gone", at=90.0, seen=90.6)
    for rank in (0, 1, *range(3, 10)):
        rig.exits(f"w-{rank}", code=0, signal=15, cause="SIGTERM")
    end = end_of(rig.raises("w-10", at=90.2))
    assert end["first"]["name"] == "w-10"
    assert [other["name"] for other in end["others"]] == ["w-2"]


def test_w_1_is_not_named_by_an_error_about_w_10() -> None:
    rig = Rig(role("w", 1, policy="one"), role("w-1", 1, policy="one"), role("x", 1, "never", 0))
    rig.exits("w-0", **KILLED)
    rig.raises("x-0", kind="PeerLostError", text="w-00 is gone")
    rig.exits("w-0", code=0, signal=15, cause="SIGTERM")
    end = end_of(rig.exits("w-1-0", code=0, signal=15, cause="SIGTERM"))
    assert end["first"]["name"] == "x-0"


def test_the_cause_of_a_lost_peer_is_found_though_it_was_restarted() -> None:
    rig = Rig(role("trainer", 1, policy="one"), role("judge", 1, policy="never", most=0))
    rig.exits("trainer-0", **KILLED)
    rig.raises("judge-0", kind="PeerLostError", text="trainer-0 is gone: SIGKILL")
    end = end_of(rig.exits("trainer-0", code=0, signal=15, cause="SIGTERM"))
    assert (end["first"]["name"], end["code"]) == ("trainer-0", 137)


def test_what_a_worker_does_after_it_was_asked_to_stop_is_no_failure() -> None:
    rig = Rig(role("w", 2, policy="never", most=0))
    rig.exits("w-0", code=3, signal=0, cause="exit 3")
    end = end_of(rig.raises("w-1", kind="KeyboardInterrupt"))
    assert end["others"] == []


def test_the_same_error_at_the_same_step_is_not_tried_a_fourth_time() -> None:
    rig = Rig(role("w", 1, most=9))
    for step in (6, 7, 7):
        assert ops(rig.raises("w-0", step=step)) == ["start"]
    end = end_of(rig.raises("w-0", step=7))
    assert "same error at step 7 in 3 attempts" in end["reason"]
    assert end["code"] == 1


@pytest.mark.parametrize("steps", [(7, 7, 8), (None, None, None)])
def test_other_steps_or_none_at_all_use_the_whole_budget(steps: tuple[int | None, ...]) -> None:
    rig = Rig(role("w", 1, most=9))
    assert [ops(rig.raises("w-0", step=step)) for step in steps] == [["start"]] * 3


def test_only_errors_of_one_and_the_same_are_the_same() -> None:
    rig = Rig(role("w", 2, policy="one", most=9))
    for name in ("w-0", "w-1", "w-0", "w-1"):
        assert ops(rig.raises(name, step=7)) == ["start"]
    for _ in range(3):
        assert ops(rig.exits("w-0", step=8, **KILLED)) == ["start"]


def test_of_very_many_failures_the_latest_are_kept() -> None:
    rig = Rig(role("w", 1, policy="one", most=999))
    for _ in range(260):
        rig.exits("w-0", **KILLED)
    kept = rig.machine.dump()["failures"]
    assert [failure["incarnation"] for failure in kept] == list(range(4, 260))


def test_a_stop_from_outside_gives_its_own_code() -> None:
    rig = Rig(role("w", 2))
    (stop,) = rig.tell(op="stop", reason="Ctrl-C", code=130)
    assert (stop["names"], stop["why"]) == (["w-0", "w-1"], "Ctrl-C")
    rig.exits("w-0", code=143, signal=0, cause="exit 143")
    end = end_of(rig.raises("w-1"))
    assert (end["code"], end["first"]) == (130, None)


def test_a_stop_during_a_gang_restart_starts_nothing_any_more() -> None:
    rig = Rig(role("w", 2))
    rig.exits("w-0", **KILLED)
    assert rig.tell(op="stop", reason="Ctrl-C", code=130) == []
    assert end_of(rig.exits("w-1", code=0, signal=15, cause="SIGTERM"))["code"] == 130


def test_kill_goes_to_all_that_live_also_while_stopping() -> None:
    rig = Rig(role("w", 2))
    rig.tell(op="stop", reason="Ctrl-C", code=130)
    rig.exits("w-0", **WELL)
    assert rig.tell(op="kill", reason="Ctrl-C", code=130) == [
        {"kind": "directive", "op": "kill", "names": ["w-1"]}
    ]


def test_the_time_limit_stops_the_job_with_124() -> None:
    rig = Rig(role("w", 1), timeout_s=5.0)
    assert rig.machine.deadline() == 105.0
    assert rig.machine.tick(104.0) == []
    (stop,) = rig.sent(rig.machine.tick(105.0))
    assert stop["op"] == "stop"
    assert rig.machine.deadline() is None, "it has passed"
    end = end_of(rig.exits("w-0", code=0, signal=15, cause="SIGTERM"))
    assert end["code"] == 124
    assert rig.machine.deadline() is None


def test_a_report_on_an_older_incarnation_changes_nothing() -> None:
    rig = Rig(role("w", 1))
    rig.exits("w-0", **KILLED)
    assert rig.tell(op="exited", name="w-0", incarnation=0, **WELL) == []


def test_a_second_report_on_the_same_end_changes_nothing() -> None:
    rig = Rig(role("w", 2))
    rig.exits("w-0", **WELL)
    assert rig.exits("w-0", **KILLED) == []
    assert end_of(rig.exits("w-1", **WELL))["code"] == 0


def test_status_says_how_the_job_stands_and_since_when() -> None:
    rig = Rig(role("w", 2))
    rig.now = 107.0
    rig.tell(op="status")
    assert (rig.reply["stage"], rig.reply["since_s"], rig.reply["code"]) == ("running", 7.0, None)
    assert [actor["state"] for actor in rig.reply["roles"][0]["actors"]] == ["running"] * 2
    rig.tell(op="stop", reason="Ctrl-C", code=130)
    rig.now = 109.0
    rig.tell(op="status")
    assert (rig.reply["stage"], rig.reply["since_s"], rig.reply["code"]) == ("stopping", 2.0, 130)
    assert rig.reply["reason"] == "Ctrl-C"


def test_a_lost_agent_takes_its_workers_with_it() -> None:
    rig = Rig(role("w", 1, policy="never", most=0))
    end = end_of(rig.sent(rig.machine.lost("agent-0", "host unreachable", 101.0)))
    assert (end["code"], end["first"]["cause"]) == (69, "host unreachable")


def test_an_unknown_actor_is_refused_by_name() -> None:
    with pytest.raises(MisuseError, match="'x-9'"):
        Rig(role("w", 1)).tell(op="exited", name="x-9", incarnation=0)


def spread(name: str, policy: str, most: int = 3) -> dict[str, Any]:
    """A role with one actor on each of two hosts."""
    planned = role(name, 2, policy, most)
    planned["actors"][1]["agent"] = "agent-1"
    return planned


def test_kill_is_answered() -> None:
    rig = Rig(role("w", 1))
    rig.tell(op="kill", reason="Ctrl-C", code=130)
    assert rig.reply == {}


@pytest.mark.parametrize("policy", ["gang", "one"])
def test_nothing_is_started_again_on_a_lost_host(policy: str) -> None:
    rig = Rig(spread("w", policy), restart_timeout_s=2.0)
    (stop,) = rig.sent(rig.machine.lost("agent-1", "host unreachable", 101.0))
    assert (stop["op"], stop["names"], stop["grace_s"]) == ("stop", ["w-0"], 10.0)
    ends = rig.exits("w-0", code=0, signal=15, cause="SIGTERM")
    assert [(end["op"], end["code"], end["first"]["name"]) for end in ends] == [
        ("end", 69, "w-1")
    ] * 2


def test_a_lost_host_is_told_nothing() -> None:
    planned = role("w", 3, most=0)
    planned["actors"][1]["agent"] = planned["actors"][2]["agent"] = "agent-1"
    sent = Rig(planned).machine.lost("agent-1", "host unreachable", 101.0)
    assert [(e.to, e.message["names"]) for e in sent if isinstance(e, Send)] == [
        ("agent-0", ["w-0"])
    ]


def test_two_gangs_restart_at_once_and_each_by_itself() -> None:
    rig = Rig(role("a", 2), role("b", 2))
    for name in ("a-0", "b-0"):
        rig.exits(name, **KILLED)
    for name in ("a", "b"):
        (start,) = rig.exits(f"{name}-1", code=0, signal=15, cause="SIGTERM")
        assert start["actors"] == {f"{name}-0": 1, f"{name}-1": 1}
    assert [event["failure"]["name"] for event in rig.emitted] == ["a-0", "b-0"]


@pytest.mark.parametrize("policy", ["gang", "one"])
def test_after_a_restart_it_counts_again_what_fails_before_the_next_stop(policy: str) -> None:
    rig = Rig(role("w", 2, policy, most=1))
    rig.exits("w-0", **KILLED)
    if policy == "gang":
        rig.exits("w-1", code=0, signal=15, cause="SIGTERM")
    before = rig.now + 0.5
    rig.exits("w-0", **KILLED)
    end = end_of(rig.raises("w-1", at=before, seen=rig.now + 0.1))
    assert {f["name"] for f in (end["first"], *end["others"])} == {"w-0", "w-1"}


def test_a_host_that_is_lost_during_a_gang_restart_ends_the_job() -> None:
    rig = Rig(spread("w", "gang"))
    rig.exits("w-1", **KILLED)
    assert rig.sent(rig.machine.lost("agent-1", "host unreachable", 101.0)) == []
    end = rig.exits("w-0", code=0, signal=15, cause="SIGTERM")[0]
    assert (end["op"], end["code"], end["first"]["name"]) == ("end", 137, "w-1")
    assert end["reason"] == "the host of w-1 is lost: not restarted"


def test_when_a_restart_fails_others_are_asked_to_stop_from_the_failure_on() -> None:
    rig = Rig(spread("w", "gang"), role("x", 1, policy="never", most=0))
    rig.exits("w-1", **KILLED)  # seen at 101
    rig.sent(rig.machine.lost("agent-1", "host unreachable", 101.0))
    (stop,) = rig.exits("w-0", code=0, signal=15, cause="SIGTERM")
    assert stop["names"] == ["x-0"]
    end = rig.raises("x-0", at=100.5)[0]
    assert {f["name"] for f in (end["first"], *end["others"])} == {"w-1", "x-0"}


def test_who_is_stopped_for_a_restart_when_the_job_finishes_is_not_started_again() -> None:
    rig = Rig(role("trainer", 1), role("judge", 2, driver=False))
    rig.exits("judge-0", **KILLED)
    assert rig.exits("trainer-0", **WELL) == []
    assert end_of(rig.exits("judge-1", code=0, signal=15, cause="SIGTERM"))["code"] == 0
    assert rig.reply == {"final": True}


def test_a_host_that_was_lost_before_the_job_began_ends_it() -> None:
    machine = Supervision()
    machine.lost("agent-1", "host unreachable", 1.0)
    effects = machine.handle(
        {"op": "begin", "agents": ["agent-0", "agent-1"], "roles": [spread("w", "one")]}, None, 2.0
    )
    sent = [(e.to, e.message["op"]) for e in effects if isinstance(e, Send)]
    assert sent == [("agent-0", "start"), ("agent-1", "start"), ("agent-0", "stop")]


def test_a_report_that_comes_twice_is_not_final_where_a_restart_follows() -> None:
    rig = Rig(role("w", 2))
    rig.exits("w-0", **KILLED)
    rig.exits("w-0", **KILLED)
    assert rig.reply == {"final": False}
    rig.exits("w-1", code=0, signal=15, cause="SIGTERM")
    rig.tell(op="exited", name="w-0", incarnation=0, **KILLED)
    assert rig.reply == {"final": False}


def test_an_exit_code_before_the_stop_is_a_failure_of_its_own() -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-0", kind="PeerLostError", text="w-1 is gone: exit 3", at=90.2, seen=90.3)
    end = end_of(rig.exits("w-1", at=90.1, seen=90.1, code=3, signal=0, cause="exit 3"))
    assert (end["first"]["name"], end["code"]) == ("w-1", 3)


def test_one_that_was_told_to_be_killed_is_not_the_first_failure() -> None:
    rig = Rig(role("w", 2, policy="never"))
    rig.raises("w-0", at=90.00, seen=90.01)
    rig.tell(op="kill", reason="Ctrl-C", code=130)
    end = end_of(rig.exits("w-1", at=90.05, seen=90.05, **KILLED))
    assert (end["first"]["name"], end["others"]) == ("w-0", [])


def test_a_host_that_is_lost_after_others_failed_is_what_they_failed_of() -> None:
    rig = Rig(spread("w", "never"))
    rig.exits("w-0", code=1, signal=0, cause="exit 1")  # a connection was reset, it says
    end = rig.sent(rig.machine.lost("agent-1", "host unreachable", 105.0))[0]
    assert (end["first"]["name"], end["code"]) == ("w-1", 69)
    assert [failure["name"] for failure in end["others"]] == ["w-0"]


@pytest.mark.parametrize("op", ["stop", "kill"])
def test_a_host_that_is_lost_while_the_job_is_stopped_from_outside_is_no_failure(op: str) -> None:
    rig = Rig(spread("w", "never"))
    rig.tell(op=op, reason="Ctrl-C", code=130)
    rig.exits("w-0", code=0, signal=15, cause="SIGTERM")
    end = rig.sent(rig.machine.lost("agent-1", "host unreachable", 105.0))[0]
    assert (end["first"], end["others"], end["code"]) == (None, [], 130)


def test_the_end_is_told_to_agents_without_workers_too() -> None:
    machine = Supervision()
    begin = {"op": "begin", "agents": ["agent-0", "agent-1"], "roles": [role("w", 1)]}
    machine.handle(begin, None, 1.0)
    report = {"op": "exited", "name": "w-0", "incarnation": 0, "at": 2.0, "seen": 2.0, **WELL}
    ends = [e for e in machine.handle(report, None, 2.0) if isinstance(e, Send)]
    assert [(e.to, e.message["op"]) for e in ends] == [("agent-0", "end"), ("agent-1", "end")]


def test_the_loss_of_an_agent_without_workers_changes_nothing() -> None:
    machine = Supervision()
    begin = {"op": "begin", "agents": ["agent-0", "agent-1"], "roles": [role("w", 1)]}
    machine.handle(begin, None, 1.0)
    assert machine.lost("agent-1", "host unreachable", 2.0) == []
    assert machine.lost("w-0.1234", "exit 1", 3.0) == []
    assert machine.dump()["gone"] == ["agent-1"], "only agents: others come and go"
