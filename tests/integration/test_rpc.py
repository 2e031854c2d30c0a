"""Calls between real processes over sockets: volume, large bodies, order, deaths."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import MisuseError, PeerLostError, RemoteError, Timeout
from runtime.peer import context
from runtime.peer.endpoint import Endpoint
from runtime.peer.group import RoleGroup
from runtime.peer.proxy import create_rpc_proxy
from runtime.transport.sockets import SocketTransport
from tests.integration.support.rpc_peer import FileDirectory, Server

_PROGRAM = Path(__file__).parent / "support" / "rpc_peer.py"
_ROOT = Path(__file__).parents[2]


class Peers:
    """Server processes in one directory, this test's own endpoint beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.directory = FileDirectory(folder)
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._starts = 0

    def start(self, *names: str) -> None:
        """Start processes and wait until all are ready."""
        for name in names:
            self._starts += 1
            self.running[name] = subprocess.Popen(
                [sys.executable, str(_PROGRAM), str(self.folder), name, f"{self._starts:08x}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(_ROOT)},
            )
        for name in names:
            out = self.running[name].stdout
            assert out is not None
            assert out.readline() == b"ready\n", f"{name} did not start"

    def kill(self, name: str) -> None:
        incarnation = (self.folder / name).read_text()
        (self.folder / f"{name}.{incarnation}.dead").touch()
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        self._reap(process)

    def run(self, program: str) -> subprocess.Popen[bytes]:
        """Another process, which the test ends itself."""
        return subprocess.Popen(
            [sys.executable, "-c", program, str(self.folder)],
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )

    def endpoint(self) -> Endpoint:
        peer = f"p-9.{os.getpid():08x}"
        transport = SocketTransport(peer, f"ipc://{self.folder}/{peer}")
        return Endpoint(transport, directory=self.directory, role="p", rank=9)

    def close(self) -> None:
        for process in self.running.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self.running.values():
            try:
                process.wait(10)
            finally:
                process.kill()
                self._reap(process)

    @staticmethod
    def _reap(process: subprocess.Popen[bytes]) -> None:
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def peers() -> Iterator[Peers]:
    folder = Path(tempfile.mkdtemp(prefix="rpc-", dir="/tmp"))  # ipc paths must be short
    made = Peers(folder)
    try:
        yield made
    finally:
        made.close()
        shutil.rmtree(folder)


@pytest.fixture
async def me(peers: Peers) -> AsyncIterator[Endpoint]:
    async with peers.endpoint() as endpoint:
        endpoint.export_instance(None, Server())
        context.install(context.Context(asyncio.get_running_loop(), endpoint, peers.directory))
        (peers.folder / "p-9").write_text(endpoint.peer.partition(".")[2])
        yield endpoint
        context.install(None)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - another process's state has no event here
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("each", [1250, pytest.param(10_000, marks=pytest.mark.long)])
async def test_thousands_of_calls_of_8_callers_get_their_own_answers(
    peers: Peers, me: Endpoint, each: int
) -> None:
    callers = [f"p-{rank}" for rank in range(8)]
    peers.start(*callers, "p-8")
    calls = [me.call(name, "ask_many", ("p-8", each, 200), timeout=55) for name in callers]
    assert await asyncio.gather(*calls) == ["0 wrong"] * 8


async def test_64_mib_and_bfloat16_come_back_bit_for_bit(peers: Peers, me: Endpoint) -> None:
    import torch

    peers.start("p-0")
    large = torch.arange(16 * 2**20, dtype=torch.int32).view(torch.float32).reshape(4096, -1)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for method, first in (("echo", large), ("plain", large[:1000])):
        back = await me.call("p-0", method, ({"first": first, "all": every},), timeout=50)
        assert torch.equal(back["first"].view(torch.int32), first.view(torch.int32))
        assert back["first"].shape == first.shape
        assert torch.equal(back["all"].view(torch.int16), every.view(torch.int16))
        assert back["all"].dtype is torch.bfloat16


async def test_calls_start_in_order_whatever_their_size(peers: Peers, me: Endpoint) -> None:
    sizes = [10, 3 << 20, 10, 200_000, 40_000]
    calls = [me.call("p-0", "note", (n, bytes(sizes[n % 5])), timeout=50) for n in range(100)]
    await asyncio.to_thread(peers.start, "p-0")  # they wait for it
    assert await asyncio.gather(*calls) == list(range(100))
    assert await me.call("p-0", "seen") == [str(n) for n in range(100)]


async def test_a_callee_killed_in_mid_call_is_told_at_once_and_its_next_start_answers(
    peers: Peers, me: Endpoint
) -> None:
    peers.start("p-0", "p-1")
    group = RoleGroup("p")[:2]
    calls = [me.call("p-0", "hang", (str(n),)) for n in range(3)]
    await until(lambda: _seen(me, "p-0", "start 2"))
    killed = time.monotonic()
    peers.kill("p-0")
    for call in calls:
        with pytest.raises(PeerLostError, match=r"p rank 0 .*SIGKILL") as caught:
            await call
        assert (caught.value.role, caught.value.rank, caught.value.cause) == ("p", 0, "SIGKILL")
    assert time.monotonic() - killed < 1.0
    again = group.call("pid")
    await asyncio.to_thread(peers.start, "p-0")
    assert await again == [peers.running["p-0"].pid, peers.running["p-1"].pid]


async def test_a_killed_caller_cancels_what_runs_for_it(peers: Peers, me: Endpoint) -> None:
    peers.start("p-0")
    program = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from runtime.peer.endpoint import Endpoint\n"
        "from runtime.transport.sockets import SocketTransport\n"
        "from tests.integration.support.rpc_peer import FileDirectory\n"
        "async def main(folder):\n"
        "    transport = SocketTransport('p-7.1', f'ipc://{folder}/p-7.1')\n"
        "    async with Endpoint(transport, directory=FileDirectory(folder)) as endpoint:\n"
        "        await endpoint.call('p-0', 'hang', ('orphan',))\n"
        "asyncio.run(main(Path(sys.argv[1])))\n"
    )
    caller = peers.run(program)
    try:
        await until(lambda: _seen(me, "p-0", "start orphan"))
    finally:
        caller.kill()
        caller.wait()
    await until(lambda: _seen(me, "p-0", "cancelled orphan"))


async def test_a_timeout_and_a_cancel_end_the_handler_over_there(
    peers: Peers, me: Endpoint
) -> None:
    peers.start("p-0")
    with pytest.raises(Timeout, match=r"p-0\.hang\(\) was not answered within 0\.3 s"):
        await me.call("p-0", "hang", ("late",), timeout=0.3)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            await me.call("p-0", "hang", ("given up",))
    await until(lambda: _seen(me, "p-0", "cancelled late"))
    await until(lambda: _seen(me, "p-0", "cancelled given up"))


async def test_a_cycle_of_plain_handlers_over_three_processes_is_named(
    peers: Peers, me: Endpoint
) -> None:
    peers.start("p-0", "p-1", "p-2")
    assert await me.call("p-0", "pass_on", (["p-1", "p-2"],), timeout=20) == 2
    started = time.monotonic()
    path = " -> ".join(f"p-{rank}.pass_on" for rank in (0, 1, 2, 0))
    with pytest.raises(RemoteError, match=f"cycle.*{path}") as caught:
        await me.call("p-0", "pass_on", (["p-1", "p-2", "p-0"],), timeout=20)
    assert isinstance(caught.value, MisuseError)
    assert time.monotonic() - started < 2.0


def test_a_plain_program_calls_through_a_loop_in_another_thread(peers: Peers) -> None:
    peers.start("p-0", "p-1")
    started, ended = threading.Event(), threading.Event()

    async def node() -> None:
        async with peers.endpoint() as endpoint:
            context.install(context.Context(asyncio.get_running_loop(), endpoint, peers.directory))
            started.set()
            await asyncio.to_thread(ended.wait, 50)
            context.install(None)

    thread = threading.Thread(target=lambda: asyncio.run(node()))
    thread.start()
    try:
        assert started.wait(10)
        proxy: Any = create_rpc_proxy("p-1", None, Server)
        assert [proxy.plain(n) for n in range(200)] == list(range(200))
        group = RoleGroup("p")[:2]
        group.wait_ready(10)
        futures = [group.call("echo", n) for n in range(500)]
        assert [future.result(20) for future in futures] == [[n, n] for n in range(500)]
    finally:
        ended.set()
        thread.join()


async def _seen(me: Endpoint, name: str, event: str) -> bool:
    return event in await me.call(name, "seen", timeout=10)
