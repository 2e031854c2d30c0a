"""A producer that is ten times faster than its consumer, for a minute: memory, order, heartbeats.

Items travel as casts, as calls that a thread does not wait for, and through a `DataQueue`; of 32 KiB, and
as casts also of 1 MiB. Once the sender has to wait, the memory of all processes of the job may not grow by
more than the credits and a tenth. That nothing is lost and the order kept is looked at in each turn.
There is no other side to compare with: what is held against the goals is ours alone. `--quick`: ten
seconds each instead of a minute.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import psutil

from bench import common
from bench.common import Goal, Side
from bench.timing import BEAT_P99, MIB

CREDITS_MIB = 16.0
"""The window of one peer (`peer/flow.py`), and what the queue of the measurement may hold."""
GROWTH, ALLOWED = "memory after warm-up, growth, MiB", "growth / allowed"
TOO_MUCH_MIB = 1024.0


def job(kind: str, kib: int, seconds: float) -> dict[str, float]:
    """One turn. Raises when an item was lost or late, or memory grows without end."""
    env = f"BENCH_KIND = '{kind}', BENCH_ITEM_KIB = '{kib}', BENCH_SECONDS = '{seconds}'"
    consumer = "QueueConsumer" if kind == "queue" else "Consumer"
    roles = common.role("producer", "bench.overload_job:produce", driver=True)
    roles += f"env = {{ {env} }}\n"
    roles += common.role("consumer", f"bench.overload_job:{consumer}") + f"env = {{ {env} }}\n"
    with common.workplace() as cwd, common.job_tree(roles, cwd) as launcher:
        level, peak = watch(launcher, cwd, seconds)
        common.finish(launcher, cwd, 120)
        found: dict[str, float] = common.read_figures(cwd)
    growth = max(0.0, peak - level)
    allowed = CREDITS_MIB + 0.1 * level
    return found | {"memory, MiB": level, GROWTH: growth, ALLOWED: growth / allowed}


def watch(launcher: Popen[Any], cwd: Path, seconds: float) -> tuple[float, float]:
    """MiB of all processes together after the warm-up, and the most from then on."""
    level = peak = 0.0
    until = time.monotonic() + seconds + 60
    while launcher.poll() is None and not (cwd / "produced").exists():
        if time.monotonic() > until:
            raise RuntimeError(f"the producer does not come to its end: {common.tail(cwd)}")
        now = resident(launcher.pid)
        if not (cwd / "warm").exists():
            level = now
        peak = max(peak, now) if (cwd / "warm").exists() else 0.0
        if peak - level > TOO_MUCH_MIB:
            raise RuntimeError(f"memory grew from {level:.0f} to {peak:.0f} MiB: nothing bounds it")
        time.sleep(0.2)
    return level, peak


def resident(pid: int) -> float:
    """MiB of a process and all below it."""
    total = 0
    try:
        main = psutil.Process(pid)
        family = [main, *main.children(recursive=True)]
    except psutil.Error:
        return 0.0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total / MIB


KINDS = {
    "casts of 32 KiB": ("cast", 32),
    "casts of 1 MiB": ("cast", 1024),
    "calls of 32 KiB": ("call", 32),
    "queue, 32 KiB": ("queue", 32),
}


def main() -> int:
    options = common.arguments(__doc__ or "", turns=1, quick=1)
    seconds = (10 if options.quick else 60) * options.scale
    sides = [
        Side(name, functools.partial(job, kind, kib, seconds))
        for name, (kind, kib) in KINDS.items()
        if not options.without_ours
    ]
    goals = [
        goal
        for name in KINDS
        for goal in (Goal(ALLOWED, name, absolute=1.0), Goal(BEAT_P99, name, absolute=20.0))
    ]
    title = f"overload: {seconds:g} s, a producer ten times faster than its consumer"
    figures = common.take_turns(title, sides, options.turns, goals)
    return common.report([figures], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
