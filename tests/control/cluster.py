"""A whole job in one process for tests: an agent with the control plane, and workers, on a memory network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from runtime.control.client import ControlClient
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.job import ActorInfo
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork, NetworkSettings

AGENT = "agent-0.00000000"


def actors(*roles: tuple[str, int]) -> list[ActorInfo]:
    """A plan: (role, how many) each."""
    return [
        ActorInfo(f"{role}-{rank}", role, rank, world_size=count)
        for role, count in roles
        for rank in range(count)
    ]


@dataclass
class Worker:
    """One process start of an actor."""

    info: ActorInfo
    incarnation: int
    peer: str
    endpoint: Endpoint
    client: ControlClient


@dataclass
class Job:
    """The agent's side, and what it can do to workers."""

    network: MemoryNetwork
    service: ControlService
    endpoint: Endpoint
    plan: Sequence[ActorInfo]
    sent: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    incarnations: dict[str, int] = field(default_factory=dict)

    @asynccontextmanager
    async def worker(self, name: str, *, join: bool = True) -> AsyncIterator[Worker]:
        """A started process of an actor; ends without saying so."""
        info = next(actor for actor in self.plan if actor.name == name)
        incarnation = self.incarnations[name] = self.incarnations.get(name, -1) + 1
        peer = f"{name}.{incarnation:08x}"
        who = {"name": name, "incarnation": incarnation, "peer": peer}
        await self.service.ask("membership", {"op": "starting", **who, "host": "h", "pid": 1})
        endpoint = Endpoint(self.network.transport(peer), role=info.role, rank=info.rank)
        client = ControlClient(
            endpoint,
            self.endpoint.address,
            me=info,
            incarnation=incarnation,
            actors=self.plan,
        )
        endpoint.directory = client
        async with endpoint, client:
            if join:
                await client.join(endpoint.address.address)
            yield Worker(info, incarnation, peer, endpoint, client)

    async def exited(self, worker: Worker, cause: str, code: int, *, final: bool) -> None:
        """What the agent says when a worker has ended."""
        who = {"name": worker.info.name, "incarnation": worker.incarnation, "peer": worker.peer}
        report = {"op": "exited", **who, "cause": cause, "code": code, "final": final}
        await self.service.ask("membership", report)


@asynccontextmanager
async def job(
    plan: Sequence[ActorInfo],
    *,
    settings: NetworkSettings | None = None,
    machines: Callable[[], dict[str, Any]] = standard_machines,
) -> AsyncIterator[Job]:
    """A running job with its control plane, and no worker yet."""
    network = MemoryNetwork(seed=1, settings=settings)
    sent: list[Any] = []
    events: list[Any] = []
    endpoint = Endpoint(network.transport(AGENT), role="agent", rank=0)
    service = ControlService(
        endpoint, Plane(machines()), me=AGENT, on_send=sent.append, on_emit=events.append
    )
    async with endpoint, service:
        declared = [{"name": a.name, "role": a.role, "rank": a.rank, "host": "h"} for a in plan]
        await service.ask("membership", {"op": "declare", "actors": declared})
        yield Job(network, service, endpoint, plan, sent, events)


@asynccontextmanager
async def running(
    plan: Sequence[ActorInfo], *, settings: NetworkSettings | None = None
) -> AsyncIterator[tuple[Job, list[Worker]]]:
    """A job with every actor running."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(job(plan, settings=settings))
        workers = [await stack.enter_async_context(made.worker(actor.name)) for actor in plan]
        yield made, workers


def control_of(job: Job) -> PeerAddress:
    """Where the control plane is."""
    return job.endpoint.address
