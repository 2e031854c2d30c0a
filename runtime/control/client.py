"""What a process knows of its job, and its way to the control plane.

`ControlClient` joins its process to the membership, keeps a picture of the others by one long poll,
tells the endpoint who is dead, and is the `Directory` that calls by name go through. The functions that
users call (`barrier`, `kv`, …) stand in `control.public` and can be had from here, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any

from runtime.aio import Backoff, Service
from runtime.control.asking import Asker
from runtime.control.messages import listed
from runtime.control.public import Entry as Entry
from runtime.control.public import Member as Member
from runtime.control.public import barrier as barrier
from runtime.control.public import barrier_async as barrier_async
from runtime.control.public import kv as kv
from runtime.control.public import master as master
from runtime.control.public import master_async as master_async
from runtime.control.public import members as members
from runtime.control.public import members_async as members_async
from runtime.errors import Closed, MisuseError, PeerLostError, RuntimeFault
from runtime.job import ActorInfo
from runtime.machine import Message
from runtime.peer.context import PeerAddress

if TYPE_CHECKING:
    from runtime.peer.endpoint import Endpoint

logger = logging.getLogger(__name__)

_FATE_S = 3.0
_LEAVE_S = 2.0


class ControlClient(Service):
    """One process's access to the control plane at `control`; implements `peer.context.Directory`.

    `me`: which actor this process is (None: not an actor; it then hears nothing of the others), `incarnation`
    the number of its start, `actors` the plan. `patience`: seconds for which a
    question is repeated when the control plane cannot be reached. `told` gets what machines send to this
    process, each message once and in order; it counts as taken when what `told` gives has been awaited, and
    what comes of that is the answer.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        control: PeerAddress,
        *,
        me: ActorInfo | None,
        incarnation: int = 0,
        actors: Sequence[ActorInfo] = (),
        patience: float = 3.0,
    ) -> None:
        super().__init__("control client")
        self._endpoint, self._control = endpoint, control
        self._me, self._peer, self._incarnation = me, endpoint.peer, incarnation
        self._actors = {actor.name: actor for actor in actors}
        self._asker = Asker(self._carry, self._give_up, Random(endpoint.peer), patience)
        self._known: dict[str, PeerAddress] = {}
        self._resolving: dict[str, asyncio.Task[PeerAddress | RuntimeFault]] = {}
        self._causes: dict[str, str] = {}
        self._watching: asyncio.Task[None] | None = None
        self.told: Callable[[Message], Awaitable[object] | None] | None = None
        self._heard = 0

    @property
    def control(self) -> PeerAddress:
        """Where the control plane is."""
        return self._control

    async def ask(self, machine: str, message: Message, timeout: float | None = None) -> Any:
        """Ask a machine of the control plane. Raises its error; `Timeout` after `timeout` seconds
        (None: no limit), saying what was awaited; `PeerLostError` when the plane is out of reach.
        Cancelling withdraws the question."""
        return await self._asker.ask(machine, message, timeout)

    # -- membership ---------------------------------------------------------------------------

    async def join(self, address: str, metadata: Mapping[str, Any] | None = None) -> None:
        """Tell the job that this process runs and listens at `address`."""
        who = self._identity("join")
        await self.ask(
            "membership",
            {"op": "join", **who, "address": address, "metadata": dict(metadata or {})},
        )

    async def leave(self, *, final: bool = False) -> None:
        """Tell the job that this process ends. `final`: it is not started again, and may go on by itself.
        Bounded; not being heard is no error."""
        if self._watching is not None:
            self._watching.cancel()  # who has left is not answered any more
        try:
            message = {"op": "leave", **self._identity("leave"), "final": final}
            await self.ask("membership", message, timeout=_LEAVE_S)
        except (PeerLostError, TimeoutError, Closed) as error:
            logger.info("left without being heard: %s", error)

    def _identity(self, op: str) -> dict[str, Any]:
        if self._me is None:
            raise MisuseError(f"{self._peer} is no actor of the job and cannot {op}")
        return {"name": self._me.name, "incarnation": self._incarnation, "peer": self._peer}

    async def members(self, timeout: float | None = None) -> list[Member]:
        """Every actor of the job, in plan order."""
        facts = await self.ask("membership", {"op": "members"}, timeout)
        return [
            Member(item["name"], *(item[key] for key in Member._fields if key != "id"))
            for item in facts
        ]

    def master(self) -> Member:
        """The agent that holds the control plane."""
        name = self._control.peer.rpartition(".")[0] or self._control.peer
        return Member(
            id=name,
            role=self._control.role or "@agent",
            rank=max(0, self._control.rank),
            host=self._control.host,
            address=self._control.address,
            incarnation=self._control.incarnation,
            state="running",
            metadata={},
        )

    # -- Directory ----------------------------------------------------------------------------

    def roles(self) -> Mapping[str, list[ActorInfo]]:
        """Every planned actor by role, in rank order."""
        roles: dict[str, list[ActorInfo]] = {}
        for actor in sorted(self._actors.values(), key=lambda actor: actor.rank):
            roles.setdefault(actor.role, []).append(actor)
        return roles

    async def resolve(self, name: str) -> PeerAddress:
        """Where an actor is; a role's name alone means its rank 0. See `Directory.resolve`."""
        name = name if name in self._actors or f"{name}-0" not in self._actors else f"{name}-0"
        if name not in self._actors:
            raise MisuseError(f"the job has no actor {name!r}; it has {listed(list(self._actors))}")
        if name in self._known:
            return self._known[name]
        task = self._resolving.get(name)
        if task is None:
            # One question for all that wait; who gives up does not take it from the others.
            task = self._resolving[name] = self.spawn(self._resolve(name), f"resolve {name}")
        await asyncio.wait({task})
        if task.cancelled():
            raise Closed("this process is leaving the job")
        found = task.result()
        if isinstance(found, RuntimeFault):
            raise found
        return found

    async def _resolve(self, name: str) -> PeerAddress | RuntimeFault:
        try:
            found = await self.ask("membership", {"op": "resolve", "name": name})
        except RuntimeFault as error:
            return error
        finally:
            self._resolving.pop(name, None)
        address = PeerAddress(**found)
        if address.peer not in self._causes:
            self._known[name] = address
        return address

    async def fate(self, peer: str) -> str | None:
        """Why a process died, None when nobody knows that it did. See `Directory.fate`."""
        if peer == self._control.peer:
            return "the control plane's agent is gone"
        if peer in self._causes:
            return self._causes[peer]
        try:
            verdict = await self.ask("membership", {"op": "fate", "peer": peer}, timeout=_FATE_S)
        except RuntimeFault:
            return None
        cause: str | None = verdict["cause"]
        return cause

    # -- life ---------------------------------------------------------------------------------

    async def _on_start(self) -> None:
        self._endpoint.export("control.told", self._on_told)
        if self._me is not None:
            self._watching = self.serve(self._watch(), "watch")

    async def _watch(self) -> None:
        """Keep up with the membership, one long poll after the other."""
        version, backoff = 0, Backoff(Random(self._peer), limit=5.0)
        while True:
            message = {"op": "watch", "since": version}
            try:
                news = await self._asker.ask("membership", message, quiet=True)
            except MisuseError as error:
                # We were given up, though we live: what we know of others stays as it is.
                logger.error("this process is no part of the job any more: %s", error)
                await asyncio.Event().wait()
            except RuntimeFault as error:
                logger.info("the membership cannot be watched at the moment: %s", error)
                await backoff.wait()
                continue
            backoff.reset()
            version = news["version"]
            for change in news["changes"]:
                self._take(change)

    def _take(self, change: Mapping[str, Any]) -> None:
        known = self._known.get(change["name"])
        if known is not None and (known.peer != change["peer"] or change["state"] != "running"):
            del self._known[change["name"]]
        for _, peer, cause in change["ended"]:
            self._causes[peer] = cause
            if peer != self._peer:
                self._endpoint.lose(peer, cause)

    # -- the way to the plane -----------------------------------------------------------------

    def _carry(self, number: int, command: Message) -> asyncio.Future[Any]:
        answer: asyncio.Future[Any] = self._endpoint.call(
            self._control, "control.ask", (number, dict(command))
        )
        return answer

    def _give_up(self, number: int) -> None:
        if self._closing:
            return
        with suppress(RuntimeFault):  # it is said in the midst of a cancellation, which must go on
            self._endpoint.cast(self._control, "control.cancelled", (number,))

    async def _on_told(self, number: int, message: dict[str, Any]) -> object:
        if number > self._heard and self.told is not None:  # else it comes a second time
            self._heard = number
            if (taken := self.told(message)) is not None:
                return await taken
        return None
