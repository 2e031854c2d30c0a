"""Ranks that meet at a real store of torch: keys of earlier rounds, ports that somebody else has."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime.embedding import _run_aside
from runtime.errors import RendezvousError
from runtime.launcher.torchrun import Outer, Place
from runtime.meeting import Meeting

HOST = "127.0.0.1"


def _serve(port: int = 0) -> Any:
    import torch.distributed as dist

    return dist.TCPStore(HOST, port, is_master=True, wait_for_workers=False)


class Served:
    """A store as torchrun's agents serve it: it lives longer than the ranks."""

    def __init__(self) -> None:
        self.stores = [_serve()]
        self.port: int = self.stores[0].port


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stores.clear()  # it ends with the last that knows it


def outer(rank: int, place: Place, size: int = 2) -> Outer:
    return Outer("torchrun", "run", rank, size, rank, rank, place, node="0")


def meet(place: Place, ranks: dict[int, str], size: int = 2, timeout: float = 10.0) -> list[Any]:
    """What each rank is given; each says a word. Errors stand in the list."""

    def one(rank: int, word: str) -> Any:
        try:
            meeting = Meeting(outer(rank, place, size), timeout)
            return [record["word"] for record in meeting.gather({"word": word})], meeting
        except RendezvousError as error:
            return str(error), error.missing

    with ThreadPoolExecutor(len(ranks)) as pool:
        return [done[0] for done in pool.map(one, ranks.keys(), ranks.values())]


def test_what_an_earlier_round_has_left_in_the_store_is_never_read(served: Served) -> None:
    place = Place((HOST,), (served.port,), served=True)
    assert meet(place, {0: "a", 1: "b"}) == [["a", "b"]] * 2
    assert meet(place, {0: "c", 1: "d"}) == [["c", "d"]] * 2
    # Of a round of three, rank 2 died before the others came: its record stands there.
    served.stores[0].set("runtime/run/rank/2", '{"word": "dead", "token": "dead"}')
    said = meet(place, {0: "e", 1: "f"}, size=3, timeout=0.5)
    assert said == [said[0]] * 2
    assert said[0].startswith("rank 2 has not called runtime.init() within 0.5 s (all 3 ranks")
    assert meet(place, {1: "h", 2: "i", 0: "g"}, size=3) == [["g", "h", "i"]] * 3


def test_ranks_that_rank_0_does_not_call_say_so(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.meeting._VERDICT_S", 0.2)
    place = Place((HOST,), (served.port,), served=True)
    (said,) = meet(place, {1: "b"}, timeout=0.3)
    assert said == "rank 0 has not called runtime.init() within 0.3 s"


def test_the_store_is_found_at_whichever_address_leads_to_it(served: Served) -> None:
    place = Place(("255.255.255.255", HOST), (served.port,), served=True)
    assert meet(place, {0: "a", 1: "b"}) == [["a", "b"]] * 2


def test_a_port_that_another_job_has_is_passed_over(served: Served) -> None:
    free = _serve()
    place = Place((HOST,), (served.port, free.port))
    del free
    assert meet(place, {0: "a", 1: "b"}) == [["a", "b"]] * 2


def test_where_no_port_is_left_rank_0_names_it(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.meeting._VERDICT_S", 0.2)
    zero, one = meet(Place((HOST,), (served.port,)), {0: "a", 1: "b"}, timeout=0.3)
    assert "rank 0 cannot serve a store" in zero
    assert str(served.port) in zero
    why = "what answers there is no store of this job"
    assert (
        one == f"rank 0 does not serve a store at {HOST}, port {served.port}, within 0.3 s: {why}"
    )


def test_who_serves_the_store_stays_until_all_have_read_it() -> None:
    free = _serve()
    place = Place((HOST,), (free.port,))
    del free
    with ThreadPoolExecutor(2) as pool:
        begun = [pool.submit(Meeting, outer(rank, place), 10.0) for rank in (0, 1)]
        zero, one = (future.result() for future in begun)
        list(pool.map(lambda meeting: meeting.gather({}), (zero, one)))
        zero.finish()
        lingers = pool.submit(zero.linger)
        time.sleep(0.1)
        assert not lingers.done()
        one.finish()
        began = time.monotonic()
        lingers.result()
        assert time.monotonic() - began < 1


def interrupted(seconds: float, work: Callable[[], object]) -> None:
    """Ctrl-C ends it, promptly."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - began < 10
    timer.join()


def test_a_signal_ends_every_wait(served: Served) -> None:
    place = Place((HOST,), (served.port,), served=True)
    interrupted(0.5, lambda: Meeting(outer(0, place), 60.0).gather({}))
    interrupted(0.5, lambda: Meeting(outer(1, place), 60.0).gather({}))
    free = _serve()
    nobody = Place((HOST,), (free.port,))
    del free
    interrupted(0.5, lambda: Meeting(outer(1, nobody), 60.0))


def test_a_store_that_says_nothing_any_more_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power loss: torch itself would wait for ever."""
    monkeypatch.setattr("runtime.meeting._VERDICT_S", 0.1)
    meeting = Meeting(outer(1, Place((HOST,), (served.port,), served=True)), 0.3)
    answers = threading.Event()

    class Mute:
        port = served.port

        def check(self, keys: list[str]) -> bool:
            return answers.wait()

    meeting._store = Mute()
    with pytest.raises(RendezvousError, match=rf"at {HOST}:{served.port} was lost: no answer"):
        meeting.get("x", "nobody has put it")
    answers.set()


def test_what_interrupts_the_caller_ends_what_runs_aside() -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)  # as who waits for the end of a process
            ended.set()

    interrupted(0.1, lambda: _run_aside(work()))
    assert ended.is_set()
