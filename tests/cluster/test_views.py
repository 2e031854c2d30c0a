"""What an agent answers to those who look at its job, over an in-process network in fake time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.cluster.views import STOPPED, Views
from runtime.errors import MisuseError, RemoteError
from runtime.job import JobSpec
from runtime.launcher.assignment import Assignment
from runtime.launcher.plan import Host, Launch, Plan
from runtime.launcher.spawn import ProcessInfo
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork

pytestmark = pytest.mark.looptime
EVERYTHING = [None, None, ["stdout"], None]
OUTCOME = {"end": "finished"}


class Agent:
    """The parts of an agent that its views ask, and somebody who looks at it."""

    def __init__(self, folder: Path, network: MemoryNetwork) -> None:
        self.server = Endpoint(network.transport("@agent-0.a"), role="@agent", rank=0)
        self.looker = Endpoint(network.transport("@cli.b"), role="@cli", rank=0)
        self.stopped: list[tuple[str, str, int]] = []
        launches = (Launch("h1", "t", 0, 0, (), {}), Launch("h2", "t", 1, 0, (), {}))
        plan = Plan("job", JobSpec("train", {}), (Host("h1", 1, local=True),), launches)
        self.assignment = Assignment(plan, "h1", "/nowhere", str(folder), "/", {})
        self.views: Views

    def workers(self) -> list[dict[str, Any]]:
        return [{"name": "t-0", "pid": 7, "incarnation": 0}]

    async def ask(self, machine: str, message: Mapping[str, Any]) -> Any:
        return [machine, message["op"]]

    async def stop(self, reason: str, code: int) -> None:
        self.stopped.append(("stop", reason, code))

    async def kill(self, reason: str, code: int) -> None:
        self.stopped.append(("kill", reason, code))

    def call(self, method: str, *args: Any) -> asyncio.Future[Any]:
        return self.looker.call(self.server.address, f"agent.{method}", args)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    made = Agent(tmp_path, MemoryNetwork())
    async with made.server, made.looker:
        made.views = Views(made.server, made.assignment, made, made.ask, made)
        yield made


def log(folder: Path, text: str, rank: int = 0) -> None:
    path = folder / "job" / "attempt_0" / "t" / str(rank) / "stdout.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(text)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_it_tells_what_the_job_and_this_host_are(agent: Agent) -> None:
    assert await agent.call("job") == {
        "supervision": ["supervision", "status"],
        "members": ["membership", "members"],
        "agents": ["membership", "agents"],
    }
    status = await agent.call("status")
    assert status == {"host": "h1", "pid": os.getpid(), "workers": agent.workers()}


async def test_only_the_output_of_this_host_is_read(agent: Agent, tmp_path: Path) -> None:
    await asyncio.to_thread(log, tmp_path, "mine\n")
    await asyncio.to_thread(log, tmp_path, "another's\n", 1)
    answer = await agent.call("logs", EVERYTHING, None, False)
    assert [piece[-1] for piece in answer["pieces"]] == [b"mine\n"]
    assert answer["over"] is True


async def test_a_follower_gets_what_is_added_and_the_last_of_it(
    agent: Agent, tmp_path: Path
) -> None:
    first = agent.call("logs", EVERYTHING, None, True)
    await asyncio.sleep(1.0)
    await asyncio.to_thread(log, tmp_path, "one\n")
    answer = await first
    assert (answer["pieces"][0][-1], answer["over"]) == (b"one\n", False)
    await asyncio.to_thread(log, tmp_path, "two\n")
    finish = asyncio.get_running_loop().create_task(agent.views.finish(OUTCOME))
    await asyncio.sleep(0)
    pieces = []
    while not answer["over"]:
        answer = await agent.call("logs", EVERYTHING, answer["positions"], True)
        pieces += answer["pieces"]
    assert [piece[-1] for piece in pieces] == [b"two\n"]
    assert answer["end"] == {"outcome": OUTCOME, "left": []}
    await finish


async def test_a_follower_of_silence_is_answered_after_a_while(agent: Agent) -> None:
    started = now()
    answer = await agent.call("logs", EVERYTHING, None, True)
    assert (answer["pieces"], answer["over"]) == ([], False)
    assert 4.0 < now() - started < 6.0


async def test_who_waits_hears_of_the_end_and_of_what_is_left(agent: Agent) -> None:
    assert await agent.call("wait", 0.5) is None
    waiting = agent.call("wait", 5.0)
    await asyncio.sleep(0.1)
    await agent.views.finish(OUTCOME, [ProcessInfo(9, "stuck", "D", 1, 1, 5)])
    assert waiting.done() or await waiting
    assert waiting.result() == {"outcome": OUTCOME, "left": [[9, "stuck", "D"]]}


async def test_the_end_waits_for_who_will_ask_again_but_not_for_long(agent: Agent) -> None:
    await agent.call("status", True)
    started = now()
    await agent.views.finish(OUTCOME)
    assert 1.0 < now() - started < 2.0


@pytest.mark.parametrize(
    ("question", "waits"),
    [
        (("wait", 0.1), True),
        (("logs", EVERYTHING, None, True), True),
        (("logs", EVERYTHING, None, False), False),
        (("status",), False),
    ],
)
async def test_the_end_waits_for_those_who_said_that_they_follow(
    agent: Agent, question: tuple[Any, ...], waits: bool
) -> None:
    assert (await agent.call(*question) or {}).get("end") is None
    started = now()
    await agent.views.finish(OUTCOME)
    assert (now() - started > 1.0) is waits


async def test_the_end_comes_at_once_when_all_have_heard_of_it(agent: Agent) -> None:
    waiting, following = agent.call("wait", 60.0), agent.call("logs", EVERYTHING, None, True)
    await asyncio.sleep(1.0)
    started = now()
    await agent.views.finish(OUTCOME)
    assert now() - started < 0.5
    assert (await waiting)["outcome"] == (await following)["end"]["outcome"] == OUTCOME


async def test_who_waits_for_long_is_answered_after_a_while(agent: Agent) -> None:
    started = now()
    assert await agent.call("wait", 60.0) is None
    assert now() - started < 6.0


async def test_the_end_does_not_wait_for_who_went_long_ago(agent: Agent) -> None:
    await agent.call("status", True)
    await asyncio.sleep(10.0)
    started = now()
    await agent.views.finish(OUTCOME)
    assert now() == started


async def test_stop_and_kill_go_to_who_holds_the_control_plane(agent: Agent) -> None:
    await agent.call("stop", "why", False)
    await agent.call("stop", "why", True)
    assert agent.stopped == [("stop", "why", STOPPED), ("kill", "why", STOPPED)]


async def test_an_agent_without_the_control_plane_stops_nothing(tmp_path: Path) -> None:
    other = Agent(tmp_path, MemoryNetwork())
    async with other.server, other.looker:
        Views(other.server, other.assignment, other, other.ask)
        with pytest.raises((MisuseError, RemoteError), match="not here"):
            await other.call("stop", "why", False)
