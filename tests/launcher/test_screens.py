"""Jobs as text: what stands there, and that it fits."""

from __future__ import annotations

import json

import pytest

from runtime.launcher import report, screens
from runtime.launcher.records import (
    Ended,
    HostStatus,
    JobEndpoint,
    JobHost,
    JobStatus,
    Missing,
    WorkerStatus,
)
from runtime.launcher.screens import Listed

HOSTS = tuple(JobHost(name, "/logs/2026-ab") for name in ("h1", "h2"))
JOB = JobEndpoint("2026-ab", "train", 1000.0, HOSTS, "@agent-0.1", "ipc:///x")


def worker(rank: int, state: str = "running", **more: object) -> WorkerStatus:
    values: dict[str, object] = {
        "pid": 7,
        "exit_code": None,
        "restart_count": 0,
        "last_heartbeat_s": 0.4,
    }
    values |= {"step": None, "stuck_s": None, "cause": "", **more}
    return WorkerStatus(f"t-{rank}", "t", rank, "h1", state=state, **values)  # type: ignore[arg-type]


def status(*workers: WorkerStatus, **more: object) -> JobStatus:
    values: dict[str, object] = {
        "job_id": "2026-ab",
        "name": "train",
        "started": 1000.0,
        "since": 1000.0,
    }
    values |= {"log_dir": "/logs", **more}
    return JobStatus("running", None, 0, {"t": list(workers)}, **values)  # type: ignore[arg-type]


def test_a_status_names_the_job_its_hosts_and_each_worker() -> None:
    hosts = (HostStatus("h1", 5, 0.4), HostStatus("h2", None, None, "does not answer"))
    text = screens.status_text(status(worker(0), worker(1, "failed", pid=None, cause="SIGKILL"),
                                      hosts=hosts), 1065.0)  # fmt: skip
    assert "job 2026-ab (train): running for 1 min 5 s\n" in text
    assert "logs       /logs on each host\n" in text
    assert "h2                     does not answer" in text
    assert "t-0     h1    7    running\n" in text
    assert "t-1     h1         failed   SIGKILL\n" in text
    assert "restarts" not in text


def test_columns_that_have_nothing_to_say_are_left_out() -> None:
    assert "step" not in screens.status_text(status(worker(0)), 1000.0)
    assert "step" in screens.status_text(status(worker(0, step=3)), 1000.0)


def test_what_one_types_is_never_cut() -> None:
    listed = [Listed(JOB._replace(job_id="20261122-051122-ab12", name="a" * 30), "finished")]
    lines = screens.list_text(listed, 1000.0 + 7500, 60).splitlines()
    assert lines[1].split("  ")[0] == "20261122-051122-ab12"
    assert max(map(len, lines)) <= 60


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_table_is_no_wider_than_the_terminal(width: int) -> None:
    rows = [worker(0, cause="a long story " * 20), worker(1, "failed")]
    text = screens.status_text(status(*rows), 1000.0, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" in text


def test_only_states_have_colours_and_they_take_no_room() -> None:
    plain = screens.status_text(status(worker(0)), 1000.0)
    painted = screens.status_text(status(worker(0)), 1000.0, colour=True)
    assert painted.count("\x1b[32mrunning") == 2
    assert painted.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain


def test_the_list_has_a_line_for_each_job() -> None:
    failed = Ended(report.Outcome("host_lost"), 1100.0)
    listed = [Listed(JOB, "running"), Listed(JOB._replace(job_id="b"), "failed", failed)]
    lines = screens.list_text(listed, 1000.0 + 7500).splitlines()
    assert lines[1].split("  ")[:3] == ["2026-ab", "train", "running"]
    assert lines[1].rstrip().endswith("2 h 5 min ago  h1 +1")
    assert lines[2].endswith("h1 +1  69")


def test_what_is_left_to_say_of_an_ended_job() -> None:
    failure = report.WorkerFailure("t", 1, "h2", 7, signal=9)
    outcome = report.Outcome("failed", "2026-ab", failures=(failure,), restarts=2)
    ended = screens.ended_status(JOB, Ended(outcome, 1010.0))
    assert (ended.stage, ended.exit_code, ended.restarts) == ("failed", 137, 2)
    assert ended.reason == "t-1 on h2: SIGKILL"
    finished = screens.ended_status(JOB, Ended(report.Outcome("finished"), 1010.0))
    assert (finished.stage, finished.exit_code, finished.reason) == ("finished", 0, "")
    stopped = screens.ended_status(JOB, Ended(report.Outcome("interrupted"), 1010.0))
    assert (stopped.exit_code, stopped.reason) == (130, "stopped by Ctrl-C")
    lost = screens.ended_status(JOB, Missing("lost", "gone"))
    assert (lost.stage, lost.exit_code, lost.reason) == ("lost", None, "gone")
    assert "lost\n" in screens.status_text(lost, 2000.0)


def test_a_failed_job_is_told_as_its_launcher_would_have() -> None:
    failure = report.WorkerFailure("t", 1, "h2", 7, code=3, last_lines=("boom",), log_dir="/l/t/1")
    outcome = report.Outcome("failed", "2026-ab", failures=(failure,))
    text = screens.ended_text(JOB, Ended(outcome, 1010.0), 1070.0, 60)
    assert "job 2026-ab (train): failed 1 min 0 s ago\n" in text
    assert "hosts      h1, h2\n" in text
    assert text.endswith("\n" + report.failure_box(outcome, 60))
    assert text.count("exit code  3\n") == text.count("boom") == 1
    stopped = report.Outcome("stopped", "2026-ab", detail="by me")
    text = screens.ended_text(JOB, Ended(stopped, 1010.0), 1070.0)
    assert "reason     by me\nexit code  143\n" in text


def test_a_status_can_be_json() -> None:
    plain = json.loads(json.dumps(screens.plain(status(worker(0, step=3)))))
    assert plain["roles"]["t"][0]["step"] == 3
    assert plain["stage"] == "running"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (7500, "2 h 5 min"), (90000, "1 d 1 h")],
)
def test_a_time_is_told_in_two_units(seconds: float, words: str) -> None:
    assert screens.lasting(seconds) == words
