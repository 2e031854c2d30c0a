"""What comes out of a queue: to whom, on lease, and what comes back."""

from __future__ import annotations

import pytest

from runtime.errors import Closed, LeaseLost
from runtime.machine import Fail, Reply
from tests.data.bench import Bench, is_for, names


def test_a_get_waits_for_as_many_as_it_wants_and_lets_others_pass() -> None:
    bench = Bench()
    patient, effects = bench.call("c", "get", most=5, least=3)
    assert effects == []
    assert bench.put("p", "a", "b")[0] != patient
    assert bench.get("d") == ["a"]
    effects = bench.put("p", "c", "d")
    assert [names(e) for e in effects if is_for(e, patient)] == [["b", "c", "d"]]


def test_a_get_that_timed_out_leaves_everything_where_it_is() -> None:
    bench = Bench()
    bench.put("p", "a")
    bench.call("c", "get", most=5, least=2, timeout=1.0)
    (answer,) = bench.machine.tick(1.0)
    assert isinstance(answer, Reply)
    assert answer.value["why"] == "queue 'q': waiting for 2 items; 1 there"
    assert bench.get("c") == ["a"]


def test_a_cancelled_get_gives_back_what_it_was_given_first_and_in_order() -> None:
    bench = Bench()
    bench.put("p", *"abcde")
    call, _ = bench.call("c", "get", most=2, least=1)
    bench.get("c", 1)
    bench.machine.cancelled(call, 0)
    bench.machine.cancelled(call, 0)
    assert bench.get("d", 9) == ["a", "b", "d", "e"]


def test_what_a_client_has_taken_never_comes_back() -> None:
    bench = Bench()
    bench.put("p", *"abc")
    call, _ = bench.call("c", "get", most=2, least=1)
    bench.call("c", "took", about=call.id)
    bench.machine.cancelled(call, 0)
    bench.machine.lost("c", "SIGKILL", 0)
    assert bench.get("d", 9) == ["c"]


def test_a_dead_consumers_items_come_back_unless_it_had_them() -> None:
    bench = Bench()
    bench.put("p", *"abcd")
    assert bench.get("c") == ["a"]
    bench.took_all("c")
    bench.get("c", 2)
    bench.machine.lost("c", "SIGKILL", 0)
    assert bench.get("d", 9) == ["b", "c", "d"]


def test_a_get_that_is_asked_again_is_answered_the_same() -> None:
    bench = Bench()
    bench.put("p", *"abc")
    call, first = bench.call("c", "get", most=2, least=1)
    again = bench.machine.handle({"op": "get", "most": 2, "least": 1}, call, 0)
    assert again == first


def test_a_lease_that_is_late_comes_back_first_and_its_ack_is_refused() -> None:
    bench = Bench(lease_s=3.0)
    bench.put("p", *"abc")
    bench.get("c", 2, lease=True)
    bench.call("c", "ack", leases=[1])
    bench.machine.tick(3.0)
    with pytest.raises(LeaseLost, match="had expired"):
        bench.call("c", "ack", leases=[0])
    assert bench.get("d", 9) == ["a", "c"]


def test_leases_of_the_dead_come_back_in_order_whoever_took_them_first() -> None:
    bench = Bench()
    bench.put("p", *"abcd")
    bench.get("c", lease=True)
    bench.get("d", lease=True)
    bench.get("c", lease=True)
    bench.machine.lost("d", "SIGKILL", 0)
    bench.machine.lost("c", "SIGKILL", 0)
    assert bench.get("e", 9) == ["a", "b", "c", "d"]


def test_an_ack_of_another_holder_is_refused() -> None:
    bench = Bench()
    bench.put("p", "a")
    bench.get("c", lease=True)
    with pytest.raises(LeaseLost):
        bench.call("d", "ack", leases=[0])
    bench.call("c", "ack", leases=[0])


def test_older_versions_are_dropped_and_counted() -> None:
    bench = Bench()
    bench.put("p", "a", "b", version=1)
    bench.put("p", "plain")
    bench.put("p", "c", version=2)
    assert bench.get("c", 9, min_version=2) == ["plain", "c"]
    assert bench.figures()["dropped"] == 2
    bench.put("p", "old", version=1)
    assert bench.get("c", 9) == ["old"]


def test_of_a_closed_queue_less_than_wanted_is_given() -> None:
    bench = Bench()
    bench.put("p", "a")
    call, _ = bench.call("c", "get", most=5, least=3)
    effects = bench.call("p", "close")[1]
    assert [names(e) for e in effects if is_for(e, call)] == [["a"]]


def test_consumers_of_a_closed_queue_wait_for_what_others_hold_on_lease() -> None:
    bench = Bench()
    bench.put("p", "a")
    bench.get("c", lease=True)
    bench.took_all("c")
    bench.call("p", "close")
    waiting, effects = bench.call("d", "get", most=1, least=1)
    assert effects == []
    _, own = bench.call("c", "get", most=1, least=1)
    assert [type(e.error) for e in own if isinstance(e, Fail)] == [Closed]
    effects = bench.call("c", "nack", leases=[0])[1]
    assert [names(e) for e in effects if is_for(e, waiting)] == [["a"]]


def test_what_a_direct_get_is_given_at_once_is_taken_and_what_it_waited_for_is_not() -> None:
    bench = Bench()
    bench.put("p", "a")
    at_once, _ = bench.call("c", "get", most=1, least=1, direct=True)
    waited, _ = bench.call("c", "get", most=1, least=1, direct=True)
    bench.put("p", "b")
    bench.machine.cancelled(at_once, 0)
    bench.machine.cancelled(waited, 0)
    assert bench.get("d", 9) == ["b"]
