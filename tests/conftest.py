"""What every test must leave behind: nothing.

An autouse guard looks at this process before and after each test: asyncio tasks, threads, sockets, child
processes, runtime directories, shared memory. What is new and does not go away within a moment fails the test
that made it. Asynchronous unit tests also fail when code of the package blocks the event loop (`blockbuster`);
integration tests may block, since they are made of waiting. A test that must block says so with
`@pytest.mark.may_block`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from tests.integration.support.processes import (
    Process,
    all_pids,
    look_at,
    orphaned_shared_memory,
    shared_memory,
)

_GRACE_S = float(os.environ.get("RUNTIME_TEST_GRACE_S", "5.0"))
"""How long threads, sockets and children that are on their way out may take."""

_LASTING_THREADS = ("zmq.utils.garbage",)
"""Modules of threads that a library starts once and keeps: pyzmq's, which lets go of large buffers that were sent."""

_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Children that the standard library starts once and keeps until the interpreter ends."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "may_block: this asynchronous test may block its event loop")


@pytest.fixture(scope="session", autouse=True)
def _runtime_dir() -> Iterator[Path]:
    """A runtime directory of this test run only: what is left in it is ours. Short, for ipc paths."""
    path = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def directory() -> Iterator[Path]:
    """For unix sockets: their paths are short, which pytest's `tmp_path` is not."""
    made = Path(tempfile.mkdtemp(prefix="rt-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="session", autouse=True)
def _idle_loop() -> Iterator[None]:
    """A loop for plugins that ask for the current one outside of any test (looptime does), closed at the end."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """What `configure_logging` set in a test ends with it: `caplog` of the next one sees our records."""
    ours = logging.getLogger("runtime")
    before = (list(ours.handlers), ours.level, ours.propagate)
    yield
    if before == (ours.handlers, ours.level, ours.propagate):
        return
    ours.handlers[:], ours.level, ours.propagate = before
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("runtime.") and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _nothing_left_behind(_runtime_dir: Path, _idle_loop: None) -> Iterator[None]:
    """Fail the test that leaves a thread, socket, child process, runtime directory or shared memory."""
    threads, sockets, others = set(threading.enumerate()), _sockets(), frozenset(all_pids())
    files, memory = _runtime_entries(_runtime_dir), shared_memory()
    yield
    left = {
        "threads": lambda: {t.name for t in set(threading.enumerate()) - threads if not _lasts(t)},
        "sockets": lambda: _sockets() - sockets,
        "child processes": lambda: _children(besides=others),
        "runtime directories": lambda: _runtime_entries(_runtime_dir) - files,
        "shared memory": lambda: orphaned_shared_memory(since=memory),
    }
    found = _still_there(left)
    assert not found, "the test left behind: " + "; ".join(f"{k}: {v}" for k, v in found.items())


@pytest.fixture(autouse=True)
def _loop_is_clean(_nothing_left_behind: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Asynchronous tests: no task outlives the test, and (unit tests) nothing of ours blocks the loop."""
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    request.getfixturevalue("_no_task_left")
    if _may_block(request.node):
        yield
        return
    guard = BlockBuster("runtime")
    # Held for some instructions only, by threads that copy.
    guard.functions["threading.Lock.acquire"].can_block_in("transport/arena_pool.py", "__enter__")
    guard.activate()
    try:
        yield
    finally:
        guard.deactivate()


@pytest.fixture
async def _no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    for _ in range(10):
        left = {t for t in asyncio.all_tasks() - before if t is not asyncio.current_task()}
        if not left:
            return
        await asyncio.sleep(0)
    names = sorted(f"{t.get_name()} ({t.get_coro()})" for t in left)
    pytest.fail(f"the test left tasks running: {names}")


def _may_block(node: pytest.Item) -> bool:
    return "integration" in node.path.parts or node.get_closest_marker("may_block") is not None


def _lasts(thread: threading.Thread) -> bool:
    return type(thread).__module__ in _LASTING_THREADS


def _still_there(left: dict[str, Callable[[], set[str]]]) -> dict[str, list[str]]:
    """What of `left` has not gone away after the grace period."""
    until = time.monotonic() + _GRACE_S
    while True:
        found = {what: sorted(names) for what, look in left.items() if (names := look())}
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def _sockets() -> set[str]:
    """The sockets that this process holds open, as the kernel names them ("socket:[1234]")."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        if name.startswith("socket:"):
            found.add(name)
    return found


def _children(*, besides: frozenset[int]) -> set[str]:
    """Our living children and theirs but for those with pids of before, as they print.

    Only what is new is looked at: to read of all processes whose children they are takes longer than most tests.
    """
    new = {pid: process for pid in all_pids() if pid not in besides and (process := look_at(pid))}
    return {str(p) for p in new.values() if _is_ours(p, new) and not _is_helper(p)}


def _is_ours(process: Process | None, new: Mapping[int, Process]) -> bool:
    while process is not None:
        if process.parent == os.getpid():
            return True
        process = new.get(process.parent) or look_at(process.parent)
    return False


def _is_helper(process: Process) -> bool:
    return any(helper in process.command for helper in _HELPERS)


def _runtime_entries(base: Path) -> set[str]:
    return {str(p.relative_to(base)) for p in base.iterdir()} if base.exists() else set()
