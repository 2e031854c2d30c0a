"""One of four workers is killed: how long until all four are back behind a barrier.

The workers import torch, form a gloo group and all-reduce in a loop. `kill -9` hits rank 2; the clock stops
when all four workers of the next attempt have formed their group again and passed `dist.barrier()`.
Compared with torchrun `--max-restarts 3`. It runs with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: without that,
torchrun of torch 2.13 does not come back from such a death at all (the new ranks wait in the old store).
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path

from bench import common
from bench.common import Goal, Side

WORKERS, VICTIM = 4, 2

SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.barrier()
name = f"{os.environ['TORCHELASTIC_RESTART_COUNT']}.{dist.get_rank()}"
path = os.path.join(sys.argv[1], name)
with open(path + ".new", "w") as file:
    file.write(f"{time.monotonic()!r} {os.getpid()}")
os.rename(path + ".new", os.path.join(sys.argv[1], "up." + name))
x = torch.ones(1000)
while name.startswith("0."):
    dist.all_reduce(x)
    time.sleep(0.01)
dist.destroy_process_group()
"""


def launch_argv(cwd: Path) -> list[str]:
    options = ["--nproc-per-node", str(WORKERS), "--max-restarts", "3"]
    return [sys.executable, "-m", "runtime.launch", *options, "--log-dir", str(cwd / "logs")]


def torchrun_argv(cwd: Path) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(WORKERS), "--max-restarts", "3"]
    return [sys.executable, "-m", "torch.distributed.run", *options]


STARTERS = {"runtime": launch_argv, "torchrun": torchrun_argv}


def stamps(cwd: Path, attempt: int) -> dict[int, tuple[float, int]]:
    """When each rank of this attempt was behind its barrier, and its pid."""
    found = {}
    for path in cwd.glob(f"up.{attempt}.*"):
        at, pid = path.read_text().split()
        found[int(path.suffix[1:])] = (float(at), int(pid))
    return found


def measure(starter: str) -> dict[str, float]:
    """One turn: seconds from the kill until all workers are behind their new barrier."""
    with common.workplace() as cwd:
        script = cwd / "train.py"
        script.write_text(SCRIPT)
        argv = [*STARTERS[starter](cwd), str(script), str(cwd)]
        env = common.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        began = time.monotonic()
        with common.tree(argv, cwd=cwd, env=env) as process:
            common.wait_for(lambda: len(stamps(cwd, 0)) == WORKERS, process, cwd)
            first = max(at for at, _ in stamps(cwd, 0).values())
            time.sleep(0.7)
            killed = time.monotonic()
            os.kill(stamps(cwd, 0)[VICTIM][1], signal.SIGKILL)
            common.wait_for(
                lambda: len(stamps(cwd, 1)) == WORKERS or process.poll() == 0, process, cwd
            )
            common.finish(process, cwd, 60)
            back = stamps(cwd, 1)
    if len(back) != WORKERS:
        raise RuntimeError(f"{len(back)} of {WORKERS} workers came back")
    return {
        "back behind the barrier, s": max(at for at, _ in back.values()) - killed,
        "first start to the barrier, s": first - began,
    }


def main() -> int:
    options = common.arguments(__doc__ or "", turns=7, quick=2)
    names = [name for name in STARTERS if not (options.without_ours and name == "runtime")]
    sides = [Side(name, functools.partial(measure, name)) for name in names]
    goals = [Goal("back behind the barrier, s", "runtime", "torchrun", 0.35)]
    title = f"recovery: kill -9 of one of {WORKERS} workers with a gloo group"
    figures = common.take_turns(title, sides, options.turns, goals)
    return common.report([figures], as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
