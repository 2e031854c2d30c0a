"""Launching on other hosts as a user does: what reaches the workers there, and what a wrong host list says."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from tests.integration.support.hosts import Hosts

PROGRAM = """
import os, socket, sys
print(socket.gethostname(), os.getcwd(), sys.executable, os.environ.get("SAID"), os.environ.get("FILE"),
      os.environ.get("HF_TOKEN"), os.environ.get("SECRET"), "SSH_CONNECTION" in os.environ, flush=True)
"""


def test_options_and_environment_reach_the_workers_of_other_hosts(
    hosts: Hosts, tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "show.py").write_text(PROGRAM)
    (tmp_path / "env").write_text("FILE='from the file'\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntouch "$0.used"; exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "hosts").write_text(
        f"host2 slots=2 python={python}\nroot@host3:1 # and one\nhost4\n"
    )
    done = hosts.python(
        "host1", "-m", "runtime.launch", "-H", "hosts", "--exclude", "host4", "--no-tag-output",
        "--log-dir", tmp_path / "logs", "--workdir", tmp_path / "src", "--env-file", "env",
        "-x", "SAID=so", "show.py",
        cwd=tmp_path, env={"HF_TOKEN": "t", "SECRET": "s", "SSH_CONNECTION": "1"},
    )  # fmt: skip
    told = f"{tmp_path / 'src'} {sys.executable} so from the file t None False"
    assert sorted(done.stdout.splitlines()) == sorted(
        f"{host} {told}" for host in ("host2", "host2", "host3")
    )
    assert (tmp_path / "python.used").exists()
    hosts.assert_empty()


def test_a_host_that_cannot_be_used_ends_the_launch_with_its_line(
    hosts: Hosts, tmp_path: Path
) -> None:
    (tmp_path / "show.py").write_text(PROGRAM)
    argv = ("-m", "runtime.launch", "--log-dir", tmp_path / "logs", "--hosts", "host1,host2,nohost")
    done = hosts.python("host1", *argv, "show.py", cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (69, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("runtime.launch: error: host nohost: Could not resolve hostname nohost")
    done = hosts.python("host1", *argv, "--", "/tmp/show.py", cwd=tmp_path, check=False)
    assert done.returncode in (2, 69)
    assert "host host2: no such file or directory: /tmp/show.py" in done.stderr
    hosts.assert_empty()


def test_a_dry_run_dials_nobody(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(PROGRAM)
    done = hosts.python(
        "host1", "-m", "runtime.launch", "--dry-run", "--hosts", "nohost:2", "show.py", cwd=tmp_path
    )
    assert "nohost" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_hosts_are_dialled_leaves_no_ssh_client(
    hosts: Hosts, tmp_path: Path, number: int
) -> None:
    (tmp_path / "show.py").write_text(PROGRAM)
    hosts.freeze("host3")
    argv = (sys.executable, "-m", "runtime.launch", "--hosts", "host1,host2,host3", "show.py")
    with hosts.popen("host1", *argv, cwd=tmp_path) as launcher:
        until = time.monotonic() + 20
        while not any(line.startswith("ssh -T") for line in hosts.processes("host1")):
            assert time.monotonic() < until
            time.sleep(0.05)
        launcher.send_signal(number)
        assert launcher.wait(5) == 128 + number
    hosts.thaw("host3")
    hosts.assert_empty()
