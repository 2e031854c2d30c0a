"""Which failure was the first: by time, with consequences last."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.cluster.failures import SIGNAL_HEAD_START_S, Failure, first_of, root_of


def failure(name: str, at: float, *, signal: int = 0, kind: str = "", text: str = "") -> Failure:
    error: dict[str, Any] = {"type": kind, "message": text} if kind else {}
    role, _, rank = name.rpartition("-")
    code = 0 if signal else 1
    return Failure(name, role, int(rank), "here", 7, 0, 0, code, signal, "cause", at, error)


def lost(name: str, at: float, text: str) -> Failure:
    return failure(name, at, kind="runtime.errors.PeerLostError", text=text)


def test_without_failures_there_is_no_first() -> None:
    assert first_of([]) is None
    assert root_of([], []) is None


def test_the_earliest_is_the_first_in_whatever_order_they_are_known() -> None:
    early, late = failure("a-0", 1.0, kind="ValueError"), failure("a-1", 2.0, kind="ValueError")
    assert first_of([late, early]) is early


def test_a_signal_goes_before_an_error_of_the_moment_before_but_not_of_long_before() -> None:
    killed = failure("a-0", 10.0, signal=9)
    just_before = failure("a-1", 10.0 - SIGNAL_HEAD_START_S / 2, kind="RuntimeError")
    long_before = failure("a-2", 10.0 - 2 * SIGNAL_HEAD_START_S, kind="RuntimeError")
    assert first_of([just_before, killed]) is killed
    assert first_of([long_before, killed]) is long_before


def test_a_signal_with_an_error_report_counts_by_the_report() -> None:
    raised = failure("a-0", 10.0, signal=6, kind="ValueError")
    assert raised.happened == 10.0


def test_an_error_about_anothers_death_comes_after_all_others() -> None:
    told, own = lost("a-1", 1.0, "a-0 is gone"), failure("a-0", 2.0, kind="ValueError")
    assert first_of([told, own]) is own
    assert first_of([told]) is told


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("trainer-1 on here is gone: SIGKILL", True),
        ("call to trainer-1.3f2a90c1 failed", True),
        ("trainer-10 is gone", False),
        ("old-trainer-1 is gone", False),
        ("trainer-10 and trainer-1 are gone", True),
        ("somebody is gone", False),
    ],
)
def test_the_root_is_who_the_first_error_names(text: str, found: bool) -> None:
    told, cause = lost("judge-0", 2.0, text), failure("trainer-1", 1.0, signal=9)
    root = root_of([told], [cause, told])
    assert root is (cause if found else told)


def test_of_several_deaths_of_the_one_that_is_named_the_newest_is_the_root() -> None:
    first, again = failure("a-0", 1.0, signal=9), failure("a-0", 5.0, signal=11)
    told = lost("b-0", 5.1, "a-0 is gone")
    assert root_of([told], [first, again, told]) is again


@pytest.mark.parametrize(("signal", "code"), [(0, 1), (9, 137), (11, 139)])
def test_the_exit_code_is_that_of_a_shell(signal: int, code: int) -> None:
    assert failure("a-0", 1.0, signal=signal).exit_code == code


def test_a_consequence_of_a_consequence_leads_to_its_root() -> None:
    root = failure("a-0", 1.0, signal=9)
    middle, last = lost("b-0", 1.2, "a-0 is gone"), lost("c-0", 1.4, "b-0 is gone")
    assert root_of([last], [root, middle, last]) is root


def test_two_that_blame_each_other_come_to_an_end() -> None:
    one, other = lost("a-0", 1.0, "b-0 is gone"), lost("b-0", 1.1, "a-0 is gone")
    assert root_of([one, other], [one, other]) is other


def test_a_death_after_the_error_that_tells_of_one_is_not_its_cause() -> None:
    before, after = failure("a-0", 1.0, signal=9), lost("a-0", 3.0, "c-0 is gone")
    told = lost("b-0", 2.0, "a-0 is gone")
    assert root_of([told, after], [before, told, after]) is before
