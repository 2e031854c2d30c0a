"""Workers from a zygote and by exec, without a launcher around them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runtime.launcher import child, spawn, zygote
from runtime.launcher.spawn import Exit
from runtime.launcher.starter import NewWorker, Starter
from runtime.launcher.tunables import tunables
from runtime.launcher.watch import Watch
from tests.integration.launcher.waiting import until

ROOT = str(Path(__file__).resolve().parents[3])
TARGETS = "tests.integration.launcher.targets"


@pytest.fixture
async def starter() -> AsyncIterator[Starter]:
    spawn.become_subreaper()
    starter = Starter(preload_timeout_s=20.0)
    yield starter
    starter.close()
    spawn.kill_descendants()


class Group:
    """Workers that are started together, with their output."""

    def __init__(self, folder: Path, count: int, function: str, **env: str) -> None:
        self.folder, self.exits = folder, dict[int, Exit]()
        self.outputs: list[tuple[int, int]] = []
        self.workers: list[NewWorker] = []
        for number in range(count):
            (out, stdout), (err, stderr) = os.pipe(), os.pipe()
            self.outputs.append((out, err))
            order = child.Order(
                f"{TARGETS}:{function}",
                pickle.dumps(str(folder / f"{number}.json")),
                {**os.environ, "PYTHONPATH": ROOT, "RANK": str(number), **env},
                str(folder),
                os.getpid(),
                title=f"w-{number}",
            )
            self.workers.append(NewWorker(order, stdout, stderr))

    def preloading(self, *modules: str) -> Group:
        self.workers = [w._replace(order=w.order._replace(preload=modules)) for w in self.workers]
        return self

    def watch(self, pids: list[int]) -> list[Watch]:
        return [
            Watch(pid, lambda watch, exit: self.exits.update({watch.pid: exit})) for pid in pids
        ]

    async def ends(self, pids: list[int]) -> list[dict[str, Any]]:
        """What they wrote down, when all have ended."""
        await until(lambda: len(self.exits) == len(pids), 20)
        return [json.loads((self.folder / f"{n}.json").read_text()) for n in range(len(pids))]

    def printed(self) -> list[tuple[str, str]]:
        texts = []
        for pair in self.outputs:
            with open(pair[0]) as out, open(pair[1]) as err:
                texts.append((out.read(), err.read()))
        return texts


@pytest.mark.parametrize("method", ["fork", "exec"])
async def test_workers_are_our_children_with_all_that_was_ordered(
    starter: Starter, tmp_path: Path, method: str
) -> None:
    group = Group(tmp_path, 3, "describe", COLOUR="blue")
    if method == "fork":
        pids = await starter.fork(group.workers)
    else:
        pids = await starter.exec(sys.executable, group.workers)
    group.watch(pids)
    facts = await group.ends(pids)
    assert [fact["pid"] for fact in facts] == pids
    assert set(group.exits.values()) == {Exit(code=7)}
    assert group.printed() == [("to stdout\n", "to stderr\n")] * 3
    for rank, fact in enumerate(facts):
        assert (fact["ppid"], fact["sid"]) == (os.getpid(), fact["pid"])
        assert (fact["cwd"], fact["stdin"], fact["fds"]) == (str(tmp_path), "/dev/null", [])
        assert fact["env"] == group.workers[rank].order.env
        assert fact["sigterm"] == str(int(signal.SIG_DFL))
        assert fact["oom"] >= 500
    assert len({fact["numpy"] for fact in facts}) == len({fact["random"] for fact in facts}) == 3


async def test_a_zygote_serves_again_and_again_with_what_it_has_imported(
    starter: Starter, tmp_path: Path
) -> None:
    zygotes = set()
    for _ in range(2):
        group = Group(tmp_path, 1, "describe").preloading("numpy", "colorsys")
        pids = await starter.fork(group.workers)
        group.watch(pids)
        (fact,) = await group.ends(pids)
        assert "colorsys" in fact["modules"]
        zygotes.add(tuple(starter.zygote_pids))
        group.printed()
    assert len(zygotes) == 1


async def test_a_zygote_that_was_started_before_is_used_if_it_fits(
    starter: Starter, tmp_path: Path
) -> None:
    started = zygote.start({**zygote.first_env(), "PYTHONPATH": ROOT})
    os.environ["PYTHONPATH"], before = ROOT, os.environ.get("PYTHONPATH")
    try:
        starter.adopt(started)
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    group = Group(tmp_path, 1, "describe", OMP_NUM_THREADS="2", **tunables(os.environ))
    pids = await starter.fork(group.workers)
    group.watch(pids)
    await group.ends(pids)
    group.printed()
    assert starter.zygote_pids == [started.pid]


async def test_a_killed_zygote_is_replaced_and_its_workers_live_on(
    starter: Starter, tmp_path: Path
) -> None:
    first = Group(tmp_path, 1, "sleep")
    (sleeper,) = await starter.fork(first.workers)
    (watch,) = first.watch([sleeper])
    (old,) = starter.zygote_pids
    os.kill(old, signal.SIGKILL)
    second = Group(tmp_path, 1, "describe")
    pids = await starter.fork(second.workers)
    second.watch(pids)
    await second.ends(pids)
    assert watch.poll() is None
    assert starter.zygote_pids != [old]
    watch.kill()
    for group in (first, second):
        group.printed()
    await until(lambda: watch.exit is not None)
    assert watch.exit == Exit(signal=9)


async def test_a_preload_that_hangs_is_given_up_and_workers_are_exec(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spawn.become_subreaper()
    (tmp_path / "stuck.py").write_text(
        "import time\nif 'zygote' in open('/proc/self/cmdline').read(): time.sleep(60)\n"
    )
    starter = Starter(preload_timeout_s=0.5)
    group = Group(tmp_path, 2, "describe", PYTHONPATH=f"{ROOT}:{tmp_path}").preloading("stuck")
    with caplog.at_level(logging.WARNING, "runtime"):
        pids = await starter.fork(group.workers)
    group.watch(pids)
    await group.ends(pids)
    group.printed()
    assert [record.message for record in caplog.records] == [
        "workers are started by exec, not forked from one that has imported stuck: "
        "importing took longer than 0.5 s"
    ]
    starter.close()
    spawn.kill_descendants()


async def test_cancelled_preparations_leave_a_starter_that_works(
    starter: Starter, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1)\n")
    group = Group(tmp_path, 1, "describe", PYTHONPATH=f"{ROOT}:{tmp_path}").preloading("slow")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await starter.prepare([worker.order for worker in group.workers])
    pids = await starter.fork(group.workers)
    group.watch(pids)
    await group.ends(pids)
    group.printed()


async def test_a_worker_dies_with_its_parent_also_when_exec_was_used(tmp_path: Path) -> None:
    """The parent here is a process in between, which starts a sleeper and is killed."""
    code = f"""
import asyncio, os, pickle, sys
sys.path.insert(0, {ROOT!r})
from runtime.launcher import child, spawn
from runtime.launcher.starter import NewWorker, Starter
from runtime.launcher.tunables import tunables

async def main():
    spawn.become_subreaper()
    starter = Starter()
    for method in (starter.fork, lambda w: starter.exec(sys.executable, w)):
        order = child.Order("{TARGETS}:sleep", pickle.dumps(0), dict(os.environ), "/", os.getpid())
        pids = await method([NewWorker(order, os.dup(1), os.dup(2))])
        print(*pids, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    spawn.become_subreaper()
    read_end, write_end = os.pipe()
    pid = spawn.start(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": ROOT},
        streams=spawn.Streams(stdout=write_end),
    )
    os.close(write_end)
    printed = b""
    while printed.count(b"\n") < 2:
        printed += os.read(read_end, 100)
    os.close(read_end)
    await until(lambda: all(spawn.look_at(int(worker)) for worker in printed.split()))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not spawn.descendants())
    spawn.reap_orphans()
