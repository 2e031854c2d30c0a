"""The program of `test_rpc_faults.py`: roles that serve, and a driver that tries everything that goes wrong.

The driver writes one JSON object per scenario to `results.json` in its working directory: what was raised
(`error`: class names of its MRO, `text`), how long it took, and what else the test wants to know.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from runtime import RoleGroup, current_worker, rpc


class Server:
    """Plain handlers run one at a time on the main thread, `async` ones side by side."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @rpc
    def echo(self, value: Any) -> Any:
        return value

    @rpc
    def add(self, left: int, right: int) -> int:
        return left + right

    @rpc
    def lookup(self, key: str) -> int:
        table: dict[str, int] = {}
        return table[key]

    @rpc
    def unpicklable(self) -> Any:
        return lambda: threading.Lock()

    @rpc
    def slow(self, seconds: float, name: str) -> str:
        self.events.append(f"start {name[:40]}")
        time.sleep(seconds)
        return name

    @rpc
    async def hang(self, name: str) -> None:
        self.events.append(f"start {name}")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            self.events.append(f"cancelled {name}")
            raise

    @rpc
    async def seen(self) -> list[str]:
        return list(self.events)

    @rpc
    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @rpc
    async def pid(self) -> int:
        return os.getpid()


class Late(Server):
    """Is not there for two seconds."""

    def setup(self) -> None:
        time.sleep(2.0)


class Left:
    @rpc
    def ping(self) -> str:
        return str(RoleGroup("right").call_rank0("pong").result(timeout=20))


class Right:
    @rpc
    def pong(self) -> str:
        return str(RoleGroup("left").call_rank0("ping").result(timeout=20))


def leave_at_once() -> None:
    """The role `leaver`: gone for good, and nobody's fault."""


class Driver:
    """Runs every scenario, one after the other; a scenario that breaks does not end the others."""

    def run(self) -> None:
        results: dict[str, dict[str, Any]] = {}
        while "NotExposedError" in record(self.try_gone_for_good).get("error", ()):
            time.sleep(0.05)  # the leaver has not left yet
        for name in sorted(n for n in dir(self) if n.startswith("try_")):
            results[name.removeprefix("try_")] = record(getattr(self, name))
        with open("results.new", "w") as file:
            json.dump(results, file)
        os.rename("results.new", "results.json")

    def try_unknown_method(self) -> Any:
        return server().call("ecko", 1).result(timeout=10)

    def try_too_few_arguments(self) -> Any:
        return server().call("add", 1).result(timeout=10)

    def try_unknown_keyword(self) -> Any:
        return server().call("add", 1, right=2, middle=3).result(timeout=10)

    def try_unpicklable_argument(self) -> Any:
        return server().call("echo", threading.Lock()).result(timeout=10)

    def try_unpicklable_result(self) -> Any:
        return server().call("unpicklable").result(timeout=10)

    def try_unknown_role(self) -> Any:
        return RoleGroup("servr")

    def try_handler_raises(self) -> Any:
        try:
            server().call("lookup", "needle").result(timeout=10)
        except KeyError as error:
            return {
                "caught": "KeyError",
                "mro": [c.__name__ for c in type(error).__mro__],
                "type_name": getattr(error, "type_name", None),
                "remote_traceback": getattr(error, "remote_traceback", ""),
                "role": getattr(error, "role", None),
                "rank": getattr(error, "rank", None),
            }

    def try_a_whole_group_raises(self) -> Any:
        try:
            RoleGroup("server").call("lookup", "needle").result(timeout=10)
        except ExceptionGroup as group:
            return sorted((e.role, e.rank) for e in group.exceptions)  # type: ignore[attr-defined]

    def try_died_in_mid_call(self) -> Any:
        return RoleGroup("victim")[1].call("die").result(timeout=20)

    def try_died_in_mid_call_then_again(self) -> Any:
        """Sorted behind the death: the same actor, without a new proxy, in its new incarnation."""
        return RoleGroup("victim")[1].call("echo", "back").result(timeout=20)

    def try_gone_for_good(self) -> Any:
        return RoleGroup("leaver")[0].call("anything").result(timeout=20)

    def try_timeout(self) -> Any:
        return server(0.4).call("slow", 1.5, "too slow").result()

    def try_timeout_drops_the_late_answer(self) -> Any:
        return [server().call("echo", i).result(timeout=10) for i in range(20)]

    def try_timeout_cancels_an_async_handler(self) -> Any:
        try:
            server(0.4).call("hang", "by timeout").result()
        except TimeoutError:
            return wait_for_event("cancelled by timeout")

    def try_cancel_cancels_an_async_handler(self) -> Any:
        future = server().call("hang", "by caller")
        wait_for_event("start by caller")
        assert future.cancel()
        return wait_for_event("cancelled by caller")

    def try_queued_call_never_starts(self) -> Any:
        first = server().call("slow", 1.0, "holds the thread")
        try:
            server(0.3).call("slow", 0.0, "queued").result()
        except TimeoutError:
            first.result(timeout=10)
            server().call("echo", "behind it").result(timeout=10)
            return server().call("seen").result(timeout=10)

    def try_starting_callee(self) -> Any:
        return RoleGroup("late")[0].call("echo", "at last").result(timeout=20)

    def try_order(self) -> Any:
        sizes = [10, 1 << 20, 10, 200_000, 10]
        futures = [server().call("slow", 0.0, f"{i:03d}" + "x" * sizes[i % 5]) for i in range(100)]
        for future in futures:
            future.result(timeout=20)
        events = server().call("seen").result(timeout=10)
        return [event[6:9] for event in events if event[6:9].isdigit()]

    def try_cycle(self) -> Any:
        return RoleGroup("left").call_rank0("ping").result(timeout=20)


def server(timeout: float | None = None) -> Any:
    actor = RoleGroup("server")[0]
    return actor if timeout is None else actor.options(timeout=timeout)


def wait_for_event(event: str) -> bool:
    """Whether the server has noted `event` within twenty seconds."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if event in server().call("seen").result(timeout=10):
            return True
        time.sleep(0.02)
    return False


def record(scenario: Callable[[], Any]) -> dict[str, Any]:
    """What `scenario` returned or raised, and how long it took."""
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"value": scenario()}
    except Exception as error:
        found = {
            "error": [c.__name__ for c in type(error).__mro__],
            "text": str(error),
            "trace": traceback.format_exc(),
            "attributes": {
                name: value
                for name in ("role", "rank", "cause", "exposed", "waited_s")
                if (value := getattr(error, name, None)) is not None
            },
        }
    return {**found, "seconds": time.monotonic() - started}


def many_calls() -> None:
    """One of eight callers: 1,250 calls in flight at once, each with an answer of its own."""
    rank = current_worker().actor_info.rank
    actor = RoleGroup("server")[0]
    wanted = [(rank, i) for i in range(1250)]
    futures = [actor.call("echo", value) for value in wanted]
    found = [tuple(future.result(timeout=60)) for future in futures]
    assert found == wanted, f"rank {rank} got answers of others"
    print("all mine", rank)


def tensors() -> None:
    """64 MiB and every special bfloat16 go there and back, bit by bit the same."""
    import torch

    actor = RoleGroup("server")[0]
    large = torch.arange(16 * 2**20, dtype=torch.float32).reshape(4096, -1)
    small = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    state = {"large": large, "part": large[3:5, 1:7:2], "bf16": small, "empty": torch.empty(0, 3)}
    back = actor.call("echo", state).result(timeout=60)
    assert list(back) == list(state)
    for name, tensor in state.items():
        got = back[name]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape), name
        kind = torch.int16 if tensor.dtype is torch.bfloat16 else torch.int32
        same = torch.equal(got.contiguous().view(kind), tensor.contiguous().view(kind))
        assert same, f"{name} came back changed"
        got.add_(1)  # what was received may be written to
    print("bit for bit")
