"""What the directive that ends a job means for the exit code and the box."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.launcher.outcome import from_plain, keep, outcome_of, read_kept, to_plain
from runtime.launcher.report import Outcome, exit_code, failure_box

BASE = Outcome("finished", "job-1", "train", log_dir="/logs")
LINES = {"stderr": ["Traceback", "boom"]}


def failure(**more: Any) -> dict[str, Any]:
    return {
        "name": "trainer-1", "role": "trainer", "rank": 1, "host": "here", "pid": 77, "attempt": 0,
        "incarnation": 0, "code": 3, "signal": 0, "cause": "exit 3", "at": 1.5, "error": {},
        "step": None, "recovered": False,
    } | more  # fmt: skip


def end(code: int, *failures: dict[str, Any], reason: str = "") -> dict[str, Any]:
    first, *others = failures or (None,)
    return {"code": code, "reason": reason, "first": first, "others": others}


def test_a_job_that_finished_has_no_box() -> None:
    outcome = outcome_of(end(0), BASE)
    assert (exit_code(outcome), failure_box(outcome)) == (0, "")


def test_the_first_failure_gives_the_code_and_the_others_a_line() -> None:
    killed = failure(name="trainer-0", rank=0, code=0, signal=9, cause="SIGKILL")
    outcome = outcome_of(end(137, killed, failure()), BASE)
    assert exit_code(outcome) == 137
    assert [(f.code, f.signal) for f in outcome.failures] == [(None, 9), (3, None)]
    box = failure_box(outcome)
    assert "trainer rank 0" in box
    assert "trainer-1 on here: exit code 3" in box


def test_what_speaks_for_an_end_by_the_oom_killer_is_in_the_box() -> None:
    killed = failure(code=0, signal=9, cause="SIGKILL (out of memory: the count rose)")
    box = failure_box(outcome_of(end(137, killed), BASE))
    assert "out of memory: the count rose" in box


@pytest.mark.parametrize(
    ("code", "reason", "how"),
    [
        (129, "stopped by SIGHUP", "hangup"),
        (130, "stopped by Ctrl-C", "interrupted"),
        (131, "stopped by SIGQUIT", "quit"),
        (143, "stopped by SIGTERM", "terminated"),
        (143, "stopped by `python -m runtime stop`", "stopped"),
    ],
)
def test_what_stopped_the_job_gives_its_own_code(code: int, reason: str, how: str) -> None:
    outcome = outcome_of(end(code, reason=reason), BASE)
    assert (outcome.end, exit_code(outcome)) == (how, code)
    assert outcome.detail == (reason if how == "stopped" else "")


def test_a_worker_that_exits_with_the_code_of_a_signal_has_failed() -> None:
    assert outcome_of(end(130, failure(code=130, cause="exit 130")), BASE).end == "failed"


def test_a_time_limit_is_told_from_a_worker_that_exits_with_124() -> None:
    assert outcome_of(end(124), BASE).end == "timeout"
    assert outcome_of(end(124, failure(code=124, cause="exit 124")), BASE).end == "failed"


def test_a_worker_that_could_not_be_started_says_why() -> None:
    unstarted = failure(pid=0, code=127, cause="no such file: '/no/python'")
    outcome = outcome_of(end(127, unstarted), BASE)
    assert exit_code(outcome) == 127
    assert "/no/python" in failure_box(outcome)


def test_a_worker_of_a_lost_host_says_so_and_no_time() -> None:
    lost = failure(pid=0, code=69, cause="host unreachable (30 s)", at=0.0, host="h2")
    outcome = outcome_of(end(69, lost), BASE)
    assert exit_code(outcome) == 69
    assert outcome.failures[0].evidence == ()
    box = failure_box(outcome)
    assert "trainer rank 1 on h2\n" in box
    assert "host unreachable (30 s)" in box


def test_an_end_for_another_reason_says_it() -> None:
    outcome = outcome_of(end(69, reason="h3 cannot be reached from h1"), BASE)
    assert (outcome.end, exit_code(outcome)) == ("host_lost", 69)
    assert "h3 cannot be reached from h1" in failure_box(outcome)


def test_last_lines_come_from_the_host_where_the_worker_ran() -> None:
    other = failure(lines=LINES, folder="/there/trainer/1")
    stale = failure(incarnation=1, lines=LINES, folder="/elsewhere", rank=2, name="trainer-2")
    directive = end(3, failure(), failure(name="trainer-2", rank=2))
    first, second = outcome_of(directive, BASE, [other, stale]).failures
    assert (first.last_lines, first.log_dir) == (("Traceback", "boom"), "/there/trainer/1")
    assert (second.last_lines, second.log_dir) == ((), "")


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ({"stderr": ["why"], "stdout": ["what"]}, ("why",)),
        ({"stderr": [], "stdout": ["what"]}, ("what",)),
        ({}, ()),
    ],
)
def test_the_last_lines_are_those_of_stderr_or_else_of_stdout(
    lines: dict[str, list[str]], shown: tuple[str, ...]
) -> None:
    assert outcome_of(end(3, failure(lines=lines)), BASE).failures[0].last_lines == shown


def test_an_outcome_is_the_same_after_a_journey(tmp_path: Path) -> None:
    error = {"type": "ValueError", "message": "bad", "traceback": "line 3"}
    told = outcome_of(end(3, failure(error=error, lines=LINES, folder="/l"), failure()), BASE)
    told = replace(told, log_dir=str(tmp_path), restarts=2)
    assert from_plain(json.loads(json.dumps(to_plain(told)))) == told
    assert read_kept(str(tmp_path), "@agent-0.x") is None
    keep(told, "@agent-0.x")
    kept = read_kept(str(tmp_path), "@agent-0.x")
    assert kept is not None
    assert kept.outcome == told
    assert read_kept(str(tmp_path), "@agent-0.y") is None, "that was an earlier job of the id"
    (tmp_path / "outcome.json").write_text("{")
    assert read_kept(str(tmp_path), "@agent-0.x") is None
