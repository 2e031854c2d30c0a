"""What all measurements share: fair turns, fresh process trees, honest figures.

Two sides are never measured one after the other in blocks: they take turns, each turn in new processes, and
the side that begins changes from turn to turn, so that a machine that gets busier (or warmer) treats both
alike. Before a turn the machine is given a moment to become quiet; if it does not, the turn runs anyway and
is counted as disturbed. What is reported is the median with the least and the most beside it, and the ratio
of medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Side:
    """One of the things that are compared. `run` does one turn and returns its figures by name."""

    name: str
    run: Callable[[], Metrics]


@dataclass(frozen=True)
class Goal:
    """`metric` of `ours` is held against that of `theirs`: ratio at most (or at least) `ratio`.

    `absolute`: a bound on our own median. Where both are given, both must hold; without either the ratio
    is only shown. `plus` is added to what the ratio allows.
    """

    metric: str
    ours: str
    theirs: str = ""
    ratio: float | None = None
    at_least: bool = False
    absolute: float | None = None
    plus: float = 0.0

    def text(self) -> str:
        bounds = [] if self.ratio is None else [f"{self.ratio:g} × {self.theirs}{self._more()}"]
        bounds += [] if self.absolute is None else [f"{self.absolute:g}"]
        return ", ".join(f"{'≥' if self.at_least else '≤'} {bound}" for bound in bounds)

    def _more(self) -> str:
        return f" + {self.plus:g}" if self.plus else ""

    def holds(self, ours: float, theirs: float | None) -> bool | None:
        """Whether it is reached; None when nothing is asked or the other side has no figure."""
        if (self.ratio is not None and not theirs) or self.ratio is self.absolute is None:
            return None
        bounds = [] if self.ratio is None or theirs is None else [self.ratio * theirs + self.plus]
        bounds += [] if self.absolute is None else [self.absolute]
        return all(ours >= bound if self.at_least else ours <= bound for bound in bounds)


@dataclass
class Figures:
    """All turns of one comparison: by side, by metric."""

    title: str
    goals: Sequence[Goal] = ()
    turns: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    disturbed: int = 0
    load: list[float] = field(default_factory=list)

    def median(self, side: str, metric: str) -> float | None:
        values = self.turns.get(side, {}).get(metric)
        return statistics.median(values) if values else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row a side and metric, with the ratio and goal where it has one."""
        for side, metrics in self.turns.items():
            for metric, values in metrics.items():
                row: dict[str, Any] = {
                    "side": side,
                    "metric": metric,
                    "median": statistics.median(values),
                    "min": min(values),
                    "max": max(values),
                    "turns": len(values),
                }
                goals = [g for g in self.goals if (g.ours, g.metric) == (side, metric)]
                yield from (row | self._judge(goal, row["median"]) for goal in goals)
                if not goals:
                    yield row

    def _judge(self, goal: Goal, ours: float) -> dict[str, Any]:
        theirs = self.median(goal.theirs, goal.metric)
        found = {"goal": goal.text(), "reached": goal.holds(ours, theirs)}
        return found | ({"ratio": ours / theirs} if theirs else {})

    def as_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": list(self.rows()),
            "values": self.turns,
            "errors": self.errors,
            "disturbed_turns": self.disturbed,
            "load": self.load,
        }

    def table(self) -> str:
        """For people: a Markdown table."""
        lines = [
            f"### {self.title}",
            "",
            "| side | what | median | min | max | ratio | goal | |",
            "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        ]
        for row in self.rows():
            ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
            reached = {True: "reached", False: "**missed**", None: ""}[row.get("reached")]
            numbers = " | ".join(shown(row[key]) for key in ("median", "min", "max"))
            line = f"| {row['side']} | {row['metric']} | {numbers} | {ratio} "
            lines.append(line + f"| {row.get('goal', '')} | {reached} |")
        lines += [f"- {side} failed: {text}" for side, e in self.errors.items() for text in e]
        if self.disturbed:
            lines.append(
                f"- {self.disturbed} turns began while the machine was busy; "
                f"load before turns {min(self.load):.1f} to {max(self.load):.1f}"
            )
        return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def take_turns(
    title: str, sides: Sequence[Side], turns: int, goals: Sequence[Goal] = ()
) -> Figures:
    """Run every side `turns` times, alternately. A turn that fails is noted and does not end the others."""
    figures = Figures(title, goals)
    for turn in range(turns if sides else 0):
        shift = turn % len(sides)
        for side in [*sides[shift:], *sides[:shift]]:
            figures.disturbed += not wait_until_quiet()
            figures.load.append(os.getloadavg()[0])
            print(f"  {title}: turn {turn + 1}/{turns}, {side.name}", file=sys.stderr)
            try:
                found = side.run()
            except Exception as error:
                figures.errors.setdefault(side.name, []).append(f"{type(error).__name__}: {error}")
                continue
            for metric, value in found.items():
                figures.turns.setdefault(side.name, {}).setdefault(metric, []).append(value)
    order = [side.name for side in sides]
    figures.turns = {name: figures.turns[name] for name in order if name in figures.turns}
    return figures


def wait_until_quiet(limit_s: float = 10.0, busy: float = 0.15) -> bool:
    """Wait for half a second in which the processors were less than `busy` used, at most `limit_s`."""
    until = time.monotonic() + limit_s
    while True:
        if psutil.cpu_percent(interval=0.5) / 100 < busy:
            return True
        if time.monotonic() > until:
            return False


def environment(**extra: str) -> dict[str, str]:
    """What every side inherits: ours without settings of a runtime that may run around us."""
    foreign = ("RUNTIME_", "PET_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def run_job(
    roles: str, *, limit_s: float = 90, options: Sequence[str] = (), hosts: str = ""
) -> Any:
    """One turn of a launched job (see `role`): the figures that one of its workers wrote. `hosts`: see `job_tree`."""
    with workplace() as cwd, job_tree(roles, cwd, options, hosts) as job:
        finish(job, cwd, limit_s)
        return read_figures(cwd)


def job_tree(
    roles: str, cwd: Path, options: Sequence[str] = (), hosts: str = ""
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """The launcher's process of a job of `roles`, with all below it. `hosts`, as "name:slots,…": as many agents of this
    machine pose as hosts; what they and their workers say to each other goes by TCP and is encrypted."""
    (cwd / "job.toml").write_text(roles)
    program = "tests.integration.support.several" if hosts else "runtime.launch"
    argv = [sys.executable, "-m", program, "--log-dir", str(cwd / "logs"), *options]
    return tree([*argv, "--job", "job.toml"], cwd=cwd, env=environment(PRETENDED_HOSTS=hosts))


def role(name: str, entry: str, *, total: int = 1, driver: bool = False) -> str:
    """A simple role for `run_job`."""
    return (
        f"[roles.{name}]\nentry = {json.dumps(entry)}\nkind = 'simple'\ntotal = {total}\n"
        f"driver = {str(driver).lower()}\nrestart = {{ policy = 'never', max = 0 }}\n"
    )


def run_programs(
    module: str, servers: Sequence[str], caller: str, env: Mapping[str, str] | None = None
) -> Any:
    """One turn of bare processes, each `python -m module ARGUMENTS DIRECTORY`: the servers first, then,
    when all of them are up, the one that measures. All end by themselves. `env`: beside `environment`."""
    with workplace() as cwd, contextlib.ExitStack() as stack:

        def start(arguments: str) -> subprocess.Popen[bytes]:
            argv = [sys.executable, "-m", module, *arguments.split(), str(cwd)]
            return stack.enter_context(tree(argv, cwd=cwd, env=environment(**env or {})))

        running = [start(arguments) for arguments in servers]
        for server in running:
            wait_for((cwd / f"up-{server.pid}").exists, server, cwd)
        finish(start(caller), cwd, 90)
        for server in running:
            finish(server, cwd, 10)
        return read_figures(cwd)


def run_tcp_peers(kind: str) -> Any:
    """One turn of our endpoints as on two hosts (`tcp_peers`), with what the launcher sets for workers."""
    env = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return run_programs("bench.tcp_peers", [f"serve {kind}"], f"call {kind}", env)


def read_figures(cwd: Path) -> Any:
    """What a measured process has written by `timing.write_figures`."""
    return json.loads((cwd / "figures.json").read_text())


@contextlib.contextmanager
def tree(
    argv: Sequence[str], *, cwd: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own session, whose output goes to `cwd/output`; what is left of it is killed."""
    with open(cwd / "output", "ab") as output:
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env or environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    known: set[psutil.Process] = set()
    try:
        with contextlib.suppress(psutil.Error):
            known.add(psutil.Process(process.pid))
        yield process
    finally:
        with contextlib.suppress(psutil.Error):
            known.update(psutil.Process(process.pid).children(recursive=True))
        for one in known:
            with contextlib.suppress(psutil.Error):
                one.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def finish(process: subprocess.Popen[bytes], cwd: Path, timeout: float) -> float:
    """Wait for the process; the time of its end. Anything but exit 0 in time is an error with its output."""
    try:
        code = process.wait(timeout)
        ended = time.monotonic()
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"did not end in {timeout} s: {tail(cwd)}") from None
    if code != 0:
        raise RuntimeError(f"exit {code}: {tail(cwd)}")
    return ended


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], cwd: Path) -> None:
    """Wait (at most a minute) until `condition` holds, as long as the process lives."""
    until = time.monotonic() + 60
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"not there (exit {process.poll()}): {tail(cwd)}")
        time.sleep(0.002)


def tail(cwd: Path) -> str:
    text = (cwd / "output").read_text(errors="replace").strip()
    return " / ".join(text.splitlines()[-6:])


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """A fresh directory for one turn."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield Path(name)


def arguments(
    description: str, turns: int, quick: int, parts: Sequence[str] = ()
) -> argparse.Namespace:
    """The options that every measurement has. `.turns`: what `--turns` or `--quick` make of it; `.parts`:
    which of its `parts` to run, all where none is named."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=f"{quick} turns instead of {turns}")
    parser.add_argument("--turns", type=int, default=None, help="turns of every side")
    parser.add_argument("--scale", type=float, default=1.0, help="repeat so many times as often")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--without-ours", action="store_true", help="only the sides compared with")
    if parts:
        parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; default: all")
    options = parser.parse_args()
    if unknown := set(getattr(options, "parts", ())) - set(parts):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    options.parts = getattr(options, "parts", None) or list(parts)
    # A measurement that is asked to end leaves no processes: the turns clean up behind themselves.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.turns = options.turns or (quick if options.quick else turns)
    os.environ["BENCH_SCALE"] = str(options.scale)
    return options


def report(figures: Sequence[Figures], *, as_json: bool) -> int:
    """Print everything; 1 when a turn failed or a goal was missed."""
    if as_json:
        print(json.dumps([f.as_json() for f in figures], indent=1))
    else:
        print("\n\n".join(f.table() for f in figures))
    missed = any(row.get("reached") is False for f in figures for row in f.rows())
    return int(missed or any(f.errors for f in figures))
