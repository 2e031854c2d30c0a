"""What workers of the tests in this folder run: named to them as "tests.launcher.targets:name"."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def describe(path: str) -> int:
    """Write down what kind of process this is."""
    import numpy

    facts: dict[str, Any] = {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "sid": os.getsid(0),
        "cwd": os.getcwd(),
        "env": dict(os.environ),
        "threads": len(os.listdir("/proc/self/task")),
        "python_threads": threading.active_count(),
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd") if int(fd) > 2)[:-1],
        "stdin": os.readlink("/proc/self/fd/0"),
        "sigterm": str(signal.getsignal(signal.SIGTERM)),
        "random": random.random(),
        "numpy": float(numpy.random.rand()),
        "modules": sorted(sys.modules),
        "oom": int(Path("/proc/self/oom_score_adj").read_text()),
    }
    with open(path + ".new", "w") as file:
        json.dump(facts, file)
    os.rename(path + ".new", path)
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr)
    return 7


def sleep(_: Any) -> int:
    signal.pause()
    return 0
