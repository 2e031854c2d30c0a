"""Whatever dies, wherever: the right exit code, the first failure named, and nothing of the job left.

Each test kills something (or lets it fail) in a real job and looks at it from outside. The issue's list is
the order of this file: workers that end by themselves, workers that are killed, entries that cannot be run,
the processes of ours, the user at the terminal, time running out, and workers with habits of their own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support import processes
from tests.integration.support.job import Job
from tests.integration.support.programs import SLEEP_FOR_LONG, WRITE_PID, simple_role
from tests.integration.support.screen import assert_first_failure, assert_no_noise, box, said

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

TWO = ("--nproc-per-node", "2", "--role", "trainer")
START_METHODS = ("fork", "spawn")


OBEDIENT = (
    WRITE_PID
    + """
import signal, sys, time

def leave(number, frame):
    print("told to leave", rank, flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
print("ready", rank, flush=True)
time.sleep(600)
"""
)
STUBBORN = (
    WRITE_PID
    + """
import signal, time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("ready", rank, flush=True)
while True:
    time.sleep(600)
"""
)
HALF_STUBBORN = STUBBORN.replace("import signal, time\n", "import signal, sys, time\n").replace(
    "print(", "if rank == 0:\n    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nprint(", 1
)
"""Rank 0 leaves when asked, rank 1 does not."""

DAEMON = (
    WRITE_PID
    + """
import time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        pathlib.Path("new").write_text(str(os.getpid()))
        os.rename("new", "daemon")
        time.sleep(600)
    os._exit(0)
os.wait()
while not pathlib.Path("daemon").exists():
    time.sleep(0.01)
"""
)
"""Leaves a process in a session of its own, and waits until it is there."""


def run_simple(write: Write, launch: Launch, body: str, entry: str = "program:run") -> Job:
    """A job of one simple role `worker` whose module `program` holds `body`."""
    write("program.py", body)
    return launch("--job", write("job.toml", simple_role(entry)))


# -- workers that end by themselves --------------------------------------------------------------


@pytest.mark.parametrize("method", START_METHODS)
def test_a_worker_that_raises_ends_the_job_with_1_and_its_traceback(
    write: Write, launch: Launch, method: str
) -> None:
    script = write(
        "train.py",
        """
        import os, time

        def inner():
            raise ValueError("boom 17")

        if os.environ["RANK"] == "1":
            inner()
        time.sleep(600)
        """,
    )
    job = launch(*TWO, "--start-method", method, script)
    assert job.wait() == 1
    assert_first_failure(
        job, role="trainer", rank=1, words=("ValueError: boom 17", "inner", "train.py")
    )
    job.assert_nothing_left()


def test_a_script_that_exits_3_ends_the_job_with_3(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        """
        import os, sys, time
        if os.environ["RANK"] == "0":
            sys.exit(3)
        time.sleep(600)
        """,
    )
    job = launch(*TWO, script)
    assert job.wait() == 3
    assert_first_failure(job, role="trainer", rank=0, words=("3",))
    job.assert_nothing_left()


@pytest.mark.parametrize(
    ("entry", "body"),
    [
        ("program:run", "import sys\ndef run():\n    sys.exit(3)\n"),
        ("program:Run", "import sys\nclass Run:\n    def run(self):\n        sys.exit(3)\n"),
    ],
    ids=["function", "class"],
)
def test_an_object_that_exits_3_ends_the_job_with_3(
    write: Write, launch: Launch, entry: str, body: str
) -> None:
    job = run_simple(write, launch, body, entry)
    assert job.wait() == 3
    assert_first_failure(job, role="worker", rank=0, words=("3",))
    job.assert_nothing_left()


@pytest.mark.parametrize("method", START_METHODS)
def test_a_worker_that_leaves_by_os_exit_ends_the_job_with_its_code(
    write: Write, launch: Launch, method: str
) -> None:
    script = write("train.py", "import os\nos._exit(4)\n")
    job = launch(*TWO, "--start-method", method, script)
    assert job.wait() == 4
    assert "4" in box(job)
    assert_no_noise(job)
    job.assert_nothing_left()


# -- workers that are killed ---------------------------------------------------------------------


@pytest.mark.parametrize("method", START_METHODS)
def test_a_worker_killed_by_sigkill_ends_the_job_with_137(
    write: Write, launch: Launch, method: str
) -> None:
    job = launch(*TWO, "--start-method", method, write("train.py", WRITE_PID + SLEEP_FOR_LONG))
    job.worker_pid(0)
    os.kill(job.worker_pid(1), signal.SIGKILL)
    assert job.wait() == 137
    assert_first_failure(job, role="trainer", rank=1, words=("SIGKILL",))
    job.assert_nothing_left()


def test_a_worker_with_a_segmentation_fault_ends_the_job_with_139(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        """
        import ctypes, os, time

        def read_nowhere():
            ctypes.string_at(0)

        if os.environ["RANK"] == "1":
            read_nowhere()
        time.sleep(600)
        """,
    )
    job = launch(*TWO, script)
    assert job.wait() == 139
    words = ("SIGSEGV", "Segmentation fault", "read_nowhere")
    assert_first_failure(job, role="trainer", rank=1, words=words, dumped=True)
    job.assert_nothing_left()


def test_a_gang_killed_twice_in_a_row_comes_back_twice(write: Write, launch: Launch) -> None:
    body = WRITE_PID + "import time\nif attempt < 2:\n    time.sleep(600)\nprint('done', attempt)\n"
    job = launch(*TWO, "--max-restarts", "2", write("train.py", body))
    for attempt in range(2):
        job.worker_pid(0, attempt)
        os.kill(job.worker_pid(1, attempt), signal.SIGKILL)
    assert job.wait() == 0
    assert job.out.count("done 2") == 2
    assert_no_noise(job)
    job.assert_nothing_left()


def test_a_gang_killed_once_more_than_it_may_restart_ends_the_job_with_137(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, "--max-restarts", "1", write("train.py", WRITE_PID + SLEEP_FOR_LONG))
    for attempt in range(2):
        job.worker_pid(1, attempt)
        os.kill(job.worker_pid(0, attempt), signal.SIGKILL)
    assert job.wait() == 137
    assert_first_failure(job, role="trainer", rank=0, words=("SIGKILL",))
    assert not (job.cwd / "pid.0.2").exists()
    job.assert_nothing_left()


# -- entries that cannot be run ------------------------------------------------------------------


def test_a_script_with_an_import_error_ends_the_job_with_1(write: Write, launch: Launch) -> None:
    job = launch(*TWO, write("train.py", "import no_such_module_of_mine\n"))
    assert job.wait() == 1
    assert "ModuleNotFoundError: No module named 'no_such_module_of_mine'" in box(job)
    assert_no_noise(job)
    job.assert_nothing_left()


def test_an_entry_module_with_an_import_error_ends_the_job_with_1(
    write: Write, launch: Launch
) -> None:
    job = run_simple(write, launch, "import no_such_module_of_mine\ndef run(): pass\n")
    assert job.wait() == 1
    assert_first_failure(job, role="worker", rank=0, words=("no_such_module_of_mine", "program.py"))
    job.assert_nothing_left()


@pytest.mark.parametrize(
    ("entry", "wrong"), [("nowhere_at_all:run", "nowhere_at_all"), ("program:nope", "nope")]
)
def test_a_missing_module_or_attribute_is_told_before_anything_starts(
    write: Write, launch: Launch, entry: str, wrong: str
) -> None:
    write("program.py", "open('started', 'w')\ndef run(): pass\n")
    for options in (("--entry", entry), ("--job", write("job.toml", simple_role(entry)))):
        job = launch(*options)
        assert job.wait() == 2
        assert wrong in job.err
        assert "Traceback" not in job.err
        assert not job.logs.exists()
        job.assert_nothing_left()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("run = int('7')\n", ("program:run", "'int'", "expected a function or a class")),
        ("def pick():\n    return lambda a, b: 0\nrun = pick()\n", ("program:run", "argument")),
    ],
    ids=["no callable", "two arguments"],
)
def test_an_entry_that_only_its_module_can_show_to_be_wrong_ends_the_job_with_1(
    write: Write, launch: Launch, body: str, words: tuple[str, ...]
) -> None:
    job = run_simple(write, launch, body)
    assert job.wait() == 1
    assert_first_failure(job, role="worker", rank=0, words=words)
    assert_no_noise(job)
    job.assert_nothing_left()


def test_a_constructor_that_raises_ends_the_job_with_1_and_its_traceback(
    write: Write, launch: Launch
) -> None:
    body = """
        class Worker:
            def __init__(self):
                raise OSError("no model there")

            def run(self):
                pass
        """
    job = run_simple(write, launch, body, "program:Worker")
    assert job.wait() == 1
    assert_first_failure(
        job, role="worker", rank=0, words=("OSError: no model there", "__init__", "program.py")
    )
    job.assert_nothing_left()


# -- processes of ours ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", START_METHODS)
def test_a_killed_agent_ends_the_job_with_69(write: Write, launch: Launch, method: str) -> None:
    job = launch(*TWO, "--start-method", method, write("train.py", WRITE_PID + SLEEP_FOR_LONG))
    job.worker_pid(0)
    job.worker_pid(1)
    os.kill(job.agent().pid, signal.SIGKILL)
    assert job.wait(15) == 69
    assert "agent" in job.err
    assert "SIGKILL" in job.err
    assert_no_noise(job)
    job.assert_nothing_left()


def test_an_agent_that_hangs_does_not_keep_a_launcher_that_is_told_to_kill(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, write("train.py", WRITE_PID + SLEEP_FOR_LONG))
    job.worker_pid(0)
    job.worker_pid(1)
    os.kill(job.agent().pid, signal.SIGSTOP)
    job.signal(signal.SIGINT)
    job.wait_until(lambda: "again: kill it now" in job.err, "the first signal was seen")
    job.signal(signal.SIGINT)
    assert job.wait(15) == 130
    assert "agent of host localhost killed by SIGKILL" in job.err
    job.assert_nothing_left()


def test_a_worker_that_is_stopped_ends_with_the_others(write: Write, launch: Launch) -> None:
    fails = "if rank == 0:\n    os.kill(int(pathlib.Path('pid.1.0').read_text()), 19)\n    sys.exit(3)\n"
    waits = "while rank == 0 and not pathlib.Path('pid.1.0').exists():\n    time.sleep(0.01)\n"
    job = launch(
        *TWO, write("train.py", f"{WRITE_PID}import sys, time\n{waits}{fails}time.sleep(600)")
    )
    assert job.wait(8) == 3, "without the ten seconds that those have who do not heed SIGTERM"
    job.assert_nothing_left()


def test_a_killed_zygote_does_not_disturb_the_job(write: Write, launch: Launch) -> None:
    body = WRITE_PID + (
        "import time\n"
        "while not pathlib.Path('go').exists():\n"
        "    time.sleep(0.02)\n"
        "print('finished', rank)\n"
    )
    job = launch(*TWO, write("train.py", body))
    job.worker_pid(0)
    job.worker_pid(1)
    os.kill(job.zygote().pid, signal.SIGKILL)
    time.sleep(0.5)
    write("go", "")
    assert job.wait() == 0
    assert job.out.count("finished") == 2
    assert_no_noise(job)
    job.assert_nothing_left()


def test_a_gang_restarts_also_after_its_zygote_was_killed(write: Write, launch: Launch) -> None:
    body = WRITE_PID + "import time\nif attempt < 1:\n    time.sleep(600)\nprint('done', attempt)\n"
    job = launch(*TWO, "--max-restarts", "1", write("train.py", body))
    job.worker_pid(0)
    victim = job.worker_pid(1)
    os.kill(job.zygote().pid, signal.SIGKILL)
    os.kill(victim, signal.SIGKILL)
    assert job.wait() == 0
    assert job.out.count("done 1") == 2
    job.assert_nothing_left()


@pytest.mark.parametrize("method", START_METHODS)
def test_a_killed_launcher_takes_its_job_with_it(write: Write, launch: Launch, method: str) -> None:
    job = launch(*TWO, "--start-method", method, write("train.py", WRITE_PID + SLEEP_FOR_LONG))
    job.worker_pid(0)
    job.worker_pid(1)
    job.signal(signal.SIGKILL)
    assert job.popen.wait(5) == -signal.SIGKILL
    job.assert_nothing_left(within=5)


@pytest.mark.parametrize("who", ["launcher", "agent"])
def test_workers_that_ignore_sigterm_and_their_daemons_die_with_launcher_and_agent(
    write: Write, launch: Launch, who: str
) -> None:
    job = launch("--nproc-per-node", "1", write("train.py", DAEMON + STUBBORN))
    job.wait_for_text("ready")
    job.processes()
    os.kill(job.pid if who == "launcher" else job.agent().pid, signal.SIGKILL)
    assert job.popen.wait(15) == (-signal.SIGKILL if who == "launcher" else 69)
    job.assert_nothing_left(within=5)
    assert not processes.is_alive(int((job.cwd / "daemon").read_text()))


def test_a_launcher_killed_while_it_starts_leaves_nothing(write: Write, launch: Launch) -> None:
    script = write("train.py", WRITE_PID + SLEEP_FOR_LONG)
    for delay in (0.05, 0.15, 0.3, 0.5):
        job = launch(*TWO, script)
        time.sleep(delay)
        job.signal(signal.SIGKILL)
        job.popen.wait(5)
        job.assert_nothing_left(within=5)


# -- the user at the terminal --------------------------------------------------------------------


def test_a_closed_terminal_ends_the_job_with_129(write: Write, launch: Launch) -> None:
    job = launch(*TWO, write("train.py", WRITE_PID + SLEEP_FOR_LONG), terminal=True)
    job.worker_pid(0)
    job.worker_pid(1)
    job.hang_up()
    assert job.popen.wait(15) == 129
    job.assert_nothing_left()


def test_one_ctrl_c_lets_the_workers_leave_and_ends_with_130(write: Write, launch: Launch) -> None:
    job = launch(*TWO, write("train.py", OBEDIENT), terminal=True)
    job.wait_for_text("ready", 2)
    job.press_ctrl_c()
    assert job.wait(15) == 130
    assert job.out.count("told to leave") == 2
    assert "KeyboardInterrupt" not in job.out
    job.assert_nothing_left()


def test_one_ctrl_c_says_whom_it_waits_for_and_kills_them_in_the_end(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, "--shutdown-timeout", "3", write("train.py", HALF_STUBBORN))
    job.wait_for_text("ready", 2)
    asked = time.monotonic()
    job.signal(signal.SIGINT)
    assert job.wait(15) == 130
    assert 2.5 < time.monotonic() - asked < 7
    waited = [line for line in said(job).splitlines() if "waiting" in line]
    assert any("trainer-1" in line or "trainer 1" in line for line in waited), job.describe()
    assert not any("trainer-0" in line or "trainer 0" in line for line in waited[-1:])
    assert_no_noise(job)
    job.assert_nothing_left()


def test_a_second_ctrl_c_kills_at_once(write: Write, launch: Launch) -> None:
    job = launch(*TWO, "--shutdown-timeout", "60", write("train.py", STUBBORN), terminal=True)
    job.wait_for_text("ready", 2)
    job.press_ctrl_c()
    job.wait_for_text("wait")
    asked = time.monotonic()
    job.press_ctrl_c()
    assert job.wait(15) == 130
    assert time.monotonic() - asked < 3
    job.assert_nothing_left()


def test_sigterm_to_the_launcher_is_the_first_ctrl_c_and_ends_with_143(
    write: Write, launch: Launch
) -> None:
    job = launch(*TWO, write("train.py", OBEDIENT))
    job.wait_for_text("ready", 2)
    job.signal(signal.SIGTERM)
    assert job.wait(15) == 143
    assert job.out.count("told to leave") == 2
    assert_no_noise(job)
    job.assert_nothing_left()


def test_ctrl_c_while_the_job_starts_ends_it_with_130(write: Write, launch: Launch) -> None:
    script = write("train.py", OBEDIENT)
    job = launch(*TWO, script)
    job.wait_until(lambda: len(job.processes()) > 1, "the agent was started")
    job.signal(signal.SIGINT)
    # Before the launcher can answer for itself the signal ends it; a shell calls both of them 130.
    assert job.wait(15) in (130, -signal.SIGINT)
    assert "Traceback" not in job.err
    assert_no_noise(job)
    job.assert_nothing_left()


def test_ctrl_c_before_the_agent_has_looked_at_its_job_is_not_lost(
    write: Write, launch: Launch
) -> None:
    """The agent is held up, so that job and request to stop reach it in one go."""
    job = launch(*TWO, write("train.py", OBEDIENT))
    job.wait_until(
        lambda: any(p.parent == job.pid and "runtime.agent" in p.command for p in job.processes()),
        "the agent was started",
    )
    agent = job.agent().pid
    os.kill(agent, signal.SIGSTOP)
    time.sleep(1.0)
    job.signal(signal.SIGINT)
    job.wait_for_text("Ctrl-C")
    os.kill(agent, signal.SIGCONT)
    assert job.wait(8) == 130
    job.assert_nothing_left()


# -- time running out ----------------------------------------------------------------------------


def test_a_job_that_takes_too_long_ends_with_124(write: Write, launch: Launch) -> None:
    job = launch(*TWO, "--timeout", "2", write("train.py", OBEDIENT))
    assert job.wait(15) == 124
    assert 2 <= job.seconds < 8
    assert "timeout" in job.err.lower()
    assert_no_noise(job)
    job.assert_nothing_left()


# -- workers with habits of their own ------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("\nos.kill(os.getpid(), 9)\n", 137)], ids=["returns", "killed"]
)
def test_a_daemon_that_a_worker_left_does_not_outlive_the_job(
    write: Write, launch: Launch, end: str, code: int
) -> None:
    options = ("--nproc-per-node", "1", "--role", "trainer")
    job = launch(*options, write("train.py", DAEMON + end))
    assert job.wait() == code
    job.assert_nothing_left()
    assert not processes.is_alive(int((job.cwd / "daemon").read_text()))


def test_a_daemon_holding_the_output_does_not_hold_up_the_end(write: Write, launch: Launch) -> None:
    """It inherits the worker's stdout; the job waits for the worker's end, not for the pipe's."""
    job = launch("--nproc-per-node", "1", write("train.py", DAEMON + "\nprint('bye')\n"))
    assert job.wait(15) == 0
    assert "bye" in job.out
    job.assert_nothing_left()


@pytest.mark.slow
def test_a_worker_killed_while_the_others_wait_in_an_all_reduce_is_named_first(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        """
        import os, signal, torch, torch.distributed as dist
        dist.init_process_group("gloo")
        x = torch.ones(1000)
        for step in range(1000):
            if step == 5 and dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(x)
        """,
    )
    job = launch("--nproc-per-node", "3", "--role", "trainer", script)
    assert job.wait() == 137
    assert_first_failure(job, role="trainer", rank=1, words=("SIGKILL",))
    job.assert_nothing_left()
