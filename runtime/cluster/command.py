"""Where an agent stands in its job: `Conductor` holds the control plane, a `Follower` goes by it.

Both carry out directives by a `Supervisor` of their own. The conductor begins the job once the agents of all
hosts are there, takes what the launcher asks for to the machine "supervision", and gives hosts up of which the
launcher knows that they are lost. A follower beats; when that is not answered for the heartbeat timeout, or
refused, it is cut off: it ends its workers, for the job goes on, or has ended, without it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Protocol

from runtime.aio import Service
from runtime.cluster.starting import declaration, node_name
from runtime.control.client import ControlClient
from runtime.control.service import ControlService
from runtime.errors import Closed, MisuseError, PeerLostError, RuntimeFault
from runtime.job import RoleSpec
from runtime.launcher.assignment import Assignment
from runtime.launcher.outcome import failures_of
from runtime.launcher.plan import planned_actors

logger = logging.getLogger(__name__)

LOST = 69
GATHER_S = 60.0
"""For so long the first agent waits for those of other hosts, which the launcher has started by then."""
_LEAVE_GRACE_S = 2.0
_LAST_WORD_S = 0.7
_END_S = 1.0
_RESTART_GRACE_S = 2.0
_THAWED_S = 1.5


class Part(Protocol):
    """What the launcher, and its end, mean for an agent."""

    async def command(self, message: Mapping[str, Any]) -> None:
        """Do what the launcher says."""
        ...

    async def launcher_gone(self, reason: str, others_s: float) -> None:
        """Bring this host's part of the job to its end: nobody is there to show it to, or wants it. The
        launcher may know better why, and has `others_s` seconds to say so."""
        ...


class Hands(Protocol):
    """What is needed of a `Supervisor`, or of what stands in its place."""

    ended: asyncio.Future[dict[str, Any]]

    def directive(self, message: Mapping[str, Any]) -> None: ...

    async def leave(self, grace_s: float) -> None: ...

    def progress(self) -> Mapping[str, Any]:
        """How far the workers here are, by name."""
        ...


class Conductor:
    """The part of the agent that holds the control plane. `emitted` is to be given the plane's events."""

    def __init__(self, assignment: Assignment, me: str, notify: Callable[[dict[str, Any]], None]):
        self._assignment, self._notify = assignment, notify
        self._agents = {0: me}
        self.lost_hosts: list[int] = []
        """Node ranks of agents that are not there any more."""
        self.added: list[dict[str, Any]] = []
        """Failures with what agents of other hosts have added to them."""
        self._all_there = asyncio.Event()
        self._begun = False
        self._service: ControlService
        self._supervisor: Hands

    def take(self, service: ControlService, supervisor: Hands) -> None:
        """Work with these."""
        self._service, self._supervisor = service, supervisor
        service.progress = supervisor.progress
        service.answered = self._answered

    def _answered(self, failures: list[dict[str, Any]] | None) -> None:
        self.added += failures or ()

    def emitted(self, event: Mapping[str, Any]) -> None:
        """Take an event of the control plane."""
        match event.get("kind"):
            case "restarting":
                self._notify({"event": "restarting", **event})
            case "agent":
                self._agents[event["node_rank"]] = event["peer"]
                if len(self._agents) == len(self._assignment.plan.hosts):
                    self._all_there.set()
            case "lost":
                gone = event["peer"]
                self.lost_hosts += [rank for rank, peer in self._agents.items() if peer == gone]

    async def run(self) -> None:
        """Begin the job when all hosts are there; one that does not come ends it."""
        hosts = self._assignment.plan.hosts
        if len(hosts) > 1:
            try:
                async with asyncio.timeout(GATHER_S):
                    await self._all_there.wait()
            except TimeoutError:
                names = [h.name for rank, h in enumerate(hosts) if rank not in self._agents]
                what = f"{', '.join(names)} cannot be reached from {hosts[0].name}"
                return self._end(f"{what}: nothing came within {GATHER_S:g} s", LOST)
        await self._begin()

    async def stop(self, reason: str, code: int) -> None:
        """Ask all workers to stop; the job ends with `code`."""
        if self._begun:
            message = {"op": "stop", "reason": reason, "code": code}
            await self._service.ask("supervision", message)
        else:
            self._end(reason, code)

    async def kill(self, reason: str, code: int) -> None:
        """Kill all workers now."""
        if self._begun:
            message = {"op": "kill", "reason": reason, "code": code}
            await self._service.ask("supervision", message)
        else:
            self._end(reason, code)

    def lost(self, node_rank: int, why: str) -> None:
        """A host is lost, as the launcher sees it."""
        host = self._assignment.plan.hosts[node_rank].name
        if self._begun:
            self._service.lost(self._agents[node_rank], why)
        else:
            self._end(f"host {host} was lost: {why}", LOST)

    async def command(self, message: Mapping[str, Any]) -> None:
        match message["op"]:
            case "stop":
                await self.stop(message["reason"], message["code"])
            case "kill":
                await self.kill(message["reason"], message["code"])
            case "lost":
                self.lost(message["node_rank"], message["why"])

    async def launcher_gone(self, reason: str, others_s: float) -> None:
        await self.stop(reason, LOST)
        await asyncio.sleep(_LEAVE_GRACE_S)
        await self.kill(reason, LOST)
        await asyncio.sleep(_END_S)
        self._end(reason, LOST)  # some host cannot be reached: that is not waited for

    def _end(self, reason: str, code: int) -> None:
        """The job ends here, without a decision of the machine."""
        if not self._supervisor.ended.done():
            end = {"code": code, "reason": reason, "first": None, "others": []}
            self._supervisor.ended.set_result({**end, "undecided": True})

    async def _begin(self) -> None:
        """Declare the job's actors and start them all."""
        assignment, ask = self._assignment, self._service.ask
        everyone = planned_actors(assignment.plan)
        await ask("membership", declaration(everyone))
        for role in assignment.plan.job.roles.values():
            if role.kind == "elastic":
                nodes = list(dict.fromkeys(node_name(i) for i in everyone if i.role == role.name))
                opened = {"op": "open", "role": role.name, "min": len(nodes), "max": len(nodes)}
                await ask("rendezvous", {**opened, "nodes": nodes})
        begin = {
            "op": "begin",
            "agents": list(self._agents.values()),
            "roles": [self._supervised(role) for role in assignment.plan.job.roles.values()],
            "stop_timeout_s": assignment.shutdown_timeout_s,
            "restart_timeout_s": min(_RESTART_GRACE_S, assignment.shutdown_timeout_s),
            "timeout_s": assignment.timeout_s,
        }
        self._begun = True  # what comes now is taken after this
        await ask("supervision", begin)

    def _supervised(self, role: RoleSpec) -> dict[str, Any]:
        ranks = {host.name: rank for rank, host in enumerate(self._assignment.plan.hosts)}
        return {
            "name": role.name,
            "policy": role.restart.policy if role.restart.max > 0 else "never",
            "max": role.restart.max,
            "driver": role.driver,
            "actors": [
                {
                    "name": info.name,
                    "rank": info.rank,
                    "agent": self._agents[ranks[info.host]],
                    "host": info.host,
                }
                for info in planned_actors(self._assignment.plan)
                if info.role == role.name
            ],
        }


class Follower(Service):
    """The part of an agent that goes by the control plane of another host, which `client` leads to."""

    def __init__(self, assignment: Assignment, client: ControlClient, address: str) -> None:
        super().__init__("follower")
        self._assignment, self._client, self._address = assignment, client, address
        self._cut_off = asyncio.Event()
        self._directed = asyncio.Event()
        self._why = ""
        self._supervisor: Hands

    def take(self, supervisor: Hands) -> None:
        """Work with this one."""
        self._supervisor = supervisor
        self._client.told = self._told

    async def _told(self, message: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        self._supervisor.directive(message)
        self._directed.set()
        if message["op"] != "end":
            return None
        # Taken when we ask nothing more, and can say what is known here: the first agent waits for that.
        await asyncio.wait({self._supervisor.ended})
        return [f for f in failures_of(self._supervisor.ended.result()) if f.get("folder")]

    async def ask(self, machine: str, message: Mapping[str, Any]) -> Any:
        """As `ControlClient.ask`. Does not return where this agent is cut off: it ends by that."""
        try:
            return await self._client.ask(machine, message)
        except (PeerLostError, MisuseError, Closed) as error:
            self._lose(f"{message.get('op')}: {error.reason}")
            await asyncio.Event().wait()

    async def begin(self) -> None:
        """Tell the first agent that this host is there, and go on telling it."""
        self.spawn(self._end_cut_off(), "cut off")
        where = {"host": self._assignment.host, "address": self._address}
        await self.ask(
            "membership", {"op": "agent", **where, "node_rank": self._assignment.node_rank}
        )
        self.serve(self._beat(), "heartbeat")

    async def command(self, message: Mapping[str, Any]) -> None:
        if message["op"] == "leave":
            await asyncio.wait({self._supervisor.ended}, timeout=message["after_s"])
            await self._leave(message["reason"], 0.0)

    async def launcher_gone(self, reason: str, others_s: float) -> None:
        lost = f"its agent: {reason}"
        clock = asyncio.get_running_loop().time
        until = clock() + others_s + _LAST_WORD_S
        self._directed.clear()
        told = self.spawn(self._tell_gone(lost, others_s), "last word")
        await self._supervisor.leave(_LEAVE_GRACE_S)
        over: list[asyncio.Future[Any]] = [told, self._supervisor.ended]
        await asyncio.wait(over, timeout=until - clock(), return_when=asyncio.FIRST_COMPLETED)
        await self._leave(reason, 0.0, lost=lost)

    async def _tell_gone(self, cause: str, others_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(others_s):
                await self._directed.wait()  # by now the first agent knows why, or has lost it, too
        await self.ask("membership", {"op": "gone", "cause": cause})

    async def _leave(self, reason: str, grace_s: float, **more: Any) -> None:
        ended = self._supervisor.ended
        if not ended.done():
            await self._supervisor.leave(grace_s)
        if not ended.done():
            end = {"code": LOST, "reason": reason, "first": None, "others": []}
            ended.set_result(end | more)

    # -- the heartbeat ------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Until it is refused, or unanswered for too long. One at a time: each is repeated until then.

        A host that stood still for that long has a moment to find out what it has missed.
        """
        beat = self._assignment.settings.coordinator
        limit, clock = beat.heartbeat_timeout_ms / 1000, asyncio.get_running_loop().time
        answered = clock()
        while True:
            try:
                async with asyncio.timeout_at(max(answered + limit, clock() + _THAWED_S)):
                    beaten = {"op": "heartbeat", "progress": self._supervisor.progress()}
                    await self._client.ask("membership", beaten)
                answered = clock()
            except TimeoutError:
                self._lose(f"its heartbeat was not answered for {limit:g} s")
            except RuntimeFault as error:
                self._lose(f"its heartbeat was not taken: {error.reason}")
            await asyncio.sleep(beat.heartbeat_interval_ms / 1000)

    def _lose(self, why: str) -> None:
        if not self._cut_off.is_set():
            first = self._assignment.plan.hosts[0].name
            self._why = f"{self._assignment.host} lost the control plane on {first}: {why}"
            self._cut_off.set()

    async def _end_cut_off(self) -> None:
        await self._cut_off.wait()
        if not self._supervisor.ended.done():  # else the plane has ended as it was to
            logger.error("%s", self._why)
        await self._leave(self._why, 0.0, lost=self._why)
