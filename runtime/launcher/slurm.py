"""Slurm: the hosts of an allocation, and the command that carries an agent there (`submit.py` asks for one).

Inside an allocation its nodes are the hosts and `srun` starts the agents, each a step of one task whose
standard input and output carry the frames. Nothing is asked of Slurm but what its variables say. When every
task of a step runs the launcher (`srun -N3 python -m runtime.launch ...`), the first one launches for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.errors import ConfigError
from runtime.launcher.hosts import parse_hosts
from runtime.launcher.options import LaunchOptions
from runtime.launcher.plan import Host

NAME = "slurm"
"""What `--hosts` calls the nodes of the allocation."""

_PART = "SLURM_JOB_NODELIST_HET_GROUP_"
_SRUN = (
    "srun", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL", "--mpi=none", "--cpu-bind=none",
    "--job-name=runtime", "--quiet",
)  # fmt: skip
_NOT_FOR_AGENTS = (
    "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK", "SLURM_LABELIO",
    "SLURM_UNBUFFEREDIO",
)  # fmt: skip
"""Wishes for the job's own tasks that `srun` reads: an agent has all of its node, and binary output."""


def is_meant(options: LaunchOptions, env: Mapping[str, str]) -> bool:
    """Whether the job's hosts are the nodes of the allocation that we are in.

    Raises `ConfigError`: `--hosts slurm`, but this is none; or it is one of several parts.
    """
    inside = "SLURM_JOB_NODELIST" in env
    parts = [env[name] for name in sorted(env) if name.startswith(_PART)]
    if options.hosts == NAME and not (inside or parts):
        raise ConfigError(
            "--hosts slurm: this is no Slurm allocation (SLURM_JOB_NODELIST is not set); "
            "--launcher slurm submits a job"
        )
    said = options.hosts not in (None, NAME) or options.hostfile is not None
    if said or options.standalone or options.launcher == "local":
        return False
    if parts:
        raise ConfigError(
            "this is a heterogeneous allocation, whose parts are not taken together: say "
            f"--hosts {','.join(parts)} --launcher ssh, or --standalone for this machine alone"
        )
    return inside


def is_to_submit(options: LaunchOptions, env: Mapping[str, str]) -> bool:
    """Whether the job is to run in an allocation that is still to be made."""
    return options.launcher == NAME and not env.keys() & {"SLURM_JOB_NODELIST", f"{_PART}0"}


def is_follower(options: LaunchOptions, env: Mapping[str, str]) -> bool:
    """Whether another task of the same step launches the job."""
    launches = not is_confined(env) or env.get("SLURM_PROCID", "0") == "0"
    return not launches and is_meant(options, env)


def is_confined(env: Mapping[str, str]) -> bool:
    """Whether we are one of several tasks of a step, with a share of this node and not all of it."""
    return env.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def allocated(options: LaunchOptions, env: Mapping[str, str]) -> tuple[Host, ...]:
    """The nodes of the allocation, each with as many slots as GPUs or, where tasks were asked for, tasks.

    Who says `--nproc-per-node N` is not held to that. Raises `ConfigError`: a variable of Slurm's does not
    say what it should.
    """
    hosts = parse_hosts(env["SLURM_JOB_NODELIST"], "SLURM_JOB_NODELIST")
    if isinstance(options.nproc_per_node, int):
        return hosts
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if gpus.isdecimal() and int(gpus):
        return tuple(replace(host, slots=int(gpus)) for host in hosts)
    if not env.keys() & {"SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"}:
        return hosts  # nobody said how many: one task a node is only Slurm's default
    counts = _tasks_per_node(env.get("SLURM_TASKS_PER_NODE", ""))
    if len(counts) != len(hosts):
        raise ConfigError(
            f"SLURM_TASKS_PER_NODE={env.get('SLURM_TASKS_PER_NODE', '')} counts tasks on {len(counts)} "
            f"nodes, but SLURM_JOB_NODELIST={env['SLURM_JOB_NODELIST']} names {len(hosts)}"
        )
    return tuple(replace(host, slots=count) for host, count in zip(hosts, counts, strict=True))


def _tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" is 2, 2, 2, 1. What is not of that form has no items."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[3] or 1) if match else []
    return counts


def carries(options: LaunchOptions, hosts: Sequence[Host], env: Mapping[str, str]) -> bool:
    """Whether `srun` is to reach the hosts: all of them are in the allocation, and nobody wants ssh.

    Raises `ConfigError`: with `--detach`, for what `srun` has started ends with it.
    """
    if options.launcher == "ssh" or "SLURM_JOB_NODELIST" not in env:
        return False
    inside = {host.name for host in parse_hosts(env["SLURM_JOB_NODELIST"], "SLURM_JOB_NODELIST")}
    if not inside.issuperset(host.name for host in hosts if not host.local):
        return False
    if options.detach:
        raise ConfigError(
            "--detach: what srun starts ends with the launcher; outside the allocation "
            "--launcher slurm submits a job of its own, and --launcher ssh does without srun"
        )
    return True


def srun_argv(host: Host, command: str) -> list[str]:
    """The local command that runs the shell's `command` on a node of the allocation."""
    without = [word for name in _NOT_FOR_AGENTS for word in ("-u", name)]
    return ["env", *without, *_SRUN, f"--nodelist={host.name}", "sh", "-c", command]
