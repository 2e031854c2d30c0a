"""From the command to the first line of user code, and to the full exit: 8 workers on this host.

Compared: `python -m runtime.launch`, torchrun with the same script, and eight plain `subprocess` Pythons
(the least that eight processes can cost). Twice: with a script that imports nothing, and with one whose
first line is `import torch`; there the "first line" is the one behind that import, since that is where a
script with torch can begin to do something.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from pathlib import Path

from bench import common
from bench.common import Goal, Side

WORKERS = 8

SCRIPT = """
import os, sys, time
with open(os.path.join(sys.argv[1], "first." + os.environ["RANK"]), "w") as file:
    file.write(repr(time.monotonic()))
"""


def launch_argv(cwd: Path) -> list[str]:
    options = ["--nproc-per-node", str(WORKERS), "--log-dir", str(cwd / "logs")]
    return [sys.executable, "-m", "runtime.launch", *options]


def torchrun_argv(cwd: Path) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(WORKERS)]
    return [sys.executable, "-m", "torch.distributed.run", *options]


def plain_argv(cwd: Path) -> list[str]:
    """A Python that starts eight Pythons and waits for them: one tree, as the other two are."""
    starter = cwd / "start_all.py"
    starter.write_text(
        "import os, subprocess, sys\n"
        "run = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=os.environ | {'RANK': str(i)})\n"
        f"       for i in range({WORKERS})]\n"
        "sys.exit(max(p.wait() for p in run))\n"
    )
    return [sys.executable, str(starter)]


STARTERS = {"runtime": launch_argv, "torchrun": torchrun_argv, "subprocess": plain_argv}


def measure(starter: str, with_torch: bool) -> dict[str, float]:
    """One turn: seconds from the command to the first line (of any, of all workers) and to the exit."""
    with common.workplace() as cwd:
        script = cwd / "train.py"
        script.write_text(("import torch\n" if with_torch else "") + SCRIPT)
        argv = [*STARTERS[starter](cwd), str(script), str(cwd)]
        began = time.monotonic()
        with common.tree(argv, cwd=cwd) as process:
            ended = common.finish(process, cwd, 120)
        stamps = [float(path.read_text()) for path in cwd.glob("first.*")]
    if len(stamps) != WORKERS:
        raise RuntimeError(f"{len(stamps)} of {WORKERS} workers ran")
    return {
        "first line, s": min(stamps) - began,
        "first line of all, s": max(stamps) - began,
        "exit, s": ended - began,
    }


def compare(with_torch: bool, turns: int, names: list[str]) -> common.Figures:
    sides = [Side(name, functools.partial(measure, name, with_torch)) for name in names]
    ratio, absolute = (0.4, None) if with_torch else (1.0, 1.0)
    metrics = ("first line, s", "first line of all, s", "exit, s")
    goals = [Goal(m, "runtime", "torchrun", ratio, absolute=absolute) for m in metrics]
    title = f"launch: {WORKERS} workers, {'with' if with_torch else 'without'} `import torch`"
    return common.take_turns(title, sides, turns, goals)


def warm_up() -> None:
    """Bring torch's files into memory, so that the first turn does not pay for the disk."""
    subprocess.run([sys.executable, "-c", "import torch.distributed.run"], check=True, timeout=120)


def main() -> int:
    options = common.arguments(__doc__ or "", turns=7, quick=2)
    names = [name for name in STARTERS if not (options.without_ours and name == "runtime")]
    warm_up()
    figures = [compare(with_torch, options.turns, names) for with_torch in (False, True)]
    return common.report(figures, as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
