"""Barriers, keys and members over real workers and a real agent."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from tests.integration.support.job import Job
from tests.integration.support.programs import WRITE_PID

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]


def _lines(job: Job) -> list[str]:
    return [re.sub(r"^\[[^\]]*\] ", "", line) for line in job.out.splitlines()]


def test_a_thousand_rounds_of_one_barrier_keep_four_workers_in_step(
    write: Write, launch: Launch
) -> None:
    write(
        "train.py",
        """
        import os, random, time
        import runtime
        rank = int(os.environ["RANK"])
        random.seed(rank)
        board = os.open("board", os.O_RDWR | os.O_CREAT)
        for round in range(1000):
            if random.random() < 0.02:
                time.sleep(random.random() / 100)
            os.pwrite(board, round.to_bytes(8, "little"), 8 * rank)
            runtime.barrier("step", timeout=30)
            seen = [int.from_bytes(os.pread(board, 8, 8 * r), "little") for r in range(4)]
            assert all(round <= other <= round + 1 for other in seen), (round, seen)
        print("in step")
        """,
    )
    job = launch("--nproc-per-node", "4", "train.py")
    assert job.wait(90) == 0, job.describe()
    assert _lines(job) == ["in step"] * 4
    job.assert_nothing_left()


def test_a_barrier_is_broken_by_name_within_a_second_when_a_member_is_killed(
    write: Write, launch: Launch
) -> None:
    write("train.py", WRITE_PID + _WAITS_FOR_THE_VICTIM)
    write(
        "job.toml",
        """
        [roles.app]
        entry = "train.py"
        kind = "simple"
        total = 3
        restart = { policy = "never", max = 0 }
        """,
    )
    job = launch("--job", "job.toml")
    job.wait_for_files("pid.0.0", "pid.1.0", "waits.0", "waits.1")
    os.kill(job.worker_pid(2), signal.SIGKILL)
    assert job.wait() == 137, job.describe()
    for rank in (0, 1):
        text = (job.cwd / f"broken.{rank}").read_text()
        seconds, _, missing = text.partition(" ")
        assert "'app-2'" in missing, job.describe()
        assert missing.endswith("SIGKILL"), job.describe()
        assert float(seconds) < 1.0


_WAITS_FOR_THE_VICTIM = """
import time, runtime
if rank == 2:
    while True:
        pathlib.Path("alive").write_text(str(time.monotonic()))
        time.sleep(0.01)
runtime.current_worker().should_stop  # who looks at this is not interrupted when the job ends
try:
    pathlib.Path(f"waits.{rank}").touch()
    runtime.barrier("together")
except runtime.BarrierBroken as broken:
    late = time.monotonic() - float(pathlib.Path("alive").read_text() or "0")
    cause = "SIGKILL" if "SIGKILL" in str(broken) else str(broken)
    new = pathlib.Path(f"new-broken.{rank}")
    new.write_text(f"{late} {broken.missing} {cause}")
    new.rename(f"broken.{rank}")
"""


def test_a_member_that_waits_longer_than_the_heartbeat_timeout_stays_alive(
    write: Write, launch: Launch
) -> None:
    # 2 s is the time after which a host that says nothing is lost; rank 0 sits in the barrier for longer,
    # rank 1 holds the interpreter lock for as long, which stops its peer thread, too.
    write(
        "train.py",
        """
        import os, time
        import runtime
        runtime.barrier("begin")
        began = time.monotonic()
        if os.environ["RANK"] == "1":
            import ctypes
            ctypes.PyDLL(None).usleep(int(4e6))
        runtime.barrier("long")
        print(time.monotonic() - began > 3, [m.state for m in runtime.members()])
        runtime.barrier("end")
        """,
    )
    env = {
        "RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS": "200",
        "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS": "2000",
    }
    job = launch("--nproc-per-node", "2", "train.py", env=env)
    assert job.wait(60) == 0, job.describe()
    assert _lines(job) == ["True ['running', 'running']"] * 2, job.describe()


def test_keys_members_and_the_master_are_the_same_for_all_roles(
    write: Write, launch: Launch
) -> None:
    write(
        "app.py",
        """
        from runtime import barrier, current_worker, kv, master, members, VersionConflict
        def left():
            kv.put("shared", {"from": "left"})
            assert kv.put("once", 1, if_version=0)
            barrier("written", role="*")
            barrier("read", role="*")
        def right():
            barrier("written", role="*")
            print(kv.get("shared"), kv.get("absent", 5))
            try:
                kv.put("once", 2, if_version=0)
            except VersionConflict:
                print("conflict")
            print(sorted(m.id for m in members() if m.state == "running"), master().id)
            barrier("read", role="*")
        """,
    )
    write(
        "job.toml",
        """
        [roles.left]
        entry = "app:left"
        total = 2
        [roles.right]
        entry = "app:right"
        restart = { policy = "never", max = 0 }
        """.replace("total = 2", "total = 1"),
    )
    job = launch("--job", "job.toml")
    assert job.wait() == 0, job.describe()
    assert _lines(job) == [
        "{'from': 'left'} 5",
        "conflict",
        "['left-0', 'right-0'] @agent-0",
    ], job.describe()


def test_a_gang_that_lost_a_member_meets_again_behind_the_same_barrier(
    write: Write, launch: Launch
) -> None:
    write(
        "train.py",
        WRITE_PID
        + """
import time, runtime
runtime.barrier("start", timeout=30)
if attempt == 0:
    time.sleep(600)
print(attempt, runtime.current_worker().actor_info.restart_count, os.environ["WORLD_SIZE"])
runtime.barrier("start", timeout=30)
""",
    )
    job = launch("--nproc-per-node", "3", "--max-restarts", "1", "train.py")
    for rank in range(3):
        job.worker_pid(rank)
    os.kill(job.worker_pid(1), signal.SIGKILL)
    assert job.wait() == 0, job.describe()
    assert _lines(job) == ["1 1 3"] * 3, job.describe()
    job.assert_nothing_left()
