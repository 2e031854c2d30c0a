"""Which addresses hosts get that have several: networks that lead nowhere, bridges, IPv6, cuts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT

PROGRAM = ROOT / "tests" / "integration" / "support" / "address_program.py"
NAMES = ("host1", "host2", "host3")


@pytest.fixture
def choose(hosts: Hosts) -> Callable[..., dict[str, Any]]:
    """`choose("fd00::/8")`: what host1 finds for the three hosts, with such `--iface`."""

    def choose(*iface: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            hosts.python("host1", PROGRAM, " ".join(NAMES), *iface).stdout
        )
        return found

    return choose


@pytest.fixture
def extra(hosts: Hosts) -> Iterator[None]:
    """A docker bridge with one address on every host, a network that leads nowhere, IPv6."""
    undo = "ip link del docker0; ip link del nowhere; ip -6 addr del fd77::{n}/64 dev eth0"
    for number, host in enumerate(NAMES, 1):
        hosts.exec(host, "sh", "-ec", f"""
            ip link add docker0 type bridge; ip addr add 172.17.0.1/16 dev docker0
            ip link add nowhere type bridge; ip addr add 10.50.{number}.7/24 dev nowhere
            ip link set docker0 up; ip link set nowhere up
            ip -6 addr add fd77::{number}/64 dev eth0 nodad""")  # fmt: skip
    yield
    for number, host in enumerate(NAMES, 1):
        hosts.exec(host, "sh", "-c", undo.format(n=number))


def test_of_several_interfaces_the_one_that_all_reach_is_chosen(
    hosts: Hosts, extra: None, choose: Callable[..., dict[str, Any]]
) -> None:
    found = choose()
    assert found["address"] == {name: hosts.address(name) for name in NAMES}
    # Whoever comes from another address of a host is let in, too.
    assert {"fd77::2", "10.50.3.7", hosts.address("host1")} <= set(found["accept_from"])
    assert found["seconds"] < 2.0


def test_iface_brings_a_job_to_another_network(
    hosts: Hosts, extra: None, tmp_path: Path, choose: Callable[..., dict[str, Any]]
) -> None:
    script = tmp_path / "where.py"
    script.write_text(
        "import os\nprint(os.environ['MASTER_ADDR'], os.environ['GLOO_SOCKET_IFNAME'])\n"
    )
    done = hosts.python(
        "host1", "-m", "runtime.launch", "--hosts", "host1,host2", "--iface", "fd77::/64",
        "--log-dir", tmp_path, "--no-tag-output", script,
    )  # fmt: skip
    assert done.stdout == "fd77::1 eth0\n" * 2, done.stderr


def test_an_interface_that_leads_nowhere_is_refused_with_what_was_tried(
    extra: None, choose: Callable[..., dict[str, Any]]
) -> None:
    found = choose("docker0")
    assert set(found["failed"]) == {"host2", "host3"}
    assert re.match(
        r"host1, host2 cannot reach it \(172\.17\.0\.1 \(docker0\): connection refused[,)]",
        found["failed"]["host3"],
    )
    assert found["seconds"] < 4.0


def test_a_cut_between_two_hosts_names_them(
    hosts: Hosts, choose: Callable[..., dict[str, Any]]
) -> None:
    hosts.cut("host2", "host3")
    found = choose(f"{hosts.address('host1')}/24")
    reason = (
        f"host2 cannot reach it ({hosts.address('host3')} (eth0): no answer); it cannot reach host2"
    )
    assert found["failed"] == {"host3": reason}
    assert found["seconds"] < 4.0


def test_a_slow_link_that_loses_packets_is_no_reason_to_fail(
    hosts: Hosts, choose: Callable[..., dict[str, Any]]
) -> None:
    hosts.delay("host2", "50ms", "10ms", "loss", "2%")
    assert choose()["address"] == {name: hosts.address(name) for name in NAMES}
