"""`python -m runtime` where no job runs: its words, its exit codes, what it knows from files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from runtime.cli import main
from runtime.launcher import jobs
from runtime.launcher.records import JobEndpoint, JobHost
from runtime.launcher.report import Outcome, WorkerFailure


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def ended(
    tmp_path: Path, outcome: Outcome | None, job_id: str = "j1", host: JobHost | None = None
) -> None:
    """A job of two ranks that has ended so; None: without a word."""
    logs = tmp_path / "logs" / job_id
    for rank in (0, 1):
        (logs / "attempt_0" / "t" / str(rank)).mkdir(parents=True)
        path = logs / "attempt_0" / "t" / str(rank) / "stdout.log"
        path.write_text(f"one {rank}\ntwo {rank}\n")
    now = datetime.now(UTC).timestamp()
    host = host or JobHost("h", str(logs), ranks=(("t", 0), ("t", 1)))
    job = JobEndpoint(job_id, "train", now, (host,), "@agent-0.a", "ipc:///nowhere/a")
    jobs.register(job)
    if outcome is not None:
        jobs.remember(job, outcome)


@pytest.mark.parametrize(
    "words", [[], ["stat"], ["logs", "-n", "x"], ["logs", "--stdout", "--stderr"], ["list", "j1"]]
)
def test_what_is_not_understood_is_a_usage_error(words: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2


def test_without_jobs_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert "no job was launched from here" in capsys.readouterr().err
    for command in ("status", "logs", "stop"):
        assert main([command]) == 1
        assert capsys.readouterr().err == (
            "runtime: error: no job was launched from here by this user\n"
        )
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_ended_job_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failure = WorkerFailure("t", 1, "h", 7, signal=9)
    ended(tmp_path, Outcome("failed", failures=(failure,)))
    assert main(["status", "train"]) == 0
    shown = capsys.readouterr().out
    assert "job j1 (train): failed 0 s ago\n" in shown
    assert "first      t rank 1 on h, pid 7\n" in shown, "the box of the launcher"
    assert "exit code  137\n" in shown
    assert main(["status", "--watch", "--json"]) == 0, "there is nothing to wait for"
    assert json.loads(capsys.readouterr().out)["exit_code"] == 137
    assert main(["stop"]) == 0
    assert "has ended before: t-1 on h: SIGKILL" in capsys.readouterr().err
    assert main(["list"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["j1", "train", "failed"]


def test_the_logs_of_an_ended_job_are_read(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    ended(tmp_path, Outcome("finished"))
    assert main(["logs", "-f", "-n", "1"]) == 0
    assert sorted(capfdbinary.readouterr().out.splitlines()) == [b"[t 0] two 0", b"[t 1] two 1"]
    assert main(["logs", "-n", "all", "--rank", "1", "--json"]) == 0
    lines = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert [(line["rank"], line["line"]) for line in lines] == [(1, "one 1"), (1, "two 1")]


def test_a_role_that_printed_nothing_is_not_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, Outcome("finished"))
    assert main(["logs", "--role", "trainer"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "runtime: job j1 has printed nothing of that kind\n")


def test_logs_that_are_not_here_are_said_to_be_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, Outcome("finished"))
    os.rename(tmp_path / "logs", tmp_path / "elsewhere")
    assert main(["logs"]) == 1
    told = f"no (more) output of h: there is no directory {tmp_path / 'logs' / 'j1'}"
    assert told in capsys.readouterr().err


def test_a_job_that_left_no_word_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, None)
    assert main(["status"]) == 1
    assert "job j1 (train): lost\n" in capsys.readouterr().out
    assert main(["stop"]) == 1
    assert "job j1 is lost: its control plane is gone" in capsys.readouterr().err
    assert main(["stop", "--force"]) == 0, "there is nothing to kill"
    assert "nothing of it is left on h" in capsys.readouterr().out
    assert main(["list"]) == 0
    assert "lost" in capsys.readouterr().out, "and that is no stop"


def test_a_job_whose_hosts_cannot_be_asked_is_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, None, host=JobHost("h", "/nowhere/j1", ranks=(("t", 0),), local=False))
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert "unknown" in out
    assert "`status JOB` asks its hosts" in err
    assert main(["status"]) == 1
    reason = "h cannot be asked (only srun leads there); whether the job runs is not known"
    assert f"reason     {reason}\n" in capsys.readouterr().out
    assert main(["logs"]) == 1
    assert capsys.readouterr().err == "runtime: no (more) output of h: only srun leads there\n"
    assert main(["stop", "--force", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == "runtime: h: only srun leads there; what is left there is not known\n"
    assert json.loads(out)["left"] == {"h": [err[12:-1]]}


def test_files_that_are_not_believed_are_named_and_the_rest_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, Outcome("finished"), "good")
    ended(tmp_path, Outcome("finished"), "bad")
    (tmp_path / ".runtime" / "jobs" / "bad" / "endpoint.json").chmod(0o644)
    assert main(["list"]) == 0
    out, err = capsys.readouterr()
    assert "good" in out
    assert "bad" not in out
    assert "is not believed: its mode is 0644" in err
    assert main(["stop", "bad"]) == 1


def test_several_jobs_of_a_beginning_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for job_id in ("j-1", "j-2"):
        ended(tmp_path, Outcome("finished"), job_id)
    assert main(["status", "j-"]) == 1
    err = capsys.readouterr().err
    assert "means several jobs" in err
    assert "j-1" in err
    assert "j-2" in err


def test_nothing_is_imported_that_files_alone_do_not_need() -> None:
    code = "import sys, runtime.cli; sys.exit(bool({'zmq', 'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
