"""Dialling real hosts through the system's ssh: what answers, what is said of what does not, what stays behind."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runtime.launcher.ssh import marked_version, remote_command
from tests.integration.support import processes
from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT

PROGRAM = ROOT / "tests" / "integration" / "support" / "dial_program.py"
Dial = Callable[..., dict[str, Any]]


def words(names: str | list[dict[str, Any]], settings: dict[str, Any]) -> tuple[str, str]:
    hosts = [{"name": name} for name in names.split()] if isinstance(names, str) else names
    return json.dumps(hosts), json.dumps(settings)


@pytest.fixture
def dial(hosts: Hosts) -> Dial:
    """`dial("host1 host2", timeout_s=5)`: what the program on host1 printed."""

    def dial(names: str | list[dict[str, Any]], **settings: Any) -> dict[str, Any]:
        done = hosts.python("host1", PROGRAM, *words(names, settings))
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return dial


class Held:
    """Links that are kept open on host1."""

    def __init__(self, hosts: Hosts, names: str, settings: dict[str, Any]) -> None:
        argv = (sys.executable, PROGRAM, *words(names, settings), "hold")
        self.popen = hosts.popen(
            "host1", *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def line(self, timeout: float = 20.0) -> dict[str, Any]:
        assert self.popen.stdout is not None
        ready, _, _ = select.select([self.popen.stdout], [], [], timeout)
        assert ready, "nothing was printed"
        found: dict[str, Any] = json.loads(self.popen.stdout.readline())
        return found

    def close(self) -> None:
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(20)
        finally:
            self.popen.kill()
            self.popen.wait()
            self.popen.stdout.close()


@pytest.fixture
def hold(hosts: Hosts) -> Iterator[Callable[..., Held]]:
    held: list[Held] = []

    def hold(names: str, **settings: Any) -> Held:
        held.append(Held(hosts, names, settings))
        return held[-1]

    yield hold
    for one in held:
        one.close()
    hosts.assert_empty()


def commands(hosts: Hosts, host: str, pattern: str) -> list[int]:
    """The processes of a host whose command line begins like that."""
    found = [(pid, processes.look_at(pid)) for pid in hosts.pids(host)]
    return [pid for pid, process in found if process and re.match(pattern, process.command)]


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_a_login_shell_runs_the_interpreter_and_hears_the_marker_first(shell: str) -> None:
    command = remote_command(sys.executable, "print('it\\'s', sys.argv)", "f00")
    done = subprocess.run([shell, "-c", command], capture_output=True, text=True, timeout=30)
    marker, said = done.stdout.splitlines()
    assert marked_version(marker.encode(), "f00") == sys.version.split()[0]
    assert said == "it's ['-c']"


def test_agents_answer_and_say_what_they_are_and_nothing_of_them_stays(
    hosts: Hosts, dial: Dial
) -> None:
    hellos = dial("host1 host2 host3")["hellos"]
    assert list(hellos) == ["host1", "host2", "host3"]
    for name, hello in hellos.items():
        assert (hello["hostname"], hello["problems"]) == (name, [])
        assert hello["python"] == sys.version.split()[0]
        assert hello["torch"] == metadata.version("torch")
        assert ["eth0", hosts.address(name)] in hello["addresses"]
        assert hello["ssh_client"] == ("" if name == "host1" else hosts.address("host1"))
    hosts.assert_empty()


class Faults:
    """Host 3 has another torch, host 4 no package, host 5 no power; host 1 knows names only by their keys."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        state = Path("/var/lib/testbed") / hosts.name
        known = (state / "known_hosts").read_text().split(maxsplit=1)[1]
        (folder / "known_hosts").write_text(f"host* {known}")
        hosts.mount("host1", folder / "known_hosts", state / "known_hosts")
        self.no_program = folder / "METADATA"
        self.no_program.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
        torch = metadata.distribution("torch")._path  # type: ignore[attr-defined]
        hosts.mount("host3", self.no_program, torch / "METADATA")
        (folder / "empty").mkdir()
        hosts.mount("host4", folder / "empty", ROOT / "runtime")
        self.older = folder / "older"
        self.older.write_text(
            f"#!/bin/sh\nexec {sys.executable} -c "
            """"$(echo "$2" | sed 's/sys.version.split()\\[0\\]/"3.10.1"/')"\n"""
        )
        self.older.chmod(0o755)
        for host in ("host1", "host3"):
            hosts.exec(host, "mkdir", "-p", "/tmp/only-here")
        hosts.kill("host5")


def test_every_host_that_cannot_be_used_is_named_with_its_reason_all_at_once(
    hosts: Hosts, dial: Dial, tmp_path: Path
) -> None:
    faults = Faults(hosts, tmp_path)
    older, no_program = str(faults.older), str(faults.no_program)
    refused: list[dict[str, Any]] = [
        {"name": "refused", "addr": "host2", "port": 2222},
        {"name": "unknown", "addr": hosts.address("host2")},
        {"name": "nameless"},
        {"name": "locked", "addr": "host2", "user": "nobody-of-that-name"},
        {"name": "bare", "addr": "host2", "python": "/no/such/python"},
        {"name": "file", "addr": "host2", "python": no_program},
        {"name": "older", "addr": "host2", "python": older},
        {"name": "host2"},
        {"name": "host3"},
        {"name": "host4"},
        {"name": "host5"},
        {"name": "host1"},
    ]
    said = dial(refused, timeout_s=8, workdir="/tmp/only-here", paths=["train.py"])
    assert said["seconds"] < 9
    assert said["code"] == 69
    expected = {
        "refused": "connect to host host2 port 2222: Connection refused",
        "unknown": "its host key is not known here: run `ssh unknown` once",
        "nameless": "Could not resolve hostname nameless",
        "locked": "no key opens it (nobody-of-that-name@host2: Permission denied",
        "bare": "has no interpreter /no/such/python",
        "file": f"cannot run its interpreter {no_program}",
        "older": f"python 3.10.1 there ({older}), but 3.11 here",
        "host2": "no such file or directory: /tmp/only-here; no such file or directory: train.py",
        "host3": f"torch 2.0.1 there, but {metadata.version('torch')} here; no such file or directory: train.py",
        "host4": "has no package runtime",
        "host5": "connect to host host5 port 22: Connection timed out",
        "host1": "no such file or directory: train.py",
    }
    assert list(said["failures"]) == list(expected)
    wrong_reasons = {
        name: said["failures"][name]
        for name, reason in expected.items()
        if not said["failures"][name].startswith(reason)
    }
    assert wrong_reasons == {}
    assert said["text"].splitlines()[0] == f"host refused: {expected['refused']}"
    hosts.assert_empty()


def test_what_start_up_files_print_is_no_matter(hosts: Hosts, dial: Dial, tmp_path: Path) -> None:
    noisy = tmp_path / "bashrc"
    noisy.write_text(
        "echo Welcome; head -c 20000 /dev/zero; echo; echo warning >&2; printf 'no end'\n"
    )
    hosts.mount("host2", noisy, "/root/.bashrc")
    assert list(dial("host2")["hellos"]) == ["host2"]
    noisy.write_text("echo this machine is closed for repair; exit 3\n")
    said = dial("host2")
    assert "this machine is closed for repair" in said["failures"]["host2"]
    assert said["code"] == 2


def test_a_question_that_a_start_up_file_asks_is_told(
    hosts: Hosts, dial: Dial, tmp_path: Path
) -> None:
    (tmp_path / "bashrc").write_text("echo 'Which project? [a/b]'; read answer\n")
    hosts.mount("host2", tmp_path / "bashrc", "/root/.bashrc")
    said = dial("host2", timeout_s=3)
    assert said["failures"]["host2"].startswith("no answer within 3 s (waited for ssh and ")
    assert said["failures"]["host2"].endswith("; it said 'Which project? [a/b]')")


def test_a_host_that_is_too_busy_to_let_us_in_is_dialled_again(
    hosts: Hosts, dial: Dial, tmp_path: Path
) -> None:
    proxy = tmp_path / "proxy"
    sshd = f"/usr/sbin/sshd -i -f /var/lib/testbed/{hosts.name}/sshd_config"
    proxy.write_text(f"#!/bin/sh\nmkdir {tmp_path}/busy 2>/dev/null && exit\nexec {sshd}\n")
    proxy.chmod(0o755)
    hellos = dial("host2", ssh_args=("-o", f"ProxyCommand={proxy}"))["hellos"]
    assert (list(hellos), (tmp_path / "busy").exists()) == (["host2"], True)


@pytest.mark.parametrize("when", ["connecting", "logging in", "linked"])
def test_an_ssh_client_that_is_killed_leaves_nothing(
    hosts: Hosts, hold: Callable[..., Held], tmp_path: Path, when: str
) -> None:
    slow = tmp_path / "bashrc"
    slow.write_text("sleep 1\n")
    hosts.mount("host2", slow if when == "logging in" else "/dev/null", "/root/.bashrc")
    if when == "connecting":
        hosts.freeze("host2")
    held = hold("host2")
    if when == "linked":
        assert "hellos" in held.line()
    (client,) = wait_for(lambda: commands(hosts, "host1", "ssh -T"), "ssh")
    if when == "logging in":
        wait_for(lambda: commands(hosts, "host2", "sleep 1"), "the login")
    os.kill(client, signal.SIGKILL)
    said = held.line()
    if when == "linked":
        assert (said["ended"], said["cause"]) == ("host2", "SIGKILL")
    else:
        assert said["failures"] == {"host2": "ssh was ended by SIGKILL"}
    held.close()
    hosts.thaw("host2")
    hosts.assert_empty()


def test_many_hosts_are_a_tree_and_who_cannot_be_reached_from_there_is_dialled_from_here(
    hosts: Hosts, hold: Callable[..., Held]
) -> None:
    hosts.cut("host3", "host5")
    held = hold(" ".join(hosts.names), tree_from=5, fan_out=2, timeout_s=12)
    said = held.line()
    assert "hellos" in said, said
    through = {name: hello["ssh_client"] for name, hello in said["hellos"].items()}
    assert through == {
        "host1": "",
        "host2": hosts.address("host1"),
        "host3": hosts.address("host1"),
        "host4": hosts.address("host2"),
        "host5": hosts.address("host1"),
    }
    with_process = [name for name, hello in said["hellos"].items() if hello["pid"]]
    assert with_process == ["host1", "host2", "host3", "host5"]
    _guard, agent = sorted(commands(hosts, "host2", r"\S+ -c .*runtime\.agent"))
    os.kill(agent, signal.SIGKILL)
    ended = {line["ended"]: line for line in (held.line(), held.line())}
    assert set(ended) == {"host2", "host4"}
    assert ended["host4"]["words"] == "the link went through host host2, which is gone"
    (launcher,) = commands(hosts, "host1", rf"\S+ {PROGRAM} ")
    os.kill(launcher, signal.SIGKILL)
    hosts.assert_empty()  # whoever was left has seen the end of its input


def test_in_a_tree_too_every_host_is_named(hosts: Hosts, dial: Dial) -> None:
    hosts.kill("host2")
    said = dial("host2 host3 host4 host5", tree_from=3, fan_out=2, timeout_s=12, workdir="/nope")
    assert list(said["failures"]) == ["host2", "host3", "host4", "host5"]
    assert "Connection timed out" in said["failures"]["host2"]
    assert {said["failures"][name] for name in ("host3", "host4", "host5")} == {
        "no such file or directory: /nope"
    }
