"""A launch is a value: job and hosts in, a list of (host, role, rank, argv, env) out.

Nothing here starts anything or looks at the machine beyond what it is given; a plan can be printed
(`--dry-run --json`), compared and tested. Ports, incarnations and the ranks that a rendezvous hands out
are not in it: the agent adds them when it starts a worker (see `WorkerSpec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.job import ActorInfo, Entry, JobSpec


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
    process group's set-up and the node check.
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
    stdout_fd: int = 1
    stderr_fd: int = 2
    preload: tuple[str, ...] = ()
    init_process_group: bool = False
    node_check: bool = False
    shutdown_timeout_s: float = 10.0
    start_timeout_s: float = 600.0
    extra: Mapping[str, Any] = field(default_factory=dict)
