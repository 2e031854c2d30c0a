"""Several hosts on this machine, each with its own address, sshd, /tmp and pids: the project's testbed.

One testbed for a test run, of its own name, five hosts; the test that changed something of it (a cut, a frozen
host, a mount) gets it put right afterwards. Hosts see this machine's files but have a /tmp of their own; the
repository, the interpreter and the tests' temporary directories are the same on all of them. A host's processes
are visible from here (`Hosts.processes`), and so are its files (`Hosts.path`).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import processes
from tests.integration.support.job import ROOT
from tests.integration.support.needs import need

_PR_SET_CHILD_SUBREAPER = 36
_COUNT = 5
_ITS_OWN = ("/bin/sh -e ", "sshd: /usr/sbin/sshd", "sleep 86400")


def find_testbed() -> Path | None:
    """The testbed's command, which lies beside the project."""
    for above in (ROOT, ROOT.parent):
        if (command := above / "shared" / "testbed" / "testbed").exists():
            return command
    return None


class Hosts:
    """The hosts "host1", "host2" ... Every command is bounded, and one that fails says what it printed."""

    def __init__(self, command: Path, share: list[Path], count: int = _COUNT) -> None:
        self._command = command
        self.name = f"rt{os.getpid()}n{count}"
        self._env = {"TESTBED": self.name, "TESTBED_NET": os.environ.get("TESTBED_NET", "10.88.0")}
        self.names = tuple(f"host{number}" for number in range(1, count + 1))
        self._share = [word for path in share for word in ("--share", str(path))]
        self._touched: set[str] = set()

    def up(self) -> None:
        self._run("up", str(len(self.names)), *self._share)
        for host in self.names:
            self._plain_login(host)

    def _plain_login(self, host: str) -> None:
        """This machine's own start-up file is not run there: one of pyenv's takes a lock in the home that all hosts
        share, which a host that loses its power keeps."""
        words = "test ! -e ~/.bashrc || mount --bind /dev/null ~/.bashrc"
        self.exec(host, "sh", "-c", words)

    def down(self) -> None:
        self._run("down")

    def address(self, host: str) -> str:
        """The IPv4 address of a host."""
        return f"{self._env['TESTBED_NET']}.{host.removeprefix('host')}"

    # -- programs -----------------------------------------------------------------------------

    def exec(
        self, host: str, *argv: object, check: bool = True, timeout: float = 30.0, **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host. `more`: `env` (added to ours), `cwd`, `input`."""
        env = self._environment(more.pop("env", None))
        done = subprocess.run(
            self._exec(host, argv), text=True, capture_output=True, timeout=timeout, env=env, **more
        )
        if check and done.returncode:
            pytest.fail(f"{host}: {argv}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def popen(self, host: str, *argv: object, **more: Any) -> subprocess.Popen[bytes]:
        """Start a program on a host; it ends when this process is killed. `more` is for `Popen`."""
        env = self._environment(more.pop("env", None))
        return subprocess.Popen(self._exec(host, argv), env=env, **more)

    def _exec(self, host: str, argv: tuple[object, ...]) -> list[str]:
        return [str(self._command), "exec", host, "--", *map(str, argv)]

    def _environment(self, env: Mapping[str, str] | None) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("RUNTIME_", "PET_"))}
        return {**ours, "PYTHONPATH": str(ROOT), **(env or {}), **self._env}

    def python(self, host: str, *argv: object, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run this interpreter on a host."""
        return self.exec(host, sys.executable, *argv, **more)

    # -- faults -------------------------------------------------------------------------------

    def cut(self, host: str, other: str | None = None) -> None:
        """No packet arrives any more: between two hosts, or between one and all others."""
        self._change("*", *(("partition", host, other) if other else ("isolate", host)))

    def heal(self) -> None:
        """Undo every `cut`."""
        self._run("heal")

    def freeze(self, host: str) -> None:
        """Every process of the host hangs; its kernel still answers TCP."""
        self._change(host, "freeze", host)

    def thaw(self, host: str) -> None:
        self._run("thaw", host)

    def kill(self, host: str) -> None:
        """Power loss: peers see silence."""
        self._change(host, "kill", host)

    def boot(self, host: str) -> None:
        """Power on. What the host had in /tmp is still there."""
        self._run("boot", host)
        self._plain_login(host)

    def delay(self, host: str, *words: str) -> None:
        """What the host receives comes late or not at all: "20ms", "5ms", "loss", "1%"; or "off"."""
        self._change(host, "delay", host, *words)

    def memory(self, host: str, size: str) -> None:
        """At most so much memory for all of its processes: "512M"; or "max"."""
        self._change(host, "memory", host, size)

    def mount(self, host: str, source: Path | str, target: Path | str) -> None:
        """On this host alone, `target` is `source` (a bind mount), until the test ends."""
        self._touched.add(f"mount {host} {target}")
        self.exec(host, "mount", "--bind", source, target)

    def restore(self) -> None:
        """Put everything right that was changed since the last time."""
        for mounted in [word.split() for word in self._touched if word.startswith("mount ")]:
            self.exec(mounted[1], "umount", "-l", mounted[2], check=False)
        if "*" in self._touched:
            self.heal()
        for host in self._touched & set(self.names):
            if self.has_power(host):
                self.thaw(host)
                self._run("delay", host, "off")
                self._run("memory", host, "max")
            else:
                self.boot(host)
        self._touched.clear()

    def _change(self, touched: str, *words: str) -> None:
        self._touched.add(touched)
        self._run(*words)

    def slurm(self, word: str) -> None:
        """Start Slurm on all hosts ("up"), or end it ("down")."""
        self._run(word, command=self._command.parent / "slurm")

    def _run(self, *words: str, command: Path | None = None) -> None:
        # A test before us may have made this process a subreaper: it would adopt the hosts.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        done = subprocess.run(
            [str(command or self._command), *words],
            text=True,
            capture_output=True,
            timeout=30,
            env={**os.environ, **self._env},
        )
        assert done.returncode == 0, f"testbed {' '.join(words)}: {done.stderr}"

    # -- looking ------------------------------------------------------------------------------

    def _group(self, host: str) -> Path:
        for root in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup")):
            if (root / f"testbed-{self.name}").exists():
                return root / f"testbed-{self.name}" / host
        raise AssertionError("the testbed has no control group")

    def has_power(self, host: str) -> bool:
        """Whether it runs, or is at least frozen."""
        return self._group(host).exists()

    def pids(self, host: str) -> list[int]:
        """The living processes of a host, but for its init and its sshd; pids as this machine counts."""
        try:
            words = (self._group(host) / "cgroup.procs").read_text().split()
        except OSError:
            return []  # powered off
        found = [processes.look_at(int(word)) for word in words]
        return [p.pid for p in found if p is not None and not p.command.startswith(_ITS_OWN)]

    def processes(self, host: str) -> list[str]:
        """The same as command lines."""
        return [p.command for pid in self.pids(host) if (p := processes.look_at(pid)) is not None]

    def path(self, host: str, path: Path | str) -> Path:
        """A path of a host (in its /tmp, say), as it is reached from here."""
        pid = int((Path("/var/lib/testbed") / self.name / host / "pid").read_text())
        return Path(f"/proc/{pid}/root") / str(path).lstrip("/")

    def assert_empty(self, within: float = 5.0) -> None:
        """No process of ours on any host that has power, `within` seconds from now."""
        until = time.monotonic() + within
        while left := {host: found for host in self.names if (found := self.processes(host))}:
            assert time.monotonic() < until, f"left on hosts: {left}"
            time.sleep(0.02)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The testbed of this test run, without anything put right between tests."""
    with make_testbed(tmp_path_factory.getbasetemp()) as hosts:
        yield hosts


@contextmanager
def make_testbed(scratch: Path, count: int = _COUNT) -> Iterator[Hosts]:
    """A testbed of so many hosts, which share the folder `scratch`."""
    command = find_testbed()
    need(os.geteuid() == 0, "to run as root")
    need(command is not None, "the testbed (shared/testbed beside the project)")
    assert command is not None
    share = [ROOT, scratch, *([Path(sys.prefix)] if _in_tmp(sys.prefix) else [])]
    hosts = Hosts(command, share, count)
    try:
        hosts.up()
        yield hosts
    finally:
        hosts.down()


def _in_tmp(path: str) -> bool:
    return path.startswith(("/tmp/", "/var/tmp/"))


@pytest.fixture
def hosts(testbed: Hosts) -> Iterator[Hosts]:
    """The hosts, as they were when the test run began."""
    yield testbed
    testbed.restore()
