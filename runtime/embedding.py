"""`runtime.init()`: a rank of a job that torchrun, srun or mpirun has started becomes a worker of ours.

The ranks find each other at torch's store (`meeting.py`); the first rank of each host starts that host's agent, which
watches the ranks and leaves with the last (`cluster/adopted.py`). After that a rank is as any worker: calls, queues,
barriers, kv and checkpoints work. The script, its process groups and its end stay its own.

This module is imported by nothing but the two public names.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from secrets import token_hex
from typing import Any, Literal, NamedTuple

from runtime.config import read_config
from runtime.entrypoint import top_level_rpc_names
from runtime.errors import ConfigError, MisuseError, RendezvousError, RuntimeFault
from runtime.job import Entry, JobSpec, RoleSpec, actor_name
from runtime.launcher import spawn
from runtime.launcher.around import gpu_count, own_names
from runtime.launcher.assignment import (
    Assignment,
    Embedded,
    choose_job_dir,
    remove_job_dir,
    spec_file,
)
from runtime.launcher.channel import Channel, Kind
from runtime.launcher.plan import Host, Launch, Plan, WorkerSpec
from runtime.launcher.torchrun import Outer, find
from runtime.launcher.watch import Watch
from runtime.meeting import Meeting
from runtime.transport.address import parse
from runtime.transport.security import Security
from runtime.transport.sockets import mint
from runtime.worker import Guest, Worker, current_worker

_TIMEOUT_S = 300.0
_AGENT_S = 30.0
_POLL_S = 0.05
_OUTSIDE = (
    "runtime.init() joins a job that torchrun, srun or mpirun has started, and this process is in none: start "
    "it with `torchrun --nproc-per-node 2 script.py`, or by ourselves with `python -m runtime.launch script.py`"
)


class _Settings(NamedTuple):
    timeout: float
    transport: Literal["auto", "zmq"]
    arena: int | None
    port_range: tuple[int, int] | None


class _Joined(NamedTuple):
    """`meeting` is kept by who serves its store: groups of the script may use it, too."""

    settings: _Settings
    guest: Guest
    meeting: Meeting
    spec: WorkerSpec
    pid: int


class _Slot:
    def __init__(self) -> None:
        # A signal handler may call `shutdown` in the middle of `init`.
        self.lock = threading.RLock()
        self.joined: _Joined | None = None
        self.left = False


_slot = _Slot()


def init(
    *,
    timeout: float = _TIMEOUT_S,
    transport: Literal["auto", "zmq"] = "auto",
    arena: int | None = None,
    port_range: tuple[int, int] | None = None,
) -> Worker:
    """Make this rank of a running torchrun, srun or mpirun job a worker; all ranks must call it, in any order with
    `init_process_group`. Returns when the agents of all hosts are there. Again: the same worker. In a worker that
    `runtime.launch` has started: that one.

    Blocks its thread, with the event loop if one runs there; a signal handler that raises (Ctrl-C) ends the wait. In
    a thread that is not the main one it leaves SIGTERM alone.

    `timeout`: seconds to wait for the other ranks. `transport="zmq"`: no local lane, no shared memory. `arena`: bytes
    of shared memory on this host (None: a quarter of its memory; 0: none). `port_range`: (low, high) for TCP,
    which only jobs of several hosts use.

    Raises `RendezvousError` naming the ranks that did not come, `MisuseError` outside of any job, after `shutdown`, and
    when it was called with other settings before; `ConfigError` where the environment or `runtime.toml` is wrong.
    """
    settings = _checked(_Settings(timeout, transport, arena, port_range))
    with _slot.lock:
        if _slot.joined is not None:
            if settings != _slot.joined.settings:
                raise MisuseError(f"runtime.init() was called before, with {_slot.joined.settings}")
            return _slot.joined.guest.worker
        if _slot.left:
            raise MisuseError("this process has left its job: a rank can join once")
        outer = _outer()
        if outer is None:
            return current_worker()
        meeting = Meeting(outer, timeout)
        spec = _join(outer, settings, meeting)
        guest = Guest(spec, _own_rpc_names())
        _slot.joined = _Joined(settings, guest, meeting, spec, os.getpid())
        atexit.register(_close, leave=False)
        return guest.worker


def shutdown() -> None:
    """Leave the job that `init` has joined; calls to this rank fail from now on. Bounded. Without `init`, or again:
    nothing. A process that ends need not call it."""
    _close(leave=True)


def _close(*, leave: bool) -> None:
    with _slot.lock:
        joined = _slot.joined
        if joined is None or joined.pid != os.getpid():
            return
        _slot.left = True
        joined.guest.close(leave=leave)
        if not leave:
            joined.meeting.linger()
        _slot.joined = None
        agent = spawn.look_at(joined.spec.agent_pid)
        if agent is None or agent.state in "ZX":  # killed: else the folder is its business
            remove_job_dir(os.path.dirname(parse(joined.spec.address).target))


def _checked(settings: _Settings) -> _Settings:
    if not settings.timeout > 0:
        raise MisuseError(f"init(timeout={settings.timeout!r}): allowed are seconds above 0")
    if settings.transport not in ("auto", "zmq"):
        raise MisuseError(f"init(transport={settings.transport!r}): allowed are 'auto' and 'zmq'")
    return settings


def _outer() -> Outer | None:
    """None: this process is a worker of ours already."""
    with suppress(MisuseError):
        current_worker()
        return None
    if actor := os.environ.get("RUNTIME_ACTOR"):
        raise MisuseError(f"this process was started by the worker {actor} and is none itself")
    found = find(os.environ)
    if found is None:
        raise MisuseError(_OUTSIDE)
    return found


def _own_rpc_names() -> frozenset[str]:
    """What the script defines for others to call. Those below the call of `init` come later."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    try:
        with open(path or "", "rb") as file:
            return top_level_rpc_names(file.read())
    except (OSError, SyntaxError):
        return frozenset()


# -- joining ----------------------------------------------------------------------------------


def _join(outer: Outer, settings: _Settings, meeting: Meeting) -> WorkerSpec:
    keys = mint() if outer.local_rank == 0 else None
    ranks = meeting.gather(_about_us(outer, keys, meeting.way))
    nodes = _by_node(ranks)
    mine = next(index for index, node in enumerate(nodes) if outer.rank in node)
    if keys is not None:
        assignment = _assignment(outer, settings, ranks, nodes)
        if len(nodes) > 1:
            assignment = _secured(assignment, keys, ranks, nodes)
        _lead(assignment, meeting)
    folders = [
        meeting.get(f"host/{index}", f"the agent of {ranks[node[0]]['host']} was not there")
        for index, node in enumerate(nodes)
    ]
    meeting.finish()
    return _read_spec(spec_file(folders[mine], outer.local_rank))


def _about_us(outer: Outer, keys: Security | None, way: tuple[str, str]) -> dict[str, Any]:
    record: dict[str, Any] = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "node": outer.node,
        "local_rank": outer.local_rank,
        "role": outer.role,
        "role_rank": outer.role_rank,
    }
    if keys is not None:
        record |= {"key": keys.public.hex(), "address": way[0], "first": way[1]}
        record["addresses"] = list(own_names()[1:])
    return record


def _by_node(ranks: list[dict[str, Any]]) -> list[list[int]]:
    """The ranks of each node by local rank; the node of rank 0 is the first."""
    nodes: dict[str, list[int]] = {}
    for rank, record in enumerate(ranks):
        nodes.setdefault(record["node"] or record["host"], []).append(rank)
    for node in nodes.values():
        node.sort(key=lambda rank: int(ranks[rank]["local_rank"]))
        found = [ranks[rank]["local_rank"] for rank in node]
        if found != list(range(len(node))):
            host = ranks[node[0]]["host"]
            raise RendezvousError(
                f"the ranks {node} on {host} have the local ranks {found}; each host must have 0, 1, ... once"
            )
    return list(nodes.values())


def _assignment(
    outer: Outer, settings: _Settings, ranks: list[dict[str, Any]], nodes: list[list[int]]
) -> Assignment:
    own = next(index for index, node in enumerate(nodes) if outer.rank in node)
    return Assignment(
        plan=_plan(outer, ranks, nodes),
        host=ranks[outer.rank]["host"],
        job_dir=choose_job_dir(token_hex(4), os.environ),
        log_dir="",
        workdir="",
        env={},
        transport=settings.transport,
        arena=settings.arena,
        port_range=settings.port_range,
        settings=read_config(),
        node_rank=own,
        embedded=Embedded(tuple(ranks[rank]["pid"] for rank in nodes[own]), outer.restart),
    )


def _plan(outer: Outer, ranks: list[dict[str, Any]], nodes: list[list[int]]) -> Plan:
    entry = Entry("script", sys.argv[0] or "-", tuple(sys.argv[1:]))
    sizes = {role: [r["role"] for r in ranks].count(role) for role in {r["role"] for r in ranks}}
    roles = {role: RoleSpec(role, "elastic", entry, total=size) for role, size in sizes.items()}
    of_rank = {rank: index for index, node in enumerate(nodes) for rank in node}
    launches = [
        Launch(
            record["host"],
            record["role"],
            record["role_rank"],
            record["local_rank"],
            (),
            {
                "RUNTIME_ACTOR": actor_name(record["role"], record["role_rank"]),
                "NODE_RANK": str(of_rank[rank]),
                "WORLD_SIZE": str(sizes[record["role"]]),
                "LOCAL_WORLD_SIZE": str(len(nodes[of_rank[rank]])),
            },
        )
        for rank, record in enumerate(ranks)
    ]
    job = JobSpec(outer.run_id, roles, device_type="GPU" if gpu_count() else "CPU")
    hosts = tuple(Host(ranks[node[0]]["host"], len(node)) for node in nodes)
    return Plan(outer.run_id, job, hosts, tuple(launches))


def _secured(
    assignment: Assignment, keys: Security, ranks: list[dict[str, Any]], nodes: list[list[int]]
) -> Assignment:
    """With what goes between hosts: where this one listens, and whom it lets in.

    The first host is where the others see it, the others are where their way to it begins."""
    leaders = [ranks[node[0]] for node in nodes]
    addresses = [leaders[1]["first"], *(leader["address"] for leader in leaders[1:])]
    everywhere = {address for leader in leaders for address in leader["addresses"]}
    allowed = frozenset(bytes.fromhex(leader["key"]) for leader in leaders)
    return replace(
        assignment,
        address=addresses[assignment.node_rank],
        accept_from=tuple(sorted(everywhere.union(addresses))),
        security=keys._replace(allowed=allowed),  # whose text does not show the secret
    )


def _read_spec(path: str) -> WorkerSpec:
    """What the agent of our host has written for us: in a folder that only this user can enter."""
    try:
        with open(path, "rb") as file:
            spec: WorkerSpec = pickle.load(file)
        os.unlink(path)
    except OSError as error:
        raise RuntimeFault(
            f"cannot read what this host's agent left at {path}: {error.strerror}"
        ) from None
    return spec


# -- the agent --------------------------------------------------------------------------------


def _lead(assignment: Assignment, meeting: Meeting) -> None:
    """Start the agent of this host, and say how it went."""
    place = f"host/{assignment.node_rank}"
    try:
        _run_aside(_start_agent(assignment, meeting))
    except (OSError, RuntimeFault) as error:
        told = {"error": f"the agent of {assignment.host} was not started: {error}"}
        if assignment.node_rank == 0:
            meeting.put("control", told)
        meeting.put(place, told)
        raise
    meeting.put(place, assignment.job_dir)


def _run_aside(work: Coroutine[Any, Any, None]) -> None:
    """On a loop in a thread: the caller may be inside of a running one. What interrupts him cancels the work."""
    runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)

    def serve() -> None:
        with runner:
            runner.get_loop().run_forever()

    loop = runner.get_loop()
    thread = threading.Thread(target=serve, name="runtime-init")
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(work, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)  # the runner then cancels what is left
        thread.join()


async def _start_agent(assignment: Assignment, meeting: Meeting) -> None:
    """Until it is ready for the ranks of this host."""
    agent = spawn.start_agent(spawn.ADOPTING_AGENT)
    ended = asyncio.Event()
    watch = Watch(agent.pid, lambda watch, exit: ended.set())
    channel = await Channel.open(agent.read_fd, agent.write_fd)
    try:
        channel.send(Kind.JOB, pickle.dumps(assignment, protocol=5))
        if assignment.node_rank > 0:
            look = partial(meeting.look, "control", "the control plane was not there")
            while (control := look()) is None:  # noqa: ASYNC110 - the store tells nobody
                await asyncio.sleep(_POLL_S)
            channel.send_message(Kind.COMMAND, {"op": "control", **control})
        async with asyncio.timeout(_AGENT_S):
            await _ready(channel, meeting)
    except BaseException as error:
        watch.send_signal(signal.SIGKILL)
        await ended.wait()
        remove_job_dir(assignment.job_dir)
        if isinstance(error, TimeoutError):
            raise RuntimeFault(f"it was not ready within {_AGENT_S:g} s") from None
        raise
    finally:
        watch.close()
        await channel.close()


async def _ready(channel: Channel, meeting: Meeting) -> None:
    while (frame := await channel.receive()) is not None:
        if frame.kind is not Kind.EVENT:
            continue
        event = frame.message()
        match event["event"]:
            case "listening":
                where = {"peer": event["peer"], "address": event["address"]}
                meeting.put("control", where)
            case "refused":
                raise ConfigError(event["text"])
            case "ready":
                return
    raise RuntimeFault("it ended at once")
