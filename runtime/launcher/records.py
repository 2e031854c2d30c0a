"""What is known of a job from outside: where it is, how it stands, how it ended. Pure records."""

from __future__ import annotations

from typing import NamedTuple

from runtime.launcher.report import Outcome, exit_code


class JobEndpoint(NamedTuple):
    """Where a job is. `started`: seconds since the epoch; `log_dir`: the job's own folder, on the hosts."""

    job_id: str
    name: str
    started: float
    hosts: tuple[str, ...]
    peer: str
    """Process id of the agent that has the control plane."""
    address: str
    log_dir: str
    detached: bool = False
    shutdown_timeout_s: float = 10.0
    machine: str = ""
    """Name of the machine that the job was launched from: an ipc address means that one."""
    security: tuple[bytes, bytes, frozenset[bytes]] | None = None

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
    """One job. `stage`: "starting", "running", "stopping", "finished", "failed", or "lost" (its control
    plane is gone without a word); `since`: when that began, seconds since the epoch (0: unknown)."""

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
