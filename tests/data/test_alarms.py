"""Moments at which something is due."""

from __future__ import annotations

from runtime.data.alarms import Alarms, earlier


def test_what_is_due_comes_in_order_and_once() -> None:
    alarms: Alarms[str] = Alarms()
    for when, thing in ((3.0, "c"), (1.0, "a"), (2.0, "b")):
        alarms.set(when, thing)
    assert alarms.next() == 1.0
    assert list(alarms.due(2.0)) == ["a", "b"]
    assert list(alarms.due(2.0)) == []
    assert alarms.next() == 3.0


def test_what_was_called_off_or_set_anew_is_not_due_at_its_old_moment() -> None:
    alarms: Alarms[str] = Alarms()
    alarms.set(1.0, "off")
    alarms.set(1.0, "later")
    alarms.set(None, "never")
    alarms.call_off("off")
    alarms.call_off("unknown")
    alarms.set(5.0, "later")
    assert alarms.next() == 5.0
    assert list(alarms.due(9.0)) == ["later"]
    assert alarms.next() is None


def test_alarms_that_are_over_take_no_room() -> None:
    alarms: Alarms[int] = Alarms()
    for number in range(10_000):
        alarms.set(1e9 + number, number)
        alarms.call_off(number)
    assert len(alarms._heap) < 100


def test_never_is_later_than_any_moment() -> None:
    assert earlier(None, None) is None
    assert earlier(0.0, None) == earlier(None, 0.0) == earlier(0.0, 1.0) == 0.0
