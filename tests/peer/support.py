"""Processes of a job in one process: endpoints on a memory network, and a directory that tests write to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from runtime.errors import MisuseError, PeerLostError
from runtime.job import ActorInfo
from runtime.peer import context
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.peer.threads import PlainRunner
from runtime.transport.base import Buffer
from runtime.transport.memory import MemoryNetwork, NetworkSettings


class Directory:
    """What the control plane would know: planned actors, who runs, who died of what."""

    def __init__(self, planned: Mapping[str, int]) -> None:
        self.planned = planned
        self.hosts: dict[str, str] = {}
        self.running: dict[str, PeerAddress] = {}
        self.causes: dict[str, str] = {}
        self.gone: dict[str, str] = {}
        self.asked: list[str] = []
        self.fate_takes = 0.0
        self._changed = asyncio.Event()

    def roles(self) -> Mapping[str, list[ActorInfo]]:
        return {
            role: [self._info(role, rank) for rank in range(size)]
            for role, size in self.planned.items()
        }

    def _info(self, role: str, rank: int) -> ActorInfo:
        name = f"{role}-{rank}"
        return ActorInfo(name, role, rank, host=self.hosts.get(name, "localhost"))

    def started(self, endpoint: Endpoint) -> None:
        name = endpoint.peer.rpartition(".")[0]
        self.running[name] = endpoint.address
        self._change()

    def stopped(self, name: str, cause: str, *, for_good: bool = False) -> None:
        address = self.running.pop(name, None)
        if address is not None:
            self.causes[address.peer] = cause
        if for_good:
            self.gone[name] = cause
        self._change()

    async def resolve(self, name: str) -> PeerAddress:
        self.asked.append(name)
        known = [info.name for actors in self.roles().values() for info in actors]
        if name not in known:
            raise MisuseError(f"no actor {name!r}; there are {known}")
        while name not in self.running:
            if name in self.gone:
                raise PeerLostError(f"{name} is gone: {self.gone[name]}", cause=self.gone[name])
            await self._changed.wait()
        return self.running[name]

    async def fate(self, peer: str) -> str | None:
        await asyncio.sleep(self.fate_takes)
        return self.causes.get(peer)

    def _change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class InlineRunner:
    """Runs plain handlers on the loop, so that fake time has no threads to wait for."""

    def submit(self, work: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(work)


class Handlers:
    """Handlers that note what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.gate = asyncio.Event()

    async def hang(self, name: str = "hang") -> None:
        self.events.append(f"start {name}")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.events.append(f"cancelled {name}")
            raise

    async def wait(self, name: str) -> str:
        self.events.append(f"start {name}")
        await self.gate.wait()
        return name

    def plain(self, name: str) -> str:
        self.events.append(f"start {name}")
        return name


SLOW_WIRE = NetworkSettings(delay_s=(0.01, 0.05))


class World:
    """A job of actors "<role>-<rank>", each an endpoint of its own."""

    def __init__(self, planned: Mapping[str, int], settings: NetworkSettings | None = None) -> None:
        self.network = MemoryNetwork(settings=settings)
        self.directory = Directory(planned)
        self.stage: Callable[..., Buffer] | None = None
        """What transports do instead of their own, see `base.Transport`."""
        self._open: list[Endpoint] = []
        self._starts = 0

    async def start(
        self,
        name: str,
        /,
        *,
        known: bool = True,
        runner: PlainRunner | None = None,
        **handlers: Any,
    ) -> Endpoint:
        """A process of the actor `name` that exposes `handlers`."""
        self._starts += 1
        role, _, rank = name.rpartition("-")
        transport = self.network.transport(f"{name}.{self._starts:08x}")
        if self.stage is not None:
            transport.stage = self.stage  # type: ignore[assignment,method-assign]
        endpoint = Endpoint(
            transport,
            directory=self.directory,
            role=role,
            rank=int(rank),
            runner=runner,
        )
        for method, function in handlers.items():
            endpoint.export(method, function)
        await endpoint.start()
        self._open.append(endpoint)
        if known:
            self.directory.started(endpoint)
        return endpoint

    async def kill(
        self, endpoint: Endpoint, cause: str = "SIGKILL", *, for_good: bool = False
    ) -> None:
        """As SIGKILL does; the directory knows at once, the others by their broken links."""
        self.network.kill(endpoint.peer)
        name = endpoint.peer.rpartition(".")[0]
        self.directory.stopped(name, cause, for_good=for_good)
        self._open.remove(endpoint)
        await endpoint.close()

    async def close(self) -> None:
        context.install(None)
        for endpoint in self._open:
            await endpoint.close()

    def install(self, endpoint: Endpoint) -> None:
        """Make `endpoint` the node of this test."""
        context.install(context.Context(asyncio.get_running_loop(), endpoint, self.directory))


@asynccontextmanager
async def world(settings: NetworkSettings | None = None, **planned: int) -> AsyncIterator[World]:
    """`async with world(a=1, b=2) as job:`"""
    job = World(planned, settings)
    try:
        yield job
    finally:
        await job.close()


async def echo(value: Any) -> Any:
    return value


async def settle() -> None:
    """Let everything happen that needs no time."""
    for _ in range(20):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Return once `condition` holds; five seconds at most."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what tests look at has no event to wait for
            await asyncio.sleep(0.001)
