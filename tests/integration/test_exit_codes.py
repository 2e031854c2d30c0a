"""The launcher's exit code is the job's: 0, else the first failing worker's own.

What is killed or cut short is in `test_deaths.py`, what is refused in `test_bad_input.py`; more ways in which
a script can end are in `tests/test_worker.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support.job import Job
from tests.integration.support.programs import simple_role
from tests.integration.support.screen import assert_first_failure, assert_no_noise

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

ONE = ("--nproc-per-node", "1", "--role", "trainer")
TWO = ("--nproc-per-node", "2", "--role", "trainer")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(None)", 0),
        ("sys.exit('no data')", 1),
        ("sys.exit(300)", 300 % 256),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_script_ends_as_python_would_end_it(
    write: Write, launch: Launch, end: str, code: int
) -> None:
    job = launch(*ONE, write("train.py", f"import sys\n{end}\n"))
    assert job.wait() == code
    if end == "sys.exit('no data')":
        assert "no data" in job.err
    assert_no_noise(job)


def test_a_module_runs_like_python_m(write: Write, launch: Launch) -> None:
    write("package/__init__.py", "")
    write("package/__main__.py", "import sys\nprint(__name__, sys.argv[1:])\nsys.exit(6)\n")
    job = launch(*ONE, "-m", "package", "--flag", "value")
    assert job.wait() == 6
    assert "__main__ ['--flag', 'value']" in job.out


def test_a_program_gets_its_own_arguments_untouched(write: Write, launch: Launch) -> None:
    script = write("train.py", "import sys\nprint(sys.argv[1:])\n")
    job = launch(*ONE, script, "--nproc-per-node", "9", "-x", "--", "a b")
    assert job.wait() == 0
    assert "['--nproc-per-node', '9', '-x', '--', 'a b']" in job.out


def test_a_function_or_class_that_returns_ends_with_0(write: Write, launch: Launch) -> None:
    write(
        "program.py",
        """
        def run():
            print("function ran")
            return 5

        def configured(config):
            print("lr is", config["lr"])

        class Service:
            def setup(self):
                print("set up")

            def run(self):
                print("class ran")

            def teardown(self):
                print("torn down")
        """,
    )
    expected = {
        "run": ["function ran"],
        "configured": ["lr is 0.5"],
        "Service": ["set up", "class ran", "torn down"],
    }
    roles = [simple_role(f"program:{name}", role=name) for name in expected]
    job = launch("--job", write("job.toml", "[config]\nlr = 0.5\n" + "".join(roles)))
    assert job.wait() == 0
    lines = job.out.splitlines()
    for name, words in expected.items():
        assert [x.partition("] ")[2] for x in lines if x.startswith(f"[{name} ")] == words


def test_the_first_of_several_failures_decides(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        """
        import os, sys, time
        if os.environ["RANK"] == "1":
            open("first", "w").close()
            sys.exit(5)
        while not os.path.exists("first"):
            time.sleep(0.01)
        time.sleep(0.05)
        sys.exit(6)
        """,
    )
    job = launch("--nproc-per-node", "4", "--role", "trainer", script)
    assert job.wait() == 5
    assert_first_failure(job, role="trainer", rank=1, words=("5",))


def test_a_job_ends_when_its_drivers_have_returned(write: Write, launch: Launch) -> None:
    """The other roles are asked to stop; that they were running is no failure."""
    write(
        "program.py",
        """
        import time

        class Helper:
            def run(self):
                time.sleep(600)

        def drive():
            print("driven")
        """,
    )
    text = simple_role("program:drive", role="driver") + simple_role(
        "program:Helper", role="helper"
    )
    job = launch("--job", write("job.toml", text + "driver = false\n"))
    assert job.wait(20) == 0
    assert "driven" in job.out
    assert_no_noise(job)
    job.assert_nothing_left()


def test_a_role_that_only_serves_ends_with_the_job(write: Write, launch: Launch) -> None:
    write(
        "program.py",
        """
        from runtime import RoleGroup, rpc

        class Server:
            @rpc
            def answer(self):
                return 42

            def teardown(self):
                print("served")

        def drive():
            print("driven", RoleGroup("server").call_rank0("answer").result(timeout=20))
        """,
    )
    text = simple_role("program:drive", role="driver") + simple_role(
        "program:Server", role="server"
    )
    job = launch("--job", write("job.toml", text + "driver = false\n"))
    assert job.wait(20) == 0
    assert "driven 42" in job.out
    assert "served" in job.out
    job.assert_nothing_left()


def test_a_simple_worker_restarts_alone(write: Write, launch: Launch) -> None:
    write(
        "program.py",
        """
        import os, sys, time
        from runtime import current_worker

        def run():
            me = current_worker().actor_info
            print("start", me.rank, me.restart_count, flush=True)
            if me.rank == 1 and me.restart_count == 0:
                sys.exit(3)
            while not os.path.exists("restarted"):
                if me.restart_count:
                    open("restarted", "w").close()
                time.sleep(0.01)
        """,
    )
    role = '[roles.worker]\nentry = "program:run"\nkind = "simple"\ntotal = 2\n'
    job = launch("--job", write("job.toml", role + 'restart = { policy = "one", max = 1 }\n'))
    assert job.wait(20) == 0
    started = sorted(line.partition("] ")[2] for line in job.out.splitlines())
    assert started == ["start 0 0", "start 1 0", "start 1 1"]


def test_the_same_failure_at_the_same_step_three_times_running_ends_the_job_early(
    write: Write, launch: Launch
) -> None:
    body = """
        import os
        from runtime import current_worker

        open(f"try.{os.environ['TORCHELASTIC_RESTART_COUNT']}", "w").close()
        current_worker().report(step=7)
        1 / 0
        """
    job = launch(*ONE, "--max-restarts", "20", write("train.py", body))
    assert job.wait() == 1
    assert sorted(p.name for p in job.cwd.glob("try.*")) == ["try.0", "try.1", "try.2"]
    assert "ZeroDivisionError" in job.err
    job.assert_nothing_left()


def test_a_gang_that_fails_differently_uses_its_whole_budget(write: Write, launch: Launch) -> None:
    body = "import os, sys\nsys.exit(10 + int(os.environ['TORCHELASTIC_RESTART_COUNT']))\n"
    job = launch(*TWO, "--max-restarts", "4", write("train.py", body))
    assert job.wait() == 14
    assert "restart" in job.err
