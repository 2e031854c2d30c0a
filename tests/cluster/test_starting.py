"""What a worker is told however it is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.cluster.starting import Control, announcement, basic_spec, node_name
from runtime.job import ActorInfo, Entry, JobSpec, RoleSpec
from runtime.launcher.assignment import Assignment
from runtime.launcher.plan import Host, Plan, WorkerSpec
from runtime.peer.context import PeerAddress

KEYS = (b"p" * 32, b"s" * 32, frozenset([b"p" * 32]))
INFO = ActorInfo("w-3", "w", 3, host="h2", node_rank=1, restart_count=2)


async def _ask(machine: str, message: Mapping[str, Any]) -> None:
    raise AssertionError("nobody is asked")


def spec() -> WorkerSpec:
    job = JobSpec("j", {"w": RoleSpec("w", "simple", Entry("object", "m:f"), total=4)})
    assignment = Assignment(
        Plan("j", job, (Host("h1"), Host("h2")), ()), "h2", "/run/j", "", "/", {},
        port_range=(30_000, 30_010), address="10.0.0.2", accept_from=("10.0.0.1", "10.0.0.2"),
        security=KEYS,
    )  # fmt: skip
    first = PeerAddress("@agent-0.x", "tcp://10.0.0.1:4000", host="h1")
    return basic_spec(assignment, Control("@agent-1.y", first, _ask), INFO, (INFO,), 7)


def test_a_worker_is_told_where_it_listens_with_which_keys_and_for_whom() -> None:
    made = spec()
    assert made.host_address == "10.0.0.2"
    assert (made.accept_from, made.port_range) == (("10.0.0.1", "10.0.0.2"), (30_000, 30_010))
    assert made.security == KEYS
    assert (made.agent_peer, made.agent_host) == ("@agent-0.x", "h1")
    assert made.incarnation == 2


def test_each_start_of_a_worker_is_another_process_at_another_address() -> None:
    one, again = spec(), spec()
    assert one.peer.startswith("w-3.")
    assert one.address.startswith("ipc:///run/j/7.")
    assert one.peer != again.peer
    assert one.address != again.address
    told = announcement(one, "@agent-1.y", 77)
    assert told == {
        "op": "starting", "name": "w-3", "incarnation": 2, "peer": one.peer, "host": "h2",
        "agent": "@agent-1.y", "pid": 77,
    }  # fmt: skip


def test_the_text_of_what_a_worker_is_told_shows_no_key() -> None:
    assert "ssss" not in repr(spec())


def test_hosts_of_one_name_are_two_nodes() -> None:
    assert node_name(INFO) != node_name(replace(INFO, node_rank=0))
