"""What a job keeps on the machine while it runs is small and private, and is gone when it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import processes
from tests.integration.support.job import Job
from tests.integration.support.programs import SLEEP_FOR_LONG, WRITE_PID

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

TWO = ("--nproc-per-node", "2", "--role", "trainer")


def wait_for_go(first: str = "") -> str:
    """A script that runs until the file `go` is there."""
    wait = "import time\nwhile not pathlib.Path('go').exists():\n    time.sleep(0.02)\n"
    return f"{first}\n{WRITE_PID}\n{wait}"


def private_bytes(pid: int) -> int:
    """Memory that only this process has, in bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"Private_(?:Clean|Dirty):\s+(\d+) kB", text)) * 1024


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_job_that_ends_well_leaves_nothing(write: Write, launch: Launch, method: str) -> None:
    job = launch(*TWO, "--start-method", method, write("train.py", "print('hello')\n"))
    assert job.wait() == 0
    job.assert_nothing_left(within=2)


def test_the_runtime_directory_is_private_and_its_sockets_have_short_paths(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, write("train.py", wait_for_go()))
    job.worker_pid(0)
    job.worker_pid(1)
    sockets = processes.unix_sockets(str(job.runtime_dir))
    assert sockets
    assert max(len(path) for path in sockets) <= 107
    directories = [path for path in job.runtime_dir.rglob("*") if path.is_dir()]
    assert directories
    assert {stat.S_IMODE(path.stat().st_mode) for path in directories} == {0o700}
    assert not (processes.shared_memory() - job._memory), "a job without tensors shares no memory"
    write("go", "")
    assert job.wait() == 0
    job.assert_nothing_left()


def test_no_socket_of_a_job_listens_on_the_network_for_a_plain_script(
    write: Write, launch: Launch
) -> None:
    """The master port belongs to the script's own process group; the runtime itself talks over ipc."""
    job = launch(*TWO, write("train.py", wait_for_go()))
    job.worker_pid(0)
    job.worker_pid(1)
    inodes = {
        line.split()[9]
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    held = {
        str(fd.readlink())
        for process in job.processes()
        for fd in Path(f"/proc/{process.pid}/fd").iterdir()
    }
    assert not {f"socket:[{inode}]" for inode in inodes} & held
    write("go", "")
    assert job.wait() == 0


def test_two_jobs_side_by_side_do_not_see_each_other(write: Write, launch: Launch) -> None:
    body = wait_for_go("import sys\nprint(sys.argv[1], flush=True)")
    script = write("train.py", body)
    first = launch("--nproc-per-node", "1", script, "first")
    first.wait_for_text("first")
    env = {"XDG_RUNTIME_DIR": str(first.runtime_dir)}
    second = launch("--nproc-per-node", "1", script, "second", env=env)
    second.wait_for_text("second")
    second.popen.terminate()
    assert second.wait(15) == 143
    assert {p.pid for p in first.processes()}, "the other job was stopped, too"
    write("go", "")
    assert first.wait() == 0
    first.assert_nothing_left()


def test_a_job_starts_beside_what_a_killed_one_may_have_left(write: Write, launch: Launch) -> None:
    """Everything of a job killed at once: launcher, agent, workers. The next one is not disturbed."""
    script = write("train.py", WRITE_PID + SLEEP_FOR_LONG)
    job = launch(*TWO, script)
    job.worker_pid(0)
    job.worker_pid(1)
    env = {"XDG_RUNTIME_DIR": str(job.runtime_dir)}
    for process in job.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    second = launch(*TWO, write("quick.py", "print('ran')\n"), env=env)
    assert second.wait() == 0
    assert second.out.count("ran") == 2


def test_workers_have_sessions_of_their_own_and_the_agent_is_their_parent(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, write("train.py", wait_for_go()))
    workers = [processes.look_at(job.worker_pid(rank)) for rank in (0, 1)]
    agent = job.agent()
    sessions = {agent.session, *(w.session for w in workers if w)}
    assert len(sessions) == 3, job.describe()
    assert {w.parent for w in workers if w} == {agent.pid}
    write("go", "")
    assert job.wait() == 0


@pytest.mark.slow
def test_the_agent_never_loads_torch_and_stays_below_45_mb(write: Write, launch: Launch) -> None:
    job = launch(*TWO, write("train.py", wait_for_go("import torch")))
    job.worker_pid(0)
    job.worker_pid(1)
    agent = job.agent()
    mapped = Path(f"/proc/{agent.pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "/torch/" not in mapped
    assert "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text(), "nor does the launcher"
    assert private_bytes(agent.pid) < 45e6
    write("go", "")
    assert job.wait() == 0
    job.assert_nothing_left()


SHARES = (
    WRITE_PID
    + """
import multiprocessing, time
from multiprocessing import shared_memory

block = shared_memory.SharedMemory(create=True, size=1000)
lock = multiprocessing.get_context("spawn").Lock()
open(f"shares{rank}", "w").close()
time.sleep(600)
"""
)
"""Holds shared memory and a semaphore, both with names, as a DataLoader with spawned workers does."""


@pytest.mark.parametrize(
    ("victim", "code"), [("worker", 137), ("agent", 69), ("launcher", -signal.SIGKILL)]
)
def test_shared_memory_and_semaphores_do_not_outlive_a_kill(
    write: Write, launch: Launch, victim: str, code: int
) -> None:
    job = launch(*TWO, write("train.py", SHARES))
    job.wait_for_files("shares0", "shares1")
    pids = {"worker": job.worker_pid(0), "agent": job.agent().pid, "launcher": job.pid}
    os.kill(pids[victim], signal.SIGKILL)
    assert job.wait() == code, job.describe()
    assert "resource_tracker" not in job.err
    job.assert_nothing_left()
