"""The program of `test_rpc_scale.py`: two roles that call each other, and a driver with thousands of calls.

The driver writes what each scenario found to `results.json` in its working directory. It looks at the inside of
its own process and, by `left`, of the callee's: calls that are open, tasks on the peer loop, what the arena holds.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from runtime import DataQueue, RoleGroup, barrier, create_rpc_proxy, current_worker, kv, rpc
from runtime.peer import context

LARGE = 200_000
"""Bytes that go through the arena where there is one."""

SIZES = (10, 3 << 20, 10, LARGE, 40_000)


class Node:
    """What both roles expose. A call that goes "there" goes to the other role, and from there "back"."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, int]] = []
        self.released = threading.Event()

    @rpc
    async def echo(self, value: Any) -> Any:
        return value

    @rpc
    def plain(self, value: Any) -> Any:
        return value

    @rpc
    def note(self, caller: int, number: int, load: bytes) -> int:
        self.noted.append((caller, number))
        return len(load)

    @rpc
    async def note_async(self, caller: int, number: int, load: bytes) -> int:
        self.noted.append((caller, number))
        return len(load)

    @rpc
    async def all_noted(self) -> list[tuple[int, int]]:
        noted, self.noted = self.noted, []
        return noted

    @rpc(concurrency=4)
    async def there(self, value: int, depth: int) -> int:
        """Asks the other role, which asks this one, `depth` times; each time one more."""
        if not depth:
            return value
        return 1 + int(await other().call("back", value, depth))

    @rpc(concurrency=4)
    async def back(self, value: int, depth: int) -> int:
        return 1 + int(await other().call("leaf", value))

    @rpc(concurrency=4)
    async def leaf(self, value: int) -> int:
        await asyncio.sleep(0.001)
        return value + 1

    @rpc
    async def unbounded(self, value: int, depth: int) -> int:
        """As `there`, as deep as wanted: nothing bounds how many run at once."""
        return value if not depth else 1 + int(await other().call("unbounded", value, depth - 1))

    @rpc
    async def mirror(self, load: bytearray, depth: int) -> bytearray:
        """The other role has it, too, `depth` times; each writes where it was."""
        load[depth] = depth
        return load if not depth else await other().call("mirror", load, depth - 1)

    @rpc
    async def hang(self, load: bytes) -> None:
        await asyncio.Event().wait()

    @rpc
    def hold(self) -> None:
        """Keeps plain handlers from running until `release`."""
        self.released.wait(30)
        self.released.clear()

    @rpc
    async def release(self) -> None:
        self.released.set()

    @rpc
    async def blocks(self, how: str) -> list[str]:
        """Waits on the peer loop as plain code would; what that raised, and its text."""
        try:
            BLOCKING[how]()
        except Exception as error:
            return [type(error).__name__, str(error)]
        return ["nothing", ""]

    @rpc
    async def left(self) -> dict[str, int]:
        return left()


class Server(Node):
    """Handlers run on the main thread."""


class Driver(Node):
    """Runs every scenario, one after the other; one that breaks does not end the others."""

    def run(self) -> None:
        if current_worker().actor_info.rank:
            self._second_caller()
            return
        RoleGroup("server").wait_ready(30)
        results = {}
        for name in sorted(name for name in dir(self) if name.startswith("try_")):
            results[name.removeprefix("try_")] = record(getattr(self, name))
        with open("results.new", "w") as file:
            json.dump(results, file)
        os.rename("results.new", "results.json")

    def _second_caller(self) -> None:
        for method in ("note", "note_async"):
            barrier(f"both {method}")
            send_numbered(method, 1)
            barrier(f"both sent {method}")

    def try_threads_and_tasks_at_once(self) -> Any:
        """1,000 threads, and 1,000 tasks of a loop of the user's own, start together."""
        before = [left(), server().call("left").result(timeout=10)]
        gate = threading.Event()
        wrong: list[Any] = []

        def ask(number: int) -> None:
            gate.wait(30)
            value = [number, "x" * (number % 50)]
            method = ("echo", "plain")[number % 2]
            try:
                found = server().call(method, value).result(timeout=40)
            except Exception as error:
                found = repr(error)
            if found != value:
                wrong.append([value, found])

        async def ask_all() -> None:
            await asyncio.to_thread(gate.wait, 30)
            async with asyncio.TaskGroup() as group:
                for number in range(1000, 2000):
                    group.create_task(ask_async(number))

        async def ask_async(number: int) -> None:
            method = ("echo", "plain")[number % 2]
            found = await server().call(method, number)
            if found != number:
                wrong.append([number, found])

        threading.stack_size(256 * 1024)
        threads = [threading.Thread(target=ask, args=(number,)) for number in range(1000)]
        threads.append(threading.Thread(target=lambda: asyncio.run(ask_all())))
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join()
        threading.stack_size(0)
        return {"wrong": wrong[:5], "before": before, "after": settled(before)}

    def try_tasks_on_the_peer_loop(self) -> Any:
        """1,000 handlers of this process call out at once, from the loop that carries the answers."""
        calls = [me().call("unbounded", number, 1) for number in range(1000)]
        return [call.result(timeout=40) for call in calls]

    def try_there_and_back(self) -> Any:
        return me().call("there", 0, 1).result(timeout=20)

    def try_100_there_and_back(self) -> Any:
        calls = [me().call("there", number, 1) for number in range(100)]
        return [call.result(timeout=30) for call in calls]

    def try_100_deep(self) -> Any:
        calls = [me().call("unbounded", number, 20) for number in range(100)]
        return [call.result(timeout=30) for call in calls]

    def try_large_there_and_back(self) -> Any:
        """Five times what a peer may have on its way to another, in both directions at once."""
        calls = [me().call("mirror", bytearray([number]) * (1 << 20), 3) for number in range(80)]
        wrong = []
        for number, call in enumerate(calls):
            found = call.result(timeout=40)
            if found[:5] != bytes([0, 1, 2, 3, number]) or len(found) != 1 << 20:
                wrong.append([number, list(found[:5]), len(found)])
        return wrong

    def try_more_than_the_window(self) -> Any:
        """Threads that send much to a slow handler wait, and get their answers; those with little time do not
        wait longer than that."""
        found: list[Any] = []

        def send(number: int) -> None:
            for _ in range(20):
                call = server().call("plain", bytes([number]) * (2 << 20))
                value = call.result(timeout=40)
                found.append(value == bytes([number]) * (2 << 20))

        threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        holds = server().call("hold")
        late, began = server().options(timeout=0.3), time.monotonic()
        futures, errors = [], []
        for _ in range(20):
            try:
                futures.append(late.call("plain", bytes(2 << 20)))
            except Exception as error:
                errors.append(type(error).__name__)
        errors += [type(future.exception()).__name__ for future in futures]
        waited = time.monotonic() - began
        server().call("release").result(timeout=20)
        holds.result(timeout=20)
        return {"right": found.count(True), "errors": errors, "waited": waited}

    def try_blocking_on_the_loop(self) -> Any:
        found = {how: server().call("blocks", how).result(timeout=10) for how in BLOCKING}
        return found | {"then": server().call("echo", "alive").result(timeout=10)}

    def try_cancelled_and_timed_out(self) -> Any:
        """1,000 calls of each kind of handler, small ones and large ones; half are cancelled, half time out."""
        before = [left(), server().call("left").result(timeout=10)]
        outcomes: dict[str, int] = {}
        late = server().options(timeout=0.3)
        held = [server().call("hold")]
        for number in range(500):
            load = bytes(LARGE if number % 25 == 0 else 100)
            method = ("hang", "plain")[number % 2]
            held.append(late.call(method, load))
            held.append(server().call(method, load))
        during = left()
        for future in held[2::2]:
            future.cancel()
        for future in held[1:]:
            try:
                future.result(timeout=20)
                outcome = "answered"
            except BaseException as error:
                outcome = type(error).__name__
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        server().call("release").result(timeout=20)
        held[0].result(timeout=20)
        held.clear()
        del future, load
        after = settled(before)
        return {"outcomes": outcomes, "during": during, "before": before, "after": after}

    def try_order(self) -> Any:
        """Two processes send calls of mixed sizes to one instance, at the same time."""
        found = {}
        for method in ("note", "note_async"):
            barrier(f"both {method}")
            send_numbered(method, 0)
            barrier(f"both sent {method}")
            noted = server().call("all_noted").result(timeout=10)
            found[method] = {
                str(caller): [number for who, number in noted if who == caller] for caller in (0, 1)
            }
        return found


def send_numbered(method: str, caller: int) -> None:
    calls = [server().call(method, caller, n, bytes(SIZES[n % 5])) for n in range(100)]
    for number, call in enumerate(calls):
        assert call.result(timeout=40) == SIZES[number % 5]


def left() -> dict[str, int]:
    """What is under way in this process: open calls of ours, calls of others, tasks on the peer loop; and
    how many slots of the host's arena are in use, whoever owns them."""
    here = context.current()
    found = here.endpoint.statistics()
    arena = getattr(here.endpoint._transport, "_arena", None)
    return {
        "outstanding": found.outstanding,
        "running": found.running,
        "tasks": len(asyncio.all_tasks(here.loop)),
        "slots": 0 if arena is None else sum(map(bool, bytes(arena._table.state))),
    }


def settled(before: list[dict[str, int]]) -> list[dict[str, int]]:
    """The same counts as `before`, as soon as they are no higher and no slot is in use, at the latest after
    thirty seconds."""
    until = time.monotonic() + 30
    while True:
        now = [left(), server().call("left").result(timeout=10)]
        limits = [was | {"slots": 0} for was in before]
        pairs = zip(limits, now, strict=True)
        clean = all(found[key] <= was[key] for was, found in pairs for key in was)
        if clean or time.monotonic() > until:
            return now
        time.sleep(0.05)


def server() -> Any:
    return RoleGroup("server")[0]


def me() -> Any:
    return RoleGroup("driver")[0]


def other() -> Any:
    return server() if current_worker().actor_info.role == "driver" else me()


BLOCKING: dict[str, Callable[[], Any]] = {
    "result": lambda: other().call("echo", 1).result(),
    "exception": lambda: other().call("echo", 1).exception(timeout=1),
    "wait_ready": lambda: RoleGroup("server").wait_ready(1),
    "sequence": lambda: RoleGroup("server").call_batch("echo", 1, [1])[0],
    "batch": lambda: RoleGroup("server").call_batch("echo", 1, [1]).wait(),
    "queue": lambda: DataQueue("a queue", is_master=True).get(),
    "proxy": lambda: create_rpc_proxy("driver", None, Node).plain(1),
    "barrier": lambda: barrier("never"),
    "kv": lambda: kv.get("key"),
}


def record(scenario: Callable[[], Any]) -> dict[str, Any]:
    """What `scenario` returned or raised, and how long it took."""
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"value": scenario()}
    except Exception:
        found = {"trace": traceback.format_exc()}
    return found | {"seconds": time.monotonic() - started}
