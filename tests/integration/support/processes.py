"""Looking at the processes, sockets and shared memory of this machine by way of /proc (Linux).

A process belongs to a job when its environment holds the job's marker; a process that cannot be read
(it ended, or it is another user's) belongs to nobody. Zombies count as gone.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Process:
    """One process as it was when looked at. `started`: clock ticks since boot; with `pid` it is unique."""

    pid: int
    parent: int
    session: int
    started: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid} (parent {self.parent}): {self.command[:160]}"


def look_at(pid: int) -> Process | None:
    """The process `pid`, or None when it is gone or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    text = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]), text)


def all_pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def with_marker(marker: str) -> list[Process]:
    """Every living process whose environment holds `marker`, oldest first."""
    found = []
    needle = marker.encode()
    for pid in all_pids():
        if pid == os.getpid():
            continue
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if needle in environ and (process := look_at(pid)) is not None:
            found.append(process)
    return sorted(found, key=lambda p: (p.started, p.pid))


def is_alive(pid: int) -> bool:
    return look_at(pid) is not None


def unix_sockets(under: str) -> list[str]:
    """Paths of the open unix sockets below the directory `under`."""
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    paths = (line.split(maxsplit=7)[7] for line in lines if len(line.split()) > 7)
    return sorted({p for p in paths if p.startswith(under)})


def shared_memory() -> frozenset[str]:
    """Names in /dev/shm."""
    return frozenset(os.listdir(_SHM)) if _SHM.exists() else frozenset()


def orphaned_shared_memory(*, since: Collection[str]) -> set[str]:
    """Names that came to /dev/shm after `since` and that no living process maps or holds open.

    Other programs of the machine use shared memory, too; theirs is in use, a leak is not.
    """
    new = shared_memory() - set(since)
    return {name for name in new if not _in_use(str(_SHM / name))}


def _in_use(path: str) -> bool:
    needle = path.encode()
    for pid in all_pids():
        try:
            if needle in Path(f"/proc/{pid}/maps").read_bytes():
                return True
            fds = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for fd in fds:
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == path:
                    return True
            except OSError:
                continue
    return False
