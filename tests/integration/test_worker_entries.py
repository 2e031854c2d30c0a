"""What a worker of a real job does with functions, classes, scripts and modules."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support.job import FRAME_OF_OURS, Job

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

_ROLE = """
[roles.{name}]
entry = "{entry}"
kind = "{kind}"
total = {total}
driver = {driver}
comm_pre_check = false
comm_auto_setup_process_group = false
restart = {{ policy = "never", max = 0 }}
"""


def _role(
    entry: str, *, name: str = "app", kind: str = "simple", total: int = 1, driver: bool = True
) -> str:
    return _ROLE.format(name=name, entry=entry, kind=kind, total=total, driver=str(driver).lower())


def _lines(job: Job) -> list[str]:
    """What the workers printed, without the prefixes."""
    return [re.sub(r"^\[[^\]]*\] ", "", line) for line in job.out.splitlines()]


def test_a_class_goes_through_its_life_and_calls_wait_for_its_set_up(
    write: Write, launch: Launch
) -> None:
    write(
        "app.py",
        """
        import threading, time
        from runtime import RoleGroup, create_rpc_proxy, rpc

        class Server:
            def __init__(self):
                print("constructed"); self.ready = False
            def setup(self):
                time.sleep(0.5); self.ready = True; print("set up")
            @rpc
            def where(self): return self.ready, threading.current_thread().name
            @rpc
            async def where_async(self): return self.ready, threading.current_thread().name
            def teardown(self): print("torn down")

        @rpc
        def top_level(x): return x + 1

        def drive():
            server = create_rpc_proxy("server", None, Server)
            print(server.where())
            print(RoleGroup("server").call_rank0("where_async").result(10))
            print(RoleGroup("server").call("top_level", 1).result(10))
        """,
    )
    write("job.toml", _role("app:Server", name="server", driver=False) + _role("app:drive"))
    job = launch("--job", "job.toml")
    assert job.wait() == 0, job.describe()
    assert _lines(job) == [
        "constructed",
        "set up",
        "(True, 'MainThread')",
        "(True, 'runtime-peer')",
        "[2]",
        "torn down",
    ], job.describe()
    job.assert_nothing_left()


def test_beside_run_handlers_have_a_thread_of_their_own(write: Write, launch: Launch) -> None:
    write(
        "app.py",
        """
        import threading
        from runtime import RoleGroup, barrier, rpc
        class App:
            @rpc
            def where(self): return threading.current_thread() is threading.main_thread()
            def run(self):
                print(RoleGroup("app").call("where").result(10))
                barrier("end")
        """,
    )
    write("job.toml", _role("app:App", total=2))
    job = launch("--job", "job.toml")
    assert job.wait() == 0, job.describe()
    assert _lines(job) == ["[False, False]"] * 2


def test_async_entries_run_in_one_loop_of_the_main_thread(write: Write, launch: Launch) -> None:
    write(
        "app.py",
        """
        import asyncio
        from runtime import RoleGroup, barrier_async, rpc
        class App:
            async def setup(self): self.loop = asyncio.get_running_loop()
            @rpc
            async def double(self, x): return 2 * x
            async def run(self):
                assert asyncio.get_running_loop() is self.loop
                print(await RoleGroup("app").call("double", 21))
                await barrier_async("end")
            async def teardown(self): print(asyncio.get_running_loop() is self.loop)
        async def function(config): print(config["lr"])
        """,
    )
    text = "[config]\nlr = 0.5\n" + _role("app:App") + _role("app:function", name="other")
    write("job.toml", text)
    job = launch("--job", "job.toml")
    assert job.wait() == 0, job.describe()
    assert sorted(_lines(job)) == ["0.5", "True", "[42]"]


def test_scripts_call_each_other_and_all_their_functions_appear_together(
    write: Write, launch: Launch
) -> None:
    write(
        "train.py",
        """
        import os, time
        from runtime import RoleGroup, barrier, rpc
        @rpc
        def first(): return f"first of {os.environ['RANK']}"
        time.sleep(0.3)  # others call by now: they must not find half of us
        @rpc("renamed")
        def second(): return f"second of {os.environ['RANK']}"
        if __name__ == "__main__":
            print(RoleGroup("default").call("renamed").result(10))
            print(RoleGroup("default").call(first).result(10))
            barrier("end")
        """,
    )
    job = launch("--nproc-per-node", "2", "train.py")
    assert job.wait() == 0, job.describe()
    expected = ["['second of 0', 'second of 1']", "['first of 0', 'first of 1']"] * 2
    assert sorted(_lines(job)) == sorted(expected), job.describe()


def test_a_module_may_run_the_node_in_its_own_loop(write: Write, launch: Launch) -> None:
    write(
        "app/main.py",
        """
        import asyncio, threading
        import runtime
        from runtime import MisuseError, RoleGroup, rpc
        @rpc
        async def where(): return threading.current_thread().name
        async def main():
            async with runtime.Node.from_env() as node:
                print(await RoleGroup("default").call(where))
                await runtime.barrier_async("end")
                try:
                    runtime.Node.from_env()
                except MisuseError as error:
                    print("refused:", "already" in str(error))
            try:
                runtime.barrier("late")
            except MisuseError as error:
                print("late:", "has been closed" in str(error))
        asyncio.run(main())
        """,
    )
    write("app/__init__.py", "")
    job = launch("--nproc-per-node", "2", "-m", "app.main")
    assert job.wait() == 0, job.describe()
    assert sorted(_lines(job)) == sorted(
        ["['MainThread', 'MainThread']", "refused: True", "late: True"] * 2
    )


def test_a_plain_script_starts_no_thread_and_loads_no_zmq(write: Write, launch: Launch) -> None:
    write(
        "train.py",
        """
        import sys, threading, runtime
        print(runtime.current_worker().actor_info.rank, [t.name for t in threading.enumerate()])
        """,
    )
    job = launch("--start-method", "spawn", "train.py")
    assert job.wait() == 0, job.describe()
    assert _lines(job) == ["0 ['MainThread', 'runtime-signals']"]


def test_a_teardown_that_hangs_does_not_keep_a_failed_worker(write: Write, launch: Launch) -> None:
    write(
        "app.py",
        """
        import time
        class App:
            def run(self): raise ValueError("what came first")
            def teardown(self): time.sleep(600)
        """,
    )
    write("job.toml", _role("app:App"))
    job = launch("--shutdown-timeout", "1", "--job", "job.toml")
    assert job.wait() == 1
    assert job.seconds < 15
    assert "ValueError: what came first" in job.err
    assert "teardown() did not end within 1 s" in job.err
    assert not FRAME_OF_OURS.search(job.err), job.describe()


def test_a_teardown_that_raises_as_well_does_not_hide_what_came_first(
    write: Write, launch: Launch
) -> None:
    write(
        "app.py",
        """
        class App:
            def run(self): raise ValueError("what came first")
            def teardown(self): raise KeyError("what came second")
        """,
    )
    write("job.toml", _role("app:App"))
    job = launch("--job", "job.toml")
    assert job.wait() == 1
    assert "ValueError: what came first" in job.err
    assert "teardown() failed as well" in job.err


def test_a_class_with_nothing_to_do_is_refused(write: Write, launch: Launch) -> None:
    write("app.py", "class App: ...\n")
    write("job.toml", _role("app:App"))
    job = launch("--job", "job.toml")
    assert job.wait() == 1
    assert "has neither run() nor an @rpc method" in job.err
    assert not FRAME_OF_OURS.search(job.err), job.describe()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_have_no_node_and_leave_their_worker_alone(
    write: Write, launch: Launch, method: str
) -> None:
    write(
        "train.py",
        f"""
        import runtime
        from torch.utils.data import DataLoader, Dataset

        class Data(Dataset):
            def __len__(self): return 8
            def __getitem__(self, i):
                try:
                    runtime.barrier("inside")
                except runtime.MisuseError:
                    return i
                return -1

        if __name__ == "__main__":
            runtime.barrier("before")
            loader = DataLoader(Data(), batch_size=4, num_workers=1, multiprocessing_context={method!r})
            print([batch.tolist() for batch in loader])
            runtime.barrier("after")
        """,
    )
    job = launch("train.py")
    assert job.wait() == 0, job.describe()
    assert _lines(job) == ["[[0, 1, 2, 3], [4, 5, 6, 7]]"]
    job.assert_nothing_left()


def test_a_serving_worker_finishes_what_waits_before_it_leaves(
    write: Write, launch: Launch
) -> None:
    write(
        "app.py",
        """
        import time
        from runtime import RoleGroup, rpc
        class Server:
            @rpc
            def slow(self, number): time.sleep(0.3); print("did", number, flush=True)
            def teardown(self): print("torn down")
        def drive():
            for number in range(3):
                RoleGroup("server").cast("slow", number)
            RoleGroup("server").call("slow", 3).result(10)
            RoleGroup("server").cast("slow", 4)
        """,
    )
    write("job.toml", _role("app:Server", name="server", driver=False) + _role("app:drive"))
    job = launch("--job", "job.toml")
    assert job.wait() == 0, job.describe()
    assert _lines(job)[:4] == ["did 0", "did 1", "did 2", "did 3"]
    assert _lines(job)[-1] == "torn down"
