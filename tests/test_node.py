"""A node's life, on the memory network and in fake time: no process, no socket, no sleep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

import runtime
from runtime.control.client import ControlClient
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.errors import Closed, MisuseError, PeerLostError, Timeout
from runtime.job import ActorInfo
from runtime.node import Identity, Node
from runtime.peer import context, method
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.memory import MemoryNetwork

pytestmark = pytest.mark.looptime

AGENT = "agent-0.0000aaaa"


class Host:
    """A network with a control plane in it, and the actors of one role."""

    def __init__(self, actors: int = 2) -> None:
        self.network = MemoryNetwork()
        self.actors = [
            ActorInfo(f"trainer-{rank}", "trainer", rank, local_rank=rank, world_size=actors)
            for rank in range(actors)
        ]
        self.service: ControlService

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Host]:
        endpoint = Endpoint(self.network.transport(AGENT), role="agent", rank=0)
        async with endpoint:
            plane = Plane(standard_machines())
            async with ControlService(endpoint, plane, me=AGENT) as self.service:
                actors = [{"name": a.name, "role": a.role, "rank": a.rank} for a in self.actors]
                await self.service.ask("membership", {"op": "declare", "actors": actors})
                yield self

    def node(self, rank: int, incarnation: int = 0) -> Node:
        me = self.actors[rank]
        transport = self.network.transport(f"{me.name}.{incarnation:08x}")
        return Node(
            transport,
            Identity(me, incarnation, PeerAddress(AGENT, f"mem://{AGENT}"), self.actors),
        )

    @asynccontextmanager
    async def other_process(self, rank: int) -> AsyncIterator[Endpoint]:
        """What another worker would have; a node's context belongs to one process only."""
        me = self.actors[rank]
        endpoint = Endpoint(self.network.transport(f"{me.name}.0000ffff"), role=me.role, rank=rank)
        agent = PeerAddress(AGENT, f"mem://{AGENT}")
        client = ControlClient(endpoint, agent, me=me, incarnation=0, actors=self.actors)
        endpoint.directory = client
        async with endpoint, client:
            yield endpoint

    async def state_of(self, rank: int) -> str:
        members = await self.service.ask("membership", {"op": "members"})
        return str(members[rank]["state"])


@pytest.fixture(autouse=True)
def _slot_as_it_was() -> Iterator[None]:
    yield
    context.install(None)
    context.on_first_use(None)
    context.hold(None)


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    async with Host().running() as host:
        yield host


async def test_a_node_joins_its_job_and_leaves_it(host: Host) -> None:
    async with host.node(0) as node:
        assert node.joined
        assert await host.state_of(0) == "running"
        assert [m.id for m in await runtime.members_async()] == ["trainer-0", "trainer-1"]
        ends = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - ends < 0.1  # its goodbye was answered
    assert await host.state_of(0) == "exited"


async def test_a_node_that_fails_leaves_it_to_its_agent_to_say_so(host: Host) -> None:
    node = host.node(0)
    await node.start()
    await node.join()
    node.leaves = False
    await node.close()
    assert await host.state_of(0) == "running"


async def test_callers_wait_until_a_node_has_joined(host: Host) -> None:
    async with host.other_process(0) as caller:
        callee = host.node(1)
        await callee.start()
        call = caller.call("trainer-1", "double", (21,))
        await asyncio.sleep(5)
        assert not call.done()
        callee.endpoint.export("double", _double)
        await callee.join()
        assert await call == 42
        await callee.close()


async def test_joining_later_happens_once_and_not_before_its_time(host: Host) -> None:
    node = host.node(0)
    await node.start()
    node.join_later(5.0)
    await asyncio.sleep(4.9)
    assert not node.joined
    await asyncio.sleep(0.2)
    assert await host.state_of(0) == "running"
    await node.join()
    await node.close()


async def test_the_running_node_is_what_public_functions_use(host: Host) -> None:
    async with host.node(0) as node:
        assert context.current().endpoint is node.endpoint
        with pytest.raises(Timeout, match="trainer-1"):
            await runtime.barrier_async("start", timeout=3)
    assert context.installed() is None
    with pytest.raises(MisuseError, match="has been closed"):
        context.current()


async def test_a_second_node_in_one_process_is_refused(host: Host) -> None:
    async with host.node(0) as first:
        with pytest.raises(MisuseError, match="running node already"):
            await host.node(1).start()
        assert context.current().endpoint is first.endpoint


async def test_functions_declared_for_export_are_exported_by_a_node_of_ones_own(host: Host) -> None:
    before = _declare()
    async with host.node(0) as node:
        after = _declare()
        assert {before, after} <= set(node.endpoint.exported())
        assert await node.endpoint.call("trainer-0", after, (1,)) == 2


async def test_a_lost_peer_is_told_by_name_and_cause(host: Host) -> None:
    async with host.node(0) as node:
        told = {"name": "trainer-1", "incarnation": 0, "peer": "trainer-1.00000000"}
        await host.service.ask("membership", {"op": "starting", **told, "host": "h", "pid": 1})
        gone = {**told, "cause": "SIGKILL", "code": 137, "final": True}
        await host.service.ask("membership", {"op": "exited", **gone})
        with pytest.raises(PeerLostError, match="SIGKILL"):
            await node.endpoint.call("trainer-1", "anything")


async def test_a_node_without_a_control_plane_says_so_and_closes_in_time() -> None:
    host = Host()
    loop = asyncio.get_running_loop()
    node = host.node(0)
    with pytest.raises((PeerLostError, Timeout, Closed)):
        async with asyncio.timeout(60), node:
            pass
    began = loop.time()
    await node.close()
    assert loop.time() - began < 3
    assert context.installed() is None


async def test_from_env_needs_a_worker(host: Host) -> None:
    context.hold(None)
    with pytest.raises(MisuseError, match=r"runtime\.launch"):
        Node.from_env()


async def test_from_env_is_refused_where_the_node_runs_already(host: Host) -> None:
    async with host.node(0):
        with pytest.raises(MisuseError, match="peer thread"):
            Node.from_env()


async def test_a_start_that_is_refused_leaves_the_running_node_and_its_hooks(host: Host) -> None:
    async with host.node(0) as first:
        context.on_first_use(None, "still this text")
        with pytest.raises(MisuseError):
            await host.node(1).start()
        context.install(None)
        with pytest.raises(MisuseError, match="still this text"):
            context.current()
        context.install(context.Context(asyncio.get_running_loop(), first.endpoint, first.control))


async def _double(x: int) -> int:
    return 2 * x


_names = iter(range(1000))


def _declare() -> str:
    """Declare a function with `@rpc(export=True)` under a new name."""
    name = f"test_node_{next(_names)}"

    async def double(x: int) -> int:
        return 2 * x

    method.rpc(name, export=True)(double)
    return name
