"""One process's composition: its connections, its calls, its access to the control plane.

A `Node` lives in one event loop: on the peer thread of a worker (`blocking.py`), or in the loop of an
async program, by `async with Node.from_env()`. While it runs it is the process's own (`peer.context`).
Nothing is decided here; the parts decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self

from runtime.aio import Service
from runtime.control.client import ControlClient
from runtime.errors import MisuseError, RuntimeFault
from runtime.job import ActorInfo
from runtime.peer import context
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.peer.threads import PlainRunner
from runtime.transport.base import Transport

if TYPE_CHECKING:
    from runtime.launcher.plan import WorkerSpec

logger = logging.getLogger(__name__)

_CLOSE_S = 2.0
_LEAVE_S = 1.0
_CLOSED = "the node of this process has been closed: nobody can be reached any more"


class Identity(NamedTuple):
    """Who a node is in its job. `control`: where the control plane listens; `actors`: all planned ones."""

    me: ActorInfo
    incarnation: int
    control: PeerAddress
    actors: Sequence[ActorInfo]


class Node(Service):
    """The running connections of one process: `endpoint` for calls, `control` for the control plane.

    `start` makes calls possible, `join` makes this process known to the others: whoever calls it waits
    until then, so what is to be called is exported in between. `async with` does both.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        *,
        runner: PlainRunner | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """`runner`, `prepare`: see `Endpoint`."""
        me = identity.me
        super().__init__(f"node {me.name}", close_timeout=_CLOSE_S)
        self._transport = transport
        self.endpoint = Endpoint(
            transport, role=me.role, rank=me.rank, runner=runner, prepare=prepare
        )
        self.control = ControlClient(
            self.endpoint,
            identity.control,
            me=me,
            incarnation=identity.incarnation,
            actors=identity.actors,
        )
        self.endpoint.directory = self.control
        self._joined = False
        self._context: context.Context | None = None
        self.leaves = True
        """Say goodbye to the job when closing. A process that fails does not: its agent knows why."""

    @classmethod
    def from_spec(
        cls,
        spec: WorkerSpec,
        *,
        runner: PlainRunner | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> Self:
        """The node of the worker that `spec` describes, not started."""
        from runtime.transport.arena import Arena
        from runtime.transport.host import HostTransport  # the first import of zmq
        from runtime.transport.link import reached_by

        agent_host = spec.agent_host or spec.info.host
        control = PeerAddress(spec.agent_peer, spec.agent_address, "@agent", 0, agent_host)
        identity = Identity(spec.info, spec.incarnation, control, spec.actors)
        local = spec.transport == "auto"
        arena = Arena.attach(spec.arena) if local else None
        address, settings = reached_by(
            spec.address, spec.host_address, spec.security, spec.accept_from, spec.port_range
        )
        transport = HostTransport(spec.peer, address, local=local, arena=arena, settings=settings)
        return cls(transport, identity, runner=runner, prepare=prepare)

    @classmethod
    def from_env(cls) -> Self:
        """The node of this worker, to run in the caller's loop: `async with Node.from_env() as node`.

        Raises `MisuseError` outside of a worker, and where this worker's node runs already.
        """
        if context.installed() is not None:
            raise MisuseError(
                "the node of this worker runs already, on its peer thread: it is started there for "
                "function and class entries, and by the first call, barrier or kv of a script"
            )
        if context.held() is None:
            raise MisuseError(
                "Node.from_env() works in a worker of a job: start the script with "
                "`python -m runtime.launch script.py`"
            )
        return cls.from_spec(context.held())

    @property
    def joined(self) -> bool:
        """Whether the others can find this process."""
        return self._joined

    async def join(self) -> None:
        """Make this process known to the others of the job, with what it exports. Again: nothing."""
        if not self._joined:
            self._joined = True
            await self.control.join(self._transport.address)

    def join_later(self, seconds: float) -> None:
        """`join` after that time, unless it has happened by then. On the loop's thread."""

        async def join() -> None:
            await asyncio.sleep(seconds)
            try:
                await self.join()
            except RuntimeFault as error:
                logger.warning("%s could not join its job: %s", self._name, error)

        self.spawn(join(), "join later")

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            await self.join()
        except BaseException:
            await self.close()
            raise
        return self

    async def _on_start(self) -> None:
        if context.installed() is not None:
            raise MisuseError("this process has a running node already; one is enough")
        await self.endpoint.start()
        self.serve(self.endpoint.wait(), "endpoint")
        await self.control.start()
        self.serve(self.control.wait(), "control client")
        loop = asyncio.get_running_loop()
        self._context = context.Context(loop, self.endpoint, self.control, self.control)
        context.install(self._context)

    async def _on_close(self) -> None:
        if self._context is not None and context.installed() is self._context:
            context.install(None)
            context.on_first_use(None, _CLOSED)
            context.hold(None)
        if self._joined and self.leaves:
            try:
                async with asyncio.timeout(_LEAVE_S):
                    await self.control.leave()
            except TimeoutError:
                logger.info("left without being heard")
        await self.control.close()
        await self.endpoint.close()
