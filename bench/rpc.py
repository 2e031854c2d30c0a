"""Calls between two processes: sequential p50 and p99, and calls a second with 1,000 outstanding.

Compared with a raw pyzmq DEALER/ROUTER ping-pong that carries the same 64 bytes and is driven by the same
event loop (`rpc_peers.py`). Two sides of ours are coroutine callers on bare endpoints, with a coroutine and
with a plain handler; two are a plain script's blocking calls in a launched job (`rpc_job.py`). The goals are
for the first: the others show what a thread hop more costs.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from bench import common
from bench.common import Goal, Side

JOB = """
[roles.driver]
entry = "bench.rpc_job:drive"
kind = "simple"

[roles.server]
entry = "bench.rpc_job:Server"
kind = "simple"
driver = false
"""

RAW, ASYNC, PLAIN = "raw ZeroMQ", "await, async handler", "await, plain handler"
JOB_ASYNC, JOB_PLAIN = "result(), async handler", "result(), plain handler"


def measure_pair(kind: str) -> dict[str, float]:
    """One turn of two bare processes."""
    with common.workplace() as cwd:
        serve, call = (
            [sys.executable, "-m", "bench.rpc_peers", side, kind, str(cwd)]
            for side in ("serve", "call")
        )
        with common.tree(serve, cwd=cwd) as server:
            common.wait_for((cwd / "up").exists, server, cwd)
            with common.tree(call, cwd=cwd) as caller:
                common.finish(caller, cwd, 60)
            common.finish(server, cwd, 10)
        return read_figures(cwd)


def measure_job(method: str) -> dict[str, float]:
    """One turn of a launched job."""
    with common.workplace() as cwd:
        (cwd / "job.toml").write_text(JOB)
        options = ["--log-dir", str(cwd / "logs"), "--job", "job.toml"]
        with common.tree([sys.executable, "-m", "runtime.launch", *options], cwd=cwd) as job:
            common.finish(job, cwd, 90)
        found: dict[str, float] = read_figures(cwd)[method]
        return found


def read_figures(cwd: Path) -> Any:
    return json.loads((cwd / "figures.json").read_text())


def main() -> int:
    options = common.arguments(__doc__ or "", turns=7, quick=2)
    sides = [Side(RAW, functools.partial(measure_pair, "raw"))]
    if not options.without_ours:
        sides += [
            Side(ASYNC, functools.partial(measure_pair, "async")),
            Side(PLAIN, functools.partial(measure_pair, "plain")),
            Side(JOB_ASYNC, functools.partial(measure_job, "echo")),
            Side(JOB_PLAIN, functools.partial(measure_job, "plain_echo")),
        ]
    goals = [
        Goal("sequential p50, µs", ASYNC, RAW, 1.7),
        Goal("calls/s, 1,000 outstanding", ASYNC, RAW, 0.3, at_least=True),
    ]
    title = "rpc: two processes, 64 bytes there and back"
    figures = common.take_turns(title, sides, options.turns, goals)
    return common.report([figures], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
