"""The program of `test_rpc_holding.py`: four members on one host that are sent weights from another, and die,
freeze or lose their connections at any step of that.

The first member is the holder. `Member.trap` arms one thing to happen once, in the process that it is called in. The
driver writes what came of each scenario to `results.json`, as that of `rpc_program` does.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtime import RoleGroup, rpc
from runtime.peer import context, holding
from runtime.transport import bulk
from tests.integration.support.rpc_program import record

Weights = dict[str, Any]

MIB = 1 << 20
FEW_S = 10.0
PATIENCE_S = 1.0
HOARD = 6
TRAPPED = Path("trapped")
"""There, once somebody waits in its trap; who waits goes on when it is gone."""


def weights(seed: int, mib: int = 24) -> Weights:
    """Of `mib` MiB, with an array of all sizes at which something changes, and of each kind."""
    numbers = np.random.default_rng(seed)
    sizes = [0, 1, 4095, *(n + d for n in (65_536, MIB, 4 * MIB) for d in (-1, 0, 1))]
    made: Weights = {f"size {n}": numbers.integers(0, 256, n, np.uint8) for n in sizes}
    kinds = [np.float16, np.float64, np.complex128, np.bool_, np.int64]
    made |= {f"kind {kind.__name__}": np.full((300, 501), seed, dtype=kind) for kind in kinds}
    square = numbers.integers(0, 256, (1500, 1500), np.uint8)
    made |= {"transposed": square.T, "backwards": square[::-2, 1:7:3], "one": np.array(seed)}
    left = mib * MIB - sum(array.nbytes for array in made.values())
    return {**made, "rest": numbers.integers(0, 256, max(0, left), np.uint8)}


def digest(found: Weights) -> int:
    sums = [(name, str(a.dtype), a.shape, zlib.crc32(a.tobytes())) for name, a in found.items()]
    return zlib.crc32(repr(sums).encode())


def cut() -> None:
    """End all connections of this process by TCP."""
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family == socket.AF_INET:
                    found.getpeername()
                    found.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # no socket, or not connected: libzmq aborts when one that listens is shut


def wait() -> None:
    TRAPPED.touch()
    until = time.monotonic() + FEW_S
    while TRAPPED.exists() and time.monotonic() < until:
        time.sleep(0.01)


def slots() -> int:
    """In use in the arena of this host."""
    endpoint: Any = context.current().endpoint
    table = endpoint._transport._arena._table
    rows = [row for member in range(table.shape.members) for row in table.rows_of(member)]
    return sum(table.state[row] != 0 for row in rows)


HAPPENS: dict[str, Callable[[], None]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "cut": cut,
    "waits": wait,
}


class Member:
    def __init__(self) -> None:
        self._kept: Weights = {}
        self._seen: list[int | None] = []
        self._hoard: list[Any] = []
        self._disarm: Callable[[], None] = lambda: None

    @rpc
    async def load_weights(self, found: Weights, version: int | None = None) -> int:
        self._kept = found
        self._seen.append(version)
        return digest(found)

    @rpc
    async def seen(self) -> list[int | None]:
        return self._seen

    @rpc
    async def clear(self) -> int:
        """Forget everything; the process id."""
        self._disarm()
        self._kept, self._seen, self._hoard = {}, [], []
        return os.getpid()

    @rpc
    async def left(self) -> list[int]:
        """Payloads held here, calls that wait for one, slots in use in the arena of this host."""
        endpoint: Any = context.current().endpoint
        return [len(endpoint._holder._payloads), len(endpoint._handlers._waiting._asks), slots()]

    @rpc
    async def hoard(self) -> None:
        """Leave room for little in the arena."""
        endpoint = context.current().endpoint
        self._hoard = [
            endpoint._transport.stage(bytes(6 * MIB))  # type: ignore[attr-defined]
            for _ in range(HOARD)
        ]

    @rpc
    async def trap(self, step: str, what: str) -> None:
        """Once, at that step: when some of the bytes have come (`arriving`), before and after they are put into the
        arena (`staging`, `staged`), before and after the first is given them (`serving`, `served`); or of one that
        is no holder, before and after it asks for them (`asking`, `asked`)."""
        holder: Any = context.current().endpoint._holder
        happens = HAPPENS[what]
        match step:
            case "arriving":
                piece, left = bulk.Arrivals.piece, [6]

                def arriving(self: bulk.Arrivals, records: Any) -> Any:
                    left[0] -= 1
                    if not left[0]:
                        disarm()
                        happens()
                    return piece(self, records)

                disarm = self._disarm = lambda: setattr(bulk.Arrivals, "piece", piece)
                bulk.Arrivals.piece = arriving  # type: ignore[method-assign]
            case "staging" | "staged":
                self._around(holder, "_staged", happens, before=step == "staging")
            case "serving" | "served":
                self._around(holder, "_give", happens, before=step == "serving")
            case "asking" | "asked":
                self._around(holder, "_fetch", happens, before=step == "asking")

    def _around(self, holder: Any, name: str, happens: Callable[[], None], *, before: bool) -> None:
        work = getattr(holder, name)

        def plain(*args: Any) -> Any:
            self._disarm()
            if before:
                happens()
            found = work(*args)
            if not before:
                happens()
            return found

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            of_others = not kwargs.get("own")
            if of_others:
                self._disarm()
            if before and of_others:
                happens()
            found = await work(*args, **kwargs)
            if not before and of_others:
                asyncio.get_running_loop().call_later(0.02, happens)
            return found

        setattr(holder, name, awaited if asyncio.iscoroutinefunction(work) else plain)
        self._disarm = lambda: setattr(holder, name, work)


class Second:
    """Another caller, on the driver's host."""

    @rpc
    async def send(self, versions: list[int]) -> list[list[int]]:
        group = RoleGroup("member")
        return [await group.broadcast(weights(v), version=v) for v in versions]

    @rpc
    async def pid(self) -> int:
        return os.getpid()


class Driver:
    """Runs the scenarios that are named in the file `scenarios`: a method, and its arguments behind hyphens."""

    def __init__(self) -> None:
        holding.PATIENCE_S = PATIENCE_S
        self.members = RoleGroup("member").options(timeout=FEW_S)
        self.second = RoleGroup("second").options(timeout=FEW_S)[0]
        self.version = 0
        self.pids: list[int] = []

    def run(self) -> None:
        found = {}
        for name in Path("scenarios").read_text().split():
            self.members.wait_ready(timeout=FEW_S)
            self.pids = self.members.call("clear").result()
            scenario, *words = name.split("-")
            found[name] = record(partial(getattr(self, scenario), *words))
            TRAPPED.unlink(missing_ok=True)
            found[name]["left"] = self.left()
            Path("results.new").write_text(json.dumps(found))
        os.rename("results.new", "results.json")

    def send(self, mib: int = 24, timeout: float | None = None) -> Any:
        self.version += 1
        self.sent = digest(sent := weights(self.version, mib))
        group = RoleGroup("member").options(return_exceptions=True, timeout=timeout)
        return group.broadcast(sent, version=self.version)

    def got(self, results: list[Any], dead: int = -1) -> list[str]:
        """What each member answered, and whether its handler ran as often as that says."""
        words = []
        for rank, result in enumerate(results):
            kind = type(result).__name__ if isinstance(result, Exception) else ""
            words.append(kind or ("ok" if result == self.sent else "other bytes"))
            if rank != dead and not kind and self.seen(rank) != [self.version]:
                words[-1] += f", seen {self.seen(rank)}"
        return words

    def seen(self, rank: int) -> Any:
        return self.members[rank].call("seen").result()

    def left(self) -> list[int]:
        """Of all members together, and of our own host's arena, once it is nothing, or at last."""
        self.members.wait_ready(timeout=FEW_S)
        until = time.monotonic() + FEW_S
        while True:
            self.members.call("clear").result()
            found = [sum(some) for some in zip(*self.members.call("left").result(), strict=True)]
            found[-1] += slots()
            if not any(found) or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def until(self, condition: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + FEW_S
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"not within {FEW_S} s: {what}")
            time.sleep(0.01)

    def stands_still(self) -> bool:
        stat = Path(f"/proc/{self.pids[0]}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "T"

    # -- scenarios --------------------------------------------------------------------------------

    def well(self) -> Any:
        return self.got(self.send().result(FEW_S))

    def killed(self, step: str, rank: str = "0") -> Any:
        """Whether the dead one had answered, or its call had not been sent and went to its next start: either is well."""
        self.members[int(rank)].call("trap", step, "killed").result()
        found = self.got(self.send(timeout=FEW_S).result(), int(rank))
        dead = found.pop(int(rank))
        return [dead in ("ok", "PeerLostError") or dead, *found]

    def cut(self, step: str, rank: str = "0") -> Any:
        self.members[int(rank)].call("trap", step, "cut").result()
        return self.got(self.send().result(FEW_S))

    def frozen(self, step: str) -> Any:
        """The others have theirs while it stands still; then it goes on."""
        self.members[0].call("trap", step, "frozen").result()
        future = self.send()
        try:
            self.until(self.stands_still, "it stands still")
            self.until(lambda: all(self.seen(n) for n in (1, 2, 3)), "the others have theirs")
        finally:
            os.kill(self.pids[0], signal.SIGCONT)
        return self.got(future.result(FEW_S))

    def late(self, step: str) -> Any:
        """It stands still until the calls have timed out."""
        self.members[0].call("trap", step, "frozen").result()
        future = self.send(timeout=3)
        try:
            self.until(self.stands_still, "it stands still")
            found = future.result()
        finally:
            os.kill(self.pids[0], signal.SIGCONT)
        return self.got(found)

    def full(self, mib: str) -> Any:
        self.members[1].call("hoard").result()
        return self.got(self.send(int(mib)).result(FEW_S))

    def cancelled(self, step: str) -> Any:
        self.members[0].call("trap", step, "waits").result()
        future = self.send()
        self.until(TRAPPED.exists, "it waits")
        time.sleep(0.2)  # all the others have asked it by then
        future.cancel()
        TRAPPED.unlink()
        return [self.seen(n) for n in range(4)]

    def orphaned(self, step: str) -> Any:
        """The caller is killed."""
        self.members[0].call("trap", step, "waits").result()
        pid = self.second.call("pid").result()
        call = self.second.call("send", [1])
        self.until(TRAPPED.exists, "it waits")
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        error = call.exception()
        TRAPPED.unlink()
        self.second.call("pid").result()
        return [type(error).__name__, *self.left()]

    def together(self) -> Any:
        """Two callers at once."""
        of_second = self.second.call("send", [101, 102, 103])
        group = RoleGroup("member")
        of_us = [group.broadcast(weights(v), version=v) for v in (1, 2, 3)]
        wrong = [
            v
            for v, future in zip((1, 2, 3), of_us, strict=True)
            if future.result(FEW_S) != [digest(weights(v))] * 4
        ]
        wrong += [
            v
            for v, found in zip((101, 102, 103), of_second.result(), strict=True)
            if found != [digest(weights(v))] * 4
        ]
        orders = [self.seen(n) for n in range(4)]
        ordered = all(
            [v for v in o if v < 100] == [1, 2, 3] and [v for v in o if v > 100] == [101, 102, 103]
            for o in orders
        )
        return [wrong, ordered]
