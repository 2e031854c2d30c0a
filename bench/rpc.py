"""Calls between two processes: sequential p50 and p99, and calls a second with 1,000 outstanding.

Three parts: `same` host (a launched job; its processes find their quickest way to each other themselves)
against a raw asyncio `Protocol` on a unix socket; between `hosts` (ZeroMQ over TCP loopback) against
pyzmq that carries the same payload, and encrypted, as in a job, against not; and beside a `busy` trainer,
whose main thread runs pure Python. All our calls have deadlines.
"""

from __future__ import annotations

import functools
import sys

from bench import common
from bench.common import Figures, Goal, Side
from bench.timing import CALLS, P50, P99

RAW, ASYNC, PLAIN = "raw Protocol, unix socket", "await, async handler", "await, plain handler"
JOB_ASYNC, JOB_PLAIN = "result(), async handler", "result(), plain handler"
ZMQ, ZMQ_LOOP, TCP = "pyzmq, no loop", "pyzmq on add_reader", "await, ZeroMQ over TCP"
CURVE = "await, ZeroMQ over TCP with CURVE"
RAW_BUSY, BUSY = "raw Protocol, busy main thread", "await, busy main thread"


def raw(kind: str) -> dict[str, float]:
    """One turn of two bare processes."""
    caller = "call unix" if kind == "busy" else f"call {kind}"
    found: dict[str, float] = common.run_programs("bench.raw_rpc", [f"serve {kind}"], caller)
    return found


def tcp(kind: str) -> dict[str, float]:
    """One turn of two endpoints without a job."""
    found: dict[str, float] = common.run_tcp_peers(kind)
    return found


def job(caller: str, server: str = "Server") -> dict[str, float]:
    """One turn of a launched job. `caller`: the entry of the role that calls."""
    roles = common.role("server", f"bench.rpc_job:{server}")
    found: dict[str, float] = common.run_job(common.role("driver", caller, driver=True) + roles)
    return found


def blocking(method: str) -> dict[str, float]:
    """One turn of a plain script's calls."""
    roles = common.role("driver", "bench.rpc_job:block", driver=True)
    roles += f"env = {{ BENCH_METHOD = '{method}' }}\n"
    found: dict[str, float] = common.run_job(roles + common.role("server", "bench.rpc_job:Server"))
    return found


def same(turns: int, ours: bool) -> Figures:
    sides = [Side(RAW, functools.partial(raw, "unix"))]
    if ours:
        sides += [
            Side(ASYNC, functools.partial(job, "-m bench.rpc_job echo")),
            Side(PLAIN, functools.partial(job, "-m bench.rpc_job plain_echo")),
            Side(JOB_ASYNC, functools.partial(blocking, "echo")),
            Side(JOB_PLAIN, functools.partial(blocking, "plain_echo")),
        ]
    goals = [
        Goal(P50, ASYNC, RAW, 2.5),
        Goal(CALLS, ASYNC, at_least=True, absolute=60_000),
    ]
    return common.take_turns("rpc, same host, 64 bytes there and back", sides, turns, goals)


def hosts(turns: int, ours: bool) -> Figures:
    sides = [
        Side(ZMQ, functools.partial(raw, "zmq")),
        Side(ZMQ_LOOP, functools.partial(raw, "zmq-loop")),
    ]
    if ours:
        sides += [
            Side(TCP, functools.partial(tcp, "small")),
            Side(CURVE, functools.partial(tcp, "small-curve")),
        ]
    goals = [
        Goal(P50, TCP, ZMQ_LOOP, 1.5),
        Goal(P50, TCP, ZMQ),
        Goal(P50, CURVE, TCP),
        Goal(CALLS, CURVE, TCP, 0.8, at_least=True),
        Goal(CALLS, TCP, ZMQ, 0.5, at_least=True, absolute=40_000),
    ]
    return common.take_turns("rpc, between hosts (TCP loopback)", sides, turns, goals)


def busy(turns: int, ours: bool) -> Figures:
    sides = [Side(RAW_BUSY, functools.partial(raw, "busy"))]
    if ours:
        sides += [Side(BUSY, functools.partial(job, "-m bench.rpc_job echo", "BusyServer"))]
    goals = [Goal(P99, BUSY, absolute=3000)]
    return common.take_turns("rpc, beside a busy main thread", sides, turns, goals)


PARTS = {"same": same, "hosts": hosts, "busy": busy}


def main() -> int:
    options = common.arguments(__doc__ or "", turns=7, quick=2, parts=list(PARTS))
    found = [PARTS[part](options.turns, not options.without_ours) for part in options.parts]
    return common.report(found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
