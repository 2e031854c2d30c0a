"""A `DataQueue` with one producer and one consumer, each a process of its own.

Items of 1 KiB one by one and in batches of 100; how long an item takes from the call of `put` to a
consumer that waits in `get`; and items of 1 MiB, against the same bytes as the argument of a call (as in
`bench.tensor`). A server of asyncio streams and `multiprocessing.Queue` stand beside it for comparison.
"""

from __future__ import annotations

import functools
import sys

from bench import common, tensor
from bench.common import Goal, Side
from bench.raw_bulk import WARM
from bench.raw_queue import BATCH, LARGE, ONE, WAKE_P50

STREAM, MP, ARGUMENT = "stream server", "multiprocessing.Queue", "argument of a call"
BLOCKING, ASYNC, AHEAD = "blocking", "async", "async, 100 puts ahead"
APART = "async, owner apart"


def raw(kind: str) -> dict[str, float]:
    servers = [] if kind == "mp" else ["serve stream", "serve produce"]
    found: dict[str, float] = common.run_programs("bench.raw_queue", servers, f"call {kind}")
    return found


def job(mode: str, place: str = "consumer") -> dict[str, float]:
    """One turn of a launched job; see `queue_job`."""
    roles = "".join(
        common.role(role, f"-m bench.queue_job {role} {mode} {place}", driver=True)
        for role in ("producer", "consumer")
    )
    if place == "apart":
        roles += common.role("owner", "bench.queue_job:Owner")
    found: dict[str, float] = common.run_job(roles)
    return found


def argument() -> dict[str, float]:
    return {LARGE: tensor.job(1)[WARM]}


def main() -> int:
    options = common.arguments(__doc__ or "", turns=5, quick=2)
    sides = [Side(STREAM, functools.partial(raw, "stream")), Side(MP, functools.partial(raw, "mp"))]
    goals = []
    if not options.without_ours:
        sides += [
            Side(ARGUMENT, argument),
            Side(BLOCKING, functools.partial(job, "blocking")),
            Side(ASYNC, functools.partial(job, "async")),
            Side(AHEAD, functools.partial(job, "ahead")),
            Side(APART, functools.partial(job, "async", "apart")),
        ]
    for side in (BLOCKING, ASYNC, AHEAD):
        goals += [
            Goal(ONE, side, STREAM, at_least=True, absolute=20_000),
            Goal(BATCH, side, STREAM, at_least=True, absolute=300_000),
            Goal(LARGE, side, ARGUMENT, 0.7, at_least=True),
        ]
        goals += [Goal(WAKE_P50, side, absolute=500)] if side != AHEAD else []
    figures = common.take_turns("queue: one producer, one consumer", sides, options.turns, goals)
    return common.report([figures], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
