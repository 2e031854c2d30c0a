"""A job over thirty-two hosts, whose links are a tree: it runs as over two, and the loss of an inner host is told as such."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.support.hosts import Hosts, make_testbed
from tests.integration.support.hosts_job import SSH, HostsJob
from tests.integration.support.programs import SLEEP_FOR_LONG, WRITE_PID

COUNT = 32
HEARTBEAT_S = 8
"""Thirty-two agents share a few cores here."""
ALL_TO_ALL = """
import runtime

me = runtime.current_worker().actor_info
runtime.export_rpc_method("host", lambda: me.host)
runtime.barrier("there", timeout=60)
found = runtime.RoleGroup("trainer").call("host").result(timeout=60)
runtime.barrier("asked", timeout=60)
print("hosts", *found, flush=True)
"""

pytestmark = [pytest.mark.hosts, pytest.mark.long, pytest.mark.timeout(240)]


NEIGHBOURS = Path("/proc/sys/net/ipv4/neigh/default/gc_thresh3")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """They share one kernel, whose table of neighbours has room for 1,024: each of them has 31, and the bridge."""
    before = NEIGHBOURS.read_text()
    NEIGHBOURS.write_text(str(max(int(before), 8 * COUNT**2)))
    try:
        with make_testbed(tmp_path_factory.getbasetemp(), COUNT) as hosts:
            yield hosts
    finally:
        NEIGHBOURS.write_text(before)


def start(many: Hosts, cwd: Path, body: str) -> HostsJob:
    (cwd / "train.py").write_text(body)
    options = ("--hosts", f"host[1-{COUNT}]", "--role", "trainer", "--connect-timeout", "120")
    beat = "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS"
    return HostsJob(many, *options, "train.py", cwd=cwd, env={beat: str(HEARTBEAT_S * 1000)})


def test_every_worker_of_many_hosts_reaches_every_other(many: Hosts, tmp_path: Path) -> None:
    job = start(many, tmp_path, ALL_TO_ALL)
    try:
        assert job.wait(180) == 0, job.describe()
        said = {line.split("hosts ")[1] for line in job.out.splitlines()}
        assert (job.out.count("\n"), said) == (COUNT, {" ".join(many.names)})
        job.assert_nothing_left(10)
    finally:
        job.close()


def test_an_inner_host_of_the_tree_that_loses_power_is_the_one_that_is_named(
    many: Hosts, tmp_path: Path
) -> None:
    job = start(many, tmp_path, WRITE_PID + SLEEP_FOR_LONG)
    try:
        names = [tmp_path / f"pid.{rank}.0" for rank in range(COUNT)]
        job.wait_until(lambda: all(map(Path.exists, names)), "all workers", 150)
        links = {host: len(job.pids(host, SSH)) for host in many.names}
        assert {links[host] for host in many.names[1:9]} == {2, 3}, links
        assert (links["host1"], sum(links.values())) == (8, COUNT - 1)
        many.kill("host5")
        began = time.monotonic()
        assert job.wait(60) == 69, job.describe()
        assert time.monotonic() - began < HEARTBEAT_S + 10
        assert "first trainer rank 4 on host5 cause" in job.box
        job.assert_nothing_left(10)
    finally:
        job.close()
