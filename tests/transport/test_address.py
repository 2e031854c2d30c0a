"""Addresses of peers as text."""

from __future__ import annotations

import pytest

from runtime.errors import ConfigError
from runtime.transport.address import Address, local_path, nearest, parse, parse_all, write_all

KEY = "ab" * 32


@pytest.mark.parametrize(
    "text",
    [
        "ipc:///tmp/x.sock",
        "tcp://10.0.0.1:29500",
        "tcp://[fe80::1]:80",
        "tcp://host-1:0",
        "mem://a",
        f"tcp://10.0.0.1:80?key={KEY}",
        f"tcp://[::1]:80?key={KEY}",
    ],
)
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(parse(text)) == text


def test_the_parts_of_an_address_are_named() -> None:
    assert parse("tcp://[::1]:80") == ("tcp", "::1", 80, b"")
    assert parse("ipc:///a/b") == ("ipc", "/a/b", 0, b"")
    assert parse(f"tcp://h:80?key={KEY}") == ("tcp", "h", 80, b"\xab" * 32)
    assert parse(f"tcp://[::1]:80?key={KEY}").endpoint == "tcp://[::1]:80"


def test_several_addresses_have_a_space_between_them_and_paths_may_have_one_too() -> None:
    text = f"ipc:///run/my dir/a tcp://10.0.0.1:80?key={KEY} tcp://[::1]:81"
    some = parse_all(text)
    assert [one.target for one in some] == ["/run/my dir/a", "10.0.0.1", "::1"]
    assert write_all(some) == text
    assert parse_all("mem://a") == (Address("mem", "a"),)


def test_a_process_in_our_own_folder_is_reached_there_any_other_by_the_first_tcp_address() -> None:
    ipc, first, second = some = parse_all("ipc:///run/job/a tcp://h:1 tcp://h:2")
    assert nearest(some, "/run/job") is ipc
    assert nearest(some, "/run/other") is first
    assert nearest(some, None) is first
    assert nearest([second, ipc], "/run/job") is ipc
    assert nearest([ipc], "/run/other") is ipc


def test_the_local_lane_is_beside_an_ipc_socket_whose_path_is_short_enough() -> None:
    assert local_path(parse("ipc:///run/a")) == "/run/a.u"
    assert local_path(parse("tcp://h:1")) is None
    assert local_path(parse("ipc:///" + "x" * 104)) == "/" + "x" * 104 + ".u"
    assert local_path(parse("ipc:///" + "x" * 105)) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "allowed are"),
        ("udp://x:1", "allowed are"),
        ("/tmp/x", "allowed are"),
        ("ipc://relative", "absolute path"),
        ("ipc:///dir/", "absolute path"),
        ("ipc:///" + "x" * 200, "at most 107"),
        ("tcp://host", "host:port"),
        ("tcp://:80", "host:port"),
        ("tcp://host:http", "host:port"),
        ("tcp://host:-1", "host:port"),
        ("tcp://host:70000", "65535"),
        ("tcp://fe80::1:80", "brackets"),
        ("tcp://h:80?key=ab", "64 hex digits"),
        ("tcp://h:80?port=1", "64 hex digits"),
        ("mem://", "a name"),
    ],
)
def test_a_wrong_address_is_refused_with_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
