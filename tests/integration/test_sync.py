"""`--sync` to real hosts, by rsync and without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT

PROGRAM = ROOT / "tests" / "integration" / "support" / "sync_program.py"
FOLDER = "/tmp/my code/it's"
FILES = {
    "host1": "mkdir -p sub; printf new >train.py; printf same >sub/same; ln -s train.py link",
    "host2": "printf 'old text' >train.py; printf kept >mine",
}


def sh(hosts: Hosts, host: str, script: str) -> str:
    """Run a shell script in the folder of a host."""
    return hosts.exec(host, "sh", "-ec", f'mkdir -p "$0"; cd "$0"; {script}', FOLDER).stdout


@pytest.fixture(autouse=True)
def _fresh(hosts: Hosts) -> Iterator[None]:
    for host, script in FILES.items():
        sh(hosts, host, script)
    yield
    for host in hosts.names[:4]:
        hosts.exec(host, "sh", "-c", 'umount "$0"; rm -rf "/tmp/my code"', FOLDER, check=False)


@pytest.mark.parametrize("way", ["rsync", "tar"])
def test_changed_files_are_copied_and_only_those(hosts: Hosts, way: str) -> None:
    if way == "tar":
        hosts.mount("host1", "/dev/null", "/usr/bin/rsync")
        hosts.mount("host2", "/dev/null", "/usr/bin/rsync")
    hosts.python("host1", PROGRAM, FOLDER, "host2", "host3")
    look = "grep -r '' . | sort; readlink link; stat -c '%i %Z' train.py"
    copied = sh(hosts, "host2", look)
    assert copied.startswith("./mine:kept\n./sub/same:same\n./train.py:new\ntrain.py\n")
    assert sh(hosts, "host3", look).startswith("./sub/same:same\n./train.py:new\ntrain.py\n")
    hosts.python("host1", PROGRAM, FOLDER, "host2")
    assert sh(hosts, "host2", look) == copied, "what had not changed was written again"


def test_each_host_that_does_not_get_it_is_one_line(hosts: Hosts) -> None:
    sh(hosts, "host1", "head -c 100000 /dev/zero >big")
    hosts.exec("host2", "sh", "-c", 'rm -rf "/tmp/my code"; touch "/tmp/my code"')
    sh(hosts, "host4", "mount -t tmpfs -o size=16k none .")
    names = ("host2", "host3", "host4", "host9")
    done = hosts.exec("host1", sys.executable, PROGRAM, FOLDER, *names, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 69
    assert [line.partition(": ")[0] for line in lines] == ["host host2", "host host4", "host host9"]
    assert f"cannot copy {FOLDER} there: " in lines[0]
    assert "No space left on device" in lines[1]
    assert "Could not resolve hostname host9" in lines[2]
