"""A worker process from its first instruction to its exit code. Real processes: that is what it is about."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

import runtime
from runtime.errors import MisuseError
from runtime.job import Entry
from runtime.worker import Worker
from tests.worker_process import WorkerProcess, run_script, worker_spec, write

# -- scripts and modules ----------------------------------------------------------------------


def test_a_script_is_the_main_module_with_its_own_arguments(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import os, sys, __main__
        print(__name__, __spec__, __package__, __file__ == os.path.abspath(sys.argv[0]))
        print(sys.argv[1:], sys.path[0] == os.path.dirname(os.path.realpath(__file__)))
        print(vars(__main__) is globals(), "WorkerSpec" in globals())
        """,
        "--x",
        "a b",
    )
    assert ended.stdout.splitlines() == [
        "__main__ None None True",
        "['--x', 'a b'] True",
        "True False",
    ]
    assert (ended.code, ended.stderr, ended.error) == (0, "", None)


def test_a_module_runs_as_python_m_runs_it(tmp_path: Path) -> None:
    write(tmp_path, "pack/__init__.py", "")
    write(tmp_path, "pack/near.py", "here = 'near'")
    write(
        tmp_path,
        "pack/__main__.py",
        """
        import sys
        from .near import here
        print(__name__, __spec__.name, __package__, here, sys.argv[1:])
        """,
    )
    spec = worker_spec(tmp_path, Entry("module", "pack", ("1",)))
    with WorkerProcess(spec) as worker:
        ended = worker.end()
    assert (ended.stdout, ended.code) == ("__main__ pack.__main__ pack near ['1']\n", 0)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_classes_of_a_script_go_to_multiprocessing_children_and_back(
    tmp_path: Path, method: str
) -> None:
    ended = run_script(
        tmp_path,
        f"""
        import multiprocessing
        class Thing:
            def __init__(self, x): self.x = x
        def work(thing): return Thing(thing.x + 1)
        if __name__ == "__main__":
            with multiprocessing.get_context({method!r}).Pool(1) as pool:
                print(pool.map(work, [Thing(1)])[0].x)
        """,
    )
    assert (ended.stdout, ended.code) == ("2\n", 0), ended.stderr


def test_a_plain_script_loads_neither_zmq_nor_asyncio(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import sys, threading
        print([n for n in ("zmq", "asyncio", "torch", "runtime.node") if n in sys.modules])
        print([t.name for t in threading.enumerate() if not t.daemon])
        """,
    )
    assert ended.stdout.splitlines() == ["[]", "['MainThread']"]


def test_the_program_sees_none_of_ours_as_its_main(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "import sys; print(sys.path.count(sys.path[0]), __builtins__)")
    assert ended.stdout.startswith("1 <module 'builtins'")


# -- how a program ends -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit(9)", 9),
        ("sys.exit(None)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit(300)", 300 % 256),
        ("sys.exit(-1)", 255),
        ("sys.exit(2**40)", 0),
        ("sys.exit(True)", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_the_exit_code_is_the_programs_own(tmp_path: Path, code: str, expected: int) -> None:
    assert run_script(tmp_path, f"import os, sys\n{code}").code == expected


def test_exit_with_a_text_prints_it_and_is_a_failure(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "import sys; sys.exit('no data')")
    assert (ended.code, ended.stderr) == (1, "no data\n")
    assert ended.error is not None
    assert ended.error["message"]["message"] == "no data"


def test_an_uncaught_error_shows_the_programs_frames_only(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import runtime
        def inner():
            raise ValueError("bad value")
        runtime.current_worker().report(step=7, loss=0.5)
        inner()
        """,
    )
    assert ended.code == 1
    assert ended.stderr.startswith("Traceback (most recent call last):\n")
    assert ended.stderr.endswith("ValueError: bad value\n")
    assert "/runtime/" not in ended.stderr
    assert ended.error is not None
    message = ended.error["message"]
    assert message["message"] == "ValueError: bad value"
    assert message["extraInfo"]["py_callstack"] == ended.stderr
    assert int(message["extraInfo"]["timestamp"]) > 1_700_000_000
    assert (ended.error["type"], ended.error["step"]) == ("ValueError", 7)


def test_a_syntax_error_points_at_the_line(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "x = (1,\n")
    assert ended.code == 1
    assert 'train.py", line 1' in ended.stderr
    assert "SyntaxError" in ended.stderr
    assert "/runtime/" not in ended.stderr


def test_an_excepthook_of_the_program_is_used(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import sys
        sys.excepthook = lambda kind, error, frames: print("hooked", kind.__name__, error)
        {}["missing"]
        """,
    )
    assert (ended.stdout, ended.stderr, ended.code) == ("hooked KeyError 'missing'\n", "", 1)


@pytest.mark.parametrize(
    ("form", "target", "text"),
    [
        ("script", "missing.py", "cannot read the script 'missing.py': No such file"),
        ("module", "no_such_module_here", "no_such_module_here"),
        ("module", "json.nothing", "cannot run module 'json.nothing': its package has no such"),
    ],
)
def test_what_cannot_be_found_is_named_without_a_traceback(
    tmp_path: Path, form: str, target: str, text: str
) -> None:
    entry = Entry(form, target)  # type: ignore[arg-type]
    with WorkerProcess(worker_spec(tmp_path, entry)) as worker:
        ended = worker.end()
    assert ended.code == 1
    assert text in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.error is not None


def test_exit_handlers_run_and_files_left_open_are_written(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import atexit, threading, time
        atexit.register(print, "exit handler")
        def late():
            time.sleep(0.2); print("thread ended")
        threading.Thread(target=late).start()
        kept = open("kept.txt", "w"); kept.write("all of it")
        print("main ended", end="")
        """,
    )
    assert ended.stdout == "main endedthread ended\nexit handler\n"
    assert (tmp_path / "kept.txt").read_text() == "all of it"
    assert ended.code == 0


def test_a_thread_that_hangs_does_not_hang_a_failed_worker(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,), name="stuck-one").start()
        1 / 0
        """,
        shutdown_timeout_s=0.3,
    )
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.stderr
    assert "did not end within 0.3 s" in ended.stderr
    assert "stuck-one" in ended.stderr


def test_a_child_that_the_program_forks_writes_no_error_file(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import os
        if os.fork() == 0:
            raise ValueError("in the child")
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        """,
    )
    assert (ended.stdout, ended.code, ended.error) == ("1\n", 0, None)


# -- stop requests ----------------------------------------------------------------------------


def test_a_program_that_ignores_should_stop_gets_a_system_exit(tmp_path: Path) -> None:
    text = """
        import atexit, time
        atexit.register(print, "exit handler")
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("cleaned up")
    """
    path = write(tmp_path, "train.py", text)
    with WorkerProcess(worker_spec(tmp_path, Entry("script", str(path)))) as worker:
        worker.wait_for("ready")
        worker.terminate()
        ended = worker.end()
    assert (ended.code, ended.stdout, ended.stderr) == (143, "cleaned up\nexit handler\n", "")
    assert ended.error is None


def test_a_program_that_looks_at_should_stop_decides_itself(tmp_path: Path) -> None:
    text = """
        import time, runtime
        worker = runtime.current_worker()
        assert not worker.should_stop and worker.stop_deadline is None
        print("ready", flush=True)
        while not worker.should_stop:
            time.sleep(0.01)
        print(worker.stop_event.wait(1), 0 < worker.stop_deadline - time.monotonic() <= 1.0)
    """
    path = write(tmp_path, "train.py", text)
    with WorkerProcess(worker_spec(tmp_path, Entry("script", str(path)))) as worker:
        worker.wait_for("ready")
        worker.terminate()
        ended = worker.end()
    assert (ended.code, ended.stdout) == (0, "True True\n"), ended.stderr


def test_a_main_thread_stuck_in_c_code_is_ended_with_its_output(tmp_path: Path) -> None:
    text = """
        import hashlib, sys, threading
        kept = open("kept.txt", "w"); kept.write("said before")
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000_000)
    """
    path = write(tmp_path, "train.py", text)
    with WorkerProcess(worker_spec(tmp_path, Entry("script", str(path)))) as worker:
        worker.wait_for("ready")
        worker.terminate()
        ended = worker.end()
    assert ended.code == 143
    assert (tmp_path / "kept.txt").read_text() == "said before"


def test_a_handler_of_the_program_is_left_alone(tmp_path: Path) -> None:
    text = """
        import hashlib, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        print("ready", flush=True)
        for _ in range(3):
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 1_500_000)
    """
    path = write(tmp_path, "train.py", text)
    with WorkerProcess(worker_spec(tmp_path, Entry("script", str(path)))) as worker:
        worker.wait_for("ready")
        worker.terminate()
        assert worker.end().code == 5


def test_forked_children_of_a_program_die_of_sigterm_as_ever(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import os, signal, time
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, b".")
            time.sleep(60)
        os.read(read, 1)
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        """,
    )
    assert (ended.stdout, ended.code) == (f"{-signal.SIGTERM}\n", 0)


# -- identity ---------------------------------------------------------------------------------


def test_a_worker_knows_who_it_is(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import runtime
        worker = runtime.current_worker()
        print(worker)
        print(worker.job_info.name, worker.job_info.job_id, worker.job_info.accelerator_type)
        print(worker.job_info.user_config["lr"], worker.actor_info.name, worker.actor_info.host)
        """,
        config={"lr": 0.1},
    )
    assert ended.stdout.splitlines() == [
        "trainer-0 (rank 0 of 1, local rank 0 of 1 on here, restart 0) of job 'demo' (j1)",
        "demo j1 CPU",
        "0.1 trainer-0 here",
    ]


def test_outside_of_a_job_there_is_no_worker() -> None:
    with pytest.raises(MisuseError, match=r"python -m runtime\.launch"):
        runtime.current_worker()


def test_reports_keep_the_last_step_and_refuse_what_is_no_number(tmp_path: Path) -> None:
    worker = Worker(worker_spec(tmp_path, Entry("script", "x.py")))
    worker.report(step=3, loss=1.0)
    worker.report(loss=0.5)
    assert worker.progress is not None
    assert (worker.progress.step, worker.progress.metrics) == (3, {"loss": 0.5})
    with pytest.raises(MisuseError, match="step='4'"):
        worker.report(step="4")  # type: ignore[arg-type]
    with pytest.raises(MisuseError, match="from 0 on"):
        worker.report(step=-1)


def test_an_async_function_that_left_a_thread_hanging_does_not_hang_a_failed_worker(
    tmp_path: Path,
) -> None:
    ended = run_script(
        tmp_path,
        """
        import asyncio, time
        async def main():
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
            await asyncio.sleep(0.1)
            raise ValueError("first")
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        """,
        shutdown_timeout_s=0.3,
    )
    assert ended.code == 1
    assert "ValueError: first" in ended.stderr
    assert "did not end within 0.3 s" in ended.stderr


def test_a_hook_of_the_program_that_fails_itself_does_not_hide_the_error(tmp_path: Path) -> None:
    ended = run_script(
        tmp_path,
        """
        import sys
        sys.excepthook = lambda *_: 1 / 0
        raise ValueError("the one to see")
        """,
    )
    assert ended.code == 1
    assert "ValueError: the one to see" in ended.stderr
    assert ended.error is not None


def test_a_closed_stderr_changes_no_exit_code(tmp_path: Path) -> None:
    ended = run_script(tmp_path, "import sys\nsys.stderr.close()\nsys.exit('text')")
    assert ended.code == 1
    assert ended.error is not None
