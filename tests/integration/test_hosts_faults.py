"""Jobs over three hosts, by ssh: whatever fails, the right code and name come in time and nothing is left.

Of the faults on one host (`test_deaths.py`) only those stand here that go another way when they are far off;
the rest is what only hosts can do: lose power, hang, lose their cable, their ssh, their disk.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.hosts_job import AGENT, LAUNCHER, SESSION, SSH, HostsJob
from tests.integration.support.programs import SLEEP_FOR_LONG, WRITE_PID

Start = Callable[..., HostsJob]

TIMEOUT_S = 2.0
"""Of heartbeats."""
WAITING = WRITE_PID + SLEEP_FOR_LONG
ON_GO = WRITE_PID + (
    "import ctypes, signal, sys, time\n"
    "if rank != 3:\n    time.sleep(600)\n"
    "while not pathlib.Path('go').exists():\n    time.sleep(0.01)\n"
)
"""Rank 3, on host2, goes on when the test says so."""
STUBBORN = WRITE_PID + (
    "import signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)\n"
)
DAEMON = WRITE_PID + (
    "import time\n"
    "from multiprocessing.shared_memory import SharedMemory\n"
    "memory = SharedMemory(create=True, size=1 << 20)\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        print('ready', flush=True)\n"
    "        time.sleep(600)\n"
    "    os._exit(0)\n"
    "os.wait()\n"
    "time.sleep(600)\n"
)
"""Leaves a process in a session of its own, and shared memory."""


@pytest.fixture
def start(hosts: Hosts, tmp_path: Path) -> Iterator[Start]:
    """Start a job of two workers on each of three hosts, and wait until they run."""
    jobs: list[HostsJob] = []

    def start(
        body: str = WAITING,
        *options: str,
        launcher: str = "host1",
        timeout_s: float = TIMEOUT_S,
        running: bool = True,
    ) -> HostsJob:
        (tmp_path / "train.py").write_text(body)
        words = ("--hosts", "host1:2,host2:2,host3:2", "--role", "trainer", *options, "train.py")
        env = {
            "RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS": "200",
            "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS": str(int(timeout_s * 1000)),
        }
        job = HostsJob(hosts, *words, cwd=tmp_path, launcher=launcher, env=env)
        jobs.append(job)
        if running:
            job.wait_for_workers(6)
        return job

    yield start
    for job in jobs:
        job.close()


def ends(job: HostsJob, code: int, *words: str, within: float = TIMEOUT_S + 2) -> None:
    """The launcher ends in time with `code` and a box that says `words`, and nothing is left anywhere."""
    began = time.monotonic()
    assert job.wait(within + 15) == code, job.describe()
    took = time.monotonic() - began
    assert all(word in job.box for word in words), job.describe()
    assert took < within, f"ended after {took:.1f} s{job.describe()}"
    job.assert_nothing_left()


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("raise ValueError('boom 17')", 1, ("ValueError: boom 17", "train.py")),
        ("print('last words', file=sys.stderr); os.kill(os.getpid(), 9)", 137, ("last words",)),
        ("ctypes.string_at(0)", 139, ("SIGSEGV",)),
    ],
    ids=["raises", "SIGKILL", "SIGSEGV"],
)
def test_a_worker_that_dies_on_another_host_is_named_with_all_that_is_known_there(
    start: Start, tmp_path: Path, what: str, code: int, words: tuple[str, ...]
) -> None:
    job = start(ON_GO + what)
    (tmp_path / "go").touch()
    ends(job, code, "first trainer rank 3 on host2", *words)


def test_a_killed_agent_and_what_its_workers_forgot_are_gone(start: Start) -> None:
    job = start(DAEMON)
    job.wait_until(lambda: job.out.count("ready") == 6, "daemons")
    _guard, agent = sorted(job.pids("host2", AGENT))
    os.kill(agent, signal.SIGKILL)
    ends(job, 69, "trainer rank 2 on host2", "its agent was killed by SIGKILL")


def test_a_second_ctrl_c_kills_on_all_hosts_at_once(start: Start) -> None:
    job = start(STUBBORN, "--shutdown-timeout", "60")
    job.wait_until(lambda: job.out.count("ready") == 6, "ready")
    job.kill("host1", LAUNCHER, signal.SIGINT)
    job.wait_until(lambda: "again" in job.err, "the first was taken")
    assert len(job.pids("host2", AGENT)) == 2
    job.kill("host1", LAUNCHER, signal.SIGINT)
    ends(job, 130, "stopped by Ctrl-C")


@pytest.mark.parametrize("launcher", ["host1", "host4"])
def test_a_killed_launcher_leaves_nothing_on_any_host(start: Start, launcher: str) -> None:
    job = start(DAEMON, launcher=launcher)
    job.wait_until(lambda: job.out.count("ready") == 6, "daemons")
    job.kill(launcher, LAUNCHER)
    job.wait()
    job.assert_nothing_left()


@pytest.mark.parametrize(
    ("fault", "host", "launcher", "words"),
    [
        ("power", "host2", "host1", "trainer rank 2 on host2"),
        ("power", "host1", "host4", "host host1, which held the control plane, was lost"),
        ("freeze", "host2", "host1", "trainer rank 2 on host2"),
        ("cable", "host2", "host1", "trainer rank 2 on host2"),
    ],
    ids=["power", "power of the first", "freeze", "cable"],
)
def test_a_host_that_is_lost_is_named_in_time_and_cleans_up_when_it_can(
    hosts: Hosts, start: Start, fault: str, host: str, launcher: str, words: str
) -> None:
    job = start(launcher=launcher)
    {"power": hosts.kill, "freeze": hosts.freeze, "cable": hosts.cut}[fault](host)
    began = time.monotonic()
    assert job.wait() == 69, job.describe()
    assert time.monotonic() - began < TIMEOUT_S + 2
    assert words in job.box, job.describe()
    job.assert_nothing_left(but=[host] if fault == "freeze" else [])
    if fault == "freeze":
        hosts.thaw(host)
        job.assert_nothing_left()


@pytest.mark.parametrize("launcher", ["host1", "host4"])
def test_without_the_launchers_host_every_host_ends_its_part(
    hosts: Hosts, start: Start, launcher: str
) -> None:
    job = start(launcher=launcher)
    hosts.cut(launcher)
    job.assert_nothing_left(TIMEOUT_S + 4, but=[launcher])
    assert job.wait() == 69, job.describe()
    assert re.search(r"host[123]\b.*(no sign of life for 2 s|host unreachable)", job.box)
    job.assert_nothing_left()


@pytest.mark.parametrize("end", ["client", "session"])
def test_a_killed_ssh_is_its_host_lost(start: Start, end: str) -> None:
    job = start()
    if end == "client":
        client, *_ = sorted(job.pids("host1", SSH + ".*-- host2 "))
        os.kill(client, signal.SIGKILL)
    else:
        job.kill("host2", SESSION)
    ends(job, 69, "trainer rank 2 on host2", "its connection")


TALKING = WRITE_PID + (
    "import runtime, time\n"
    "runtime.export_rpc_method('rank', lambda: rank)\n"
    "runtime.barrier('exported', timeout=20)\n"
    "print('ready', flush=True)\n"
    "while not pathlib.Path('go').exists():\n"
    "    assert runtime.RoleGroup('trainer').call('rank').result(60) == [*range(6)]\n"
    "    time.sleep(0.02)\n"
    "runtime.barrier('end', timeout=20)\n"
)


def test_a_cable_that_is_cut_for_3_s_disturbs_nobody(
    hosts: Hosts, start: Start, tmp_path: Path
) -> None:
    job = start(TALKING, timeout_s=30)
    job.wait_until(lambda: job.out.count("ready") == 6, "ready")
    hosts.cut("host2")
    time.sleep(3)
    hosts.heal()
    (tmp_path / "go").touch()
    assert job.wait() == 0, job.describe()
    assert job.err == ""
    job.assert_nothing_left()


def test_a_full_disk_is_told_and_no_reason_to_stop(
    hosts: Hosts, start: Start, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    hosts.exec("host2", "mount", "-t", "tmpfs", "-o", "size=64k", "none", logs)
    body = "for i in range(2000):\n    print('x' * 100)\nprint('the end')\n"
    job = start(body, running=False)
    try:
        assert job.wait() == 0, job.describe()
    finally:
        hosts.exec("host2", "umount", "-l", logs)
    assert job.out.count("the end") == 6
    assert re.search(r"runtime: host2: .*stdout.log gets no more of the output: No space", job.err)
    job.assert_nothing_left()


def test_a_host_that_cannot_begin_says_why(hosts: Hosts, start: Start) -> None:
    full = "mkdir -m 700 -p /tmp/runtime-0 && mount -t tmpfs -o nr_inodes=1,mode=700 none /tmp/runtime-0"
    hosts.exec("host2", "sh", "-c", full)
    job = start(running=False)
    try:
        assert job.wait() == 2, job.describe()
        job.assert_nothing_left()
    finally:
        hosts.exec("host2", "umount", "/tmp/runtime-0")
    assert "host2: cannot make the job's folder /tmp/runtime-0/" in job.box
    assert "No space left on device" in job.box
