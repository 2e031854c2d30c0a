"""Looking at the processes, sockets and shared memory of this machine by way of /proc (Linux).

A process belongs to a job when its environment holds the job's marker; a process that cannot be read
(it ended, or it is another user's) belongs to nobody. Zombies count as gone.
"""

from __future__ import annotations

import contextlib
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
    inodes = {}
    for name in shared_memory() - set(since):
        with contextlib.suppress(OSError):
            inodes[name] = (_SHM / name).stat().st_ino
    used = _inodes_in_use() if inodes else set()
    return {name for name, inode in inodes.items() if inode not in used}


def _inodes_in_use() -> set[int]:
    """Files of /dev/shm that some process maps or holds open; by inode, since a semaphore is mapped under
    the temporary name that it was made with."""
    used = set()
    for pid in all_pids():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(f"{_SHM}/"):
                    used.add(int(fields[4]))
        with contextlib.suppress(OSError):
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(fd.path).startswith(f"{_SHM}/"):
                        used.add(os.stat(fd.path).st_ino)
    return used
