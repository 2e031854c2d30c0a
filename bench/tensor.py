"""A large array as the argument of a call: 1, 64 and 512 MiB, the call and its answer.

Two parts: `same` host (a launched job) against memcpy of the same bytes; between `hosts` (ZeroMQ over TCP
loopback) against `sendall` and `recv_into`. "First use" is the first call with such an array in fresh
processes; it also makes the link, but for the side that has made one call without an array before. "Warm" is a stream
of calls, up to 64 MiB but no more than eight of them under way, which is what copies of the same bytes can be held
against; "one by one" has the way there and back in each figure. The callee gets an array that it may read and write,
and does nothing with it; in a second figure it reads every byte. That nobody sees what a callee writes into its array
is looked at in each turn.
"""

from __future__ import annotations

import functools
import sys

from bench import common
from bench.common import Figures, Goal, Side
from bench.raw_bulk import FIRST, TOUCH, WARM

SIZES = (1, 64, 512)
MEMCPY, JOB, LINKED = "memcpy", "await, same host", "await, link is up"
KEPT, FRESH, TCP = "sendall, kept buffer", "sendall, new buffers", "await, ZeroMQ over TCP"
CURVE = "await, ZeroMQ over TCP with CURVE"


def raw(kind: str) -> dict[str, float]:
    servers = [] if kind.startswith("memcpy") else [f"serve {kind}"]
    found: dict[str, float] = common.run_programs("bench.raw_bulk", servers, f"call {kind}")
    return found


def tcp(kind: str) -> dict[str, float]:
    found: dict[str, float] = common.run_tcp_peers(kind)
    return found


def job(mib: int, what: str = "all") -> dict[str, float]:
    """One turn of a launched job."""
    caller = common.role("driver", f"-m bench.tensor_job {mib} {what}", driver=True)
    found: dict[str, float] = common.run_job(
        caller + common.role("sink", "bench.tensor_job:Sink", total=2)
    )
    return found


def same(mib: int, turns: int, ours: bool) -> Figures:
    sides = [Side(MEMCPY, functools.partial(raw, f"memcpy-{mib}"))]
    if ours:
        sides += [Side(JOB, functools.partial(job, mib))]
        sides += [Side(LINKED, functools.partial(job, mib, "first"))]
    goals = [
        Goal(WARM, JOB, MEMCPY, 0.8, at_least=True),
        *(Goal(FIRST, side, MEMCPY, 0.5, at_least=True) for side in (JOB, LINKED)),
    ]
    return common.take_turns(f"argument of {mib} MiB, same host", sides, turns, goals)


def hosts(mib: int, turns: int, ours: bool) -> Figures:
    sides = [
        Side(KEPT, functools.partial(raw, f"tcp-{mib}")),
        Side(FRESH, functools.partial(raw, f"fresh-{mib}")),
    ]
    if ours:
        sides += [
            Side(TCP, functools.partial(tcp, f"{mib}")),
            Side(CURVE, functools.partial(tcp, f"{mib}-curve")),
        ]
    goals = [Goal(what, TCP, FRESH, 0.8, at_least=True) for what in (WARM, TOUCH)]
    goals += [Goal(WARM, CURVE, TCP)]
    return common.take_turns(f"argument of {mib} MiB, TCP loopback", sides, turns, goals)


PARTS = {"same": same, "hosts": hosts}


def main() -> int:
    options = common.arguments(__doc__ or "", turns=5, quick=2, parts=list(PARTS))
    found = [
        PARTS[part](mib, options.turns, not options.without_ours)
        for part in options.parts
        for mib in SIZES
    ]
    return common.report(found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
