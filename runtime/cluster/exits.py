"""What is known about a worker's end beside its exit status: its own report, and the kernel's."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)


class OwnReport(NamedTuple):
    """What a worker wrote down before it ended. `at`: wall clock, when; None if it wrote nothing."""

    at: float | None = None
    error: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    step: int | None = None


def wall_clock() -> float:
    """Seconds since the epoch: to be compared with the times of files, and told to people."""
    return datetime.now(UTC).timestamp()


def read_report(path: str) -> OwnReport:
    """Read torchelastic's error file; what is no such file is as good as none."""
    try:
        with open(path, "rb") as file:
            record = json.load(file)
            # The file's own time: the one inside has whole seconds only, as torchelastic's.
            at = os.fstat(file.fileno()).st_mtime
        message = record["message"]
        if isinstance(message, str):
            message = {"message": message}
        extra = message.get("extraInfo") or {}
        error = {
            "type": str(record.get("type", "")),
            "message": str(message.get("message", "")),
            "traceback": str(extra.get("py_callstack", "")),
        }
        step = record.get("step")
        return OwnReport(at, error, step if isinstance(step, int) else None)
    except FileNotFoundError:
        return OwnReport()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        logger.warning("cannot read %s: %s", path, problem)
        return OwnReport()


def oom_kills() -> int:
    """How often the kernel killed for memory in our cgroup; 0 where that cannot be seen."""
    try:
        with open("/proc/self/cgroup") as file:
            path = next(line[3:].strip() for line in file if line.startswith("0::"))
        with open(f"/sys/fs/cgroup{path}/memory.events") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
