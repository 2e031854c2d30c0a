"""Jobs over three hosts under random faults, two at once: whichever they are, the end is one of theirs, in time and clean.

`RUNTIME_TEST_SEEDS=17:3` plays the three rounds from seed 17 on (by default six from 0 on).
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.hosts_job import AGENT, LAUNCHER, SESSION, SSH, HostsJob
from tests.integration.support.programs import WRITE_PID

TIMEOUT_S = 2.0
"""Of heartbeats."""
HOSTS = ("host1", "host2", "host3")
LOST = 69
ON_GO = (
    WRITE_PID
    + "import time\nprint('x' * 99_999)\nwhile not os.path.exists('go'):\n    time.sleep(0.02)\n"
)
_FIRST, _COUNT = map(int, os.environ.get("RUNTIME_TEST_SEEDS", "0:6").split(":"))


class Fault(NamedTuple):
    """What may come of a fault: the job's exit code (0: nothing), and the hosts one of which is named."""

    code: int
    named: tuple[str, ...] = ()
    silent: str = ""
    """The host whose processes nobody can reach."""


class Chaos:
    """The faults of one round; each method strikes a host that is left whole so far."""

    def __init__(self, hosts: Hosts, job: HostsJob, draw: random.Random) -> None:
        self.hosts, self.job, self.draw = hosts, job, draw
        self._others = [host for host in HOSTS if host != job.launcher]
        draw.shuffle(self._others)

    def strike(self, again: bool = False) -> tuple[str, Fault]:
        host = self._others.pop()
        ways: list[Callable[[str], Fault]] = [
            self.worker, self.agent, self.power, self.cable, self.freeze, self.ssh, self.sshd,
            self.slow_line, self.stop_worker, self.hang,
        ]  # fmt: skip
        way = self.draw.choice(ways)
        what = f"{way.__name__} {host}"
        try:
            return what, way(host)
        except (AssertionError, ValueError, ProcessLookupError):
            if not again:
                raise
            return f"{what} (gone before)", Fault(0)

    def _worker(self, host: str) -> int:
        return self.job.worker(host, 2 * HOSTS.index(host) + self.draw.randrange(2))

    def worker(self, host: str) -> Fault:
        os.kill(self._worker(host), signal.SIGKILL)
        return Fault(137, (host,))

    def stop_worker(self, host: str) -> Fault:
        os.kill(self._worker(host), signal.SIGSTOP)
        return Fault(0)

    def agent(self, host: str) -> Fault:
        os.kill(max(self.job.pids(host, AGENT)), signal.SIGKILL)
        return Fault(LOST, (host,))

    def hang(self, host: str) -> Fault:
        os.kill(max(self.job.pids(host, AGENT)), signal.SIGSTOP)
        return Fault(LOST, (host,), silent=host)

    def power(self, host: str) -> Fault:
        self.hosts.kill(host)
        return Fault(LOST, (host,))

    def cable(self, host: str) -> Fault:
        self.hosts.cut(host)
        return Fault(LOST, (host,))

    def freeze(self, host: str) -> Fault:
        self.hosts.freeze(host)
        return Fault(LOST, (host,), silent=host)

    def ssh(self, host: str) -> Fault:
        os.kill(min(self.job.pids(self.job.launcher, f"{SSH}.*-- {host} ")), signal.SIGKILL)
        return Fault(LOST, (host,))

    def sshd(self, host: str) -> Fault:
        self.job.kill(host, SESSION)
        return Fault(LOST, (host,))

    def slow_line(self, host: str) -> Fault:
        self.hosts.delay(host, "20ms", "loss", "1%")
        return Fault(0)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(_FIRST, _FIRST + _COUNT))
def test_whatever_happens_the_end_is_right_in_time_and_clean(
    hosts: Hosts, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    launcher, full = draw.choice(["host1", "host4"]), draw.choice([*HOSTS, ""])
    (tmp_path / "train.py").write_text(ON_GO)
    logs = tmp_path / "logs"
    logs.mkdir()
    if full:
        hosts.exec(full, "mount", "-t", "tmpfs", "-o", "size=64k", "none", logs)
    words = ("--hosts", "host1:2,host2:2,host3:2", "--role", "trainer", "train.py")
    env = {
        "RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS": "200",
        "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS": str(int(TIMEOUT_S * 1000)),
    }
    job = HostsJob(hosts, *words, cwd=tmp_path, launcher=launcher, env=env)
    try:
        job.wait_for_workers(6)
        told = _two_faults(hosts, job, draw)
        print(f"seed {seed}: launcher on {launcher}, full disk on {full or 'no host'}, {told}")
    finally:
        if full and hosts.has_power(full):
            hosts.exec(full, "umount", "-l", logs, check=False)
        job.close()


def _two_faults(hosts: Hosts, job: HostsJob, draw: random.Random) -> str:
    chaos = Chaos(hosts, job, draw)
    struck = [chaos.strike()]
    time.sleep(draw.choice([0.0, 0.3]))
    if draw.random() < 0.8:
        struck.append(chaos.strike(again=True))
    if draw.random() < 0.2 and job.pids(job.launcher, LAUNCHER):
        job.kill(job.launcher, LAUNCHER)
        struck.append(("launcher killed", Fault(128 + signal.SIGKILL)))
    last, told = time.monotonic(), ", ".join(what for what, _ in struck)
    faults = [fault for _, fault in struck if fault.code]
    if not faults:
        (job.cwd / "go").touch()
        for host in HOSTS:
            for pid in hosts.pids(host):
                os.kill(pid, signal.SIGCONT)
        assert job.wait() == 0, told + job.describe()
    else:
        assert job.wait() in {fault.code for fault in faults}, told + job.describe()
        assert time.monotonic() - last < TIMEOUT_S + 2, told
        named = {host for fault in faults for host in fault.named}
        if "launcher" not in told:
            found = re.search(r"\b(host\d)\b", job.box)
            assert found, told + job.describe()
            assert found[1] in named, told + job.describe()
    silent = [fault.silent for fault in faults if fault.silent]
    within = 5.0 + (TIMEOUT_S + 2 if "launcher" in told else 0.0)
    job.assert_nothing_left(within, but=silent)
    for host in silent:
        hosts.thaw(host)
        for pid in hosts.pids(host):
            os.kill(pid, signal.SIGCONT)
    job.assert_nothing_left()
    return told
