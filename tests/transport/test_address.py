"""Addresses of peers as text."""

from __future__ import annotations

import pytest

from runtime.errors import ConfigError
from runtime.transport.address import local_path, parse


@pytest.mark.parametrize(
    "text",
    [
        "ipc:///tmp/x.sock",
        "tcp://10.0.0.1:29500",
        "tcp://[fe80::1]:80",
        "tcp://host-1:0",
        "mem://a",
    ],
)
def test_an_address_is_written_as_it_was_read(text: str) -> None:
    assert str(parse(text)) == text


def test_the_parts_of_an_address_are_named() -> None:
    assert parse("tcp://[::1]:80") == ("tcp", "::1", 80)
    assert parse("ipc:///a/b") == ("ipc", "/a/b", 0)


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
        ("mem://", "a name"),
    ],
)
def test_a_wrong_address_is_refused_with_what_is_allowed(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse(text)
    assert repr(text) in str(caught.value)
