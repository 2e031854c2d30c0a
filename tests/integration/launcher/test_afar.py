"""What hosts tell of a job without its agents. The way there is a shell of this machine in place of ssh."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from runtime.errors import RuntimeFault
from runtime.launcher import afar, spawn
from runtime.launcher.logfiles import Piece, Query
from runtime.launcher.outcome import keep
from runtime.launcher.records import Ended, JobEndpoint, JobHost, Missing, Way
from runtime.launcher.report import Outcome

SHELL = Way(sys.executable, ("sh", "-c"))
TREE = """
import os, signal, sys, time
parent = os.getpid()
if os.fork():
    os.kill(parent, signal.SIGSTOP)
while sys.argv[1] == "stays" or os.getppid() == parent:
    time.sleep(0.01)
"""


def job(*hosts: JobHost) -> JobEndpoint:
    return JobEndpoint("j1", "train", 0.0, hosts, "@agent-0.a", "ipc:///nowhere/a", machine="m")


def host(name: str, folder: Path | str, rank: int = 0, way: Way | None = SHELL) -> JobHost:
    return JobHost(name, str(folder), (os.getpid(), 1), (("t", rank),), way, local=False)


def log(folder: Path, rank: int) -> None:
    path = folder / "attempt_0" / "t" / str(rank) / "stdout.log"
    path.parent.mkdir(parents=True)
    path.write_text(f"one {rank}\ntwo {rank}\n")


async def read(made: JobEndpoint, query: Query) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    async with aclosing(afar.logs(made, query)) as items:
        async for name, item in items:
            found[name] = item.data if isinstance(item, Piece) else str(item)
    return found


async def test_a_host_says_how_the_job_ended_and_when(tmp_path: Path) -> None:
    outcome = Outcome("host_lost", "j1", log_dir=str(tmp_path), detail="h3 is gone")
    keep(outcome, "@agent-0.a")
    os.utime(tmp_path / "outcome.json", (1000.5, 1000.5))
    assert await afar.how_it_ended(job(host("h1", tmp_path))) == Ended(outcome, 1000.5)


async def test_a_host_without_an_outcome_says_whether_the_agent_lives(tmp_path: Path) -> None:
    keep(Outcome("finished", log_dir=str(tmp_path)), "@agent-0.of-an-earlier-job")
    gone = host("h1", tmp_path)
    found = await afar.how_it_ended(job(gone))
    assert isinstance(found, Missing)
    assert (found.stage, "h1" in found.reason) == ("lost", True)
    found = await afar.how_it_ended(job(gone._replace(process=spawn.own_process())))
    assert isinstance(found, Missing)
    assert found.stage == "unknown"
    assert f"process {os.getpid()} on h1) lives" in found.reason


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("sh", "-c", "echo no route >&2; exit 255"), "no route"),
        (("sh", "-c", "exit 127"), "has no interpreter"),
        (("sh", "-c", "sleep 100"), "no answer within 0.5 s"),
        (("/nowhere/ssh",), "/nowhere/ssh"),
    ],
)
async def test_a_host_that_cannot_be_asked_is_said_to_be(
    words: tuple[str, ...], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "ANSWER_S", 0.5)
    found = await afar.how_it_ended(job(host("h1", tmp_path, way=Way(sys.executable, words))))
    assert isinstance(found, Missing)
    assert found.stage == "unknown"
    assert reason in found.reason


async def test_a_host_to_which_nothing_leads_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFault, match="srun"):
        async with afar.visit(job(), host("h1", tmp_path, way=None)):
            raise AssertionError
    with pytest.raises(RuntimeFault, match="it is m, from which the job was launched"):
        async with afar.visit(job(), host("h1", tmp_path, way=None)._replace(local=True)):
            raise AssertionError


async def test_all_hosts_give_their_logs_and_one_that_cannot_be_asked_its_reason(
    tmp_path: Path,
) -> None:
    for rank in (0, 1):
        log(tmp_path / "h1", rank)
    lost = host("h2", tmp_path / "h2", 1, Way(sys.executable, ("sh", "-c", "exit 255")))
    empty = host("h3", tmp_path / "h3", 2)
    (tmp_path / "h1" / "attempt_0" / "t" / "1").rename(tmp_path / "another's")
    first = host("h1", tmp_path / "h1")._replace(ranks=(("t", 0), ("t", 5)))
    found = await read(job(first, lost, empty), Query(lines=1))
    assert found["h1"] == b"two 0\n"
    assert found["h2"] == "ssh gave up without a word"
    assert found["h3"] == f"there is no directory {tmp_path / 'h3'}"


async def test_what_lies_here_is_not_fetched(tmp_path: Path) -> None:
    for rank in (0, 1):
        log(tmp_path, rank)
    no_way = Way(sys.executable, ("false",))
    shared = [host(f"h{rank}", tmp_path, rank, no_way) for rank in (0, 1)]
    found = await read(job(*shared), Query(lines=1))
    assert found == {"h0": b"two 0\n", "h1": b"two 1\n"}


@pytest.mark.parametrize(("local", "child"), [(False, "goes"), (True, "stays")])
async def test_an_agent_that_hangs_is_killed_with_what_it_started(
    local: bool, child: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(afar, "_CLEANS_S", 0.1)  # for who cleans up after it: here nobody
    agent = await asyncio.to_thread(stopped, child)
    (below,) = spawn.children(agent.pid)
    made = job(JobHost("h1", "", (agent.pid, agent.started), (), SHELL, local))
    made = made._replace(machine="" if local else "m")
    reaped = asyncio.to_thread(os.waitpid, agent.pid, 0)
    left, (_, status) = await asyncio.gather(afar.end(made, ["h1"]), reaped)
    assert left == {"h1": []}
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert afar.outliving([info for info in [spawn.look_at(below)] if info], 0.0) == []
    assert await afar.end(made, ["h1"]) == {"h1": []}, "there is nothing to kill any more"


async def test_another_process_of_that_number_is_left_alone() -> None:
    agent = await asyncio.to_thread(stopped, "goes")
    made = job(JobHost("h1", "", (agent.pid, agent.started - 1), (), SHELL, local=False))
    assert await afar.end(made, ["h1"]) == {"h1": []}
    info = spawn.look_at(agent.pid)
    assert info is not None
    assert info.state == "T"
    os.kill(agent.pid, signal.SIGKILL)
    await asyncio.to_thread(os.waitpid, agent.pid, 0)


def stopped(child: str) -> spawn.ProcessInfo:
    """A process that has been stopped. Its child "stays" without it, or "goes"."""
    pid = spawn.start([sys.executable, "-c", TREE, child])
    while (info := spawn.look_at(pid)) is None or info.state != "T":
        time.sleep(0.01)
    return info
