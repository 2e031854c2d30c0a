"""A launch is a value: job and hosts in, a list of (host, role, rank, argv, env) out.

Nothing here starts anything or looks at the machine beyond what it is given (`Facts`); a plan can be
printed (`--dry-run --json`), compared and tested. Which instance goes to which host is decided in
`place.py`; where options and files become a job and hosts, in `prepare.py`. Ports, incarnations and the
ranks that a rendezvous hands out are not in a plan: the agent adds them when it starts a worker
(`Start`, `worker_env`, `WorkerSpec`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from runtime.errors import ConfigError
from runtime.job import (
    IDENTITY_ENV,
    ActorInfo,
    Entry,
    JobSpec,
    RoleSpec,
    actor_name,
    raise_together,
    validate,
)
from runtime.launcher.place import Room, place
from runtime.launcher.tunables import tunables

if TYPE_CHECKING:
    from runtime.launcher.options import LaunchOptions


@dataclass(frozen=True)
class Host:
    """One host to launch on. `slots`: workers of an elastic role that fit there; None: find out."""

    name: str
    slots: int | None = None
    addr: str | None = None
    user: str | None = None
    port: int | None = None
    python: str | None = None
    role: str | None = None
    devices: tuple[int, ...] | None = None
    local: bool = True


@dataclass(frozen=True)
class Launch:
    """One worker process to be. `env` holds only what we set, not what is inherited."""

    host: str
    role: str
    rank: int
    local_rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """Everything the agents need to know to run the job."""

    job_id: str
    job: JobSpec
    hosts: tuple[Host, ...]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class WorkerSpec:
    """What the agent tells one worker process at its start; complete, plain data.

    `env` is the whole environment of the worker (inherited ones included). `actors` are all planned
    actors of the job. `peer` ("trainer-0.3f2a90c1") and `address` ("ipc:///…/t0.3f2a90c1") are where this
    process must listen; `agent_peer`/`agent_address` is the control plane. `start_timeout_s` bounds the
    process group's set-up and the node check. `arena` is an `ArenaSpec` (`transport/arena_table.py`).

    Of a job of several hosts: `host_address` is the IP address to listen on beside `address` ("": none),
    `agent_host` the host of the control plane, `security` a `transport.security.Security`, `accept_from` the
    addresses that may connect, `port_range` (low, high) where ports are to lie.
    """

    job_id: str
    job: JobSpec
    info: ActorInfo
    entry: Entry
    env: Mapping[str, str]
    actors: tuple[ActorInfo, ...]
    peer: str
    address: str
    agent_peer: str
    agent_address: str
    agent_pid: int
    incarnation: int
    workdir: str
    error_file: str
    preload: tuple[str, ...] = ()
    init_process_group: bool = False
    node_check: bool = False
    transport: Literal["auto", "zmq"] = "auto"
    arena: tuple[str, int] | None = None
    shutdown_timeout_s: float = 10.0
    start_timeout_s: float = 600.0
    host_address: str = ""
    agent_host: str = ""
    security: tuple[bytes, bytes, frozenset[bytes]] | None = field(default=None, repr=False)
    accept_from: tuple[str, ...] = ()
    port_range: tuple[int, int] | None = None


@dataclass(frozen=True)
class Facts:
    """What the launcher found around it. `files` holds the text of every file that the options name.

    `job_id` is the id drawn for this launch (`--rdzv-id` goes before it); `own_names` are the machine's
    host names and addresses; `env` is the environment that workers inherit. `found`: the CPUs and GPUs of
    other hosts, by name, once those have been asked.
    """

    job_id: str
    cwd: str = "."
    python: str = "python"
    own_names: tuple[str, ...] = ()
    cpu_count: int = 1
    gpu_count: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Start(NamedTuple):
    """What is known about a worker only when it starts. None: as planned.

    The first fields come from the supervisor; ranks and sizes are those of the rendezvous round.
    """

    incarnation: int = 0
    restart_count: int = 0
    error_file: str = ""
    master_addr: str | None = None
    master_port: int | None = None
    rank: int | None = None
    world_size: int | None = None


def make_plan(options: LaunchOptions, hosts: Sequence[Host], job: JobSpec, *, facts: Facts) -> Plan:
    """Put every instance of every role on a host, with its command line and environment.

    Raises `ConfigError`: the job is wrong, or does not fit the hosts.
    """
    validate(job)
    used = _enough_hosts(job, hosts)
    rooms = [Room(h.name, h.slots or job.device_per_node, h.role) for h in used]
    job = replace(job, roles={name: _fitted(role, rooms) for name, role in job.roles.items()})
    placed = place(job, rooms)
    _one_master(options, job)
    job_id = options.job_id or facts.job_id
    launches = _launches(job, placed, _Common(job_id, options, facts, {h.name: h for h in used}))
    counts = {host.name: sum(launch.host == host.name for launch in launches) for host in used}
    full = tuple(replace(h, slots=h.slots or job.device_per_node or counts[h.name]) for h in used)
    return Plan(job_id, job, full, tuple(launches))


def _enough_hosts(job: JobSpec, hosts: Sequence[Host]) -> Sequence[Host]:
    """The hosts that the job uses: all, or the first `node_num`."""
    if not hosts:
        raise ConfigError("no host to start on")
    if job.node_num is not None and job.node_num > len(hosts):
        names = ", ".join(host.name for host in hosts)
        raise ConfigError(
            f"the job needs node_num = {job.node_num} hosts, found {len(hosts)}: {names}"
        )
    unknown = [host for host in hosts if host.role is not None and host.role not in job.roles]
    roles = ", ".join(job.roles)
    raise_together(
        [f"host {h.name}: role={h.role} is no role of the job ({roles})" for h in unknown]
    )
    return hosts[: job.node_num]


def _fitted(role: RoleSpec, rooms: Sequence[Room]) -> RoleSpec:
    """An elastic role of MIN:MAX nodes, with no more nodes than there are for it."""
    if role.kind == "simple":
        return role
    low, high = role.nnodes
    found = len(Room.of_role(rooms, role.name))
    if found < low:
        raise ConfigError(f"role {role.name}: needs {low} hosts, found {found}")
    nodes = min(high, found)
    total = role.total if role.nproc_per_node is None else nodes * role.nproc_per_node
    return replace(role, nnodes=(low, nodes), total=total)


def _one_master(options: LaunchOptions, job: JobSpec) -> None:
    elastic = [role.name for role in job.roles.values() if role.kind == "elastic"]
    if options.master_port and len(elastic) > 1:
        raise ConfigError(
            f"--master-port {options.master_port}: one port cannot serve the roles {', '.join(elastic)}; "
            "leave it out, and each gets a free one"
        )


class _Common(NamedTuple):
    """What all launches of a plan share."""

    job_id: str
    options: LaunchOptions
    facts: Facts
    hosts: Mapping[str, Host]


def _launches(job: JobSpec, placed: Mapping[str, Sequence[str]], common: _Common) -> list[Launch]:
    on_host: dict[str, int] = {}
    for host in (host for hosts in placed.values() for host in hosts):
        on_host[host] = on_host.get(host, 0) + 1
    launches: list[Launch] = []
    everyone = sum(on_host.values())
    for role in job.roles.values():
        hosts = placed[role.name]
        nodes = list(dict.fromkeys(hosts))
        for rank, host in enumerate(hosts):
            local_rank = hosts[:rank].count(host)
            info = ActorInfo(
                actor_name(role.name, rank), role.name, rank, nodes.index(host), local_rank,
                len(hosts), hosts.count(host), host,
            )  # fmt: skip
            env = {
                **_defaults(job, role, on_host[host], common),
                **job.global_env,
                **role.env,
                **_masters(role, common),
                **_devices(common.hosts[host]),
                **_identity(role, info, len(nodes), common.job_id),
                "RUNTIME_GLOBAL_RANK": str(len(launches)),
                "RUNTIME_GLOBAL_WORLD_SIZE": str(everyone),
            }
            env |= tunables({**common.facts.env, **env})
            python = role.python or common.hosts[host].python or common.facts.python
            argv = command_line(role.entry, python)
            launches.append(Launch(host, role.name, rank, local_rank, argv, env))
    return launches


def command_line(entry: Entry, python: str) -> tuple[str, ...]:
    """What a worker runs, as one would type it."""
    match entry.form:
        case "program":
            return (entry.target, *entry.args)
        case "script":
            return (python, entry.target, *entry.args)
        case "module":
            return (python, "-m", entry.target, *entry.args)
        case "object":
            return (python, "-m", "runtime.worker", "--entry", entry.target)


def _defaults(job: JobSpec, role: RoleSpec, on_host: int, common: _Common) -> dict[str, str]:
    """Variables that we set only where nobody else does."""
    wanted = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    if on_host > 1:
        # As under torchrun: each of several workers would else start a thread per core.
        wanted["OMP_NUM_THREADS"] = "1"
    return {name: value for name, value in wanted.items() if name not in common.facts.env}


def _masters(role: RoleSpec, common: _Common) -> dict[str, str]:
    if role.kind == "simple":
        return {}
    addr, port = common.options.master_addr, common.options.master_port
    chosen = {"MASTER_ADDR": addr} if addr else {}
    return {**chosen, "MASTER_PORT": str(port)} if port else chosen


def _devices(host: Host) -> dict[str, str]:
    """Devices are masked only where some of a host's were picked by hand (`--include h1:0,2`)."""
    if host.devices is None:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}


def _identity(role: RoleSpec, info: ActorInfo, nodes: int, job_id: str) -> dict[str, str]:
    """torchrun's variables, per role, and ours. What a rendezvous decides is as planned here."""
    return {
        "RANK": str(info.rank),
        "LOCAL_RANK": str(info.local_rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "NODE_RANK": str(info.node_rank),
        "GROUP_RANK": str(info.node_rank),
        "GROUP_WORLD_SIZE": str(nodes),
        "ROLE_NAME": role.name,
        "ROLE_RANK": str(info.rank),
        "ROLE_WORLD_SIZE": str(info.world_size),
        "TORCHELASTIC_MAX_RESTARTS": str(role.restart.max if role.restart.policy != "never" else 0),
        "TORCHELASTIC_RUN_ID": job_id,
        # Nobody but rank 0 itself serves the store at MASTER_PORT.
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "RUNTIME_JOB_ID": job_id,
        "RUNTIME_ROLE": role.name,
        "RUNTIME_ACTOR": info.name,
        "RUNTIME_HOST": info.host,
    }


_TASK_ENV = (
    {f"SLURM_{what}" for what in ("PROCID", "LOCALID", "NODEID", "NTASKS", "NPROCS", "GTIDS")}
    | {f"SLURM_{what}" for what in ("TASK_PID", "STEP_NUM_TASKS", "STEP_TASKS_PER_NODE")}
    | {f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    | {"PMI_RANK", "PMI_SIZE", "PMIX_RANK"}
)
"""Which task of `srun` or `mpirun` the launcher or an agent is."""


def worker_env(launch: Launch, inherited: Mapping[str, str], start: Start) -> dict[str, str]:
    """The whole environment of a worker: inherited, then planned, then what this start decides.

    Who an outer job says we are (its RANK, MASTER_PORT and so on) is not inherited. A master address
    or port in the plan is the user's choice and goes before the round's.
    """
    stale = IDENTITY_ENV | _TASK_ENV | {"MASTER_ADDR", "MASTER_PORT"}
    env = {name: value for name, value in inherited.items() if name not in stale}
    env |= launch.env
    env["TORCHELASTIC_RESTART_COUNT"] = str(start.restart_count)
    env["RUNTIME_INCARNATION"] = str(start.incarnation)
    if start.error_file:
        env["TORCHELASTIC_ERROR_FILE"] = start.error_file
    decided = {
        "RANK": start.rank,
        "ROLE_RANK": start.rank,
        "WORLD_SIZE": start.world_size,
        "ROLE_WORLD_SIZE": start.world_size,
        "MASTER_ADDR": launch.env.get("MASTER_ADDR", start.master_addr),
        "MASTER_PORT": launch.env.get("MASTER_PORT", start.master_port),
    }
    return env | {name: str(value) for name, value in decided.items() if value is not None}


def planned_actors(plan: Plan) -> tuple[ActorInfo, ...]:
    """Every instance of the job, in the order of `plan.launches`."""
    return tuple(
        ActorInfo(
            launch.env["RUNTIME_ACTOR"],
            launch.role,
            launch.rank,
            int(launch.env["NODE_RANK"]),
            launch.local_rank,
            int(launch.env["WORLD_SIZE"]),
            int(launch.env["LOCAL_WORLD_SIZE"]),
            launch.host,
            0,
            plan.job.roles[launch.role],
        )
        for launch in plan.launches
    )


# Showing a plan


def to_json(plan: Plan) -> str:
    """What `--dry-run --json` prints: {"job", "hosts", "launches"}. `env` is only what we set."""
    import json

    document = {
        "job": {"id": plan.job_id, **_plain(asdict(plan.job))},
        "hosts": [
            {k: _plain(v) for k, v in asdict(host).items() if v is not None or k == "slots"}
            for host in plan.hosts
        ],
        "launches": [_plain(asdict(launch)) for launch in plan.launches],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """`value` of what JSON knows; anything else of a user's config as its repr."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return repr(value)


def to_text(plan: Plan) -> str:
    """What `--dry-run` prints: hosts, roles, and each worker with its command line and environment.

    What all workers of a role have alike stands once, under the role.
    """
    import shlex

    lines = [f"job {plan.job_id} ({plan.job.name}): {_counted(len(plan.launches), 'worker')}"]
    for host in plan.hosts:
        where = "this machine" if host.local else "not this machine"
        lines.append(f"host {host.name}: {_counted(host.slots or 0, 'slot')}, {where}")
    for role in plan.job.roles.values():
        mine = [launch for launch in plan.launches if launch.role == role.name]
        if not mine:
            continue
        restart = role.restart
        never = restart.policy == "never" or not restart.max
        again = "never" if never else f"{restart.policy}, {restart.max}x"
        lines += [
            "",
            f"role {role.name}: {role.kind}, {_counted(len(mine), 'worker')}, restart {again}"
            + ("" if role.driver else ", no driver"),
            f"  {shlex.join(mine[0].argv)}",
        ]
        shared = {
            name: value
            for name, value in mine[0].env.items()
            if len(mine) > 1 and all(launch.env.get(name) == value for launch in mine)
        }
        if shared:
            lines.append(f"  all: {_assignments(shared)}")
        for launch in mine:
            own = {name: value for name, value in launch.env.items() if name not in shared}
            lines.append(
                f"  {actor_name(role.name, launch.rank)} on {launch.host}: {_assignments(own)}"
            )
    return "\n".join(lines) + "\n"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _assignments(env: Mapping[str, str]) -> str:
    import shlex

    return " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(env.items()))
