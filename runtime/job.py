"""What a job is: roles, what each of them runs, what it needs, what happens when it dies.

`JobSpec` is a plain value: built by `JobBuilder`, read from a `job.toml`, or made by the launcher
from a command line; it is validated once, where it is made, and never changed. Every mistake found
stands in one `ConfigError`, a line each. `job_toml` reads and writes files; how the job is put on
hosts is `launcher.plan`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.errors import ConfigError, nearest

Kind = Literal["elastic", "simple"]
Policy = Literal["gang", "one", "never"]


@dataclass(frozen=True)
class Entry:
    """What a worker runs.

    `form`: "object" (`target` is "pkg.mod:obj", a function or a class), "script" (a path), "module"
    (as `python -m`) or "program" (any executable, `--no-python`). `args` are the program's own
    arguments (never those of an object).
    """

    form: Literal["object", "script", "module", "program"]
    target: str
    args: tuple[str, ...] = ()

    def __str__(self) -> str:
        import shlex  # only messages and files need it

        module = ("-m",) if self.form == "module" else ()
        return shlex.join((*module, self.target, *self.args))


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
    init_process_group: bool = False
    """Scripts and modules only: set up the process group before they run (`--init-process-group`)."""

    @property
    def sets_up_process_group(self) -> bool:
        """Whether the worker calls `init_process_group` before the entry: elastic roles only, objects
        unless they said no, scripts (as under torchrun) only when asked to, programs never."""
        if self.kind != "elastic" or self.entry.form == "program":
            return False
        if self.entry.form == "object":
            return self.comm_auto_setup_process_group
        return self.init_process_group

    @property
    def checks_node(self) -> bool:
        """Whether the worker runs the bounded node check first: object entries of elastic roles."""
        return self.kind == "elastic" and self.entry.form == "object" and self.comm_pre_check


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

    def to_toml(self) -> str:
        """The job as a `job.toml`; `job_from_toml` makes an equal job of it.

        Raises `ConfigError` when `config` holds what TOML has no notation for.
        """
        from runtime.job_toml import job_to_toml  # that module reads and writes these records

        return job_to_toml(self)


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


def actor_name(role: str, rank: int) -> str:
    """The name of one instance: "<role>-<rank>"."""
    return f"{role}-{rank}"


# Entries

# Compiled when first used: a launch of a script needs none of them.
_DOTTED = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
_OBJECT = f"{_DOTTED}:{_DOTTED}"
ENTRY_FORMS = '"pkg.mod:obj", "train.py --x 1" or "-m pkg.mod --x 1"'


def parse_entry(text: str) -> Entry:
    """Read an entry: "pkg.mod:obj", "pkg.mod.obj", "train.py --x 1" or "-m pkg.mod --x 1".

    Arguments are split as a shell splits them. Raises `ConfigError` saying what is allowed.
    """
    import shlex

    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"entry {text!r}: {str(error).lower()}") from None
    if not words:
        raise ConfigError(f"entry {text!r} is empty: say {ENTRY_FORMS}")
    first, rest = words[0], tuple(words[1:])
    if first == "-m":
        if not rest or not re.fullmatch(_DOTTED, rest[0]):
            raise ConfigError(f"entry {text!r}: -m needs the dotted name of a module")
        return Entry("module", rest[0], rest[1:])
    if first.endswith(".py") or ("/" in first and ":" not in first):
        return Entry("script", first, rest)
    target = _object_target(first)
    if target is None:
        raise ConfigError(f"entry {text!r} is not understood: say {ENTRY_FORMS}")
    if rest:
        raise ConfigError(
            f"entry {text!r}: a function or class takes no arguments here (found {shlex.join(rest)}); "
            "it gets the job's config"
        )
    return Entry("object", target)


def _object_target(word: str) -> str | None:
    """`word` as "pkg.mod:obj", or None if it cannot mean an object."""
    if re.fullmatch(_OBJECT, word):
        return word
    if re.fullmatch(_DOTTED, word) and "." in word:
        module, _, name = word.rpartition(".")
        return f"{module}:{name}"
    return None


# Validation

ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
IDENTITY_ENV = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK"}
    | {"GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    | {f"TORCHELASTIC_{what}" for what in ("RESTART_COUNT", "MAX_RESTARTS", "RUN_ID", "ERROR_FILE")}
    | {f"RUNTIME_{what}" for what in ("JOB_ID", "ROLE", "ACTOR", "HOST", "INCARNATION")}
    | {"RUNTIME_GLOBAL_RANK", "RUNTIME_GLOBAL_WORLD_SIZE"}
)
"""Variables that say who a worker is. No job may set them; inherited values are replaced."""

_ROLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_POLICIES: dict[str, tuple[Policy, ...]] = {
    "elastic": ("gang", "never"),
    "simple": ("gang", "one", "never"),
}


def validate(job: JobSpec, source: str = "") -> JobSpec:
    """The job, if nothing is wrong with it; else one `ConfigError` that names every mistake."""
    problems = [line for role in job.roles.values() for line in role_problems(role)]
    problems += job_problems(job)
    raise_together(problems, source)
    return job


def raise_together(problems: list[str], source: str = "") -> None:
    """One `ConfigError` with a line for each of `problems`, each beginning with `source`; or nothing."""
    if problems:
        where = f"{source}: " if source else ""
        raise ConfigError("\n".join(where + line for line in problems))


def role_problems(role: RoleSpec) -> list[str]:
    """What is wrong with one role by itself."""
    found: list[str] = []

    def check(good: bool, key: str, value: object, allowed: str) -> None:
        if not good:
            found.append(f"roles.{role.name}.{key} = {value}: {allowed}")

    if not _ROLE_NAME.fullmatch(role.name) or re.search(r"-\d+$", role.name):
        found.append(
            f"role {role.name!r}: a role's name is letters, digits, '_', '.' and '-', begins with a "
            "letter, has at most 64 characters, and does not end in -<number> (instances do)"
        )
    if _counts_are_sane(role, check):
        _check_shape(role, check)
    policies = _POLICIES[role.kind]
    allowed = f"a role of kind {role.kind} allows {', '.join(policies)}"
    check(role.restart.policy in policies, "restart.policy", repr(role.restart.policy), allowed)
    check(role.restart.max >= 0, "restart.max", role.restart.max, "must be 0 or more")
    for key in ("cpu", "memory", "disk", "accelerator"):
        amount = getattr(role.resource, key)
        check(amount >= 0, f"resource.{key}", amount, "must be 0 or more")
    found += _env_problems(f"roles.{role.name}.env", role.env)
    return found


def _counts_are_sane(role: RoleSpec, check: Callable[[bool, str, object, str], None]) -> bool:
    low, high = role.nnodes
    check(role.total >= 1, "total", role.total, "must be at least 1")
    check(role.per_group >= 1, "per_group", role.per_group, "must be at least 1")
    check(1 <= low <= high, "nnodes", f"{low}:{high}", "must be N or MIN:MAX with 1 <= MIN <= MAX")
    nproc = role.nproc_per_node
    check(nproc is None or nproc >= 1, "nproc_per_node", nproc, "must be at least 1")
    return min(role.total, role.per_group, low, high, nproc or 1) >= 1


def _check_shape(role: RoleSpec, check: Callable[[bool, str, object, str], None]) -> None:
    """The numbers of a role must fit each other."""
    allowed = f"must be a multiple of per_group = {role.per_group}"
    check(role.total % role.per_group == 0, "total", role.total, allowed)
    nodes, nproc = role.nnodes[1], role.nproc_per_node
    if role.kind == "simple":
        return
    if nproc is not None:
        allowed = f"must be nnodes * nproc_per_node = {nodes} * {nproc} = {nodes * nproc}"
        check(role.total == nodes * nproc, "total", role.total, allowed)
        allowed = f"must be a multiple of per_group = {role.per_group}: groups share a host"
        check(nproc % role.per_group == 0, "nproc_per_node", nproc, allowed)


def _env_problems(where: str, env: Mapping[str, str]) -> list[str]:
    found = []
    for name, value in env.items():
        if not ENV_NAME.fullmatch(name):
            found.append(f"{where}: {name!r} is no name of a variable")
        elif name in IDENTITY_ENV:
            found.append(f"{where}: {name} is set by the launcher and cannot be chosen")
        elif "\0" in value:
            found.append(f"{where}.{name}: a value cannot hold a zero byte")
    return found


def job_problems(job: JobSpec, doubtful: frozenset[str] = frozenset()) -> list[str]:
    """What is wrong between roles. Numbers of `doubtful` roles are not looked at."""
    found = _env_problems("global_env", job.global_env)
    if not job.roles:
        found.append("roles: a job needs at least one role")
    elif not any(role.driver for role in job.roles.values()):
        found.append(
            "roles: none is a driver, so the job would end at once; give one driver = true"
        )
    for key in ("node_num", "device_per_node"):
        value = getattr(job, key)
        if value is not None and value < 1:
            found.append(f"{key} = {value}: must be at least 1")
    seen: set[str] = set()
    for together in job.collocations:
        found += _collocation_problems(job, together, seen, doubtful)
        seen |= together
    if not found and not doubtful:
        found += _device_problems(job)
    return found


def _collocation_problems(
    job: JobSpec, together: frozenset[str], seen: set[str], doubtful: frozenset[str]
) -> list[str]:
    names = sorted(together)
    where = f"collocation {names}"
    unknown = [name for name in names if name not in job.roles]
    if unknown:
        return [
            f"{where}: no role is called {name!r}{nearest(name, job.roles)}; "
            f"the roles are {', '.join(job.roles)}"
            for name in unknown
        ]
    found = [f"{where}: {name} is collocated twice" for name in names if name in seen]
    if len(names) < 2:
        found.append(f"{where}: at least two roles are needed")
    groups = {name: job.roles[name].total // max(1, job.roles[name].per_group) for name in names}
    if len(set(groups.values())) > 1 and not together & doubtful:
        counts = ", ".join(f"{name} has {count}" for name, count in groups.items())
        found.append(
            f"{where}: all need the same number of groups (total / per_group), but {counts}"
        )
    return found


def _device_problems(job: JobSpec) -> list[str]:
    """Devices that roles ask for by name, against what the job says its nodes have."""
    if job.node_num is None or job.device_per_node is None:
        return []
    asked = {n: r.total * r.resource.accelerator for n, r in job.roles.items()}
    have = job.node_num * job.device_per_node
    if sum(asked.values()) <= have:
        return []
    detail = ", ".join(f"{name} {amount:g}" for name, amount in asked.items() if amount)
    return [
        f"roles ask for {sum(asked.values()):g} devices ({detail}), but node_num * device_per_node "
        f"= {job.node_num} * {job.device_per_node} = {have}"
    ]
