"""From the command to the first line of user code on three other hosts, with two workers on each.

Compared with `ssh` to the same three hosts in parallel, each running `python -c pass`: that much anything costs
that goes by ssh. Both begin on a fourth host of the project's testbed (`shared/testbed`), without which nothing
is measured.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import common
from bench.common import Goal, Side
from tests.integration.support.hosts import Hosts, find_testbed

HOSTS = ("host1", "host2", "host3")
FROM = "host4"
WORKERS = 6

SCRIPT = """
import os, sys, time
with open(os.path.join(sys.argv[1], "first." + os.environ["RANK"]), "w") as file:
    file.write(repr(time.monotonic()))
"""
ALL_SSH = """
import subprocess, sys
running = [subprocess.Popen(["ssh", "-T", host, sys.executable, "-c", "pass"]) for host in sys.argv[1:]]
sys.exit(max(process.wait() for process in running))
"""
NOTED = """
import os, sys, time
with open(sys.argv[1], "w") as file:
    file.write(repr(time.monotonic()))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
"""Notes when the command begins and becomes it: the way onto the host is not measured."""


def ours(cwd: Path) -> list[str]:
    script = cwd / "train.py"
    script.write_text(SCRIPT)
    hosts = ",".join(f"{host}:{WORKERS // len(HOSTS)}" for host in HOSTS)
    options = ["--hosts", hosts, "--log-dir", str(cwd / "logs")]
    return ["-m", "runtime.launch", *options, str(script), str(cwd)]


def plain_ssh(cwd: Path) -> list[str]:
    return ["-c", ALL_SSH, *HOSTS]


def measure(hosts: Hosts, argv: Sequence[str], cwd: Path) -> dict[str, float]:
    """One turn: seconds to the first line (of any, of all workers) and to the exit."""
    for old in cwd.glob("first.*"):
        old.unlink()
    hosts.python(FROM, "-c", NOTED, cwd / "began", *argv, cwd=cwd, timeout=60)
    ended = time.monotonic()
    began = float((cwd / "began").read_text())
    stamps = [float(path.read_text()) for path in cwd.glob("first.*")]
    if stamps and len(stamps) != WORKERS:
        raise RuntimeError(f"{len(stamps)} of {WORKERS} workers ran")
    return {
        "first line, s": min(stamps, default=ended) - began,
        "first line of all, s": max(stamps, default=ended) - began,
        "exit, s": ended - began,
    }


def main() -> int:
    options = common.arguments(__doc__ or "", turns=7, quick=2)
    command = find_testbed()
    if command is None:
        print("not measured: the testbed (shared/testbed beside the project) is not here")
        return 0
    with contextlib.ExitStack() as stack:
        cwd = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        hosts = Hosts(command, [common.ROOT, cwd])
        stack.callback(hosts.down)
        hosts.up()
        turns = {} if options.without_ours else {"runtime": ours}
        sides = [
            Side(name, functools.partial(measure, hosts, argv(cwd), cwd))
            for name, argv in {**turns, "ssh": plain_ssh}.items()
        ]
        goals = [
            Goal(metric, "runtime", "ssh", 1.0, plus=1.5)
            for metric in ("first line, s", "first line of all, s")
        ]
        title = "launch: 3 hosts × 2 workers by ssh, without `import torch`"
        return common.report(
            [common.take_turns(title, sides, options.turns, goals)], as_json=options.json
        )


if __name__ == "__main__":
    sys.exit(main())
