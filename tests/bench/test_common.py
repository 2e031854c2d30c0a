"""The arithmetic of the measurements: medians, ratios, goals, and turns that fail."""

from __future__ import annotations

import os

import pytest

from bench import common
from bench.common import Figures, Goal, Side


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "wait_until_quiet", lambda: True)


def figures(ours: list[float], theirs: list[float], goal: Goal) -> Figures:
    return Figures("t", [goal], {"a": {"m": ours}, "b": {"m": theirs}})


def only_row(found: Figures) -> dict[str, object]:
    (row,) = [row for row in found.rows() if "goal" in row]
    return row


def test_the_ratio_is_one_of_medians() -> None:
    row = only_row(figures([1.0, 2.0, 90.0], [4.0, 8.0, 1.0], Goal("m", "a", "b", 0.5)))
    assert (row["median"], row["min"], row["max"], row["ratio"]) == (2.0, 1.0, 90.0, 0.5)
    assert row["reached"] is True


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal("m", "a", "b", 0.49), False),
        (Goal("m", "a", "b", 0.5, absolute=1.9), False),
        (Goal("m", "a", "b", 0.5, absolute=2.0), True),
        (Goal("m", "a", "b", 0.5, at_least=True), True),
        (Goal("m", "a", "b", 0.51, at_least=True), False),
    ],
)
def test_a_goal_is_reached_or_missed(goal: Goal, reached: bool) -> None:
    found = figures([2.0], [4.0], goal)
    assert only_row(found)["reached"] is reached
    assert ("**missed**" in found.table()) is not reached
    assert common.report([found], as_json=False) == int(not reached)


def test_a_goal_without_the_other_side_is_neither() -> None:
    found = Figures("t", [Goal("m", "a", "b", 1.0)], {"a": {"m": [1.0]}})
    assert only_row(found)["reached"] is None


def test_a_goal_may_be_a_bound_alone_or_no_bound_at_all() -> None:
    for limit, reached in ((2.0, True), (1.9, False)):
        assert only_row(figures([2.0], [4.0], Goal("m", "a", absolute=limit)))["reached"] is reached
    shown = only_row(figures([2.0], [4.0], Goal("m", "a", "b")))
    assert (shown["ratio"], shown["reached"]) == (0.5, None)


def test_a_metric_may_be_held_against_several_sides() -> None:
    goals = [Goal("m", "a", "b", 0.5), Goal("m", "a", "c", 0.5)]
    found = Figures("t", goals, {"a": {"m": [2.0]}, "b": {"m": [4.0]}, "c": {"m": [3.0]}})
    assert [row["reached"] for row in found.rows() if "goal" in row] == [True, False]


def test_sides_take_turns_and_change_who_begins() -> None:
    order = []

    def side(name: str) -> Side:
        return Side(name, lambda: order.append(name) or {"m": 1.0})  # type: ignore[func-returns-value]

    common.take_turns("t", [side("a"), side("b")], 3)
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_the_load_stands_below_a_table_of_disturbed_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(common, "wait_until_quiet", lambda: False)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.5, 0.0, 0.0))
    found = common.take_turns("t", [Side("a", lambda: {"m": 1.0})], 2)
    assert "2 turns began while the machine was busy; load before turns 7.5 to 7.5" in found.table()


def test_a_turn_that_fails_is_told_and_does_not_end_the_others() -> None:
    def broken() -> dict[str, float]:
        raise RuntimeError("exit 3: no such thing")

    found = common.take_turns("t", [Side("a", broken), Side("b", lambda: {"m": 1.0})], 2)
    assert found.turns == {"b": {"m": [1.0, 1.0]}}
    assert found.table().count("a failed: RuntimeError: exit 3: no such thing") == 2
    assert common.report([found], as_json=True) == 1
