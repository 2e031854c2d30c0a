"""What a job is: roles, what each of them runs, what it needs, what happens when it dies.

`JobSpec` is a plain value: built by `JobBuilder`, read from a `job.toml`, or made by the launcher
from a command line; it is validated once, where it is made, and never changed. How the job is put on
hosts is `launcher.plan`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["elastic", "simple"]
Policy = Literal["gang", "one", "never"]


@dataclass(frozen=True)
class Entry:
    """What a worker runs.

    `form`: "object" (`target` is "pkg.mod:obj", a function or a class), "script" (a path) or "module"
    (as `python -m`). `args` are the program's own arguments (scripts and modules only).
    """

    form: Literal["object", "script", "module"]
    target: str
    args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Resource:
    """What one instance needs. cpu: cores; memory, disk: MiB; accelerator: devices (fractions allowed)."""

    cpu: float = 0
    memory: float = 0
    disk: float = 0
    accelerator: float = 0
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Restart:
    """What happens when an instance fails. gang: all of the role anew; one: that one; never: the job ends.

    `max`: how often per role (gang) or per instance (one).
    """

    policy: Policy = "one"
    max: int = 3


@dataclass(frozen=True)
class RoleSpec:
    """One role of a job."""

    name: str
    kind: Kind
    entry: Entry
    total: int = 1
    per_group: int = 1
    driver: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    resource: Resource = field(default_factory=Resource)
    restart: Restart = field(default_factory=Restart)
    comm_auto_setup_process_group: bool = True
    comm_pre_check: bool = True
    group: str | None = None
    nnodes: tuple[int, int] = (1, 1)
    """Fewest and most nodes of an elastic role (`--nnodes MIN:MAX`)."""
    nproc_per_node: int | None = None
    """Instances on one node; None: as the plan finds room."""
    python: str | None = None
    workdir: str | None = None
    preload: tuple[str, ...] | None = None
    """Modules that the fork server imports once; None: found out from the entry's imports."""
    start_method: Literal["fork", "spawn"] = "fork"


@dataclass(frozen=True)
class JobSpec:
    """A whole job. Two specs that say the same are equal."""

    name: str
    roles: Mapping[str, RoleSpec]
    collocations: tuple[frozenset[str], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    global_env: Mapping[str, str] = field(default_factory=dict)
    node_num: int | None = None
    device_per_node: int | None = None
    device_type: Literal["CPU", "GPU"] = "CPU"
    dl_type: Literal["PRE", "SFT", "RL", "MULTIMODAL"] = "SFT"
    stream_type: Literal["task", "data"] | None = None


@dataclass(frozen=True)
class ActorInfo:
    """One instance of a role, as others see it. `name` is "<role>-<rank>"."""

    name: str
    role: str
    rank: int
    node_rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    host: str = "localhost"
    restart_count: int = 0
    spec: RoleSpec | None = None


@dataclass(frozen=True)
class JobInfo:
    """The job as a worker sees it."""

    name: str
    job_id: str
    user_config: Any
    accelerator_type: Literal["CPU", "GPU"] = "CPU"
