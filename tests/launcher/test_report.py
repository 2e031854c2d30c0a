"""The failure box to the letter, exit codes, and words for what is waited for."""

from __future__ import annotations

import signal
from dataclasses import replace
from unicodedata import combining, east_asian_width

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.launcher.report import (
    MAX_FOLLOW_ONS,
    End,
    ErrorFile,
    Outcome,
    WorkerFailure,
    cause,
    exit_code,
    failure_box,
    restarting,
    signal_name,
    waiting_for,
)

TRACEBACK = """\
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    main()
ValueError: the loss is nan
"""
RAISED = WorkerFailure(
    "trainer",
    1,
    "node1",
    4242,
    "12:03:44",
    code=1,
    error=ErrorFile("the loss is nan", TRACEBACK, "ValueError"),
    last_lines=("step 41 loss 2.31", "\x1b[31mstep 42\x1b[0m loss nan"),
    log_dir="/logs/j1/attempt_0/trainer/1",
)
KILLED = WorkerFailure("trainer", 0, "node1", 4241, "12:03:45", signal=9)


def body(outcome: Outcome, width: int = 80) -> str:
    """The box without its rules."""
    return "\n".join(failure_box(outcome, width).splitlines()[1:-1])


def test_the_box_tells_the_first_failure_in_full_and_what_followed_in_one_line_each() -> None:
    follow_on = WorkerFailure("evaluator", 0, when="12:03:46", code=3)
    outcome = Outcome("failed", "j1", "sft", (RAISED, KILLED, follow_on), restarts=1)
    assert failure_box(outcome, 72) == (
        "══ job j1 (sft) failed after 1 restart ═════════════════════════════════\n"
        "first      trainer rank 1 on node1, pid 4242, at 12:03:44\n"
        "cause      exit code 1\n"
        "traceback\n"
        "  Traceback (most recent call last):\n"
        '    File "train.py", line 3, in <module>\n'
        "      main()\n"
        "  ValueError: the loss is nan\n"
        "last lines\n"
        "  step 41 loss 2.31\n"
        "  step 42 loss nan\n"
        "logs       /logs/j1/attempt_0/trainer/1\n"
        "after it\n"
        "  trainer-0 on node1: SIGKILL at 12:03:45\n"
        "  evaluator-0 on localhost: exit code 3 at 12:03:46\n"
        "exit code  1\n"
        "════════════════════════════════════════════════════════════════════════\n"
    )


def test_a_signal_is_named_with_its_evidence_or_what_it_mostly_means() -> None:
    guessed = body(Outcome("failed", "j", failures=(KILLED,)), 100)
    assert (
        "cause      killed by SIGKILL (signal 9): "
        "killed from outside, or by the kernel for want of memory\n"
    ) in guessed
    proven = replace(KILLED, evidence=("cgroup oom_kill +1", "peak rss 3.9 GiB"))
    assert "cause      killed by SIGKILL (signal 9); cgroup oom_kill +1; peak rss 3.9 GiB" in body(
        Outcome("failed", "j", failures=(proven,))
    )


def test_an_exception_without_a_traceback_is_told_by_its_message() -> None:
    failure = replace(RAISED, error=ErrorFile("nan", "", "ValueError"), last_lines=())
    assert "error      ValueError: nan" in body(Outcome("failed", "j", failures=(failure,)))


def test_last_lines_that_only_repeat_the_traceback_are_left_out() -> None:
    failure = replace(RAISED, last_lines=tuple(TRACEBACK.splitlines()[1:]))
    text = body(Outcome("failed", "j", failures=(failure,)))
    assert "last lines" not in text
    assert text.count("the loss is nan") == 1


def test_long_things_are_cut_with_a_mark_and_never_in_silence() -> None:
    deep = "\n".join(f"frame {number}" for number in range(500)) + "\nRecursionError: deep"
    failure = replace(
        RAISED, error=ErrorFile("deep", deep), last_lines=tuple(f"line {n}" for n in range(90))
    )
    many = (failure, *(replace(KILLED, rank=rank) for rank in range(40)))
    text = body(Outcome("failed", "j", failures=many))
    assert "frame 0" in text
    assert "RecursionError: deep" in text
    assert "… 442 lines more …" in text
    assert "… 70 lines more in the log" in text
    assert text.endswith(f"  … and {40 - MAX_FOLLOW_ONS} more\nexit code  1")
    assert len(text.splitlines()) < 120


@pytest.mark.parametrize(
    ("outcome", "first_line", "code"),
    [
        (Outcome("timeout", "j", timeout_s=90.0), "══ job j ran longer than --timeout 90 s ═", 124),
        (Outcome("timeout", "j"), "══ job j ran longer than --timeout ═", 124),
        (Outcome("interrupted", "j"), "══ job j stopped by Ctrl-C ═", 130),
        (Outcome("terminated", "j"), "══ job j stopped by SIGTERM ═", 143),
        (Outcome("hangup", "j"), "══ job j stopped: the terminal was closed ═", 129),
        (Outcome("host_lost", "j"), "══ job j lost a host ═", 69),
        (Outcome("usage", "", "name"), "══ job name could not start ═", 2),
        (Outcome("usage"), "══ job ? could not start ═", 2),
        (Outcome("failed", "j", "j"), "══ job j failed ═", 1),
    ],
)
def test_each_end_has_its_words_and_its_exit_code(
    outcome: Outcome, first_line: str, code: int
) -> None:
    assert failure_box(outcome).startswith(first_line)
    assert f"exit code  {code}\n" in failure_box(outcome)
    assert exit_code(outcome) == code


def test_a_job_that_finished_has_no_box_and_exits_with_zero() -> None:
    assert failure_box(Outcome("finished", "j")) == ""
    assert exit_code(Outcome("finished", failures=(KILLED,))) == 0


@pytest.mark.parametrize(
    ("failure", "words", "code"),
    [
        (WorkerFailure("a", 0, code=3), "exit code 3", 3),
        (WorkerFailure("a", 0, signal=9), "SIGKILL", 137),
        (WorkerFailure("a", 0, signal=11), "SIGSEGV", 139),
        (WorkerFailure("a", 0, signal=15), "SIGTERM", 143),
        (
            WorkerFailure("a", 0, reason="could not start: no memory"),
            "could not start: no memory",
            1,
        ),
        (WorkerFailure("a", 0), "lost", 1),
        (
            WorkerFailure("a", 0, code=0, reason="left the job too early"),
            "left the job too early",
            1,
        ),
    ],
)
def test_the_exit_code_is_the_first_failing_workers_own(
    failure: WorkerFailure, words: str, code: int
) -> None:
    assert cause(failure) == words
    assert exit_code(Outcome("failed", failures=(failure, KILLED))) == code


def test_a_job_that_failed_never_exits_with_zero() -> None:
    assert exit_code(Outcome("failed")) == 1


def test_other_facts_of_the_end_are_told() -> None:
    outcome = Outcome("interrupted", "j", detail="second Ctrl-C", log_dir="/logs/j")
    assert body(outcome) == "second Ctrl-C\nlogs       /logs/j\nexit code  130"


def test_restarted_attempts_are_counted() -> None:
    failure = replace(KILLED, restart_count=2, log_dir="")
    text = body(Outcome("failed", "j", failures=(failure,), log_dir="/logs/j"))
    assert "first      trainer rank 0 on node1, pid 4241, at 12:03:45, attempt 2" in text
    assert "logs       /logs/j" in text


@pytest.mark.parametrize(
    ("number", "name"), [(9, "SIGKILL"), (15, "SIGTERM"), (40, "SIGRTMIN+6"), (99, "signal 99")]
)
def test_signals_have_names(number: int, name: str) -> None:
    assert signal.SIGRTMIN == 34
    assert signal_name(number) == name


def test_progress_names_who_is_waited_for() -> None:
    assert waiting_for(["trainer-0"]) == "waiting for 1 rank: trainer-0"
    assert waiting_for(["a-0", "a-1", "b-0"]) == "waiting for 3 ranks: a-0, a-1, b-0"
    many = [f"a-{rank}" for rank in range(100)]
    assert waiting_for(many, limit=2) == "waiting for 100 ranks: a-0, a-1 and 98 more"


def shown_width(line: str) -> int:
    return sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in line)


_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_FAILURE = st.builds(
    WorkerFailure,
    role=st.text("abc", min_size=1, max_size=60),
    rank=st.integers(0, 10**6),
    host=_TEXT,
    pid=st.none() | st.integers(1, 2**22),
    when=st.sampled_from(["", "12:03:44"]),
    code=st.none() | st.integers(1, 255),
    signal=st.none() | st.integers(1, 64),
    evidence=st.lists(_TEXT, max_size=2).map(tuple),
    error=st.none() | st.builds(ErrorFile, _TEXT, _TEXT, _TEXT),
    last_lines=st.lists(_TEXT | st.text("字e\u0301 ", max_size=200), max_size=3).map(tuple),
    log_dir=_TEXT,
)
_ENDS: list[End] = ["failed", "timeout", "interrupted", "host_lost"]


@given(
    st.builds(
        Outcome,
        end=st.sampled_from(_ENDS),
        job_id=_TEXT,
        job_name=_TEXT,
        failures=st.lists(_FAILURE, max_size=3).map(tuple),
        detail=_TEXT,
    ),
    st.integers(0, 200),
)
def test_no_line_is_wider_than_the_terminal_and_nothing_controls_it(
    outcome: Outcome, width: int
) -> None:
    text = failure_box(outcome, width)
    lines = [line for line in text.split("\n") if not line.startswith("logs ")]
    assert all(shown_width(line) <= max(40, width) for line in lines)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert 0 < exit_code(outcome) < 256


def test_lines_that_torch_gave_the_rank_to_are_not_shown_twice() -> None:
    error = ErrorFile("boom", "Traceback:\n  File x\nValueError: boom", "ValueError")
    lines = ("[rank0]: Traceback:", "[rank0]:   File x", "[rank0]: ValueError: boom")
    failure = WorkerFailure("trainer", 0, code=1, error=error, last_lines=lines)
    assert "last lines" not in failure_box(Outcome("failed", failures=(failure,)))


def test_a_line_of_any_length_leaves_room_for_the_others() -> None:
    error = ErrorFile("x", "ValueError: " + "x" * 200_000, "ValueError")
    box = failure_box(Outcome("failed", failures=(WorkerFailure("a", 0, code=1, error=error),)))
    assert len(box.splitlines()) < 40
    assert "198012 more" in box


def test_exit_codes_of_shells_and_the_path_of_the_logs_can_be_read() -> None:
    folder = "/a/" + "long/" * 40
    failure = WorkerFailure("a", 0, code=143, log_dir=folder)
    box = failure_box(Outcome("failed", failures=(failure,)), 60)
    assert "exit code 143 (128 + SIGTERM)" in box
    assert folder in box


def test_sigquit_has_its_own_code() -> None:
    assert exit_code(Outcome("quit")) == 131
    assert "stopped by SIGQUIT" in failure_box(Outcome("quit"))


def test_a_job_that_was_stopped_says_by_whom() -> None:
    outcome = Outcome("stopped", detail="stopped by `python -m runtime stop`")
    assert exit_code(outcome) == 143
    assert "was stopped" in failure_box(outcome)
    assert "`python -m runtime stop`" in failure_box(outcome)


def test_a_restart_is_told_in_a_line() -> None:
    failure = {"name": "trainer-1", "cause": "exit 3"}
    event = {"role": "trainer", "names": ["trainer-0", "trainer-1"], "attempt": 1, "max": 3}
    assert restarting({**event, "failure": failure}) == (
        "trainer-1 failed (exit 3): restarting all 2 of trainer, attempt 1 of 3"
    )
    alone = {**event, "names": ["trainer-0"], "failure": failure}
    assert "restarting trainer-0," in restarting(alone)
