"""The agent of a host whose workers somebody else has started (torchrun, srun, mpirun): it tells them where things
are and watches them.

Each rank of the host gets its `WorkerSpec` as a file in the job's folder, mode 0600, which it removes when it has
read it: by that no key goes through the outer launcher's store. A rank that dies is told to the membership with
its cause, so that others need not guess. Nobody is started, stopped or killed here, and the end of the rank that
started this agent is not its end: it ends when the last rank of its host has gone. The one that holds the control plane
waits for the ranks of other hosts besides, at most the drain timeout.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import pickle
import signal
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from runtime import aio
from runtime.cluster.command import Follower
from runtime.cluster.starting import Control, announcement, basic_spec, declaration
from runtime.control.client import ControlClient
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.errors import RuntimeFault
from runtime.launcher import spawn
from runtime.launcher.assignment import Assignment, spec_file
from runtime.launcher.plan import WorkerSpec, planned_actors
from runtime.launcher.progress import reported
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.arena_keeper import make_keeper

logger = logging.getLogger(__name__)

Notify = Callable[[dict[str, Any]], None]

_TELL_S = 5.0
_EXIT_CODE_FIELD = 49
"""Of /proc/PID/stat, counted from the one after the name."""
_PIDFD_GET_INFO = 0xC040FF0B
_PIDFD_INFO = struct.Struct("=Q52xi")
_PIDFD_INFO_EXIT = 8


async def run(
    assignment: Assignment,
    endpoint: Endpoint,
    notify: Notify,
    told_control: Callable[[], Awaitable[PeerAddress | None]],
) -> None:
    """Be the agent of this host until its ranks have gone. `notify` gets the events "listening" (of the control plane)
    and "ready"; `told_control` gives the control plane's address to the others, None where nobody will."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all of a job: its ranks decide
    if assignment.node_rank == 0:
        await _conduct(assignment, endpoint, notify)
    elif (address := await told_control()) is not None:
        await _follow(assignment, endpoint, notify, address)


async def _conduct(assignment: Assignment, endpoint: Endpoint, notify: Notify) -> None:
    everyone = planned_actors(assignment.plan)
    left, all_gone = {info.name for info in everyone}, asyncio.Event()

    def emitted(event: Mapping[str, Any]) -> None:
        if event.get("kind") == "member" and event["gone"]:
            left.discard(event["name"])
            if not left:
                all_gone.set()

    beat = assignment.settings.coordinator
    machines = standard_machines(heartbeat_timeout=beat.heartbeat_timeout_ms / 1000)
    service = ControlService(
        endpoint,
        Plane(machines),
        me=endpoint.peer,
        on_emit=emitted,
        heartbeat_interval=beat.heartbeat_interval_ms / 1000,
    )
    async with service:
        await service.ask("membership", declaration(everyone))
        address = endpoint.address._replace(host=assignment.host)
        notify({"event": "listening", "peer": address.peer, "address": address.address})
        control = Control(endpoint.peer, address, service.ask)
        async with Adopted(assignment, control) as adopted:
            service.progress = adopted.progress
            await adopted.begin()
            notify({"event": "ready"})
            await adopted.ended
            try:
                async with asyncio.timeout(assignment.drain_timeout_s):
                    await all_gone.wait()
            except TimeoutError:
                logger.warning("the control plane leaves %s behind", ", ".join(sorted(left)))


async def _follow(
    assignment: Assignment, endpoint: Endpoint, notify: Notify, address: PeerAddress
) -> None:
    patience = assignment.settings.coordinator.heartbeat_timeout_ms / 1000
    client = ControlClient(endpoint, address, me=None, patience=patience)
    follower = Follower(assignment, client, endpoint.address.address)
    adopted = Adopted(assignment, Control(endpoint.peer, address, follower.ask))
    async with client, follower, adopted:
        follower.take(adopted)
        await follower.begin()
        await adopted.begin()
        notify({"event": "ready"})
        await adopted.ended


class _Rank(NamedTuple):
    """A process that somebody else has started. `place`: its own in the arena."""

    spec: WorkerSpec
    pid: int
    pidfd: int
    place: int


class Adopted(aio.Service):
    """The ranks of this host. `ended` is set when the last of them has gone and the membership knows it."""

    def __init__(self, assignment: Assignment, control: Control) -> None:
        super().__init__("adopted ranks")
        assert assignment.embedded is not None
        self._assignment, self._control = assignment, control
        self._pids, self._attempt = assignment.embedded
        everyone = planned_actors(assignment.plan)
        self._everyone = everyone
        mine = [info for info in everyone if info.node_rank == assignment.node_rank]
        self._mine = sorted(mine, key=lambda info: info.local_rank)
        shared = assignment.arena if assignment.transport == "auto" else 0
        self._arena = make_keeper(shared, len(mine))
        self._ranks: dict[str, _Rank] = {}
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def begin(self) -> None:
        """Watch the ranks, announce them, and write down for each what it is to know."""
        for place, (info, pid) in enumerate(zip(self._mine, self._pids, strict=True)):
            info = replace(info, restart_count=self._attempt)
            spec = basic_spec(self._assignment, self._control, info, self._everyone, place)
            spec = replace(spec, arena=self._arena.spec(place) if self._arena else None)
            await self._control.ask("membership", announcement(spec, self._control.me, pid))
            self._watch(_Rank(spec, pid, _open(pid), place))
            _write(spec_file(self._assignment.job_dir, info.local_rank), spec)

    def directive(self, message: Mapping[str, Any]) -> None:
        """Nobody decides about ranks here."""

    def progress(self) -> dict[str, Any]:
        """What the ranks here have reported, by name."""
        return reported(rank.spec for rank in self._ranks.values())

    async def leave(self, grace_s: float) -> None:
        """The control plane is lost: the ranks go on without it, and so does this agent, for the arena."""
        await asyncio.wait({self.ended})

    # -- their ends ---------------------------------------------------------------------------

    def _watch(self, rank: _Rank) -> None:
        self._ranks[rank.spec.info.name] = rank
        loop = asyncio.get_running_loop()
        if rank.pidfd >= 0:
            loop.add_reader(rank.pidfd, self._gone, rank)
        else:
            loop.call_soon(self._gone, rank)

    def _gone(self, rank: _Rank) -> None:
        exit = how_it_ended(rank.pid, rank.pidfd)
        if rank.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(rank.pidfd)
            os.close(rank.pidfd)
        if self._arena is not None:
            self._arena.reclaim(rank.place)
            self.spawn(self._arena.settle(), f"arena after {rank.spec.info.name}")
        self.spawn(self._tell(rank, exit), f"end of {rank.spec.info.name}")

    async def _tell(self, rank: _Rank, exit: spawn.Exit | None) -> None:
        spec = rank.spec
        name, code = spec.info.name, exit.shell_code if exit else -1
        cause = exit.cause if exit else f"its process {rank.pid} is gone"
        logger.info("%s has ended: %s", name, cause)
        gone = {"op": "exited", "name": name, "incarnation": spec.incarnation, "peer": spec.peer}
        try:
            async with asyncio.timeout(_TELL_S):
                told = {**gone, "cause": cause, "code": code, "final": True}
                await self._control.ask("membership", told)
        except (RuntimeFault, TimeoutError) as error:
            logger.info("the end of %s was not heard: %s", name, error)
        del self._ranks[name]
        if not self._ranks and not self.ended.done():
            self.ended.set_result({})

    async def _on_close(self) -> None:
        loop = asyncio.get_running_loop()
        for rank in self._ranks.values():
            if rank.pidfd >= 0 and loop.remove_reader(rank.pidfd):
                os.close(rank.pidfd)


def _open(pid: int) -> int:
    """-1 when it has gone by now."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _write(path: str, spec: WorkerSpec) -> None:
    with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
        pickle.dump(spec, file)


def how_it_ended(pid: int, pidfd: int) -> spawn.Exit | None:
    """How somebody else's child ended. Until its parent has collected it, /proc says it, afterwards the kernel
    from 6.15 on by its pidfd; None where neither does."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X"):
            return spawn.Exit.from_status(int(fields[_EXIT_CODE_FIELD]))
    except (OSError, IndexError):
        pass
    info = bytearray(_PIDFD_INFO.pack(_PIDFD_INFO_EXIT, 0))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except (OSError, ValueError):
        return None
    mask, status = _PIDFD_INFO.unpack(info)
    return spawn.Exit.from_status(status) if mask & _PIDFD_INFO_EXIT else None
