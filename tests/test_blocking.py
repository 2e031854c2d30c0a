"""The peer thread: a node for synchronous code. Its own thread and loop, on the memory network."""

from __future__ import annotations

import asyncio
import concurrent.futures.thread
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import runtime
from runtime.blocking import BlockingNode
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.errors import Closed, ConfigError, MisuseError, Timeout
from runtime.job import ActorInfo
from runtime.node import Identity, Node
from runtime.peer import context
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork

AGENT = "agent-0.0000aaaa"
ME = ActorInfo("trainer-0", "trainer", 0)


class _WholeJob(Node):
    """A node with its job's control plane in the same loop: a job of one process."""

    def __init__(self) -> None:
        network = MemoryNetwork()
        control = PeerAddress(AGENT, f"mem://{AGENT}")
        super().__init__(network.transport("trainer-0.00000000"), Identity(ME, 0, control, [ME]))
        self._agent = Endpoint(network.transport(AGENT), role="agent", rank=0)
        self._service = ControlService(self._agent, Plane(standard_machines()), me=AGENT)

    async def _on_start(self) -> None:
        await self._agent.start()
        await self._service.start()
        actor = {"name": ME.name, "role": ME.role, "rank": ME.rank}
        await self._service.ask("membership", {"op": "declare", "actors": [actor]})
        await super()._on_start()

    async def _on_close(self) -> None:
        await super()._on_close()
        await self._service.close()
        await self._agent.close()


def _never() -> Node:
    raise ConfigError("this one is not to run")


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)
    context.install(None)
    context.on_first_use(None)


@pytest.fixture
def peer() -> Iterator[BlockingNode]:
    peer = BlockingNode(_WholeJob)
    peer.start()
    yield peer
    peer.stop()


async def _fail() -> None:
    raise KeyError("of the coroutine")


def test_coroutines_run_on_the_peer_thread_and_give_their_result(peer: BlockingNode) -> None:
    async def where() -> str:
        return threading.current_thread().name

    assert peer.run(where()) == "runtime-peer"
    with pytest.raises(KeyError, match="of the coroutine"):
        peer.run(_fail())


def test_public_functions_work_from_any_thread(peer: BlockingNode) -> None:
    peer.run(peer.node.join())
    runtime.barrier("alone", timeout=5)
    assert [member.state for member in runtime.members()] == ["running"]
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(len(runtime.members())))
    thread.start()
    thread.join(5)
    assert found == [1]


def test_waiting_on_the_peer_thread_for_itself_is_refused(peer: BlockingNode) -> None:
    async def wrong() -> None:
        peer.run(_fail())

    with pytest.raises(MisuseError, match="await the async form"):
        peer.run(wrong())


def test_a_coroutine_that_takes_too_long_is_cancelled(peer: BlockingNode) -> None:
    ended = threading.Event()

    async def long() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Timeout, match=r"within 0\.05 s"):
        peer.run(long(), timeout=0.05)
    assert ended.wait(2)


def test_a_timeout_of_the_coroutines_own_is_its_own(peer: BlockingNode) -> None:
    async def own() -> None:
        raise TimeoutError("of the coroutine")

    with pytest.raises(TimeoutError, match="of the coroutine"):
        peer.run(own(), timeout=5)


def test_starting_again_is_nothing_and_shortens_the_switch_interval(peer: BlockingNode) -> None:
    before = threading.active_count()
    peer.start()
    peer.begin()
    assert threading.active_count() == before
    assert sys.getswitchinterval() == pytest.approx(0.0005)


@pytest.mark.parametrize(
    ("before", "after"), [((700, 10, 10), (10_000, 10, 10)), ((5_000, 7, 7), (5_000, 7, 7))]
)
def test_the_garbage_collector_looks_less_often_unless_somebody_has_set_it(
    before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    gc.set_threshold(*before)
    BlockingNode(_never).begin()
    assert gc.get_threshold() == after


def test_what_keeps_the_node_from_starting_is_raised_in_start() -> None:
    def make() -> Node:
        raise ConfigError("no such address")

    peer = BlockingNode(make)
    with pytest.raises(ConfigError, match="no such address"):
        peer.start()
    with pytest.raises(Closed):
        peer.run(_fail())
    assert peer.stop()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_a_handler_that_asks_the_interpreter_to_end_does_not_end_the_node(
    peer: BlockingNode, error: type[BaseException]
) -> None:
    def handler() -> None:
        raise error

    peer.call_soon(handler)
    assert peer.run(asyncio.sleep(0.01, "still there")) == "still there"
    assert peer.running


def test_stopping_ends_the_thread_and_tells_later_callers() -> None:
    peer = BlockingNode(_WholeJob)
    peer.start()
    assert peer.stop()
    assert not peer.running
    with pytest.raises(Closed):
        peer.run(_fail())
    with pytest.raises(Closed):
        peer.node  # noqa: B018
    with pytest.raises(MisuseError, match="has been closed"):
        runtime.barrier("late")
    assert peer.stop()


def test_stopping_is_bounded_when_a_handler_blocks_the_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    peer = BlockingNode(_WholeJob)
    peer.start()
    go_on = threading.Event()
    peer.call_soon(go_on.wait, 10)
    began = time.monotonic()
    assert not peer.stop(timeout=0.1)
    assert time.monotonic() - began < 1
    assert "did not end within 0.1 s" in caplog.text
    go_on.set()
    assert peer.stop()


def test_the_loop_can_use_threads_while_the_interpreter_exits(
    peer: BlockingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrent.futures.thread, "_shutdown", True)
    names: list[str] = peer.run(_in_threads(lambda: threading.current_thread().name, 3))
    assert len(names) == 3
    assert all(name.startswith("runtime-peer-pool") for name in names)
    with pytest.raises(ZeroDivisionError):
        peer.run(_in_threads(lambda: 1 // 0, 1))


async def _in_threads(work: Callable[[], object], count: int) -> list[object]:
    return list(await asyncio.gather(*(asyncio.to_thread(work) for _ in range(count))))


def test_a_forked_child_has_no_node_and_does_not_hang(peer: BlockingNode) -> None:
    peer.run(peer.node.join())
    code = _in_child(lambda: _check_forked(peer))
    assert code == 0
    runtime.barrier("after the fork", timeout=5)


def _check_forked(peer: BlockingNode) -> int:
    problems = 0
    for attempt in (lambda: runtime.barrier("x"), peer.begin, lambda: peer.run(_fail())):
        try:
            attempt()
        except (MisuseError, Closed):
            continue
        problems += 1
    return problems + (not peer.stop())


def _in_child(work: Callable[[], int]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    for _ in range(500):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the forked child hangs")


def test_a_node_that_fails_by_itself_is_told() -> None:
    failed = threading.Event()
    peer = BlockingNode(_WholeJob, on_failure=failed.set)
    peer.start()

    async def fail() -> None:
        peer.node.spawn(_fail(), "to fail")

    peer.run(fail())
    assert failed.wait(5)
    peer.stop()
    assert isinstance(peer.error, KeyError)


def test_a_stop_during_the_start_is_heard() -> None:
    started, go_on = threading.Event(), threading.Event()

    def make() -> Node:
        started.set()
        go_on.wait(5)
        return _WholeJob()

    peer = BlockingNode(make)
    peer.begin()
    assert started.wait(5)
    assert not peer.stop(timeout=0.01)
    go_on.set()
    assert peer.stop(timeout=5)


def test_what_runs_when_the_node_ends_is_told_that_it_is_closed() -> None:
    peer = BlockingNode(_WholeJob)
    peer.start()
    waits = threading.Event()
    raised: list[BaseException] = []

    async def wait_for_ever() -> None:
        waits.set()
        await asyncio.Event().wait()

    def call() -> None:
        try:
            peer.run(wait_for_ever())
        except Closed as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    assert waits.wait(5)
    assert peer.stop()
    thread.join(5)
    assert len(raised) == 1


def test_callers_that_come_while_the_node_ends_never_hang() -> None:
    for _ in range(20):
        peer = BlockingNode(_WholeJob)
        peer.start()
        ended: list[str] = []

        def call(peer: BlockingNode = peer, ended: list[str] = ended) -> None:
            try:
                while True:
                    peer.run(asyncio.sleep(0))
            except Closed:
                ended.append("closed")

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        assert peer.stop(timeout=5)
        for caller in callers:
            caller.join(5)
        assert ended == ["closed"] * 3
