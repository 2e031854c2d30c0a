"""A job over the testbed's hosts, started on one of them as a user starts it, and watched from outside.

Processes are found by host and command line, and named by this machine's pids. What is left of a job is looked
for on every host that has power: processes, anything in /tmp that was not there before, shared memory.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from tests.integration.support import processes
from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT

AGENT = r"\S+ -c .*runtime\.agent"
LAUNCHER = r"\S+ -m runtime\.launch"
SSH = r"ssh -T"
SESSION = r"sshd: root@notty"


class HostsJob:
    """`python -m runtime.launch` on the host `launcher`. `out` and `err` are what it has printed so far."""

    def __init__(
        self,
        hosts: Hosts,
        *options: str | Path,
        cwd: Path,
        launcher: str = "host1",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.hosts, self.cwd, self.launcher = hosts, cwd, launcher
        self.logs = cwd / "logs"
        self._before = {host: _things(hosts, host) for host in hosts.names}
        argv = [sys.executable, "-m", "runtime.launch", "--log-dir", self.logs, *options]
        path = f"{ROOT}{os.pathsep}{cwd}"
        with open(cwd / "out", "wb") as out, open(cwd / "err", "wb") as err:
            self.popen = hosts.popen(
                launcher,
                *argv,
                cwd=cwd,
                env={"PYTHONPATH": path, "HOME": str(cwd), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        return (self.cwd / "out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return (self.cwd / "err").read_text(errors="replace")

    @property
    def box(self) -> str:
        """The failure box, as one line."""
        found = self.err.find("══ job")
        assert found >= 0, f"there is no failure box{self.describe()}"
        return " ".join(self.err[found:].split())

    def describe(self) -> str:
        return f"\n-- out:\n{self.out[-4000:]}\n-- err:\n{self.err[-4000:]}"

    # -- while it runs ------------------------------------------------------------------------

    def wait(self, timeout: float = 30.0) -> int:
        """The launcher's exit code."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            left = {host: self.hosts.processes(host) for host in self.hosts.names}
            raise AssertionError(f"no end within {timeout} s: {left}{self.describe()}") from None

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 20.0) -> None:
        until = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < until, f"waited for {what}{self.describe()}"
            assert self.popen.poll() is None or condition(), f"ended before {what}{self.describe()}"
            time.sleep(0.01)

    def wait_for_workers(self, count: int, attempt: int = 0) -> None:
        """Until `count` workers have written their pids (`programs.WRITE_PID`)."""
        names = [self.cwd / f"pid.{rank}.{attempt}" for rank in range(count)]
        self.wait_until(lambda: all(map(Path.exists, names)), f"{count} workers")

    def worker(self, host: str, rank: int, attempt: int = 0) -> int:
        """The pid of a worker of a host, as this machine counts."""
        inside = (self.cwd / f"pid.{rank}.{attempt}").read_text()
        for pid in self.hosts.pids(host):
            status = Path(f"/proc/{pid}/status").read_text()
            if (found := re.search(r"^NSpid:.*\s(\d+)$", status, re.M)) and found[1] == inside:
                return pid
        raise AssertionError(f"{host} has no worker {rank}{self.describe()}")

    def pids(self, host: str, pattern: str) -> list[int]:
        """The processes of a host whose command line begins like that."""
        found = [processes.look_at(pid) for pid in self.hosts.pids(host)]
        return [p.pid for p in found if p is not None and re.match(pattern, p.command)]

    def kill(self, host: str, pattern: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to the processes of a host with such a command line; there must be one."""
        pids = self.pids(host, pattern)
        assert pids, f"nothing like {pattern} on {host}: {self.hosts.processes(host)}"
        for pid in pids:
            os.kill(pid, number)

    # -- after it -----------------------------------------------------------------------------

    def assert_nothing_left(self, within: float = 5.0, but: Collection[str] = ()) -> None:
        """No process, file in /tmp or shared memory of this job on any host that has power, `but` for these.

        An `sshd` whose other end was cut off is no matter: it waits for TCP to give up.
        """
        until = time.monotonic() + within
        while left := self._left(but):
            assert time.monotonic() < until, f"left after {within} s: {left}{self.describe()}"
            time.sleep(0.02)

    def _left(self, but: Collection[str]) -> dict[str, list[str]]:
        found = {
            host: [p for p in self.hosts.processes(host) if not re.match(SESSION, p)]
            + sorted(_things(self.hosts, host) - self._before[host])
            for host in self.hosts.names
            if self.hosts.has_power(host) and host not in but
        }
        return {host: things for host, things in found.items() if things}

    def close(self) -> None:
        """End what is left of it."""
        for host in self.hosts.names:
            for pid in self.hosts.pids(host):
                os.kill(pid, signal.SIGKILL)
        self.popen.kill()
        self.popen.wait()


def _things(hosts: Hosts, host: str) -> set[str]:
    """What stands in the folders that every host has for itself, but for the shared ones below them."""
    if not hosts.has_power(host):
        return set()
    tmp, memory = hosts.path(host, "/tmp"), hosts.path(host, "/dev/shm")
    return {*os.listdir(memory), *os.listdir(tmp), *map(str, tmp.glob("runtime-*/*"))}
