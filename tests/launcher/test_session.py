"""What the agent's last word means for the launcher's exit code and box."""

from __future__ import annotations

import signal
from typing import Any

from runtime.launcher.report import Outcome, exit_code, failure_box
from runtime.launcher.session import Signalled, _restarting, outcome_of_end

BASE = Outcome("finished", "job-1", "train")
CTRL_C = Signalled(signal.SIGINT, "interrupted", "Ctrl-C")


def failure(**more: Any) -> dict[str, Any]:
    return {
        "name": "trainer-1", "role": "trainer", "rank": 1, "host": "here", "pid": 77, "attempt": 0,
        "incarnation": 0, "code": 3, "signal": 0, "cause": "exit 3", "at": 1.5, "error": {},
        "step": None, "recovered": False,
    } | more  # fmt: skip


def end(code: int, *failures: dict[str, Any], reason: str = "") -> dict[str, Any]:
    first, *others = failures or (None,)
    return {"code": code, "reason": reason, "first": first, "others": others, "log_dir": "/logs"}


def test_a_job_that_finished_has_no_box() -> None:
    outcome = outcome_of_end(end(0), BASE, None, None)
    assert (exit_code(outcome), failure_box(outcome)) == (0, "")


def test_the_first_failure_gives_the_code_and_the_others_a_line() -> None:
    killed = failure(name="trainer-0", rank=0, code=0, signal=9, cause="SIGKILL")
    outcome = outcome_of_end(end(137, killed, failure()), BASE, None, None)
    assert exit_code(outcome) == 137
    box = failure_box(outcome)
    assert "trainer rank 0" in box
    assert "trainer-1 on here: exit code 3" in box


def test_what_speaks_for_an_end_by_the_oom_killer_is_in_the_box() -> None:
    killed = failure(code=0, signal=9, cause="SIGKILL (out of memory: the count rose)")
    box = failure_box(outcome_of_end(end(137, killed), BASE, None, None))
    assert "out of memory: the count rose" in box


def test_a_signal_that_stopped_the_job_gives_its_own_code() -> None:
    outcome = outcome_of_end(end(130), BASE, CTRL_C, None)
    assert (outcome.end, exit_code(outcome)) == ("interrupted", 130)


def test_a_signal_that_came_when_the_job_had_failed_already_changes_nothing() -> None:
    outcome = outcome_of_end(end(3, failure()), BASE, CTRL_C, None)
    assert exit_code(outcome) == 3


def test_a_job_that_finished_in_spite_of_the_signal_is_finished() -> None:
    assert exit_code(outcome_of_end(end(0), BASE, CTRL_C, None)) == 0


def test_a_time_limit_is_told_from_a_worker_that_exits_with_124() -> None:
    assert outcome_of_end(end(124), BASE, None, 5.0).end == "timeout"
    own = failure(code=124, cause="exit 124")
    assert outcome_of_end(end(124, own), BASE, None, 5.0).end == "failed"


def test_a_worker_that_could_not_be_started_says_why() -> None:
    unstarted = failure(pid=0, code=127, cause="no such file: '/no/python'")
    outcome = outcome_of_end(end(127, unstarted), BASE, None, None)
    assert exit_code(outcome) == 127
    assert "/no/python" in failure_box(outcome)


def test_a_restart_is_told_in_a_line() -> None:
    event = {
        "role": "trainer", "names": ["trainer-0", "trainer-1"], "attempt": 1, "max": 3,
        "failure": failure(),
    }  # fmt: skip
    assert _restarting(event) == (
        "runtime: trainer-1 failed (exit 3): restarting all 2 of trainer, attempt 1 of 3\n"
    )
    assert "restarting trainer-0," in _restarting({**event, "names": ["trainer-0"]})
