"""The launcher's part of a job on several hosts, played by agents that are only frames."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from runtime.config import Config, Coordinator
from runtime.job import JobSpec
from runtime.launcher import jobs
from runtime.launcher.assignment import Assignment
from runtime.launcher.channel import Frame, Kind
from runtime.launcher.outcome import outcome_of, to_plain
from runtime.launcher.plan import Host, Launch, Plan
from runtime.launcher.report import Outcome, exit_code, failure_box
from runtime.launcher.session import Session
from runtime.launcher.spawn import Exit
from tests.launcher.test_outcome import BASE, end, failure

pytestmark = pytest.mark.looptime


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session writes down where its job is."""
    monkeypatch.setenv("HOME", str(tmp_path))


class FakeAgent:
    """An agent as its link shows it: `told` is what it was sent, `says` sends an event up."""

    held, late_s, via = False, 0.0, ""

    def __init__(self, host: Host) -> None:
        self.host, self.local, self.pid = host, host.local, 0
        self.channel, self.hello, self.way = self, None, None
        self.told: list[dict[str, Any]] = []
        self.job: Assignment | None = None
        self.exit: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.words = ""
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        self.answers: Callable[[dict[str, Any]], None] = lambda message: None

    def says(self, event: str, **values: Any) -> None:
        self._frames.put_nowait(Frame(Kind.EVENT, msgpack.packb({"event": event, **values})))

    def dies(self, exit: Exit | None = None, words: str = "") -> None:
        if not self.exit.done():
            self.words = words
            self.exit.set_result(exit or Exit())
            self._frames.put_nowait(None)

    def ops(self, without: Sequence[str] = ("ping",)) -> list[str]:
        return [m["op"] for m in self.told if m["op"] not in without]

    # -- as a link and its channel ------------------------------------------------------------

    def send(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.JOB:
            self.job = pickle.loads(body)

    def send_message(self, kind: Kind, message: dict[str, Any]) -> None:
        self.told.append(message)
        self.answers(message)

    async def drain(self) -> None: ...

    async def receive(self) -> Frame | None:
        return await self._frames.get()

    async def close(self, timeout: float = 1.0) -> None: ...

    def last_words(self) -> str:
        return self.words

    def kill(self) -> None:
        self.dies(Exit(signal=9))

    async def ended(self, timeout: float = 2.0) -> Exit:
        await asyncio.wait({self.exit}, timeout=timeout)
        self.kill()
        return await self.exit


class Played:
    """A session and its agents."""

    def __init__(self, agents: list[FakeAgent], session: Session) -> None:
        self.agents, self.session = agents, session
        self.outcome: Outcome | None = None

    @property
    def box(self) -> str:
        assert self.outcome is not None
        return failure_box(self.outcome, 200)

    @property
    def code(self) -> int:
        assert self.outcome is not None
        return exit_code(self.outcome)

    def ends_with(
        self, code: int, *failures: dict[str, Any], reason: str = "", lost: Sequence[int] = ()
    ) -> None:
        """What the first agent says at the end."""
        outcome = outcome_of(end(code, *failures, reason=reason), BASE)
        self.agents[0].says(
            "end", outcome=to_plain(outcome), lost_hosts=list(lost), undecided=False
        )
        self.agents[0].dies()


@asynccontextmanager
async def play(
    *names: str,
    local: bool = False,
    silence_s: float = 5.0,
    detached: Sequence[str] = (),
    started: bool = True,
) -> AsyncIterator[Played]:
    """Run a session on hosts of these names beside the block; it must end soon after that. `detached`: the
    workers of a job that it is to leave when they run; `started`: all agents have been heard of."""
    hosts = tuple(Host(name, 1, local=local) for name in names)
    launches = tuple(Launch(names[0], name, 0, 0, (), {}) for name in detached)
    plan = Plan("job-1", JobSpec("train", {}), hosts, launches)
    beat = Coordinator(heartbeat_timeout_ms=int(silence_s * 1000))
    assignments = [
        Assignment(plan, n, "/nowhere", "/logs", "/", {}, node_rank=i, settings=Config(beat))
        for i, n in enumerate(names)
    ]
    assignments = [replace(a, detached=bool(detached)) for a in assignments]
    agents = [FakeAgent(host) for host in hosts]
    for agent in agents if started else ():
        agent.says("pong")
    session = Session(agents, assignments)  # type: ignore[arg-type]
    played = Played(agents, session)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(session.run())
        await asyncio.sleep(0.1)
        yield played
        played.outcome = (
            await running
        )  # its console has a thread: no time limit of a fake clock here


def _obliging(agent: FakeAgent) -> None:
    """It answers pings, and goes when it is told to."""

    def answers(message: dict[str, Any]) -> None:
        if message["op"] == "ping":
            agent.says("pong")
        elif message["op"] == "leave":
            agent.says("end", lost="")
            agent.dies()

    agent.answers = answers


async def test_all_hosts_get_their_job_and_hear_where_the_control_plane_is() -> None:
    async with play("h1", "h2", "h3") as job:
        for agent in job.agents:
            _obliging(agent)
        where = {"address": "tcp://10.0.0.1:7", "log_dir": "/logs/job-1"}
        job.agents[0].says("listening", peer="@agent-0.x", process=(7, 99), **where)
        await asyncio.sleep(0.1)
        assert [a.job and a.job.host for a in job.agents] == ["h1", "h2", "h3"]
        assert [a.ops() for a in job.agents] == [[], ["control"], ["control"]]
        assert job.agents[1].told[-1]["address"] == "tcp://10.0.0.1:7"
        job.ends_with(0)
    assert job.code == 0
    assert job.agents[2].ops() == ["control", "leave"]
    registered = await asyncio.to_thread(jobs.read, "job-1")
    assert registered.address == "tcp://10.0.0.1:7"
    assert registered.names == ["h1", "h2", "h3"]
    assert registered.hosts[0][1:3] == ("/logs/job-1", (7, 99))
    ended = await asyncio.to_thread(jobs.outcome, registered)
    assert ended is not None, "the launcher says so where it cannot read the logs"
    assert ended.stage == "finished"


async def test_a_detached_job_is_left_when_all_its_workers_run_and_all_hosts_know() -> None:
    async with play("h1", "h2", detached=("a-0", "a-1")) as job:
        where = {"address": "tcp://10.0.0.1:7", "log_dir": "/logs/job-1"}
        job.agents[0].says("listening", peer="@agent-0.x", process=(7, 99), **where)
        for pid in (1, 2):  # it was restarted: that counts once
            job.agents[0].says("started", name="a-0", pid=pid)
        await asyncio.sleep(0.1)
        assert "detach" not in job.agents[0].ops()
        job.agents[1].says("started", name="a-1", pid=3)
        await asyncio.sleep(0.1)
        assert [agent.ops()[-1] for agent in job.agents] == ["detach", "detach"]
        job.agents[0].says("detached")
        await asyncio.sleep(1.0)
        assert not job.agents[0].exit.done(), "the other has not heard of it yet"
        job.agents[1].says("detached")
    assert job.code == 0
    assert [agent.ops()[-1] for agent in job.agents] == ["detach", "detach"], "nobody was stopped"


async def test_a_detached_job_that_fails_in_its_start_says_how() -> None:
    async with play("h1", "h2", detached=("a-0", "a-1")) as job:
        for agent in job.agents:
            _obliging(agent)
        job.agents[0].says("started", name="a-0", pid=1)
        job.ends_with(3, failure())
    assert job.code == 3


async def test_a_link_that_ends_is_told_to_the_first_agent_with_its_reason() -> None:
    async with play("h1", "h2", "h3") as job:
        _obliging(job.agents[0])
        _obliging(job.agents[2])
        job.agents[1].dies(Exit(255), "Connection to h2 closed by remote host.")
        await asyncio.sleep(0.1)
        (lost,) = [m for m in job.agents[0].told if m["op"] == "lost"]
        assert lost["node_rank"] == 1
        assert (
            lost["why"]
            == "its connection ended with exit 255: Connection to h2 closed by remote host."
        )
        job.ends_with(69, failure(pid=0, code=69, cause=lost["why"], at=0.0, host="h2"))
    assert job.code == 69
    assert "trainer rank 1 on h2" in job.box


async def test_an_agent_that_is_cut_off_is_told_to_the_first_one() -> None:
    async with play("h1", "h2") as job:
        _obliging(job.agents[0])
        job.agents[1].says("end", lost="h2 lost the control plane on h1: silence")
        await asyncio.sleep(0.1)
        (lost,) = [m for m in job.agents[0].told if m["op"] == "lost"]
        assert lost["why"] == "h2 lost the control plane on h1: silence"
        job.ends_with(69, reason="gone")


async def test_the_loss_of_the_first_host_ends_the_job_with_its_own_message() -> None:
    async with play("h1", "h2", "h3") as job:
        for agent in job.agents[1:]:
            _obliging(agent)
        job.agents[0].dies(Exit(255), "Connection reset")
    assert job.code == 69
    assert (
        "host h1, which held the control plane, was lost: its connection ended with exit 255"
        in job.box
    )
    leave = job.agents[1].told[-1]
    assert (leave["op"], leave["after_s"]) == ("leave", 0.0)


async def test_an_agent_of_this_machine_that_is_killed_is_named_with_the_signal() -> None:
    async with play("here", "there", local=True) as job:
        _obliging(job.agents[1])
        job.agents[0].dies(Exit(signal=9))
    assert "its agent killed by SIGKILL" in job.box


@pytest.mark.parametrize("local", [False, True])
async def test_a_host_without_a_sign_of_life_is_given_up_after_the_timeout(local: bool) -> None:
    async with play("h1", "h2", local=local, silence_s=5) as job:
        _obliging(job.agents[0])
        began = asyncio.get_running_loop().time()
        await asyncio.wait({job.agents[1].exit})
        assert 4 < asyncio.get_running_loop().time() - began < 7
        await asyncio.sleep(0.1)
        (lost,) = [m for m in job.agents[0].told if m["op"] == "lost"]
        assert (lost["node_rank"], lost["why"]) == (1, "no sign of life for 5 s")
        job.ends_with(69, reason="h2")


async def test_a_host_whose_words_wait_behind_those_of_another_is_not_silent() -> None:
    async with play("h1", "h2", silence_s=5) as job:
        _obliging(job.agents[0])
        job.agents[1].held = True
        await asyncio.sleep(20)
        job.agents[1].held = False
        await asyncio.sleep(4)
        assert "lost" not in job.agents[0].ops()
        _obliging(job.agents[1])
        job.ends_with(0)


async def test_who_carries_links_is_missed_before_those_whose_links_it_carries() -> None:
    async with play("h1", "h2", "h3", silence_s=5) as job:
        _obliging(job.agents[0])
        job.agents[1].late_s, job.agents[1].via = 2.0, " (by way of h3)"
        await asyncio.wait({job.agents[1].exit})
        assert job.agents[2].exit.done()
        await asyncio.sleep(0.1)
        lost = [(m["node_rank"], m["why"]) for m in job.agents[0].told if m["op"] == "lost"]
        silent = "no sign of life for 5 s"
        assert lost == [(2, silent), (1, f"{silent} (by way of h3)")]
        job.ends_with(69, reason="h3")


async def test_a_host_of_which_nonsense_comes_is_given_up() -> None:
    async with play("h1", "h2") as job:
        for agent in job.agents:
            _obliging(agent)
        job.agents[1]._frames.put_nowait(Frame(Kind.EVENT, b"nonsense"))
        await asyncio.sleep(0.1)
        (lost,) = [m for m in job.agents[0].told if m["op"] == "lost"]
        assert (lost["node_rank"], "is not msgpack" in lost["why"]) == (1, True)
        job.ends_with(69, reason="host h2 was lost", lost=[1])


async def test_a_first_agent_of_this_machine_that_hangs_does_not_keep_the_others() -> None:
    async with play("h1", "h2", local=True, silence_s=5, started=False) as job:
        _obliging(job.agents[1])
        await asyncio.sleep(20)
        assert not job.agents[0].exit.done(), "its interpreter may take its time"
        job.agents[0].says("pong")
        await asyncio.wait({job.agents[0].exit})
    assert "host h1, which held the control plane, was lost: no sign of life for 5 s" in job.box


async def test_the_agent_of_a_job_of_this_machine_alone_is_not_pinged() -> None:
    async with play("a", local=True) as job:
        await asyncio.sleep(20)
        assert job.agents[0].told == []
        job.ends_with(0)


async def test_an_agent_that_does_not_go_is_not_waited_for() -> None:
    async with play("h1", "h2", silence_s=60) as job:
        began = asyncio.get_running_loop().time()
        job.ends_with(0)
    assert job.code == 0
    assert asyncio.get_running_loop().time() - began < 8
    assert job.agents[1].exit.result() == Exit(signal=9)


async def test_a_host_that_the_first_agent_has_lost_is_not_waited_for() -> None:
    async with play("h1", "h2", silence_s=60) as job:
        began = asyncio.get_running_loop().time()
        job.ends_with(69, failure(pid=0, code=69, cause="host unreachable", at=0.0), lost=[1])
    assert asyncio.get_running_loop().time() - began < 0.5


async def test_what_one_host_refuses_ends_the_job_with_its_name() -> None:
    async with play("h1", "h2") as job:
        _obliging(job.agents[0])
        job.agents[1].says("refused", text="cannot make the log directory /x: no space")
        job.agents[1].dies()
        await asyncio.sleep(0.1)
        assert [m["op"] for m in job.agents[0].told if m["op"] != "ping"] == ["lost"]
        job.ends_with(69, reason="h2")
    assert job.code == 2
    assert "h2: cannot make the log directory /x: no space" in job.box
