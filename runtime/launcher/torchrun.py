"""Who a process is in a job that torchrun, srun or mpirun has started, as its environment says. Pure.

Also where the ranks of such a job can meet: the store that torchrun serves, else one that rank 0 is to serve, at
MASTER_ADDR and MASTER_PORT where those are set. Without them srun's list of nodes and the addresses of mpirun's own
host, which Open MPI up to 4 gives to all ranks, are enough: the port then follows from the job's id, with neighbours
in case that somebody else has it.
What is done there is `runtime/meeting.py`'s business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from zlib import crc32

from runtime.errors import ConfigError, MisuseError
from runtime.launcher.hosts import parse_hosts

_LOWEST_PORT = 20_000
_PORTS = 10_000
_NEIGHBOURS = 8


class Place(NamedTuple):
    """Where the ranks meet: a host under one or several addresses. `ports` are tried in order; `served`: torchrun
    serves the store itself."""

    hosts: tuple[str, ...]
    ports: tuple[int, ...]
    served: bool = False


class Outer(NamedTuple):
    """A rank of a job that somebody else has started. `rank` of `world_size` in all of the job, `role_rank` in its
    role; `node` tells the nodes of the job apart ("": by their host names); `restart` counts from 0."""

    launcher: str
    run_id: str
    rank: int
    world_size: int
    local_rank: int
    role_rank: int
    place: Place
    role: str = "default"
    node: str = ""
    restart: int = 0


def find(env: Mapping[str, str]) -> Outer | None:
    """The outer job of a process with that environment; None where there is none.

    Raises `ConfigError` naming the variable that is missing or wrong, `MisuseError` where the ranks cannot meet.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        return _torchrun(env)
    if "OMPI_COMM_WORLD_RANK" in env:  # before Slurm's: mpirun starts its daemons by srun
        return _mpirun(env)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        return _srun(env)
    return None


def _torchrun(env: Mapping[str, str]) -> Outer:
    if not env.get("MASTER_ADDR"):
        raise ConfigError("MASTER_ADDR is not set in the environment, which torchrun does")
    rank = _number(env, "RANK")
    served = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Outer(
        "torchrun",
        env["TORCHELASTIC_RUN_ID"],
        rank,
        _number(env, "WORLD_SIZE"),
        _number(env, "LOCAL_RANK"),
        _number(env, "ROLE_RANK", rank),
        Place((env["MASTER_ADDR"],), (_number(env, "MASTER_PORT"),), served),
        role=env.get("ROLE_NAME", "default"),
        node=str(_number(env, "GROUP_RANK", 0)),
        restart=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def _srun(env: Mapping[str, str]) -> Outer:
    job = env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID", "")
    run_id = f"{job}.{env['SLURM_STEP_ID']}"
    rank = _number(env, "SLURM_PROCID")
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    host = env.get("MASTER_ADDR") or _first_node(nodes)
    place = Place((host,), _ports(env, f"slurm {run_id}"))
    local_rank, node = _number(env, "SLURM_LOCALID"), str(_number(env, "SLURM_NODEID"))
    return Outer("srun", run_id, rank, size, local_rank, rank, place, node=node)


def _mpirun(env: Mapping[str, str]) -> Outer:
    rank, size = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_SIZE")
    hosts = (env["MASTER_ADDR"],) if env.get("MASTER_ADDR") else _where_mpirun_is(env, rank, size)
    run_id = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or "mpirun"
    local_rank = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
    place = Place(hosts, _ports(env, f"mpirun {run_id}"))
    return Outer("mpirun", run_id, rank, size, local_rank, rank, place)


def _where_mpirun_is(env: Mapping[str, str], rank: int, size: int) -> tuple[str, ...]:
    """The addresses of mpirun's own host, if rank 0 is there, which it alone knows."""
    if _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", size) == size:
        return ("localhost",)
    # "123.0;tcp://10.0.0.1,10.1.0.1:4000;tcp6://[...]:4001"
    mpirun = env.get("OMPI_MCA_orte_hnp_uri", "")
    found = [uri.partition("://")[2].rpartition(":")[0] for uri in mpirun.split(";")[1:]]
    # Every host has a daemon, and that of mpirun's own is mpirun itself.
    elsewhere = rank == 0 and env.get("OMPI_MCA_orte_local_daemon_uri") != mpirun
    if elsewhere or not any(found):
        raise MisuseError(
            f"the {size} ranks of this mpirun job are on several hosts and none knows where rank 0 is: "
            "start it with `mpirun -x MASTER_ADDR=<host of rank 0> ...`"
        )
    return tuple(address for part in found for address in part.strip("[]").split(",") if address)


def _first_node(nodes: str) -> str:
    """Where rank 0 is: "gpu[01-03,07],login" begins with gpu01."""
    if not nodes:
        raise ConfigError("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0")
    return parse_hosts(nodes, "SLURM_STEP_NODELIST")[0].name


def _ports(env: Mapping[str, str], job: str) -> tuple[int, ...]:
    """The one that is set, else some below those that the kernel gives to outgoing connections."""
    if env.get("MASTER_PORT"):
        return (_number(env, "MASTER_PORT"),)
    start = crc32(job.encode())
    return tuple(_LOWEST_PORT + (start + n) % _PORTS for n in range(_NEIGHBOURS))


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()):
        found = f"{name}={text!r}" if text else f"{name} is not set"
        raise ConfigError(f"{found} in the environment: must be a whole number from 0")
    return int(text)
