"""What is known of a job from outside: where it is, how it stands, how it ended. Pure records."""

from __future__ import annotations

from typing import NamedTuple

from runtime.launcher.report import Outcome, exit_code


class Way(NamedTuple):
    """How another host is reached: `words` before a shell's command run that there; `python` is to be its
    interpreter."""

    python: str
    words: tuple[str, ...]


class JobHost(NamedTuple):
    """One host of a job. `log_dir`: the job's own folder there; `process`: its agent's pid and
    `ProcessInfo.started`; `ranks`: (role, rank) of the workers there."""

    name: str
    log_dir: str
    process: tuple[int, int] = (0, 0)
    ranks: tuple[tuple[str, int], ...] = ()
    way: Way | None = None
    """None: it is the machine that the job was launched from, or nothing leads there but `srun`."""
    local: bool = True
    """It is that machine."""


class JobEndpoint(NamedTuple):
    """Where a job is. `started`: seconds since the epoch."""

    job_id: str
    name: str
    started: float
    hosts: tuple[JobHost, ...]
    peer: str
    """Process id of the agent that has the control plane, on the first host."""
    address: str
    detached: bool = False
    shutdown_timeout_s: float = 10.0
    machine: str = ""
    """Name of the machine that the job was launched from: an ipc address means that one."""
    security: tuple[bytes, bytes, frozenset[bytes]] | None = None

    @property
    def names(self) -> list[str]:
        """Of its hosts."""
        return [host.name for host in self.hosts]

    @property
    def log_dir(self) -> str:
        """The job's own folder on its first host."""
        return self.hosts[0].log_dir

    def __repr__(self) -> str:  # the keys are nobody's business
        return f"JobEndpoint({self.job_id}, {self.address})"


class Ended(NamedTuple):
    """How a job ended, and when: seconds since the epoch."""

    outcome: Outcome
    at: float

    @property
    def code(self) -> int:
        return exit_code(self.outcome)

    @property
    def stage(self) -> str:
        return "failed" if self.code else "finished"


class Missing(NamedTuple):
    """In place of how a job ended. `stage`: "lost" or "unknown", as in `JobStatus`."""

    stage: str
    reason: str


class WorkerStatus(NamedTuple):
    """One planned worker. `state`: "starting", "running", "restarting", "exited" or "failed"."""

    name: str
    role: str
    rank: int
    host: str
    pid: int | None
    state: str
    exit_code: int | None
    restart_count: int
    last_heartbeat_s: float | None
    step: int | None
    stuck_s: float | None
    cause: str


class HostStatus(NamedTuple):
    """One host of a job and its agent. `problem`: why nothing is known of it, "" where it answered."""

    host: str
    pid: int | None
    last_heartbeat_s: float | None
    problem: str = ""


class JobStatus(NamedTuple):
    """One job. `stage`: "starting", "running", "stopping", "finished", "failed", "lost" (its control
    plane is gone without a word) or "unknown" (who could say that is out of reach); `since`: when that began,
    seconds since the epoch (0: unknown)."""

    stage: str
    exit_code: int | None
    restarts: int
    roles: dict[str, list[WorkerStatus]]
    job_id: str = ""
    name: str = ""
    started: float = 0.0
    since: float = 0.0
    hosts: tuple[HostStatus, ...] = ()
    reason: str = ""
    log_dir: str = ""
