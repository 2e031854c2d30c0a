"""`--launcher slurm` outside an allocation: the same command line as a batch job, which then runs it inside."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import PurePath

from runtime.errors import ConfigError
from runtime.job_toml import job_from_toml
from runtime.launcher.options import LaunchOptions
from runtime.launcher.plan import Facts
from runtime.launcher.prepare import hosts_from_options


def submit(options: LaunchOptions, argv: Sequence[str], facts: Facts) -> str:
    """Submit the launcher's command line; gives what to tell the user.

    Raises `ConfigError`: there is no `sbatch`, or it does not take the job.
    """
    sbatch = _sbatch(options, facts)
    words = [sys.executable, "-m", "runtime.launch", *argv]
    if options.dry_run and "--dry-run" in words:
        words.remove("--dry-run")  # what would be submitted
    script = f"#!/bin/sh\nexec {shlex.join(words)}\n"
    if options.dry_run:
        return f"{shlex.join(sbatch)} <<'EOF'\n{script}EOF\n"
    try:
        done = subprocess.run(sbatch, input=script, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            f"--launcher slurm: this is no Slurm allocation, and no job can be submitted from here: "
            f"sbatch: {error.strerror}"
        ) from error
    if done.returncode:
        raise ConfigError("\n".join(done.stderr.splitlines()) or f"sbatch: exit {done.returncode}")
    number = done.stdout.strip().partition(";")[0]  # "12;cluster"
    return (
        f"runtime: submitted as Slurm job {number}: `squeue -j {number}` shows it, `scancel {number}` "
        f"ends it; its output is in slurm-{number}.out unless --slurm-args say otherwise\n"
    )


def _sbatch(options: LaunchOptions, facts: Facts) -> list[str]:
    """The command: what follows from the job, then what the user says."""
    named = options.hosts is not None or options.hostfile is not None
    hosts = [host.name for host in hosts_from_options(options, facts)] if named else []
    name, nodes, tasks = "runtime", options.nnodes, options.nproc_per_node
    if options.job_file is not None:
        job = job_from_toml(facts.files[options.job_file], options.job_file)
        name, tasks = job.name, job.device_per_node
        nodes = (job.node_num, job.node_num) if job.node_num else None
    elif options.entry is not None:
        target = options.entry.target
        name = PurePath(target).stem if options.entry.form == "script" else target
    low, high = nodes or (max(1, len(hosts)),) * 2
    argv = ["sbatch", "--parsable", f"--job-name={name}"]
    argv.append(f"--nodes={low}" if low == high else f"--nodes={low}-{high}")
    if isinstance(tasks, int):
        argv.append(f"--ntasks-per-node={tasks}")
    if options.total is not None:
        argv.append(f"--ntasks={options.total}")
    if hosts:
        argv.append(f"--nodelist={','.join(hosts)}")
    return [*argv, *options.slurm_args]
