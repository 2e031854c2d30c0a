"""Calling every member of a role and gathering the answers, and sending weights to a role.

Three parts: `gather`, 8 and 32 members, 64 bytes there and back, against a raw asyncio `Protocol` that asks
as many processes over unix sockets; `broadcast` of 64 MiB to 8 members against one memcpy of the same
bytes, with the number of copies of the payload that this made; and `hosts`, the same to 4 members of another host (as on
two hosts: TCP over the loopback, CURVE, an arena each), against a broadcast that sends the bytes to each of them, and
against `sendall` of the bytes to one raw socket.
"""

from __future__ import annotations

import functools
import sys

from bench import common, tensor
from bench.common import Figures, Goal, Side
from bench.raw_bulk import WARM
from bench.timing import COPIES, P50

RAW, ASYNC, PLAIN = "raw Protocol, fan-out", "await", "result()"
MEMCPY, BROADCAST = "memcpy", "broadcast to 8"
SENDALL, DIRECT, HELD = "sendall, once", "to each of 4 directly", "to one of 4 for all"


def raw(members: int) -> dict[str, float]:
    found: dict[str, float] = common.run_programs(
        "bench.raw_rpc", ["serve unix"] * members, "call unix"
    )
    return found


def job(caller: str, members: int, server: str = "rpc_job:Server") -> dict[str, float]:
    """One turn of a launched job. `caller`: the entry of the role that calls."""
    servers = common.role("server", f"bench.{server}", total=members)
    found: dict[str, float] = common.run_job(common.role("driver", caller, driver=True) + servers)
    return found


def gather(turns: int, ours: bool) -> list[Figures]:
    found = []
    for members, limit in ((8, 1000), (32, 4000)):
        sides = [Side(RAW, functools.partial(raw, members))]
        if ours:
            script, entry = "-m bench.rpc_job echo all", "bench.rpc_job:block_all"
            sides.append(Side(ASYNC, functools.partial(job, script, members)))
            sides.append(Side(PLAIN, functools.partial(job, entry, members)))
        goals = [Goal(P50, side, RAW, absolute=limit) for side in (ASYNC, PLAIN)]
        title = f"group: {members} members called and gathered"
        found.append(common.take_turns(title, sides, turns, goals))
    return found


def memcpy() -> dict[str, float]:
    found: dict[str, float] = common.run_programs("bench.raw_bulk", [], "call memcpy-64")
    return {WARM: found[WARM], COPIES: 1.0}


def broadcast(turns: int, ours: bool) -> list[Figures]:
    sides = [Side(MEMCPY, memcpy)]
    if ours:
        caller = "-m bench.group_job"
        sides += [Side(BROADCAST, functools.partial(job, caller, 8, "group_job:Learner"))]
    goals = [Goal(COPIES, BROADCAST, absolute=1.1), Goal(WARM, BROADCAST, MEMCPY)]
    return [common.take_turns("group: broadcast of 64 MiB", sides, turns, goals)]


def sendall() -> dict[str, float]:
    return {WARM: tensor.raw("fresh-64")[WARM], COPIES: 1.0}


def remote(way: str) -> dict[str, float]:
    """One turn of a job on two hosts. `way`: held or direct."""
    driver = common.role("driver", f"-m bench.group_job {way}", driver=True)
    servers = common.role("server", "bench.group_job:Learner", total=4)
    options = ("--arena", "1GiB")
    found: dict[str, float] = common.run_job(driver + servers, options=options, hosts="a:1,b:4")
    return found


def hosts(turns: int, ours: bool) -> list[Figures]:
    sides = [Side(SENDALL, sendall)]
    if ours:
        sides += [Side(DIRECT, functools.partial(remote, "direct"))]
        sides += [Side(HELD, functools.partial(remote, "held"))]
    goals = [
        Goal(COPIES, HELD, absolute=1.1),
        Goal(WARM, HELD, DIRECT, 1.0, at_least=True),
        Goal(WARM, DIRECT, SENDALL),
    ]
    return [common.take_turns("group: broadcast of 64 MiB to another host", sides, turns, goals)]


PARTS = {"gather": gather, "broadcast": broadcast, "hosts": hosts}


def main() -> int:
    options = common.arguments(__doc__ or "", turns=5, quick=2, parts=list(PARTS))
    ours = not options.without_ours
    found = [figures for part in options.parts for figures in PARTS[part](options.turns, ours)]
    return common.report(found, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
