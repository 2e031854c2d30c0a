"""The shape of the tree, and frames within frames."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.launcher.channel import Frame, Kind
from runtime.launcher.plan import Host
from runtime.launcher.relay import Branch, grow, unwrap, wrap


def hosts(count: int) -> list[Host]:
    return [Host(f"h{number}") for number in range(count)]


def shape(branches: tuple[Branch, ...]) -> str:
    return " ".join(
        branch.host.name + (f"({shape(branch.children)})" if branch.children else "")
        for branch in branches
    )


def test_the_first_hosts_are_dialled_from_here_and_share_the_others_evenly() -> None:
    assert shape(grow(hosts(5), 2)) == "h0(h2 h4) h1(h3)"
    assert shape(grow(hosts(3), 8)) == "h0 h1 h2"
    assert shape(grow(hosts(4), 1)) == "h0(h1(h2(h3)))"
    assert shape(grow([], 8)) == ""


@given(st.integers(0, 300), st.integers(1, 9))
def test_every_host_is_in_the_tree_once_and_nobody_dials_too_many(count: int, fan_out: int) -> None:
    found: list[str] = []

    def walk(branches: tuple[Branch, ...]) -> None:
        assert len(branches) <= fan_out
        for branch in branches:
            found.append(branch.host.name)
            walk(branch.children)

    walk(grow(hosts(count), fan_out) if fan_out > 1 else grow(hosts(min(count, 20)), 1))
    assert len(set(found)) == len(found) == (count if fan_out > 1 else min(count, 20))


def test_a_frame_comes_out_of_its_wrapping_also_twice() -> None:
    inner = wrap(7, Kind.STDOUT, b"line\n")
    assert unwrap(inner) == (7, Frame(Kind.STDOUT, b"line\n"))
    assert unwrap(wrap(65_535, Kind.RELAY, inner)) == (65_535, Frame(Kind.RELAY, inner))


@pytest.mark.parametrize("body", [b"", b"\0\1", b"\0\1\x63rest"])
def test_what_wraps_no_frame_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="RELAY"):
        unwrap(body)
