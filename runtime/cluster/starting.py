"""From a planned actor to a running process: its place, its environment, its pipes, its pid.

A start is announced before there is a process, so that others wait for it instead of calling it gone.
It can be given up at any moment: what was made for it by then is closed, what runs is killed.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from runtime import aio
from runtime.cluster.ports import PortChooser
from runtime.job import ActorInfo, RoleSpec
from runtime.launcher import child, spawn, zygote
from runtime.launcher.assignment import Assignment
from runtime.launcher.output import Capture, Outputs, Source
from runtime.launcher.plan import Start, WorkerSpec, planned_actors, worker_env
from runtime.launcher.starter import NewWorker, Starter, close_streams
from runtime.peer.context import PeerAddress
from runtime.transport.arena_keeper import make_keeper

Ask = Callable[[str, Mapping[str, Any]], Coroutine[Any, Any, Any]]
"""Ask a machine of the control plane: its name and a message."""

WORKER = "runtime.worker:main"
PROGRAM = "runtime.launcher.child:exec_program"
_LOOPBACK = "127.0.0.1"


class Prepared(NamedTuple):
    """A worker that is ready to be started. Its pipes are open."""

    spec: WorkerSpec
    capture: Capture
    worker: NewWorker


class Control(NamedTuple):
    """The way to the control plane: `me` is this agent's peer id, `address` the agent that holds the plane."""

    me: str
    address: PeerAddress
    ask: Ask


class Starting:
    """Starts workers of this host. `service` owns the tasks that must not be cut short."""

    def __init__(
        self,
        assignment: Assignment,
        control: Control,
        *,
        starter: Starter,
        outputs: Outputs,
        service: aio.Service,
    ) -> None:
        self._assignment, self._control = assignment, control
        self._starter, self._outputs, self._service = starter, outputs, service
        everyone = planned_actors(assignment.plan)
        self._everyone = everyone
        self.actors = {info.name: info for info in everyone if info.host == assignment.host}
        """Those of this host, in plan order."""
        launches = assignment.plan.launches
        self._launches = {launch.env["RUNTIME_ACTOR"]: launch for launch in launches}
        self._ports = PortChooser(assignment.port_range)
        shared = assignment.arena if assignment.transport == "auto" else 0
        self.arena = make_keeper(shared, len(self.actors)) if self.actors else None
        """For large buffers between the workers."""

    async def place(self, role: RoleSpec, attempt: int) -> Mapping[str, Any]:
        """Where this host's workers stand in the role: the outcome of a rendezvous round. Empty for
        roles that have none."""
        if role.kind != "elastic":
            return {}
        mine = [info for info in self.actors.values() if info.role == role.name]
        message = {
            "op": "join",
            "role": role.name,
            "round": attempt,
            "node": node_name(mine[0]),
            "slots": len(mine),
            "addr": self._assignment.address or _LOOPBACK,
            "port": self._ports.choose(),
        }
        place: Mapping[str, Any] = await self._control.ask("rendezvous", message)
        return place

    def prepare(
        self, role: RoleSpec, incarnations: Mapping[str, int], place: Mapping[str, Any]
    ) -> list[Prepared]:
        """Make pipes and orders, and begin to read the pipes. Give them to `processes` or `drop`."""
        prepared: list[Prepared] = []
        for name, incarnation in incarnations.items():
            capture = self._capture(name, incarnation)
            spec = self._spec(role, name, incarnation, place, capture)
            _remove(spec.error_file)
            stdout, stderr = capture.open()
            prepared.append(Prepared(spec, capture, NewWorker(_order(spec), stdout, stderr)))
            capture.run(self._outputs)
        return prepared

    @staticmethod
    def drop(prepared: Sequence[Prepared]) -> None:
        """These are not started after all."""
        close_streams([item.worker for item in prepared])

    async def announce(self, prepared: Sequence[Prepared]) -> None:
        """Tell the membership that these incarnations are coming."""
        for item in prepared:
            await self._control.ask("membership", announcement(item.spec, self._control.me))

    async def processes(self, role: RoleSpec, prepared: Sequence[Prepared]) -> list[int]:
        """Start them; their pids. May be cancelled: what runs by then is killed. Raises `OSError`."""
        workers = [item.worker for item in prepared]
        starter = self._starter
        if role.start_method == "spawn" or role.python is not None:
            work = starter.exec(role.python or sys.executable, workers)
        else:
            try:
                await starter.prepare([worker.order for worker in workers])
            except BaseException:
                close_streams(workers)
                raise
            work = starter.fork(workers)
        starting = self._service.spawn(_pids_or_error(work), f"processes of {role.name}")
        try:
            pids = await asyncio.shield(starting)
        except asyncio.CancelledError:
            started = await starting  # a matter of milliseconds: nothing is imported in it
            for pid in started if isinstance(started, list) else []:
                spawn.send_signal(pid, signal.SIGKILL)
            raise
        if isinstance(pids, OSError):
            raise pids
        return pids

    def _capture(self, name: str, incarnation: int) -> Capture:
        info = self.actors[name]
        position = list(self._assignment.plan.job.roles).index(info.role)
        source = Source(info.role, info.rank, info.local_rank, info.host, incarnation, position)
        return self._outputs.capture(source)

    def _spec(
        self,
        role: RoleSpec,
        name: str,
        incarnation: int,
        place: Mapping[str, Any],
        capture: Capture,
    ) -> WorkerSpec:
        assignment, info, launch = self._assignment, self.actors[name], self._launches[name]
        rank, world_size = info.rank, info.world_size
        if place:
            mine = [name for name, other in self.actors.items() if other.role == role.name]
            rank, world_size = place["first_rank"] + mine.index(name), place["world_size"]
        info = replace(info, rank=rank, world_size=world_size, restart_count=incarnation)
        folder = capture.folder or assignment.job_dir
        error_file = os.path.join(folder, "error.json" if capture.folder else f"{name}.json")
        start = Start(
            incarnation,
            incarnation,
            error_file,
            place.get("master_addr"),
            place.get("master_port"),
            rank if place else None,
            world_size if place else None,
        )
        number = int(launch.env["RUNTIME_GLOBAL_RANK"])
        spec = basic_spec(assignment, self._control, info, self._everyone, number)
        return replace(
            spec,
            env=worker_env(launch, assignment.env, start),
            workdir=role.workdir or assignment.workdir,
            error_file=error_file,
            preload=(*zygote.WARM, *(role.preload or ())),
            init_process_group=role.sets_up_process_group,
            node_check=role.checks_node,
            arena=self.arena.spec(list(self.actors).index(name)) if self.arena else None,
        )


def declaration(actors: Sequence[ActorInfo]) -> dict[str, Any]:
    """The job's actors, as the membership is told of them."""
    known = ("name", "role", "rank", "host")
    return {"op": "declare", "actors": [{key: getattr(a, key) for key in known} for a in actors]}


def announcement(spec: WorkerSpec, agent: str, pid: int = 0) -> dict[str, Any]:
    """A start of a worker, as the membership is told of it."""
    who = {"name": spec.info.name, "incarnation": spec.incarnation, "peer": spec.peer}
    return {"op": "starting", **who, "host": spec.info.host, "agent": agent, "pid": pid}


def basic_spec(
    assignment: Assignment,
    control: Control,
    info: ActorInfo,
    actors: tuple[ActorInfo, ...],
    number: int,
) -> WorkerSpec:
    """What a process of the actor `info` is told however it is started. `number`: unique on its host."""
    job, token = assignment.plan.job, secrets.token_hex(4)
    return WorkerSpec(
        job_id=assignment.plan.job_id,
        job=job,
        info=info,
        entry=job.roles[info.role].entry,
        env={},
        actors=actors,
        peer=f"{info.name}.{token}",
        address=f"ipc://{assignment.job_dir}/{number}.{token}",
        agent_peer=control.address.peer,
        agent_address=control.address.address,
        agent_host=control.address.host,
        agent_pid=os.getpid(),
        incarnation=info.restart_count,
        workdir="",
        error_file="",
        transport=assignment.transport,
        shutdown_timeout_s=assignment.shutdown_timeout_s,
        host_address=assignment.address,
        security=assignment.security,
        accept_from=assignment.accept_from,
        port_range=assignment.port_range,
    )


def node_name(info: ActorInfo) -> str:
    """What the host of an actor is called in the rendezvous of its role: nodes are in plan order by it."""
    return f"node {info.node_rank} ({info.host})"


def _order(spec: WorkerSpec) -> child.Order:
    program = spec.entry.form == "program"
    argument: Any = (spec.entry.target, *spec.entry.args) if program else spec
    return child.Order(
        PROGRAM if program else WORKER,
        pickle.dumps(argument, protocol=5),
        dict(spec.env),
        spec.workdir,
        spec.agent_pid,
        spec.preload,
        spec.info.name,
    )


async def _pids_or_error(work: Awaitable[list[int]]) -> list[int] | OSError:
    """A program that cannot be executed is the role's failure, not that of the service it runs in."""
    try:
        return await work
    except OSError as error:
        return error


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
