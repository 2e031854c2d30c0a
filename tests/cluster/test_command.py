"""Agents of several hosts around one control plane, over a network in memory and in fake time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from runtime.cluster.command import GATHER_S, Conductor, Follower
from runtime.cluster.restart import Supervision
from runtime.config import Config, Coordinator
from runtime.control.client import ControlClient
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.job import Entry, JobSpec, Restart, RoleSpec
from runtime.launcher.assignment import Assignment
from runtime.launcher.outcome import failures_of
from runtime.launcher.plan import Host, Launch, Plan
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork

pytestmark = pytest.mark.looptime

TIMEOUT_S = 5.0
"""Of heartbeats."""
WELL = {"code": 0, "signal": 0, "cause": "exit 0"}


class Hands:
    """What a supervisor does, without workers: it notes what it was told."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.told: list[Mapping[str, Any]] = []
        self.left: list[float] = []
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def directive(self, message: Mapping[str, Any]) -> None:
        self.told.append(message)
        if message["op"] == "end" and not self.ended.done():
            for failure in failures_of(message):
                if failure["name"] == f"w-{self.rank}":
                    failure["folder"] = f"/on/host/{self.rank}"
            self.ended.set_result(dict(message))

    async def leave(self, grace_s: float) -> None:
        self.left.append(grace_s)

    def progress(self) -> Mapping[str, Any]:
        return {f"w-{self.rank}": {"step": 10 + self.rank}}

    def ops(self) -> list[str]:
        return [message["op"] for message in self.told]


def _assignment(rank: int, hosts: int, policy: str) -> Assignment:
    restart = Restart(policy, 3)  # type: ignore[arg-type]
    role = RoleSpec("w", "simple", Entry("object", "m:f"), total=hosts, restart=restart)
    names = [f"h{number + 1}" for number in range(hosts)]
    launches = tuple(
        Launch(
            name, "w", number, 0, (),
            {"RUNTIME_ACTOR": f"w-{number}", "NODE_RANK": str(number), "WORLD_SIZE": str(hosts),
             "LOCAL_WORLD_SIZE": "1"},
        )
        for number, name in enumerate(names)
    )  # fmt: skip
    plan = Plan("j", JobSpec("j", {"w": role}), tuple(map(Host, names)), launches)
    beat = Coordinator(500, int(TIMEOUT_S * 1000))
    settings = Config(beat)
    return Assignment(plan, names[rank], "", "", "/", {}, node_rank=rank, settings=settings)


class Several:
    """One conductor and its followers. `end` is what ended the job, for each by node rank."""

    def __init__(self, hosts: int, policy: str = "gang") -> None:
        self.network = MemoryNetwork(seed=1)
        self.assignments = [_assignment(rank, hosts, policy) for rank in range(hosts)]
        self.hands = [Hands(rank) for rank in range(hosts)]
        self.peers = [f"@agent-{rank}.x" for rank in range(hosts)]
        self.followers: dict[int, Follower] = {}
        self.events: list[dict[str, Any]] = []
        """What the launcher is told."""
        self.conductor: Conductor
        self.service: ControlService

    @asynccontextmanager
    async def running(self, *ranks: int, apart: bool = False) -> AsyncIterator[None]:
        """With the followers of these node ranks, and the conductor; `apart`: which they do not reach."""
        async with AsyncExitStack() as stack:
            endpoint = await stack.enter_async_context(self._endpoint(0))
            machines = standard_machines(heartbeat_timeout=TIMEOUT_S)
            machines["supervision"] = Supervision()
            self.conductor = Conductor(self.assignments[0], self.peers[0], self.events.append)
            self.service = ControlService(
                endpoint,
                Plane(machines),
                me=self.peers[0],
                on_send=self.hands[0].directive,
                on_emit=self.conductor.emitted,
                heartbeat_interval=0.5,
            )
            await stack.enter_async_context(self.service)
            self.conductor.take(self.service, self.hands[0])
            self.service.spawn(self.conductor.run(), "begin")
            for rank in ranks:
                if apart:
                    self.part(rank)
                await self._follow(stack, rank, endpoint)
            await asyncio.sleep(0.1)
            yield

    def _endpoint(self, rank: int) -> Endpoint:
        return Endpoint(self.network.transport(self.peers[rank]), role="@agent", rank=rank)

    async def _follow(self, stack: AsyncExitStack, rank: int, control: Endpoint) -> None:
        endpoint = await stack.enter_async_context(self._endpoint(rank))
        client = ControlClient(endpoint, control.address, me=None, patience=TIMEOUT_S)
        await stack.enter_async_context(client)
        follower = Follower(self.assignments[rank], client, endpoint.address.address)
        await stack.enter_async_context(follower)
        follower.take(self.hands[rank])
        self.followers[rank] = follower
        follower.spawn(follower.begin(), "begin")

    async def exits(self, rank: int, **how: Any) -> None:
        """The worker of that host has ended."""
        starts = [m for m in self.hands[rank].told if m["op"] == "start"]
        incarnation = starts[-1]["actors"][f"w-{rank}"]
        report = {"op": "exited", "name": f"w-{rank}", "incarnation": incarnation, "at": 1.0}
        ask = self.followers[rank].ask if rank else self.service.ask
        await ask("supervision", {**report, "seen": 1.0, **how})

    def part(self, rank: int) -> None:
        self.network.part([self.peers[rank]], [self.peers[0]])


async def test_heartbeats_tell_how_far_the_workers_of_all_hosts_are() -> None:
    job = Several(3)
    async with job.running(1, 2):
        await asyncio.sleep(1.0)
        members = await job.service.ask("membership", {"op": "members"})
        assert [(member["name"], member["step"]) for member in members] == [
            ("w-0", 10), ("w-1", 11), ("w-2", 12),
        ]  # fmt: skip


async def test_a_job_begins_when_all_hosts_are_there_and_ends_on_all() -> None:
    job = Several(3)
    async with job.running(1, 2):
        assert [hands.ops() for hands in job.hands] == [["start"]] * 3
        assert job.hands[2].told[0]["actors"] == {"w-2": 0}
        for rank in range(3):
            await job.exits(rank, **WELL)
        await job.service.flush(1)
        assert [hands.ended.result()["code"] for hands in job.hands] == [0, 0, 0]


async def test_what_a_host_adds_to_its_failure_is_with_the_first_agent_at_the_end() -> None:
    job = Several(3, "never")
    async with job.running(1, 2):
        await job.exits(1, code=3, signal=0, cause="exit 3")
        for rank in (0, 2):
            await job.exits(rank, code=0, signal=15, cause="SIGTERM")
        await job.service.flush(1)
        added = [(f["name"], f["code"], f["folder"]) for f in job.conductor.added]
        assert added == [("w-1", 3, "/on/host/1")]


async def test_a_host_that_does_not_come_ends_the_job_with_its_name() -> None:
    job = Several(3)
    async with job.running(1):
        await asyncio.sleep(GATHER_S)
        end = job.hands[0].ended.result()
        assert (end["code"], end["first"], end["undecided"]) == (69, None, True)
        assert end["reason"].startswith("h3 cannot be reached from h1")
        assert job.hands[1].told == []


async def test_a_host_that_is_lost_before_the_job_begins_ends_it() -> None:
    job = Several(3)
    async with job.running(1):
        await job.conductor.command({"op": "lost", "node_rank": 2, "why": "ssh ended"})
        assert job.hands[0].ended.result()["reason"] == "host h3 was lost: ssh ended"


async def test_a_host_that_cannot_reach_the_first_says_so_and_leaves() -> None:
    job = Several(2)
    async with job.running(1, apart=True):
        await asyncio.sleep(20)
        assert job.hands[1].left == [0.0]
        end = job.hands[1].ended.result()
        assert end["lost"].startswith("h2 lost the control plane on h1: agent: ")
        assert not job.hands[0].ended.done(), "that is the launcher's to tell"


async def test_a_failure_on_one_host_restarts_the_gang_on_all() -> None:
    job = Several(3)
    async with job.running(1, 2):
        await job.exits(1, code=1, signal=0, cause="exit 1")
        await asyncio.sleep(0.1)
        assert [hands.ops() for hands in job.hands] == [
            ["start", "stop"],
            ["start"],
            ["start", "stop"],
        ]
        assert job.hands[0].told[-1]["grace_s"] == 2.0, "not all of the time for an end"
        for rank in (0, 2):
            await job.exits(rank, code=0, signal=15, cause="SIGTERM")
        await asyncio.sleep(0.1)
        assert [hands.told[-1]["actors"] for hands in job.hands] == [
            {"w-0": 1}, {"w-1": 1}, {"w-2": 1},
        ]  # fmt: skip
        assert [(e["event"], e["failure"]["name"]) for e in job.events] == [("restarting", "w-1")]


async def test_a_short_cut_goes_unnoticed_and_what_was_said_meanwhile_arrives_in_order() -> None:
    job = Several(2)
    async with job.running(1):
        job.part(1)
        await job.exits(0, code=1, signal=0, cause="exit 1")
        await asyncio.sleep(3)
        assert job.hands[1].ops() == ["start"]
        job.network.heal()
        await asyncio.sleep(3)
        assert job.hands[1].ops() == ["start", "stop"]
        await job.exits(1, code=0, signal=15, cause="SIGTERM")
        await asyncio.sleep(20)
        assert job.hands[1].ops() == ["start", "stop", "start"]
        assert job.hands[1].left == []


async def test_a_long_cut_loses_the_host_and_its_agent_leaves_by_itself() -> None:
    job = Several(2)
    async with job.running(1):
        job.part(1)
        await asyncio.sleep(TIMEOUT_S - 1)
        assert (job.hands[1].left, job.hands[0].ops()) == ([], ["start"])
        await asyncio.sleep(3)
        assert job.hands[1].left == [0.0]
        end = job.hands[1].ended.result()
        assert end["lost"].startswith("h2 lost the control plane on h1: its heartbeat")
        assert job.hands[0].ops() == ["start", "stop"]
        await job.exits(0, code=0, signal=15, cause="SIGTERM")
        first = job.hands[0].ended.result()["first"]
        assert (first["host"], first["cause"], first["code"]) == ("h2", "host unreachable", 69)
        assert job.conductor.lost_hosts == [1]


async def test_a_host_that_comes_back_too_late_is_refused_and_leaves() -> None:
    job = Several(2)
    async with job.running(1):
        job.service.lost(job.peers[1], "no sign of life")
        await asyncio.sleep(2)
        assert job.hands[1].left == [0.0]
        assert "was declared lost (no sign of life)" in job.hands[1].ended.result()["lost"]


async def test_what_the_launcher_knows_of_a_host_is_the_cause_of_its_loss() -> None:
    job = Several(2)
    async with job.running(1):
        await job.conductor.command({"op": "lost", "node_rank": 1, "why": "ssh ended with 255"})
        await asyncio.sleep(0.1)
        await job.exits(0, code=0, signal=15, cause="SIGTERM")
        assert job.hands[0].ended.result()["first"]["cause"] == "ssh ended with 255"


async def test_an_agent_whose_launcher_is_gone_leaves_and_says_so() -> None:
    job = Several(2)
    async with job.running(1):
        await job.followers[1].launcher_gone("the launcher is gone", 3.0)
        assert job.hands[1].left[0] > 0
        assert job.hands[1].ended.result()["code"] == 69
        assert job.conductor.lost_hosts == [1]
        assert job.hands[0].ops() == ["start", "stop"]


async def test_the_launcher_may_say_first_why_an_agent_lost_it() -> None:
    job = Several(2)
    async with job.running(1):
        gone = job.followers[1].spawn(job.followers[1].launcher_gone("gone", 3.0), "gone")
        await asyncio.sleep(2)
        await job.conductor.command({"op": "lost", "node_rank": 1, "why": "host5 was killed"})
        await asyncio.sleep(0.5)
        assert gone.done(), "the rest is not waited for"
        await job.exits(0, code=0, signal=15, cause="SIGTERM")
        assert job.hands[0].ended.result()["first"]["cause"] == "host5 was killed"


async def test_without_a_launcher_the_first_agent_waits_for_no_host_that_is_silent() -> None:
    job = Several(2)
    async with job.running(1):
        job.part(1)
        await job.conductor.launcher_gone("the launcher is gone", 3.0)
        assert job.hands[0].ops() == ["start", "stop", "kill"]
        assert job.hands[0].ended.result()["reason"] == "the launcher is gone"


async def test_an_agent_that_is_told_to_leave_waits_a_moment_for_the_end() -> None:
    job = Several(2)
    async with job.running(1):
        leave = {"op": "leave", "reason": "the job has ended", "after_s": 2.0}
        leaving = job.service.spawn(job.followers[1].command(leave), "leave")
        await asyncio.sleep(1)
        assert job.hands[1].left == []
        await leaving
        assert job.hands[1].left == [0.0]


@pytest.mark.parametrize("op", ["stop", "kill"])
async def test_a_stop_before_the_beginning_ends_the_job(op: str) -> None:
    job = Several(2)
    async with job.running():
        await job.conductor.command({"op": op, "reason": "stopped by Ctrl-C", "code": 130})
        assert job.hands[0].ended.result()["code"] == 130
