"""Which address of each host the others use: what is tried, by whom, what is chosen, why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from runtime.launcher.addresses import (
    MOST_CANDIDATES,
    MOST_PARTNERS,
    Candidate,
    Chosen,
    Trial,
    candidates,
    choose,
    partners,
)

Known = Mapping[str, Sequence[Candidate]]


def known(**hosts: str) -> dict[str, tuple[Candidate, ...]]:
    """`known(h1="10.0.0.1 !192.168.0.1")`: candidates by host, in order; "!" marks one that is named."""
    found = {}
    for host, text in hosts.items():
        words = text.split()
        named = [word[1:] for word in words if word.startswith("!")]
        listed = [(f"eth{n}", word.removeprefix("!")) for n, word in enumerate(words)]
        found[host] = candidates(listed, named)
    return found


def tried(known: Known, missing: Mapping[str, str] | None = None, **slow: float) -> list[Trial]:
    """Everybody tries everything; `missing` {"h1 10.0.0.2": reason} (by, "*" for all) is not reached."""
    trials = []
    for by in known:
        for host, mine in known.items():
            for each in mine if host != by else ():
                reason = next(
                    (
                        why
                        for where, why in (missing or {}).items()
                        if where in (f"{by} {each.address}", f"* {each.address}")
                    ),
                    "",
                )
                seconds = None if reason else slow.get(each.interface, 0.001)
                trials.append(Trial(by, host, each.address, seconds, reason))
    return trials


def addresses(known: Known, missing: Mapping[str, str] | None = None, **slow: float) -> list[str]:
    chosen, failures = choose(known, tried(known, missing, **slow))
    assert failures == []
    assert list(chosen) == list(known)
    return [candidate.address for candidate in chosen.values()]


def failures(known: Known, missing: Mapping[str, str]) -> list[tuple[str, str]]:
    chosen, found = choose(known, tried(known, missing))
    assert chosen == {}
    return found


# What is tried


def test_private_addresses_go_before_public_and_link_local_ones_and_ipv4_before_ipv6() -> None:
    found = candidates(
        [(str(n), a) for n, a in enumerate(
            ["fe80::1%eth0", "169.254.1.1", "8.8.8.8", "2a00::1", "fd00::1", "100.64.0.1", "10.0.0.1"]
        )]
    )  # fmt: skip
    assert [each.address for each in found] == [
        "100.64.0.1", "10.0.0.1", "fd00::1", "8.8.8.8", "2a00::1", "169.254.1.1", "fe80::1%eth0",
    ]  # fmt: skip


def test_what_the_name_of_a_host_stands_for_goes_before_all() -> None:
    found = candidates([("eth0", "10.0.0.1"), ("eth1", "8.8.8.8")], {"8.8.8.8", "1.2.3.4"})
    assert [(each.address, each.preferred) for each in found] == [
        ("8.8.8.8", True),
        ("10.0.0.1", False),
    ]


@pytest.mark.parametrize(
    ("iface", "kept"),
    [
        (("ib0",), ["192.168.0.1", "fd00::1"]),
        (("10.0.0.0/8",), ["10.0.0.1"]),
        (("10.0.0.7/8", "fd00::/64"), ["10.0.0.1", "fd00::1"]),
        (("192.168.0.1",), ["192.168.0.1"]),
        (("eth1",), []),
        ((), ["192.168.0.1", "10.0.0.1", "fd00::1"]),
    ],
)
def test_iface_keeps_interfaces_networks_and_addresses(
    iface: tuple[str, ...], kept: list[str]
) -> None:
    found = [("ib0", "192.168.0.1"), ("ib0", "fd00::1"), ("eth0", "10.0.0.1")]
    assert [each.address for each in candidates(found, (), iface)] == kept


def test_a_host_with_very_many_addresses_is_tried_at_the_best_of_them() -> None:
    found = [("v6", f"2a00::{n:x}") for n in range(1, 99)] + [("eth0", "10.0.0.1")]
    tried = candidates(found)
    assert len(tried) == MOST_CANDIDATES
    assert tried[0].address == "10.0.0.1"


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_few_hosts_all_try_each_other(count: int) -> None:
    assert [set(mine) for mine in partners(count)] == [
        set(range(count)) - {mine} for mine in range(count)
    ]


def test_of_many_hosts_each_tries_a_few_and_all_of_them_the_first() -> None:
    all_of_them = partners(500)
    assert {len(mine) for mine in all_of_them} == {MOST_PARTNERS}
    assert all(mine not in chosen for mine, chosen in enumerate(all_of_them))
    assert all(0 in chosen for chosen in all_of_them[1:])
    tries = [sum(host in chosen for chosen in all_of_them) for host in range(500)]
    assert min(tries) >= MOST_PARTNERS // 2


# What is chosen


def test_a_bridge_that_is_on_every_host_is_passed_over() -> None:
    hosts = known(h1="172.17.0.1 10.0.0.1", h2="172.17.0.1 10.0.0.2", h3="172.17.0.1 10.0.0.3")
    assert addresses(hosts, {"* 172.17.0.1": "connection refused"}) == [
        "10.0.0.1", "10.0.0.2", "10.0.0.3",
    ]  # fmt: skip


def test_an_address_that_only_some_reach_is_passed_over() -> None:
    hosts = known(h1="10.0.0.1 192.168.0.1", h2="10.0.0.2 192.168.0.2", h3="192.168.0.3")
    missing = {"h3 10.0.0.1": "no answer", "h3 10.0.0.2": "no answer"}
    assert addresses(hosts, missing) == ["192.168.0.1", "192.168.0.2", "192.168.0.3"]


def test_hosts_meet_in_the_network_that_most_of_them_have() -> None:
    hosts = known(
        h1="172.20.0.1 192.168.0.1", h2="172.30.9.2 192.168.0.2", h3="172.25.0.3 192.168.0.3"
    )
    assert addresses(hosts) == ["192.168.0.1", "192.168.0.2", "192.168.0.3"]


def test_the_first_host_goes_where_most_of_the_others_are() -> None:
    hosts = known(h1="10.1.0.1 10.2.0.1", h2="10.1.0.2", h3="10.2.0.3", h4="10.2.0.4")
    assert addresses(hosts)[0] == "10.2.0.1"


def test_an_address_is_as_quick_as_for_the_slowest_that_tries_it() -> None:
    hosts = known(h1="10.1.0.1", h2="10.1.0.2 10.1.0.3", h3="10.1.0.5")
    slow = Trial("h1", "h2", "10.1.0.2", 0.5)
    chosen, _ = choose(hosts, [slow, *tried(hosts)])
    assert chosen["h2"].address == "10.1.0.3"


def test_of_two_networks_alike_the_quicker_one_is_taken_by_all() -> None:
    hosts = known(h1="10.1.0.1 10.2.0.1", h2="10.1.0.2 10.2.0.2", h3="10.2.0.3 10.1.0.3")
    assert addresses(hosts, eth0=0.02) == ["10.2.0.1", "10.2.0.2", "10.2.0.3"]


def test_what_a_name_stands_for_is_taken_although_another_is_quicker() -> None:
    hosts = known(h1="10.1.0.1 !10.2.0.1", h2="10.1.0.2 10.2.0.2")
    assert addresses(hosts, eth1=0.2) == ["10.2.0.1", "10.2.0.2"]


def test_what_a_name_stands_for_is_not_taken_where_it_is_not_reached() -> None:
    hosts = known(h1="10.1.0.1 !8.8.8.8", h2="10.1.0.2")
    assert addresses(hosts, {"h2 8.8.8.8": "no answer"}) == ["10.1.0.1", "10.1.0.2"]


def test_hosts_with_ipv6_only_bring_all_to_ipv6() -> None:
    hosts = known(h1="10.0.0.1 fd00::1", h2="fd00::2", h3="10.0.0.3 fd00::3")
    assert addresses(hosts, {"h2 10.0.0.1": "x", "h2 10.0.0.3": "x"}) == [
        "fd00::1", "fd00::2", "fd00::3",
    ]  # fmt: skip


def test_link_local_addresses_are_the_last_resort() -> None:
    hosts = known(h1="169.254.0.1 8.8.8.1", h2="169.254.0.2 8.8.8.2")
    assert addresses(hosts) == ["8.8.8.1", "8.8.8.2"]
    assert addresses(hosts, {"* 8.8.8.1": "x", "* 8.8.8.2": "x"}) == ["169.254.0.1", "169.254.0.2"]


def test_gloo_is_told_the_interface_and_nccl_only_a_wish() -> None:
    found = Chosen({"h1": "10.0.0.1"}, {"h1": "eth0"})
    assert found.variables("h1") == {"GLOO_SOCKET_IFNAME": "eth0"}
    wished = replace(found, wished=True)
    assert wished.variables("h1") == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}


def test_one_host_alone_has_its_best_address() -> None:
    assert addresses(known(h1="8.8.8.8 10.0.0.1")) == ["10.0.0.1"]


def test_a_thousand_hosts_are_decided_from_what_their_partners_met() -> None:
    hosts = {
        f"h{n}": candidates([("eth0", f"10.0.{n // 250}.{n % 250 + 1}"), ("docker0", "172.17.0.1")])
        for n in range(1000)
    }
    names = list(hosts)
    trials = [
        Trial(by, names[other], each.address, None if each.interface == "docker0" else 0.001, "x")
        for by, others in zip(names, partners(1000), strict=True)
        for other in others
        for each in hosts[names[other]]
    ]
    chosen, failures = choose(hosts, trials)
    assert failures == []
    assert {candidate.interface for candidate in chosen.values()} == {"eth0"}


# Why not


def test_a_host_that_is_cut_off_is_named_alone_with_what_was_tried() -> None:
    hosts = known(h1="10.0.0.1", h2="172.17.0.1 10.0.0.2", h3="10.0.0.3")
    missing = {
        "* 10.0.0.2": "no answer", "* 172.17.0.1": "connection refused",
        "h2 10.0.0.1": "no answer", "h2 10.0.0.3": "no answer",
    }  # fmt: skip
    assert failures(hosts, missing) == [
        (
            "h2",
            "h1, h3 cannot reach it (172.17.0.1 (eth0): connection refused, "
            "10.0.0.2 (eth1): no answer); it cannot reach h1, h3",
        )
    ]


def test_a_cut_in_one_direction_between_two_hosts_is_told_once() -> None:
    hosts = known(h1="10.0.0.1", h2="10.0.0.2", h3="10.0.0.3")
    assert failures(hosts, {"h1 10.0.0.3": "no answer"}) == [
        ("h3", "h1 cannot reach it (10.0.0.3 (eth0): no answer)")
    ]
    assert failures(hosts, {"h3 10.0.0.1": "no route to host"}) == [
        ("h3", "it cannot reach h1 (10.0.0.1 (eth0): no route to host)")
    ]


def test_a_host_that_is_reached_by_each_at_another_address_is_told_with_who_misses_which() -> None:
    hosts = known(h1="10.0.0.1 192.168.0.1", h2="10.0.0.2", h3="192.168.0.3")
    missing = {"h2 192.168.0.1": "no answer", "h3 10.0.0.1": "network is unreachable"}
    assert failures(hosts, missing) == [
        (
            "h1",
            "no address of it is reached by all: 10.0.0.1 (eth0) from h3: network is unreachable, "
            "192.168.0.1 (eth1) from h2: no answer",
        )
    ]


def test_hosts_that_are_apart_are_told_in_order_each_with_its_own_reasons() -> None:
    hosts = known(**{f"h{n}": f"10.0.0.{n} 10.1.0.{n}" for n in range(1, 6)})
    missing = {"* 10.0.0.5": "refused", "* 10.1.0.5": "refused"}
    missing |= {"h1 10.0.0.3": "late", "h2 10.0.0.3": "no answer", "h2 10.1.0.3": "no answer"}
    assert failures(hosts, missing) == [
        ("h3", "h2 cannot reach it (10.0.0.3 (eth0): no answer, 10.1.0.3 (eth1): no answer)"),
        (
            "h5",
            "h1, h2, h3 and 1 others cannot reach it (10.0.0.5 (eth0): refused, 10.1.0.5 (eth1): refused)",
        ),
    ]


def test_where_nobody_reaches_anybody_some_are_told() -> None:
    hosts = known(**{f"h{n}": f"10.0.{n}.1" for n in range(40)})
    missing = {f"* {mine[0].address}": "no answer" for mine in hosts.values()}
    assert len(failures(hosts, missing)) == 16


def test_of_many_hosts_some_are_named() -> None:
    hosts = known(**{f"h{n}": f"10.0.0.{n}" for n in range(1, 9)})
    ((host, reason),) = failures(hosts, {"* 10.0.0.8": "no answer"})
    assert host == "h8"
    assert reason.startswith("h1, h2, h3 and 4 others cannot reach it")
