"""Ends in words, and what /proc says of processes."""

from __future__ import annotations

import os
import signal

import pytest

from runtime.launcher import spawn
from runtime.launcher.spawn import Exit


@pytest.mark.parametrize(
    ("status", "exit", "cause", "shell_code"),
    [
        (0, Exit(), "exit 0", 0),
        (3 << 8, Exit(code=3), "exit 3", 3),
        (9, Exit(signal=9), "SIGKILL", 137),
        (11 | 128, Exit(signal=11), "SIGSEGV", 139),
    ],
)
def test_a_wait_status_in_words(status: int, exit: Exit, cause: str, shell_code: int) -> None:
    found = Exit.from_status(status)
    assert (found, found.cause, found.shell_code) == (exit, cause, shell_code)


def test_a_process_is_found_in_proc_with_its_parent_and_session() -> None:
    info = spawn.look_at(os.getpid())
    assert info is not None
    assert (info.parent, info.session) == (os.getppid(), os.getsid(0))


def test_a_process_that_is_gone_is_none() -> None:
    assert spawn.look_at(2**22 + 1) is None
    assert spawn.children(2**22 + 1) == []


def test_signalling_a_process_that_is_gone_is_fine() -> None:
    spawn.send_signal(2**22 + 1, signal.SIGTERM)


def test_the_bootstrap_calls_main_with_its_arguments() -> None:
    code = spawn.bootstrap("os.path", 7, first="a.b:c")
    first, _, rest = code.partition("from a.b import c; first = c(); from os.path import main; ")
    assert "gc.disable()" in first
    assert rest == "gc.freeze(); gc.enable(); main(7, first)"
    compile(code, "bootstrap", "exec")
