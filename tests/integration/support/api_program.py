"""The program of `test_rpc_api.py`: workers that serve, and a driver that calls them in every way there is.

The driver writes what each scenario found to `results.json` in its working directory; one that raises
writes the error's name and text.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import torch

from runtime import (
    CallGroupError,
    FutureSequence,
    PeerLostError,
    RoleGroup,
    Whole,
    create_rpc_proxy,
    current_worker,
    export_rpc_method,
    rpc,
)

FEW_S = 20.0


class Worker:
    """What the roles "worker" and "victim" expose."""

    def __init__(self) -> None:
        self.rank = current_worker().actor_info.rank
        self.pieces: list[Any] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.made = 0
        self.closed = 0

    @rpc
    async def rank_of(self) -> int:
        return self.rank

    @rpc
    def double(self, rows: Any, *whole: Any) -> Any:
        self.pieces.append([len(rows), *whole])
        return rows * 2 if isinstance(rows, torch.Tensor) else [2 * row for row in rows]

    @rpc
    async def take_pieces(self) -> list[Any]:
        taken, self.pieces = self.pieces, []
        return taken

    @rpc
    def own(self, item: str, *, number: int) -> str:
        return f"{self.rank}{item}{number}"

    @rpc
    def double_or_die(self, rows: list[int]) -> list[int]:
        if 0 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        return [2 * row for row in rows]

    @rpc
    async def die_if_first(self, path: str) -> int:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return self.rank
        os.kill(os.getpid(), signal.SIGKILL)
        return -1

    @rpc
    def load_weights(self, state_dict: dict[str, torch.Tensor], version: int = -1) -> list[float]:
        self.weights = state_dict
        return [version, *(float(tensor.sum()) for tensor in state_dict.values())]

    @rpc
    def scribble(self) -> float:
        self.weights["large"].mul_(self.rank)
        return float(self.weights["large"].sum())

    @rpc
    def count(self, upto: int) -> Iterator[int]:
        try:
            for number in range(upto):
                self.made += 1
                yield number
        finally:
            self.closed += 1

    @rpc
    async def count_async(self, upto: int, die_at: int = -1) -> AsyncIterator[int]:
        for number in range(upto):
            if number == die_at and self.rank == 1:
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    @rpc
    async def progress(self) -> list[int]:
        return [self.made, self.closed]

    @rpc(thread=False)
    def on_the_loop(self) -> bool:
        return asyncio.get_running_loop().is_running()

    @rpc
    async def ask_all(self) -> list[Any]:
        """From the peer loop: everything that is awaited or iterated there."""
        group = RoleGroup("worker")
        batch = group.call_batch("double", 3, [1, 2, 3])
        streamed = [pair async for pair in group.stream("rank_of")]
        items = [item async for item in group[0].stream("count_async", 3)]
        return [await group.call("rank_of"), await batch, sorted(streamed), items]


class Driver:
    """Runs every scenario; one that breaks does not end the others."""

    def run(self) -> None:
        self.workers = RoleGroup("worker")
        self.workers.wait_ready(FEW_S)
        results = {}
        for name in sorted(n for n in dir(self) if n.startswith("try_")):
            try:
                found = getattr(self, name)()
            except Exception as error:  # the test shows it
                found = f"{type(error).__name__}: {error}"
            results[name.removeprefix("try_")] = found
        with open("results.new", "w") as file:
            json.dump(results, file)
        os.rename("results.new", "results.json")

    def try_batch(self) -> Any:
        results: FutureSequence[int] = self.workers.call_batch(
            "double", 5, [1, 2, 3, 4, 5], "text", Whole([7, 8])
        )
        found = [len(results), results[-1], results[1:3], results.wait(FEW_S), list(results)]
        return [*found, self.workers.call("take_pieces").result(FEW_S)]

    def try_batch_of_nothing(self) -> Any:
        nothing = self.workers.call_batch("double", 0, [])
        return [len(nothing), nothing.wait(FEW_S), self.workers.call("take_pieces").result(FEW_S)]

    def try_batch_of_a_tensor(self) -> Any:
        rows = torch.arange(600_000.0).reshape(6, -1)
        back = torch.stack(self.workers.call_batch("double", 6, rows).wait(FEW_S))
        pieces = self.workers.call("take_pieces").result(FEW_S)
        return [torch.equal(back, rows * 2), pieces]

    def try_batch_with_a_death(self) -> Any:
        batch = RoleGroup("victim").options(timeout=FEW_S).call_batch("double_or_die", 3, [1, 0, 3])
        found: list[Any] = [batch[0], batch[2]]
        try:
            batch[1]
        except PeerLostError as error:
            found.append([error.cause, error.rank])
        try:
            batch.wait(FEW_S)
        except CallGroupError as group:
            found.append([failure.rank for failure in group.failures])
        return found

    def try_scatter(self) -> Any:
        call = self.workers.call("own", ["a", "b", "c", "d"], number=[1, 2, 3, 4], _scatter=True)
        return call.result(FEW_S)

    def try_any(self) -> Any:
        return sorted(self.workers.call_any("rank_of").result(FEW_S) for _ in range(8))

    def try_any_with_a_death(self) -> Any:
        victims = RoleGroup("victim")
        victims.wait_ready(FEW_S)
        call = victims.options(idempotent=True, timeout=FEW_S).call_any("die_if_first", "any.died")
        return [call.result(FEW_S) in (0, 1, 2), os.path.exists("any.died")]

    def try_retry_with_a_death(self) -> Any:
        victim = RoleGroup("victim")[2]
        victim.ping().result(FEW_S)
        call = victim.options(idempotent=True, retry=1, timeout=FEW_S)
        return call.call("die_if_first", "retry.died").result(FEW_S)

    def try_broadcast(self) -> Any:
        weights = {"large": torch.ones(2**20), "small": torch.ones(3), "half": torch.ones(9).half()}
        before = self.workers.broadcast(weights).result(FEW_S)
        after = self.workers.broadcast(weights, version=5).result(FEW_S)
        weights["large"].zero_()
        return [before, after, self.workers.call("scribble").result(FEW_S)]

    def try_stream(self) -> Any:
        plain = list(self.workers[0].stream("count", 100))
        elsewhere = asyncio.run(self._collect(self.workers[1].stream("count_async", 100)))
        groups = sorted(self.workers.stream("rank_of"))
        return [plain == elsewhere == list(range(100)), groups]

    def try_stream_given_up(self) -> Any:
        before = self.workers[3].call("progress").result(FEW_S)
        for number in self.workers[3].stream("count", 100_000):
            if number == 2:
                break
        gc.collect()
        until = time.monotonic() + FEW_S
        while self.workers[3].call("progress").result(FEW_S)[1] == before[1]:
            assert time.monotonic() < until
            time.sleep(0.01)
        return self.workers[3].call("progress").result(FEW_S)[0] - before[0] < 100

    def try_stream_with_a_death(self) -> Any:
        RoleGroup("victim").wait_ready(FEW_S)
        found = []
        try:
            for pair in RoleGroup("victim").stream("count_async", 10, die_at=3):
                found.append(pair)
        except CallGroupError as group:
            causes = [failure.cause for failure in group.failures]
            return [len(found), [n for rank, n in found if rank == 1], causes]

    def try_own_loop(self) -> Any:
        async def work() -> Any:
            ranks, batch = await asyncio.gather(
                self.workers.call("rank_of"),
                self._wait(self.workers.call_batch("double", 2, [1, 2])),
            )
            arrived = [
                pair async for pair in self.workers.call_batch("double", 2, [5, 6]).as_completed()
            ]
            return [ranks, batch, sorted(arrived)]

        return asyncio.run(work())

    def try_peer_loop(self) -> Any:
        return self.workers[2].call("ask_all").result(FEW_S)

    def try_on_the_loop(self) -> Any:
        return self.workers.call("on_the_loop").result(FEW_S)

    def try_export_twice(self) -> Any:
        def answer() -> int:
            return 42

        export_rpc_method("answer", answer)
        export_rpc_method("answer", answer)
        return RoleGroup("driver").call_rank0("answer").result(FEW_S)

    def try_proxy(self) -> Any:
        proxy = create_rpc_proxy("worker-3", None, Worker)
        return [proxy.own("x", number=1), list(proxy.count(3))]

    async def _collect(self, stream: AsyncIterator[Any]) -> list[Any]:
        return [item async for item in stream]

    async def _wait(self, batch: FutureSequence[Any]) -> list[Any]:
        return await batch
