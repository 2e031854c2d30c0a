"""How far workers are: eight bytes beside the socket of each, which it writes and its agent reads. No messages."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from typing import Any

from runtime.launcher.plan import WorkerSpec

_CELL = struct.Struct("Q")
"""The step and one; 0: none was reported."""
_MOST = (1 << 64) - 2


class StepFile:
    """Of this process. Raises `OSError` where it cannot be made."""

    def __init__(self, spec: WorkerSpec) -> None:
        fd = os.open(_path(spec), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(
                fd, 0, _CELL.size
            )  # a full disk is an error now, later it were a signal
            self._cell = mmap.mmap(fd, _CELL.size)
        finally:
            os.close(fd)

    def write(self, step: int) -> None:
        """`step`: not negative."""
        _CELL.pack_into(self._cell, 0, min(step, _MOST) + 1)


def reported(specs: Iterable[WorkerSpec]) -> dict[str, dict[str, Any]]:
    """What those workers of this host have reported, by name, as heartbeats carry it."""
    found = {spec.info.name: _read(_path(spec)) for spec in specs}
    return {name: {"step": step - 1} for name, step in found.items() if step}


def _path(spec: WorkerSpec) -> str:
    return spec.address.removeprefix("ipc://") + ".step"


def _read(path: str) -> int:
    try:
        with open(path, "rb") as file:
            return int(_CELL.unpack(file.read(_CELL.size))[0])
    except (OSError, struct.error):
        return 0
