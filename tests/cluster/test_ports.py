"""Ports that are free, each given once, within the range that was asked for."""

from __future__ import annotations

import socket

import pytest

from runtime.cluster.ports import PortChooser
from runtime.errors import ResourceInsufficientError


def listener(host: str = "127.0.0.1") -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    server.bind((host, 0))
    server.listen()
    return server


def test_a_chosen_port_can_be_listened_on() -> None:
    port = PortChooser().choose()
    with socket.socket() as server:
        server.bind(("127.0.0.1", port))


def test_chosen_ports_lie_below_those_of_outgoing_connections() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        low = int(file.read().split()[0])
    chooser = PortChooser()
    assert all(15_000 <= chooser.choose() < low for _ in range(20))


def test_no_port_is_given_twice() -> None:
    chooser = PortChooser((23_000, 23_100))
    assert len({chooser.choose() for _ in range(30)}) == 30


def test_agents_that_choose_at_once_hardly_choose_the_same() -> None:
    assert len({PortChooser((23_000, 23_999)).choose() for _ in range(10)}) > 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_in_use_is_not_given(host: str) -> None:
    with listener(host) as server:
        port = server.getsockname()[1]
        with pytest.raises(ResourceInsufficientError, match=f"{port}:{port}"):
            PortChooser((port, port)).choose()


def test_ports_of_earlier_attempts_are_given_again_when_the_range_is_used_up() -> None:
    with listener() as server:
        port = server.getsockname()[1]
    chooser = PortChooser((port, port))
    assert [chooser.choose(), chooser.choose()] == [port, port]
