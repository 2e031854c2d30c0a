"""The machine's own names: what of a host list is this machine."""

from __future__ import annotations

import socket

import pytest

from runtime.launcher.around import interfaces, own_names
from runtime.launcher.hosts import is_local


@pytest.mark.parametrize(
    "name", ["localhost", "127.0.0.1", "127.0.1.1", "::1", socket.gethostname()]
)
def test_this_machine_is_local_by_each_of_its_usual_names(name: str) -> None:
    assert is_local(name, own_names())


def test_the_address_that_packets_leave_from_is_local() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has no network")
        address = probe.getsockname()[0]
    assert address in own_names()


def test_interfaces_have_the_addresses_that_others_may_reach() -> None:
    found = interfaces()
    addresses = {address for _, address in found}
    assert addresses <= set(own_names())
    assert not {address for address in addresses if address.startswith("127.") or address == "::1"}
    names = {name for _, name in socket.if_nameindex()}
    for name, address in found:
        assert name in names
        assert address.endswith(f"%{name}") == address.startswith("fe80:")


def test_other_addresses_and_names_are_not_local() -> None:
    names = own_names()
    assert not any(is_local(name, names) for name in ("203.0.113.1", "2001:db8::1", "no-such-host"))


def test_the_name_with_its_domain_is_asked_for_only_where_it_can_be_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def qualified(name: str = "") -> str:
        asked.append(name)
        return "here.example.org"

    monkeypatch.setattr(socket, "gethostname", lambda: "here")
    monkeypatch.setattr(socket, "getfqdn", qualified)
    assert "here.example.org" not in own_names("there.example.org")
    assert asked == []
    assert "here.example.org" in own_names("there:8,HERE.example.org:8")
