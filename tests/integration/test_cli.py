"""`python -m runtime` from another terminal: jobs that run by themselves, seen, read and ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.hosts import Hosts
from tests.integration.support.job import ROOT, Job

STEPS = """
import os, sys, time
from runtime import current_worker
current_worker().report(step=7)
print("begins", os.environ["RANK"], flush=True)
print("warns", file=sys.stderr, flush=True)
while not os.path.exists("enough"):
    time.sleep(0.02)
print("ends", os.environ["RANK"], flush=True)
sys.exit(int(os.environ.get("CODE", "0")))
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


class Terminal:
    """Where the user types `python -m runtime …`."""

    def __init__(self, job: Job) -> None:
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(job.home)}
        self.env["XDG_RUNTIME_DIR"] = str(job.runtime_dir)

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", "runtime", *words],
            env=self.env,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def run(self, *words: str, timeout: float = 20.0) -> tuple[int, str, str]:
        """Exit code, what came out, and what was said."""
        process = self.start(*words)
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err

    def json(self, *words: str) -> Any:
        code, out, err = self.run(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def detached(launch: Callable[..., Job], write: Callable[[str, str], Path]) -> Callable[..., Job]:
    """A job that was started with `--detach`, when its launcher has gone."""

    def detached(program: str = STEPS, *options: str, **env: str) -> Job:
        job = launch("--detach", "--nproc-per-node", "2", *options, write("t.py", program), env=env)
        assert job.wait() == 0, job.describe()
        return job

    return detached


def end(job: Job) -> None:
    (job.cwd / "enough").touch()


def test_a_detached_job_is_seen_read_to_its_end_and_remembered(
    detached: Callable[..., Job],
) -> None:
    job = detached()
    job_id = job.out.strip()
    assert f"python -m runtime stop {job_id}" in job.err
    here = Terminal(job)
    status = here.json("status")
    assert (status["job_id"], status["stage"], status["exit_code"]) == (job_id, "running", None)
    workers = status["roles"]["default"]
    assert [(w["name"], w["state"]) for w in workers] == [
        ("default-0", "running"), ("default-1", "running"),
    ]  # fmt: skip
    # `wait` saw the end of the launcher's pipes: nobody has them any more. Nor its terminal.
    assert all(process.session != os.getsid(0) for process in job.processes())
    alive = {process.pid for process in job.processes()}
    assert {w["pid"] for w in workers} | {status["hosts"][0]["pid"]} <= alive
    while [worker["step"] for worker in here.json("status")["roles"]["default"]] != [7, 7]:
        time.sleep(0.1)  # a heartbeat brings it
    follower = here.start("logs", "-f")
    time.sleep(0.7)
    end(job)
    out, err = follower.communicate(timeout=20)
    assert (follower.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == [
        f"[default {rank}] {text}" for rank in (0, 1) for text in (f"begins {rank}", f"ends {rank}", "warns")
    ]  # fmt: skip
    job.assert_nothing_left()
    ended = here.json("status", job_id[:-2])
    assert (ended["stage"], ended["exit_code"]) == ("finished", 0)
    assert here.run("logs", "-n", "1", "--rank", "1", "--stdout")[1] == "[default 1] ends 1\n"
    assert [(j["job_id"], j["stage"]) for j in here.json("list")] == [(job_id, "finished")]


def test_a_failed_job_says_how_it_ended(detached: Callable[..., Job]) -> None:
    job = detached(STEPS, CODE="7")
    here = Terminal(job)
    watch = here.start("status", "--watch", "--json")
    assert watch.stdout is not None
    assert json.loads(watch.stdout.readline())["stage"] == "running"
    end(job)
    out, _ = watch.communicate(timeout=20)
    assert watch.returncode == 0
    assert json.loads(out.splitlines()[-1])["stage"] == "failed"
    code, out, _ = here.run("status")
    assert code == 0
    assert "exit code  7\n" in out
    assert "cause      exit code 7\n" in out
    job.assert_nothing_left()


def test_stop_ends_the_job_and_says_that_nothing_is_left(detached: Callable[..., Job]) -> None:
    job = detached()
    here = Terminal(job)
    both = [here.start("stop"), here.start("stop")]
    said = [process.communicate(timeout=20) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert any("nothing of it is left on localhost" in out for out, _ in said)
    assert job.processes() == []
    job.assert_nothing_left(0.5)
    assert here.json("status")["reason"] == "stopped by `python -m runtime stop`"
    code, _, err = here.run("stop")
    assert (code, "has ended before" in err) == (0, True)


def test_a_job_that_does_not_stop_is_named_and_then_killed(detached: Callable[..., Job]) -> None:
    job = detached(STUBBORN, "--shutdown-timeout", "30")
    here = Terminal(job)
    patient = here.start("stop")
    assert patient.stderr is not None
    assert "stopping job" in patient.stderr.readline()
    assert patient.stderr.readline() == "runtime: waiting for 2 ranks: default-0, default-1\n"
    code, out, err = here.run("stop", "--force")
    assert (code, "nothing of it is left" in out) == (0, True), err
    patient.communicate(timeout=10)
    assert patient.returncode == 0
    job.assert_nothing_left(0.5)


def test_ctrl_c_while_it_starts_stops_a_job_that_was_to_be_detached(
    launch: Callable[..., Job], write: Callable[[str, str], Path]
) -> None:
    absent = "import time; time.sleep(600)"
    job = launch("--detach", "--preload", "slow", write("t.py", absent), terminal=True)
    write("slow.py", "import time; open('loading', 'w').close(); time.sleep(600)")
    job.wait_for_files("loading")
    job.press_ctrl_c()
    assert job.wait() == 130, job.describe()
    job.assert_nothing_left()


def test_logs_go_on_over_restarts_and_a_killed_reader_costs_nothing(
    detached: Callable[..., Job],
) -> None:
    program = """
    import os, sys, time
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    print("attempt", attempt, "rank", os.environ["RANK"], flush=True)
    while not os.path.exists("go" + attempt):
        time.sleep(0.02)
    sys.exit(3 if attempt == "0" else 0)
    """
    job = detached(program, "--max-restarts", "1")
    here = Terminal(job)
    killed, reader = here.start("logs", "-f"), here.start("logs", "-f", "--json")
    time.sleep(1.0)
    killed.kill()
    killed.communicate()
    (job.cwd / "go0").touch()
    until = time.monotonic() + 15
    while here.json("status")["restarts"] != 1:
        assert time.monotonic() < until
    (job.cwd / "go1").touch()
    started = time.monotonic()
    out, _ = reader.communicate(timeout=20)
    assert time.monotonic() - started < 5.0
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted((line["attempt"], line["line"]) for line in lines) == [
        (attempt, f"attempt {attempt} rank {rank}") for attempt in (0, 1) for rank in (0, 1)
    ]
    job.assert_nothing_left()


def test_an_attached_job_is_seen_and_stopped_from_another_terminal(
    launch: Callable[..., Job], write: Callable[[str, str], Path]
) -> None:
    job = launch(write("t.py", STEPS))
    job.wait_for_text("begins 0")
    here = Terminal(job)
    assert here.json("status")["stage"] == "running"
    assert here.run("stop")[0] == 0
    assert job.wait() == 143
    assert "stopped by `python -m runtime stop`" in job.err
    job.assert_nothing_left()


def test_an_agent_that_hangs_is_named_and_killed_and_one_that_was_killed_is_missed(
    detached: Callable[..., Job],
) -> None:
    job = detached()
    here = Terminal(job)
    agent = here.json("status")["hosts"][0]["pid"]
    os.kill(agent, signal.SIGSTOP)
    started = time.monotonic()
    code, out, err = here.run("stop", "--force")
    assert "the agent of localhost does not answer" in err
    assert (code, "nothing of it is left" in out) == (0, True), err
    assert time.monotonic() - started < 15.0
    job.assert_nothing_left(0.5)
    assert here.json("status")["reason"] == "stopped by `python -m runtime stop`"

    job = detached()
    here = Terminal(job)
    os.kill(here.json("status")["hosts"][0]["pid"], signal.SIGKILL)
    job.assert_nothing_left()
    code, out, _ = here.run("status")
    assert (code, ": lost" in out) == (1, True), out
    assert here.run("stop")[0] == 1
    assert "lost" in here.run("list")[1]


class Away:
    """`python -m ...` on host1, in a job's folder."""

    def __init__(self, hosts: Hosts, cwd: Path) -> None:
        self._hosts, self._cwd = hosts, cwd
        self._env = {"HOME": str(cwd), "RUNTIME_COORDINATOR_HEARTBEAT_TIMEOUT_MS": "8000"}

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        more: dict[str, Any] = {"env": self._env, "cwd": self._cwd, "check": False, "timeout": 60}
        return self._hosts.python("host1", "-m", *words, **more)

    def detach(self, program: str, *options: str) -> None:
        (self._cwd / "t.py").write_text(program)
        launched = self.run("runtime.launch", "--detach", *options, "t.py")
        assert launched.returncode == 0, launched.stderr

    def status(self) -> Any:
        return json.loads(self.run("runtime", "status", "--json").stdout)


@pytest.fixture
def away(hosts: Hosts, tmp_path: Path) -> Away:
    return Away(hosts, tmp_path)


def test_a_detached_job_of_three_hosts_is_seen_and_killed_though_an_agent_hangs(
    hosts: Hosts, away: Away
) -> None:
    away.detach(STEPS, "--hosts", "host1,host2,host3")
    status = away.status()
    assert [host["problem"] for host in status["hosts"]] == ["", "", ""]
    workers = status["roles"]["default"]
    assert [(w["host"], w["state"]) for w in workers] == [
        (host, "running") for host in ("host1", "host2", "host3")
    ]
    out = away.run("runtime", "logs", "--stdout").stdout
    assert sorted(out.splitlines()) == [f"[default {n} host{n + 1}] begins {n}" for n in range(3)]
    assert not [p for p in hosts.processes("host1") if "-m runtime.launch" in p or "ssh " in p]
    hosts.exec("host3", "kill", "-STOP", status["hosts"][2]["pid"])
    killed = away.run("runtime", "stop", "--force")
    assert (killed.returncode, "left on host1, host2, host3" in killed.stdout) == (0, True), killed
    hosts.assert_empty(0.5)


def test_what_a_job_on_other_hosts_has_left_is_fetched_and_remembered(
    hosts: Hosts, away: Away, tmp_path: Path
) -> None:
    fails = """
if os.environ["RANK"] == "0":
    open("zero", "w").close()
while not os.path.exists("zero"):
    time.sleep(0.02)
sys.stderr.write("hot\\n")
sys.exit"""
    program = STEPS.replace("sys.exit", fails).replace("CODE", "RANK")
    away.detach(program, "--log-dir", "/tmp/logs", "--hosts", "host2,host3")
    (tmp_path / "enough").touch()
    hosts.assert_empty(20.0)
    assert " unknown " in away.run("runtime", "list").stdout
    asked = away.run("runtime", "status")
    assert asked.returncode == 0, asked.stderr
    for words in ("failed", "default rank 1 on host3", "\n  hot\n", "logs       /tmp/logs/"):
        assert words in asked.stdout
    assert json.loads(away.run("runtime", "list", "--json").stdout)[0]["exit_code"] == 1
    lines = sorted(away.run("runtime", "logs", "--stdout", "-n", "1").stdout.splitlines())
    assert lines == ["[default 0 host2] ends 0", "[default 1 host3] ends 1"]


@pytest.mark.long
def test_a_host_that_is_cut_off_is_named_when_the_job_is_stopped(hosts: Hosts, away: Away) -> None:
    away.detach(STEPS, "--hosts", "host1,host2,host3")
    hosts.cut("host3")
    stopped = away.run("runtime", "stop")
    assert stopped.returncode == 1
    assert "host3: the agent of host3 " in stopped.stderr
    assert "what is left there is not known" in stopped.stderr
    for host in ("host1", "host2"):
        assert hosts.processes(host) == []
    hosts.heal()
    hosts.assert_empty(40.0)
    ended = away.status()
    assert (ended["stage"], ended["exit_code"]) == ("failed", 143)
