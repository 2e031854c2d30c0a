"""Jobs on several agents: all but ssh is as between hosts (`support/several.py`)."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support.job import Job
from tests.integration.support.programs import SLEEP_FOR_LONG, WRITE_PID
from tests.integration.support.screen import box

Write = Callable[[str, str], Path]
Start = Callable[..., Job]

TIMEOUT_S = 2.0
"""Of heartbeats."""
WAITING = WRITE_PID + SLEEP_FOR_LONG


@pytest.fixture
def start(launch: Callable[..., Job]) -> Start:
    """Start a job of three hosts: h1 and h2 with two workers, h3 with one."""

    def start(*options: str | Path, **settings: object) -> Job:
        env = {
            "PRETENDED_HOSTS": "h1:2,h2:2,h3:1",
            "RUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS": "200",
            "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS": str(int(TIMEOUT_S * 1000)),
        }
        env |= settings.pop("env", {})  # type: ignore[arg-type,operator]
        more = {"program": "tests.integration.support.several", "env": env, **settings}
        return launch("--nnodes", "3", "--role", "trainer", *options, **more)

    return start


def _all_run(job: Job) -> list[int]:
    return [job.worker_pid(rank) for rank in range(5)]


SHOW = WRITE_PID + (
    "keys = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'RUNTIME_HOST')\n"
    "import json\n"
    "pathlib.Path(f'env.{attempt}.{rank}').write_text(json.dumps([os.environ[k] for k in keys]))\n"
    "print('here I am')\n"
)


def test_ranks_run_through_the_hosts_and_the_first_has_the_master(
    write: Write, start: Start
) -> None:
    job = start(write("train.py", SHOW))
    assert job.wait() == 0
    found = [json.loads((job.cwd / f"env.0.{rank}").read_text()) for rank in range(5)]
    assert found == [
        ["0", "0", "5", "0", "127.0.0.2", "h1"],
        ["1", "1", "5", "0", "127.0.0.2", "h1"],
        ["2", "0", "5", "1", "127.0.0.2", "h2"],
        ["3", "1", "5", "1", "127.0.0.2", "h2"],
        ["4", "0", "5", "2", "127.0.0.2", "h3"],
    ]
    assert sorted(job.out.splitlines()) == [
        f"[trainer {rank} {host}] here I am"
        for rank, host in enumerate(("h1", "h1", "h2", "h2", "h3"))
    ]
    job.assert_nothing_left()


def test_processes_of_all_hosts_reach_each_other(write: Write, start: Start) -> None:
    job = start(
        write(
            "talk.py",
            "import runtime\n"
            "me = runtime.current_worker().actor_info\n"
            "runtime.export_rpc_method('host', lambda: me.host)\n"
            "runtime.barrier('exported', timeout=20)\n"
            "print(runtime.RoleGroup('trainer').call('host').result(20))\n"
            "runtime.barrier('asked', timeout=20)\n",
        )
    )
    assert job.wait() == 0
    assert job.out.count("['h1', 'h1', 'h2', 'h2', 'h3']") == 5
    job.assert_nothing_left()


BROADCAST = """
import json, pathlib, numpy, runtime
from runtime.peer import context

me = runtime.current_worker().actor_info
kept = {}


def mapped(array):
    at = array.ctypes.data
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= at < end:
            return "memfd" in line


def load_weights(weights, version=None):
    kept.update(weights)
    return [version, int(weights["a"][-1]), len(weights), mapped(weights["a"])]


def scribble():
    kept["a"][:] = me.rank
    return me.rank


runtime.export_rpc_method("load_weights", load_weights)
runtime.export_rpc_method("scribble", scribble)
runtime.export_rpc_method("sums", lambda: int(kept["a"].sum()))
runtime.barrier("exported", timeout=20)
if me.rank == 0:
    transport = context.current().endpoint._transport
    weights = {name: numpy.full(4 << 20, n + 5, dtype=numpy.uint8) for n, name in enumerate("abcd")}
    before = transport._sockets.statistics().bytes_out
    group = runtime.RoleGroup("trainer")
    told = group.broadcast(weights, version=3).result(20)
    sent = (transport._sockets.statistics().bytes_out - before) / (16 << 20)
    group[1:4].call("scribble").result(20)
    found = [told, sent, group.call("sums").result(20), int(weights["a"].sum())]
    pathlib.Path("found.json").write_text(json.dumps(found))
runtime.barrier("asked", timeout=20)
"""


@pytest.mark.parametrize(("arena", "copies"), [("512MiB", 1), ("0", 3)])
def test_weights_travel_once_to_a_host_and_are_each_member_s_own(
    write: Write, start: Start, arena: str, copies: int
) -> None:
    hosts = {"PRETENDED_HOSTS": "h1:2,h2:3"}
    job = start("--nnodes", "2", "--arena", arena, write("send.py", BROADCAST), env=hosts)
    assert job.wait() == 0, job.err
    told, sent, sums, own = json.loads((job.cwd / "found.json").read_text())
    assert [one[:3] for one in told] == [[3, 5, 4]] * 5
    assert copies <= sent < copies + 0.1
    # The one that the bytes came to keeps them as they came; the others see the arena's.
    assert [one[3] for one in told[2:]] == [False, arena != "0", arena != "0"]
    size = 4 << 20
    assert own == 5 * size
    assert sums == [5 * size, size, 2 * size, 3 * size, 5 * size], "nobody sees what others write"
    job.assert_nothing_left()


def test_a_failure_on_any_host_restarts_the_gang_on_all(write: Write, start: Start) -> None:
    body = (
        SHOW
        + "if (rank, attempt) == (3, 0): raise ValueError('once')\nif attempt == 0: "
        + ("import time; time.sleep(600)\n")
    )
    job = start("--max-restarts", "1", write("train.py", body))
    assert job.wait() == 0
    assert "trainer-3 failed (exit 1): restarting all 5 of trainer, attempt 1 of 1" in job.err
    assert len(list(job.cwd.glob("env.1.*"))) == 5
    job.assert_nothing_left()


def test_the_box_has_the_last_lines_of_a_worker_of_another_host(write: Write, start: Start) -> None:
    body = WRITE_PID + (
        "import sys, time\n"
        "if rank != 4: time.sleep(600)\n"
        "print('the last thing it said', file=sys.stderr)\n"
        "sys.exit(7)\n"
    )
    job = start(write("train.py", body))
    assert job.wait() == 7
    assert "trainer rank 4 on h3" in box(job)
    assert "the last thing it said" in box(job)
    assert str(job.logs) in box(job)
    assert json.loads((job.logs / "latest" / "outcome.json").read_text())["code"] == 7
    job.assert_nothing_left()


def test_a_killed_agent_is_its_host_lost_and_named(write: Write, start: Start) -> None:
    job = start("--max-restarts", "3", write("train.py", WAITING))
    _all_run(job)
    os.kill(job.agents()[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(20) == 69
    assert time.monotonic() - killed < 4
    assert "trainer rank 2 on h2" in box(job)
    assert "its agent killed by SIGKILL" in box(job)
    job.assert_nothing_left()


def test_the_loss_of_the_control_planes_host_has_a_message_of_its_own(
    write: Write, start: Start
) -> None:
    job = start(write("train.py", WAITING))
    _all_run(job)
    os.kill(job.agents()[0].pid, signal.SIGKILL)
    killed = time.monotonic()
    assert job.wait(20) == 69
    assert time.monotonic() - killed < 4
    assert "host h1, which held the control plane, was lost" in " ".join(box(job).split())
    job.assert_nothing_left()


def test_a_frozen_host_is_named_in_time(write: Write, start: Start) -> None:
    job = start(write("train.py", WAITING))
    pids = _all_run(job)
    frozen = [job.agents()[2].pid, pids[4]]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert job.wait(20) == 69
    assert "trainer rank 4 on h3" in box(job)
    assert re.search("host unreachable|no sign of life for 2 s", box(job))
    assert time.monotonic() - stopped < TIMEOUT_S + 2
    job.assert_nothing_left()


def test_a_first_agent_that_hangs_keeps_neither_the_others_nor_the_launcher(
    write: Write, start: Start
) -> None:
    job = start(write("train.py", WAITING))
    pids = _all_run(job)
    first = job.agents()[0].pid
    os.kill(first, signal.SIGSTOP)
    job.wait_until(
        lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids[2:]),
        "the workers of the other hosts were ended",
        timeout=TIMEOUT_S + 5,
    )
    assert job.wait(20) == 69
    words = "host h1, which held the control plane, was lost: no sign of life for 2 s"
    assert words in " ".join(box(job).split())
    job.assert_nothing_left()


def test_a_killed_launcher_leaves_nothing_on_any_host(write: Write, start: Start) -> None:
    job = start(write("train.py", WAITING))
    _all_run(job)
    job.signal(signal.SIGKILL)
    assert job.wait(20) == -signal.SIGKILL
    job.assert_nothing_left()


def test_ctrl_c_stops_all_hosts(write: Write, start: Start) -> None:
    job = start(write("train.py", WAITING))
    _all_run(job)
    job.signal(signal.SIGINT)
    assert job.wait(20) == 130
    job.assert_nothing_left()
