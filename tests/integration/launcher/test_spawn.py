"""Starting, watching and ending real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

import pytest

from runtime.launcher import spawn
from runtime.launcher.spawn import Exit, Streams
from runtime.launcher.watch import Watch
from tests.integration.launcher.waiting import until

GRANDCHILD = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _no_descendant_left() -> None:
    spawn.become_subreaper()


def start(code: str, **more: object) -> int:
    return spawn.start([sys.executable, "-c", code], **more)  # type: ignore[arg-type]


async def ended(watch: Watch) -> Exit:
    await until(lambda: watch.exit is not None)
    assert watch.exit is not None
    return watch.exit


def reaped(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG) == (pid, 0)


def is_zombie(pid: int) -> bool:
    info = spawn.look_at(pid)
    return info is not None and info.state == "Z"


@pytest.mark.parametrize(
    ("code", "exit"),
    [
        ("pass", Exit()),
        ("raise SystemExit(3)", Exit(code=3)),
        ("import os; os.kill(os.getpid(), 9)", Exit(signal=9)),
    ],
)
async def test_the_end_of_a_process_is_told_once_with_its_status(code: str, exit: Exit) -> None:
    told: list[Exit] = []
    watch = Watch(start(code), lambda watch, exit: told.append(exit))
    assert await ended(watch) == exit
    assert watch.poll() == exit
    assert told == [exit]


async def test_what_is_tied_to_us_does_not_outlive_us() -> None:
    code = (
        "from runtime.launcher import spawn; import time\n"
        "print(spawn.start(['sleep', '60'], tied=True), flush=True); time.sleep(60)"
    )
    read, write = os.pipe()
    watch = Watch(start(code, streams=Streams(stdout=write)), lambda *_: None)
    os.close(write)
    with os.fdopen(read) as said:
        tied = int(await asyncio.to_thread(said.readline))
    watch.kill()
    await ended(watch)
    await until(lambda: spawn.look_at(tied) is None or is_zombie(tied))
    spawn.reap_orphans(known=[])


async def test_the_end_is_seen_within_milliseconds() -> None:
    seen: list[float] = []
    watch = Watch(start("import time; time.sleep(60)"), lambda *_: seen.append(time.monotonic()))
    await asyncio.sleep(0.1)
    killed = time.monotonic()
    watch.send_signal(signal.SIGKILL)
    await ended(watch)
    assert seen[0] - killed < 0.05
    watch.send_signal(signal.SIGKILL)  # nobody is there any more: nothing happens


async def test_a_process_that_ended_before_it_was_watched_is_told_all_the_same() -> None:
    pid = start("raise SystemExit(5)")
    await asyncio.sleep(0.3)
    watch = Watch(pid, lambda *_: None)
    assert await ended(watch) == Exit(code=5)


async def test_a_process_has_its_own_session_no_input_and_no_descriptor_of_ours() -> None:
    read_end, write_end = os.pipe()
    code = (
        "import os, sys; fds = [int(f) for f in os.listdir('/proc/self/fd')];"
        "print(os.getsid(0) == os.getpid(), sys.stdin.read() == '', max(fds) <= 3)"
    )
    watch = Watch(start(code, streams=Streams(stdout=write_end)), lambda *_: None)
    os.close(write_end)
    await ended(watch)
    assert os.read(read_end, 100) == b"True True True\n"
    os.close(read_end)


def test_a_program_that_is_not_there_is_an_oserror_naming_it() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        spawn.start(["/no-such-program"])


async def test_grandchildren_that_were_double_forked_are_found_and_killed() -> None:
    watch = Watch(start(GRANDCHILD), lambda *_: None)
    await until(lambda: len(spawn.descendants()) >= 2)
    assert spawn.descendants(without=[watch.pid]) != spawn.descendants()
    assert spawn.kill_descendants(without=[watch.pid]) == []
    assert watch.poll() is None, "the one to be spared was killed"
    watch.kill()
    await ended(watch)
    spawn.kill_descendants()
    assert spawn.descendants() == []


async def test_killing_a_watched_process_takes_its_session_with_it() -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    watch = Watch(start(code), lambda *_: None)
    await until(lambda: len(spawn.descendants()) >= 2)
    watch.kill()
    await ended(watch)
    await until(lambda: not spawn.descendants())
    spawn.reap_orphans()


async def test_ended_orphans_are_reaped_and_watched_children_are_not() -> None:
    watch = Watch(start("pass"), lambda *_: None)
    watch.close()
    pid = start("pass")
    await until(lambda: is_zombie(pid) and is_zombie(watch.pid))
    spawn.reap_orphans(known=[watch.pid])
    assert spawn.look_at(pid) is None
    assert reaped(watch.pid)
