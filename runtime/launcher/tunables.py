"""What the C library of workers is told about memory: to back large allocations with large pages.

It doubles the speed of large messages. Where the system knows no large pages, nothing changes. It is read by the
loader alone, so a fork server must be started with it, too.
"""

from __future__ import annotations

from collections.abc import Mapping

NAME = "GLIBC_TUNABLES"
READ_AT_START = ("PYTHON", "LD_", "MALLOC_", NAME)
"""Prefixes of variables that the interpreter and the loader read: a running process cannot take them on."""
_OURS = "glibc.malloc.hugetlb"


def tunables(env: Mapping[str, str]) -> dict[str, str]:
    """The variable to add to `env`: what it says there, and ours, unless it says that, too."""
    said = [part for part in env.get(NAME, "").split(":") if part]
    if any(part.partition("=")[0] == _OURS for part in said):
        return {NAME: env[NAME]}
    return {NAME: ":".join([*said, f"{_OURS}=1"])}
