"""What goes into a queue, who waits for room, who was promised some."""

from __future__ import annotations

import pytest

from runtime.data.intake import CREDIT_S, RESERVED_S
from runtime.errors import Closed, MisuseError
from runtime.machine import Call, Fail, Reply
from tests.data.bench import Bench, bodies, is_for, names


def test_a_put_of_many_goes_in_item_by_item_and_a_timeout_says_how_many_did() -> None:
    bench = Bench(size=3)
    call, effects = bench.call("p", "put", bodies=bodies(*"abcde"), timeout=2.0)
    assert effects == []
    assert bench.machine.why(call) == "queue 'q' has no room: 3 of 3 items; 3 of 5 went in"
    assert bench.get("c") == ["a"]
    assert bench.machine.deadline() == 2.0
    (answer,) = bench.machine.tick(2.0)
    assert isinstance(answer, Reply)
    assert (answer.call, answer.value["taken"]) == (call, 4)
    assert bench.get("c", 9) == ["b", "c", "d"]


def test_a_put_that_may_not_wait_says_how_many_went_in() -> None:
    bench = Bench(size=2)
    (answer,) = bench.put("p", "a", "b", "c", timeout=0)
    assert isinstance(answer, Reply)
    assert answer.value["taken"] == 2
    assert "2 of 3 went in" in answer.value["why"]


def test_waiting_producers_take_turns_at_free_places() -> None:
    bench = Bench(size=1)
    bench.put("first", *"abc")
    bench.put("second", *"xyz")
    got = []
    for _ in range(6):
        got += bench.get("c")
    assert got == ["a", "b", "x", "c", "y", "z"]


def test_bytes_are_bounded_with_the_buffers_counted() -> None:
    bench = Bench(max_bytes=10)
    big = {"buffers": [[b"1234"], [b"1234"], []]}
    (answer,) = bench.put("p", "a", "b", "c", timeout=0, **big)
    assert isinstance(answer, Reply)
    assert answer.value["taken"] == 2
    assert bench.figures()["bytes"] == 10


def test_what_never_fits_is_refused_at_once() -> None:
    bench = Bench(size=2, max_bytes=10)
    with pytest.raises(MisuseError, match=r"an item of 11 bytes never fits .* max_bytes is 10"):
        bench.put("p", "a", "x" * 11)
    with pytest.raises(MisuseError, match=r"a group of 3 items never fits .* size is 2"):
        bench.put("p", "a", "b", "c", whole=True)
    with pytest.raises(MisuseError, match="min_size=3: queue 'q' never has more than 2"):
        bench.get("c", 3, 3)
    assert bench.figures()["depth"] == 0


def test_a_put_that_comes_again_goes_in_once() -> None:
    bench = Bench(size=2)
    message = {"op": "put", "bodies": bodies("a", "b", "c"), "timeout": 1.0}
    call = Call("p", 1)
    assert bench.machine.handle(message, call, 0) == []
    assert bench.machine.handle(message, call, 0) == []
    (timed_out,) = bench.machine.tick(1.0)
    assert isinstance(timed_out, Reply)
    assert bench.machine.handle(message, call, 2.0) == [Reply(call, {"taken": 2})]
    assert bench.get("c", 9) == ["a", "b"]


def test_a_group_goes_in_whole_and_comes_out_whole() -> None:
    bench = Bench(size=4)
    bench.put("p", "a", "b")
    assert bench.put("q", "x", "y", "z", whole=True) == []
    assert bench.get("c", 1) == ["a"]
    assert bench.get("c", 3) == ["b"]
    assert bench.get("c", 1) == ["x", "y", "z"]


def test_a_group_that_timed_out_has_nothing_in() -> None:
    bench = Bench(size=2)
    bench.put("p", "a")
    (answer,) = bench.put("q", "x", "y", whole=True, timeout=0)
    assert isinstance(answer, Reply)
    assert answer.value["taken"] == 0
    assert bench.get("c", 9) == ["a"]


def test_closing_refuses_puts_at_once_and_gives_out_the_rest() -> None:
    bench = Bench(size=2)
    bench.put("p", "a", "b", "c")
    effects = bench.call("p", "close")[1]
    assert [str(e.error) for e in effects if isinstance(e, Fail)] == [
        "queue 'q' was closed; 2 of 3 items went in"
    ]
    with pytest.raises(Closed):
        bench.put("p", "d")
    assert bench.get("c", 5, 2) == ["a", "b"]
    bench.took_all("c")
    effects = bench.call("c", "get", most=1, least=1)[1]
    assert [type(e.error) for e in effects if isinstance(e, Fail)] == [Closed]


def test_credit_is_room_that_others_do_not_get_until_it_runs_out() -> None:
    bench = Bench(size=100)
    (answer,) = bench.put("p", "a", credit=True)
    assert isinstance(answer, Reply)
    items, _ = answer.value["credit"]
    assert 8 <= items <= 75
    effects = bench.call("q", "put", bodies=[b"x"] * 99)[1]
    assert effects == []
    assert bench.figures()["depth"] == 100 - items
    assert bench.put("p", "b", eager=True, credit=True)
    assert bench.machine.deadline() == RESERVED_S
    effects = bench.machine.tick(RESERVED_S)
    assert bench.figures()["depth"] == 100
    assert CREDIT_S < RESERVED_S


def test_promises_to_others_keep_no_put_back_while_a_get_waits_for_more() -> None:
    for get_first in (True, False):
        bench = Bench(size=100)
        bench.put("p", *"ab", credit=True)
        groups = [{"bodies": [b"x"] * 49, "whole": True, "credit": True} for _ in range(2)]
        if get_first:
            waiting, _ = bench.call("c", "get", most=100, least=100)
        effects = [e for group in groups for e in bench.call("q", "put", **group)[1]]
        if not get_first:
            assert bench.figures()["depth"] < 100
            waiting, more = bench.call("c", "get", most=100, least=100)
            effects += more
        assert [len(names(e)) for e in effects if is_for(e, waiting)] == [100]


def test_nobody_is_promised_room_while_a_put_waits_for_it() -> None:
    bench = Bench(size=100)
    bench.put("p", "a", credit=True)
    bench.call("q", "put", bodies=[b"x"] * 150)
    (answer,) = bench.put("p", "b", eager=True, credit=True)
    assert isinstance(answer, Reply)
    assert "credit" not in answer.value


def test_who_may_not_wait_gets_promised_room_rather_than_a_refusal() -> None:
    bench = Bench(size=100)
    bench.put("p", "a", credit=True)
    (answer,) = bench.call("q", "put", bodies=[b"x"] * 99, timeout=0)[1]
    assert isinstance(answer, Reply)
    assert answer.value == {"taken": 99}


def test_an_eager_put_goes_in_though_the_queue_is_closed_and_its_producer_dead() -> None:
    bench = Bench(size=100)
    bench.put("p", "a", credit=True)
    bench.call("c", "close")
    bench.machine.lost("p", "SIGKILL", 0)
    assert bench.get("c", 9) == ["a"]
    bench.took_all("c")
    waiting, effects = bench.call("c", "get", most=1, least=1)
    assert effects == []  # promised room may still be used
    effects = bench.put("p", "b", eager=True)
    assert [names(e) for e in effects if is_for(e, waiting)] == [["b"]]


def test_a_small_queue_promises_nothing() -> None:
    (answer,) = Bench(size=4).put("p", "a", credit=True)
    assert isinstance(answer, Reply)
    assert "credit" not in answer.value


def test_who_has_not_put_for_long_is_forgotten_and_its_promised_room_is_free() -> None:
    bench = Bench(size=100)
    for name in ("old", "waiting"):
        bench.put(name, "a", credit=True)
    bench.call("waiting", "put", bodies=[b"x"] * 200)
    bench.now = 601.0
    bench.put("new", "a", timeout=0)
    producers = [name for name, *_ in bench.machine.dump()["intake"]["producers"]]
    assert producers == ["waiting/0", "new/0"]
    bench.put("another", "a", timeout=0)  # they are not looked for each time
    assert bench.figures()["depth"] == 100
