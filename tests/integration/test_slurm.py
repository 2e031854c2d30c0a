"""Jobs in Slurm's allocations: by srun, in every task of a step, submitted, cancelled, abandoned."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.needs import need

HELLO = """
    import os, socket
    slurm = sorted(name for name in os.environ if name.startswith("SLURM_PROC"))
    print(os.environ["RANK"], socket.gethostname(), os.environ["WORLD_SIZE"], *slurm)
"""
WAITING = "import time\nprint('up', flush=True)\ntime.sleep(600)\n"


@pytest.fixture(scope="module")
def _slurm(testbed: Hosts) -> Iterator[None]:
    """Slurm on the testbed's hosts, for the tests of this file: its daemons are processes, too."""
    need(shutil.which("slurmctld"), "slurm-wlm and munge")
    testbed.slurm("up")
    yield
    testbed.slurm("down")


@pytest.fixture
def on_host1(_slurm: None, hosts: Hosts, tmp_path: Path) -> Iterator[Callable[..., list[object]]]:
    """`on_host1("salloc", "-N3", ...)`: the words of a command that launches a job, with its options."""

    def words(*before: object, options: str = "", script: Path) -> list[object]:
        launcher = (sys.executable, "-m", "runtime.launch", "--log-dir", tmp_path / "logs")
        return [*before, *launcher, *options.split(), script]

    yield words
    hosts.exec("host1", "scancel", "--quiet", "--user=root", check=False)
    left(hosts, within=10.0)


def left(hosts: Hosts, within: float) -> None:
    """Fail if a process of a job is left after so many seconds."""
    until = time.monotonic() + within
    while found := [p for host in hosts.names for p in hosts.processes(host) if "runtime" in p]:
        assert time.monotonic() < until, found
        time.sleep(0.05)


def ranks(out: str) -> list[str]:
    return sorted(line.partition("] ")[2] for line in out.splitlines() if "] " in line)


ON_THREE = ["0 host1 3", "1 host2 3", "2 host3 3"]


def test_in_an_allocation_its_nodes_are_the_hosts(
    hosts: Hosts, on_host1: Callable[..., list[object]], write: Callable[[str, str], Path]
) -> None:
    done = hosts.exec("host1", *on_host1("salloc", "-Q", "-N3", script=write("hello.py", HELLO)))
    assert ranks(done.stdout) == ON_THREE


def test_a_launcher_in_each_task_of_a_step_launches_once(
    hosts: Hosts, on_host1: Callable[..., list[object]], write: Callable[[str, str], Path]
) -> None:
    step = ("salloc", "-Q", "-N3", "srun", "-N3", "--ntasks-per-node=1")
    done = hosts.exec("host1", *on_host1(*step, script=write("hello.py", HELLO)))
    assert ranks(done.stdout) == ON_THREE


def test_the_code_of_a_rank_that_fails_on_another_node_comes_through(
    hosts: Hosts, on_host1: Callable[..., list[object]], write: Callable[[str, str], Path]
) -> None:
    script = write("fails.py", "import os, sys\nsys.exit(7 * int(os.environ['RANK']))\n")
    done = hosts.exec("host1", *on_host1("salloc", "-Q", "-N2", script=script), check=False)
    assert done.returncode == 7, done.stderr
    assert "default rank 1 on host2" in done.stderr


def test_a_job_is_submitted_and_scancel_ends_it_cleanly(
    hosts: Hosts,
    on_host1: Callable[..., list[object]],
    write: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    options = "--launcher slurm --nnodes 3 --slurm-args=-oout.txt"
    words = on_host1(options=options, script=write("waits.py", WAITING))
    done = hosts.exec("host1", *words, cwd=tmp_path)
    match = re.match(r"runtime: submitted as Slurm job (\d+)", done.stdout)
    assert match, done.stderr
    out = tmp_path / "out.txt"
    until = time.monotonic() + 20
    while not (out.exists() and out.read_text().count("up") == 3):
        assert time.monotonic() < until, out.read_text() if out.exists() else "not started"
        time.sleep(0.05)
    hosts.exec("host1", "scancel", match[1])
    left(hosts, within=10.0)
    shown = hosts.exec("host1", "scontrol", "show", "job", match[1]).stdout
    assert "ExitCode=143:0" in shown
    assert "runtime: SIGTERM: stopping the job" in out.read_text()


def test_nothing_is_left_of_a_job_whose_launcher_was_killed(
    hosts: Hosts, on_host1: Callable[..., list[object]], write: Callable[[str, str], Path]
) -> None:
    words = on_host1("salloc", "-Q", "-N3", script=write("waits.py", WAITING))
    job = hosts.popen("host1", *words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert job.stdout is not None
    try:
        assert [b"up" in job.stdout.readline() for _ in range(3)] == [True] * 3
        (launcher,) = (
            pid for pid, text in zip(hosts.pids("host1"), hosts.processes("host1"), strict=True)
            if "-m runtime.launch" in text and "salloc" not in text
        )  # fmt: skip
        os.kill(launcher, signal.SIGKILL)
        left(hosts, within=10.0)
    finally:
        job.stdout.close()
        job.kill()
        job.wait(10)
