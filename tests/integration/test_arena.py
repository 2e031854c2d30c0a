"""Processes that share an arena, and are killed while they do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from runtime.errors import WireError
from runtime.transport.arena import Arena
from runtime.transport.arena_keeper import Keeper, Statistics
from runtime.transport.arena_table import EXTENT
from tests.integration.support.job import Job

MEMBERS = 3
HELD_S = 0.05
WITHIN_S = 1.0
LIMIT_S = 10.0
NOTHING = Statistics(0, 0, 0)


class _Member:
    """What each process does until it is killed: make, send on, hold and write to buffers of one byte."""

    def __init__(
        self, keeper: Keeper, place: int, inboxes: list[tuple[socket.socket, ...]]
    ) -> None:
        self.arena = Arena(keeper.spec(place))
        self.place, self.inboxes = place, inboxes
        self.random = random.Random()
        self.held: deque[tuple[float, memoryview]] = deque()

    def turn(self) -> None:
        while self.held and self.held[0][0] < time.monotonic():
            view = self.held.popleft()[1]
            assert view[-1] == view[len(view) // 2], "changed while it was held"
        byte = self.random.randrange(256)
        staged = self.arena.stage(bytes([byte]) * self.random.choice([70_000, 400_000, 3_000_000]))
        if staged is not None:
            self.send(staged, byte)
        with contextlib.suppress(BlockingIOError):
            while True:
                message = self.inboxes[self.place][0].recv(100)
                with contextlib.suppress(WireError):  # for the one who was here before
                    self.take(message[1:], message[0])

    def take(self, handle: bytes, byte: int) -> None:
        if self.random.random() < 0.1:
            self.arena.discard(handle)
            return
        view = self.arena.open(handle)
        self.held.append((time.monotonic() + HELD_S, view))
        assert {view[0], view[len(view) // 2], view[-1]} == {byte}
        if self.random.random() < 0.5:
            self.send(view, byte)
        view[0] = self.random.randrange(256)

    def send(self, view: memoryview, byte: int) -> None:
        to = self.random.randrange(MEMBERS)
        member = to | self.arena._table.life[to] << 8
        if (handle := self.arena.share(view, member)) is not None:
            try:
                self.inboxes[to][1].send(bytes([byte]) + handle)
            except BlockingIOError:
                self.arena.revoke(handle, member)


def fork(work: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    _run(work)


def _run(work: Callable[[], None]) -> NoReturn:
    try:
        gc.freeze()
        while True:
            work()
            time.sleep(0.001)
    except BaseException as error:  # nothing of a child may come back into the test
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(3)


class _Host:
    """The agent's part, played by the test."""

    def __init__(self) -> None:
        self.keeper = Keeper(12 * EXTENT, MEMBERS)
        self.inboxes = [socket.socketpair(type=socket.SOCK_DGRAM) for _ in range(MEMBERS)]
        for ends in self.inboxes:
            for end in ends:
                end.setblocking(False)
        self.pids = [self.start(place) for place in range(MEMBERS)]
        self.tasks: set[asyncio.Task[None]] = set()

    def start(self, place: int) -> int:
        members: list[_Member] = []

        def work() -> None:
            if not members:
                members.append(_Member(self.keeper, place, self.inboxes))
            members[0].turn()

        return fork(work)

    def kill(self, place: int) -> list[tuple[int, int]]:
        """SIGKILL, then what the agent does. The rows that are waited for now, with their generations."""
        os.kill(self.pids[place], signal.SIGKILL)
        status = os.waitpid(self.pids[place], 0)[1]
        self.pids[place] = 0
        assert os.WIFSIGNALED(status), f"member {place} ended by itself"
        self.keeper.reclaim(place)
        self.tasks.add(asyncio.get_running_loop().create_task(self.keeper.settle()))
        return [(row, self.keeper._table.generation[row]) for row in self.keeper._orphans()]

    async def close(self) -> None:
        for place, pid in enumerate(self.pids):
            if pid:
                self.kill(place)
        await asyncio.gather(*self.tasks)
        for ends in self.inboxes:
            for end in ends:
                end.close()
        self.keeper.close()


@pytest.mark.parametrize("number", [60, pytest.param(200, marks=pytest.mark.long)])
async def test_kills_leave_nothing(number: int) -> None:
    """All is taken back within a second of the kill, by the clock. Where others keep the processors busy a
    measurement may be late, but not again and again."""
    gc.collect()
    fds = len(os.listdir("/proc/self/fd"))
    for kills in (number, number // 4, number // 4):
        took = sorted(await _kill_and_look(kills))
        quarters = ", ".join(f"{took[len(took) * n // 4 - (n == 4)]:.3f}" for n in range(5))
        print(f"{kills} kills, all taken back after so many seconds (quartiles): {quarters}")
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == fds
        if took[-1] <= WITHIN_S:
            return
    raise AssertionError(f"three times in a row not within {WITHIN_S} s: {quarters}")


async def _kill_and_look(kills: int) -> list[float]:
    """Seconds from each kill until nothing was left of what it had made wait."""
    host = _Host()
    try:
        took = await _kill_members(host, kills)
        table, began = host.keeper._table, time.monotonic()
        for _ in range(1000):
            if host.keeper.statistics() == NOTHING:
                break
            await asyncio.sleep(0.01)
        assert host.keeper.statistics() == NOTHING
        assert bytes(table.sent) == bytes(table.opened) == bytes(table.done)
        assert not any(table.used)
        assert os.stat(host.keeper.spec(0).path).st_blocks * 512 == table.data_start
        return [*took, time.monotonic() - began]
    finally:
        await host.close()


async def _kill_members(host: _Host, kills: int) -> list[float]:
    generation = host.keeper._table.generation
    waited: list[tuple[float, list[tuple[int, int]]]] = []
    took: list[float] = []

    def look() -> None:
        now = time.monotonic()
        for item in list(waited):
            killed, orphans = item
            if not any(generation[row] == value for row, value in orphans):
                waited.remove(item)
                took.append(now - killed)

    for _ in range(kills):
        until = time.monotonic() + random.uniform(0.01, 0.06)
        while time.monotonic() < until:
            await asyncio.sleep(0.01)
            look()
        place = random.randrange(MEMBERS)
        killed = time.monotonic()
        waited.append((killed, host.kill(place)))
        host.pids[place] = host.start(place)
    while waited and time.monotonic() < killed + LIMIT_S:
        await asyncio.sleep(0.01)
        look()
    assert not waited, f"{waited} are left of those killed at {killed} and before"
    for place in range(MEMBERS):
        host.kill(place)
    return took


def _own_process(work: Callable[[], None]) -> int:
    """Do that in a fork of this process; its exit code, 3 for an exception."""

    def once() -> None:
        work()
        os._exit(0)

    return os.waitstatus_to_exitcode(os.waitpid(fork(once), 0)[1])


def test_a_fork_of_a_worker_neither_uses_nor_releases_what_its_parent_has() -> None:
    keeper = Keeper(2 * EXTENT, 2)
    one, other = Arena(keeper.spec(0)), Arena(keeper.spec(1))
    handle = one.share(b"x" * 100_000, other.index)
    assert handle is not None
    views = [other.open(handle), one.stage(b"y" * 100_000)]

    def child() -> None:
        assert views[0] == b"x" * 100_000
        views.clear()
        gc.collect()
        assert one.stage(b"z" * 100_000) is None
        assert one.share(b"z" * 100_000, other.index) is None
        one.close()

    assert _own_process(child) == 0
    assert views[0] == b"x" * 100_000
    assert one.stage(b"w" * 100_000) is not None
    assert keeper.statistics().rows == 2
    views.clear()
    one.close()
    other.close()
    keeper.close()


def test_a_process_that_may_not_map_the_arena_does_without() -> None:
    keeper = Keeper(1 << 30, 2)

    def child() -> None:
        with open("/proc/self/statm") as file:
            limit = int(file.read().split()[0]) * resource.getpagesize() + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        assert Arena.attach(keeper.spec(0)) is None

    assert _own_process(child) == 0
    keeper.close()


def test_an_interpreter_that_ends_with_views_says_nothing() -> None:
    program = """if True:
        import os, sys
        from runtime.transport.arena import Arena
        from runtime.transport.arena_keeper import Keeper

        keeper = Keeper(1 << 24, 2)
        one, other = Arena(keeper.spec(0)), Arena(keeper.spec(1))
        staged = one.stage(bytes(1 << 20))
        view = other.open(one.share(staged, other.index))
        cycle = [view]
        cycle.append(cycle)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_workers_of_a_job_share_an_arena_and_get_large_pages(
    launch: Callable[..., Job], write: Callable[[str, str], Path]
) -> None:
    script = write(
        "look.py",
        """
        import os
        from runtime.peer import context
        from runtime.transport.arena import Arena

        spec = context.held().arena
        print("arena", spec and (spec[1], Arena.attach(spec).stage(bytes(1 << 20)) is not None))
        print("tunables", os.environ["GLIBC_TUNABLES"])
        """,
    )
    for options, expected in (
        (["--arena", "64MiB"], ["arena (0, True)", "arena (1, True)"]),
        (["--arena", "0"], ["arena None", "arena None"]),
        (["--transport", "zmq"], ["arena None", "arena None"]),
        (["--start-method", "spawn"], ["arena (0, True)", "arena (1, True)"]),
    ):
        job = launch("--nproc-per-node", "2", "--no-tag-output", *options, str(script))
        assert job.wait() == 0
        lines = job.out.splitlines()
        assert sorted(line for line in lines if "arena" in line) == expected
        assert lines.count("tunables glibc.malloc.hugetlb=1") == 2


def test_a_restarted_worker_finds_its_place_free(
    launch: Callable[..., Job], write: Callable[[str, str], Path]
) -> None:
    script = write(
        "again.py",
        """
        import os, signal
        from runtime.peer import context
        from runtime.transport.arena import Arena

        arena = Arena.attach(context.held().arena)
        view = arena.stage(bytes(40 << 20))
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        print("life", arena.index >> 8, view is not None)
        """,
    )
    job = launch("--arena", "80MiB", "--max-restarts", "1", "--no-tag-output", str(script))
    assert job.wait() == 0
    assert "life 1 True" in job.out.splitlines()
