"""What an agent is told, and the private folder of a job's sockets on its host."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from runtime.config import Config
from runtime.errors import ConfigError
from runtime.launcher.output import OutputSettings
from runtime.launcher.plan import Plan

ADDRESS_LIMIT = 107
_LONGEST_NAME = 24
_OLD_S = 600.0


class Embedded(NamedTuple):
    """The ranks of this host that somebody else has started: their processes by local rank, and how often the
    outer launcher has started its job anew."""

    pids: tuple[int, ...]
    attempt: int


@dataclass(frozen=True)
class Assignment:
    """Everything an agent needs to know; it travels pickled over the agent's private pipe.

    `plan.job.config` is pickled bytes, which only workers open. `job_dir` is chosen by the agent itself
    where it is ""; `log_dir` is the folder above the jobs' folders (of a remote host: may begin with "~");
    `env` what workers inherit; `settings` those of `--config`. Times are seconds.

    Of a job of several hosts: `node_rank` is the host's place in `plan.hosts`, `address` the IP address that
    the others reach it by ("" on one-host jobs: no TCP at all), `accept_from` those of all hosts of the
    job and of the launcher, `security` a `transport.security.Security`. `detached`: the agent goes on when
    its input ends; `embedded`: somebody else starts the workers. `clock_ahead_s`: how far the host's clock is
    ahead of the launcher's, which tells the times of the job.
    """

    plan: Plan
    host: str
    job_dir: str
    log_dir: str
    workdir: str
    env: Mapping[str, str]
    output: OutputSettings = field(default_factory=OutputSettings)
    transport: Literal["auto", "zmq"] = "auto"
    arena: int | None = None
    shutdown_timeout_s: float = 10.0
    timeout_s: float | None = None
    port_range: tuple[int, int] | None = None
    settings: Config = field(default_factory=Config)
    node_rank: int = 0
    address: str = ""
    accept_from: tuple[str, ...] = ()
    security: tuple[bytes, bytes, frozenset[bytes]] | None = field(default=None, repr=False)
    detached: bool = False
    embedded: Embedded | None = None
    drain_timeout_s: float = 60.0
    clock_ahead_s: float = 0.0

    @property
    def log_folder(self) -> str:
        """The job's own."""
        return os.path.join(self.log_dir, self.plan.job_id)


def choose_job_dir(token: str, env: Mapping[str, str]) -> str:
    """Where a job's sockets are to be: short, since the path of a unix socket has at most 107 bytes.

    `$XDG_RUNTIME_DIR` where it is set, usable and short enough, else /tmp/runtime-<uid>.
    """
    base = env.get("XDG_RUNTIME_DIR", "")
    fits = len(base) + len(f"/runtime-{token}/") + _LONGEST_NAME <= ADDRESS_LIMIT
    if base and fits and os.path.isabs(base) and os.access(base, os.W_OK | os.X_OK):
        return os.path.join(base, f"runtime-{token}")
    return f"/tmp/runtime-{os.getuid()}/{token}"


def spec_file(job_dir: str, local_rank: int) -> str:
    """Where an embedded rank finds its `WorkerSpec`, pickled. It removes the file."""
    return os.path.join(job_dir, f"{local_rank}.spec")


def make_job_dir(path: str) -> None:
    """Make the job's private folder. Raises `ConfigError` when it is not, or cannot be, ours alone."""
    above = os.path.dirname(path)
    shared = os.path.basename(above) == f"runtime-{os.getuid()}"
    try:
        if shared:
            os.makedirs(above, mode=0o700, exist_ok=True)
            found = os.lstat(above)
            if found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise ConfigError(
                    f"{above} is not a private folder of ours (owner {found.st_uid}, mode "
                    f"{found.st_mode & 0o777:o}); remove it, or set XDG_RUNTIME_DIR"
                )
        os.mkdir(path, 0o700)
        if shared:
            _sweep(above, os.stat(path).st_mtime)
    except OSError as error:
        raise ConfigError(f"cannot make the job's folder {path}: {error.strerror}") from error


def _sweep(above: str, now: float) -> None:
    """Remove what jobs have left here whose host lost its power: old folders in which nobody listens."""
    for folder in os.scandir(above):
        with suppress(OSError):  # its job ends just now
            if now - folder.stat().st_mtime > _OLD_S and not any(map(_listens, _inside(folder))):
                shutil.rmtree(folder, ignore_errors=True)


def _inside(folder: os.DirEntry[str]) -> list[str]:
    return [os.path.join(folder, name) for name in os.listdir(folder)]


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as asking:
        asking.setblocking(False)
        return asking.connect_ex(path) != errno.ECONNREFUSED


def remove_job_dir(path: str) -> None:
    """Remove the job's folder, and the one above if that was made for it and is empty now."""
    shutil.rmtree(path, ignore_errors=True)
    above = os.path.dirname(path)
    if os.path.basename(above) == f"runtime-{os.getuid()}":
        try:
            os.rmdir(above)
        except OSError:  # other jobs have folders there
            pass
