"""`call_batch` and the sequence of its results: what blocks, what fails, what is there already."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from runtime.errors import CallGroupError, MisuseError, PeerLostError, RemoteError, Timeout
from runtime.peer.batch import Whole
from runtime.peer.group import RoleGroup
from tests.peer.support import World, settle, until, world
from tests.peer.workers import FEW_S, blocking, worker


class Doubler:
    """Exported by each worker: notes its pieces, doubles them; may be held back or fail."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails: Exception | None = None

    async def double(self, rows: Any, *more: Any, scale: int = 2) -> Any:
        self.seen.append((rows, *more))
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        return rows * scale if isinstance(rows, torch.Tensor) else [row * scale for row in rows]

    async def short(self, rows: list[int]) -> Any:
        return rows[1:]

    async def none(self, rows: list[int]) -> None: ...


@pytest.fixture
def doublers(job: World) -> list[Doubler]:
    made = []
    for rank in range(3):
        doubler = Doubler()
        for name in ("double", "short", "none"):
            worker(job, rank).export(name, getattr(doubler, name))
        made.append(doubler)
    return made


async def test_five_items_on_four_members() -> None:
    async with world(me=1, r=4) as job:
        job.install(await job.start("me-0"))
        doublers = [Doubler() for _ in range(4)]
        for rank, doubler in enumerate(doublers):
            await job.start(f"r-{rank}", double=doubler.double)
        texts = RoleGroup("r").call_batch("double", 5, [1, 2, 3, 4, 5], "text", Whole([1]), scale=3)
        assert len(texts) == 5, "known at once"
        assert await texts == [3, 6, 9, 12, 15]
        assert texts[-1] == 15
        assert texts[1:4] == [6, 9, 12]
        assert [d.seen for d in doublers] == [
            [([1, 2], "text", [1])],
            [([3, 4], "text", [1])],
            [([5], "text", [1])],
            [],
        ]


async def test_an_empty_batch_calls_nobody(job: World, doublers: list[Doubler]) -> None:
    nothing = RoleGroup("w").call_batch("double", 0, [])
    assert len(nothing) == 0
    assert await nothing == []
    assert nothing.wait(FEW_S) == []
    assert list(nothing.as_completed()) == []
    assert nothing.done()
    with pytest.raises(IndexError, match="no item 0"):
        nothing[0]
    await settle()
    assert not any(d.seen for d in doublers)


async def test_an_empty_group_is_refused(job: World) -> None:
    with pytest.raises(MisuseError, match=r"call_batch\('double'\): the group is empty"):
        RoleGroup("w")[3:].call_batch("double", 0, [])


async def test_tensors_are_cut_along_dim_0_and_come_back_by_row(
    job: World, doublers: list[Doubler]
) -> None:
    rows = torch.arange(8).reshape(4, 2)
    back = await RoleGroup("w").call_batch("double", 4, rows)
    assert torch.equal(torch.stack(back), rows * 2)
    assert [tuple(d.seen[0][0].shape) for d in doublers[:2]] == [(2, 2), (2, 2)]


async def test_items_block_only_for_their_own_piece(job: World, doublers: list[Doubler]) -> None:
    doublers[1].gate.clear()
    batch = RoleGroup("w").call_batch("double", 6, [1, 2, 3, 4, 5, 6])

    def there() -> Any:
        return batch[0], batch[-1], batch[4:], batch[:2], batch[5:3:-1], batch[7:]

    assert await blocking(there) == (2, 12, [10, 12], [2, 4], [12, 10], [])
    assert not batch.done()
    for wait in (lambda: batch.wait(0.02), lambda: batch.wait(0)):
        with pytest.raises(Timeout, match=r"double\(\) of w-1: no answer yet"):
            await blocking(wait)
    doublers[1].gate.set()
    assert await blocking(batch.wait, FEW_S) == [2, 4, 6, 8, 10, 12]
    assert (list(batch), 8 in batch, len(batch)) == ([2, 4, 6, 8, 10, 12], True, 6)
    assert repr(batch) == "<6 items of double(): 3 of 3 pieces are done>"
    with pytest.raises(IndexError, match="no item -7"):
        batch[-7]


async def test_on_the_loop_waiting_names_the_async_forms(
    job: World, doublers: list[Doubler]
) -> None:
    doublers[2].gate.clear()
    batch = RoleGroup("w").call_batch("double", 3, [1, 2, 3])
    await settle()
    assert batch[0] == 2, "what is there does not block"
    for work in (lambda: batch[2], lambda: batch[:], batch.wait, lambda: list(batch)):
        with pytest.raises(MisuseError, match=r"`await` the sequence.*as_completed"):
            work()
    batch.cancel()


async def test_pieces_come_as_they_are_completed(job: World, doublers: list[Doubler]) -> None:
    for doubler in doublers:
        doubler.gate.clear()
    batch = RoleGroup("w").call_batch("double", 5, [1, 2, 3, 4, 5])
    arriving = batch.as_completed()
    found = []
    for rank in (2, 0, 1):
        doublers[rank].gate.set()
        found.append(await anext(arriving))
        if rank != 2:
            found.append(await anext(arriving))
    with pytest.raises(StopAsyncIteration):
        await anext(arriving)
    assert found == [(4, 10), (0, 2), (1, 4), (2, 6), (3, 8)]
    assert sorted(await blocking(list, batch.as_completed())) == sorted(found)


async def test_a_failed_piece_fails_its_own_items_only(job: World, doublers: list[Doubler]) -> None:
    doublers[1].fails = IndexError("needle")
    batch = RoleGroup("w").call_batch("double", 6, [1, 2, 3, 4, 5, 6])
    with pytest.raises(CallGroupError) as caught:
        await batch
    assert [(f.role, f.rank) for f in caught.value.failures] == [("w", 1)]
    assert caught.value.partial == {0: [2, 4], 2: [10, 12]}
    assert batch[0:2] + batch[4:] == [2, 4, 10, 12]
    for index in (2, 3, -3):
        with pytest.raises(RemoteError, match="needle") as raised:
            batch[index]
        assert isinstance(raised.value, IndexError)
    with pytest.raises(RemoteError, match="needle"):
        list(batch)  # which an IndexError must not end early
    with pytest.raises(CallGroupError, match=r"in 1 of 3 members: w-1: .*needle"):
        batch[1:3]
    found = []

    async def collect() -> None:
        async for pair in batch.as_completed():
            found.append(pair)

    with pytest.raises(CallGroupError):
        await collect()
    assert sorted(found) == [(0, 2), (1, 4), (4, 10), (5, 12)]


async def test_failures_may_stand_among_the_items(job: World, doublers: list[Doubler]) -> None:
    doublers[0].fails = KeyError("gone")
    batch = RoleGroup("w").options(return_exceptions=True).call_batch("double", 3, [1, 2, 3])
    found = await batch
    assert isinstance(found[0], KeyError)
    assert found[1:] == [4, 6]
    assert batch[0] is found[0]
    assert dict(batch.as_completed()) == dict(enumerate(found))


@pytest.mark.parametrize(
    ("method", "found"),
    [("short", r"list of 1 for items 2 to 3"), ("none", "NoneType for items 2")],
)
async def test_a_result_of_another_length_is_told_for_its_items(
    job: World, doublers: list[Doubler], method: str, found: str
) -> None:
    batch = RoleGroup("w").call_batch(method, 6, [1, 2, 3, 4, 5, 6])
    with pytest.raises(CallGroupError):
        await batch
    with pytest.raises(
        MisuseError, match=rf"w-1\.{method}\(\) returned a {found}.*as many items: 2"
    ):
        batch[2]


async def test_a_member_that_dies_fails_its_own_piece(job: World, doublers: list[Doubler]) -> None:
    doublers[1].gate.clear()
    batch = RoleGroup("w").call_batch("double", 3, [1, 2, 3])
    await until(lambda: bool(doublers[1].seen))
    await job.kill(worker(job, 1), "SIGKILL", for_good=True)
    with pytest.raises(CallGroupError) as caught:
        await batch
    assert isinstance(caught.value.exceptions[0], PeerLostError)
    assert caught.value.failures[0].cause == "SIGKILL"
    assert (batch[0], batch[2]) == (2, 6)


async def test_a_cancelled_awaiter_gives_up_every_piece(
    job: World, doublers: list[Doubler]
) -> None:
    for doubler in doublers:
        doubler.gate.clear()
    batch = RoleGroup("w").call_batch("double", 3, [1, 2, 3])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await batch
    assert batch.done()
    await until(lambda: not any(endpoint.statistics().running for endpoint in job._open))
    assert job._open[0].statistics().outstanding == 0


async def test_a_batch_that_cannot_be_cut_or_sent_sends_nothing(
    job: World, doublers: list[Doubler]
) -> None:
    group = RoleGroup("w")
    with pytest.raises(MisuseError, match="argument 0"):
        group.call_batch("double", 3, [1, 2])
    with pytest.raises(MisuseError, match=r"argument 0\[0\].*lock"):
        group.call_batch("double", 3, [1, 2, threading.Lock()])
    await settle()
    assert job._open[0].statistics().calls_out == 0


@pytest.mark.parametrize("wait", ["wait", "as_completed", "index"])
async def test_a_handler_that_waits_for_a_piece_of_its_own_is_told(job: World, wait: str) -> None:
    job.install(worker(job, 0))

    def outer() -> str:
        batch = RoleGroup("w")[:2].call_batch("inner", 2, [1, 2])
        try:
            match wait:
                case "wait":
                    batch.wait()
                case "index":
                    batch[0]
                case _:
                    list(batch.as_completed())
        except (MisuseError, CallGroupError) as error:
            return str(error)
        return "no cycle"

    def inner(rows: list[int]) -> list[int]:
        return rows

    for rank in (0, 1):
        worker(job, rank).export("inner", inner)
    worker(job, 0).export("outer", outer)
    told = await job._open[0].call("w-0", "outer", timeout=FEW_S)
    assert "w-0.outer" in told
    assert "w-0.inner" in told


async def test_a_long_wait_for_any_piece_says_whom_it_waits_for(
    job: World, doublers: list[Doubler]
) -> None:
    doublers[2].gate.clear()
    arriving = RoleGroup("w").call_batch("double", 3, [1, 2, 3]).as_completed()
    assert [await anext(arriving), await anext(arriving)] == [(0, 2), (1, 4)]
    assert "no answer yet from w-2: " in arriving._feed.describe()
    arriving.close()
    assert doublers[2].seen, "to stop looking is not to give up the calls"
    await settle()
    assert worker(job, 2).statistics().running == 1
