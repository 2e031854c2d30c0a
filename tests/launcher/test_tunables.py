"""What is said to the C library beside what the user has said."""

from __future__ import annotations

import pytest

from runtime.launcher.tunables import tunables


@pytest.mark.parametrize(
    ("said", "then"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("a=1:glibc.malloc.hugetlb=2:b=3", "a=1:glibc.malloc.hugetlb=2:b=3"),
    ],
)
def test_large_pages_are_asked_for_unless_the_user_has_decided(said: str | None, then: str) -> None:
    env = {"A": "b"} if said is None else {"GLIBC_TUNABLES": said}
    assert tunables(env) == {"GLIBC_TUNABLES": then}
    assert tunables(tunables(env)) == {"GLIBC_TUNABLES": then}, "a job within a job says it once"
