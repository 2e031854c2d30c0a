"""What decides whether workers may share a zygote, and whether a process may be forked."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from runtime.launcher import child, starter, tunables, zygote


def order(**env: str) -> child.Order:
    return child.Order("m:f", b"", env, "/", 1)


def test_a_zygote_sees_what_its_workers_have_in_common_but_not_who_they_are() -> None:
    orders = [order(RANK="0", A="1", B="2"), order(RANK="1", A="1", B="3")]
    assert starter._common_env(orders) == {"A": "1"}
    assert starter._common_env(orders[:1]) == {"A": "1", "B": "2"}


def test_variables_that_every_worker_follows_itself_do_not_part_zygotes() -> None:
    env = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": "x", "OMP_NUM_THREADS": "2", "HOME": "/"}
    assert starter._relevant(env, tunables.READ_AT_START) == (("PYTHONPATH", "x"),)
    found = dict(starter._relevant(env, starter._READ_AT_IMPORT))
    assert found == {"PYTHONPATH": "x", "OMP_NUM_THREADS": "2"}


def test_an_order_comes_back_from_its_descriptor() -> None:
    given = child.Order("m:f", b"\x00" * 300_000, {"A": "ä"}, "/", 1, ("torch",), "w-0")
    fd = child.pack_order(given)
    assert child.open_order(fd) == given
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_a_python_thread_makes_a_process_unsafe_and_is_named() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="mine")
    thread.start()
    reason = zygote.unsafe_to_fork(set())
    done.set()
    thread.join()
    assert reason is not None
    assert "mine" in reason


def test_a_socket_of_somebody_else_makes_a_process_unsafe() -> None:
    known = {int(name) for name in os.listdir("/proc/self/fd")}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert zygote._foreign_descriptor({*known, ours.fileno(), theirs.fileno()}) is None
        reason = zygote._foreign_descriptor({*known, ours.fileno()})
        assert reason == f"a socket is open (descriptor {theirs.fileno()})"
