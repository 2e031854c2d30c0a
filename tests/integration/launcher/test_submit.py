"""What a submission asks Slurm for, and what is said where there is none. (With a real one: test_slurm.py.)"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest

from runtime.errors import ConfigError
from runtime.launcher.options import parse_options
from runtime.launcher.plan import Facts
from runtime.launcher.submit import submit

JOB = "name = 'tune'\nnode_num = 2\ndevice_per_node = 4\n[roles.r]\nentry = 'm:f'\n"


def submitted(line: str, **facts: Any) -> list[str]:
    """What `--dry-run` of a submission prints, line by line."""
    argv = shlex.split(line)
    told = submit(parse_options(argv, {}), argv, Facts("job", **facts))
    return told.splitlines()


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("train.py", "--job-name=train --nodes=1"),
        ("--nnodes 2:4 --nproc-per-node 8 train.py", "--job-name=train --nodes=2-4 --ntasks-per-node=8"),
        ("-n 16 -m pkg.train", "--job-name=pkg.train --nodes=1 --ntasks=16"),
        ("--hosts a:2,b:2 train.py", "--job-name=train --nodes=2 --nodelist=a,b"),
        ("--slurm-args '-p gpu -t 60' train.py", "--job-name=train --nodes=1 -p gpu -t 60"),
        ("--job job.toml", "--job-name=tune --nodes=2 --ntasks-per-node=4"),
    ],
)  # fmt: skip
def test_a_submission_asks_for_what_the_job_needs(line: str, asked: str) -> None:
    line = f"--launcher slurm {line}"
    first, head, command, end = submitted(f"--dry-run {line}", files={"job.toml": JOB})
    assert first == f"sbatch --parsable {asked} <<'EOF'"
    assert (head, end) == ("#!/bin/sh", "EOF")
    # Inside, the same words mean the allocation's nodes.
    assert (
        command
        == f"exec {shlex.join([sys.executable, '-m', 'runtime.launch', *shlex.split(line)])}"
    )


def test_who_submits_where_slurm_is_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no job can be submitted from here: sbatch: No such"):
        submitted("--launcher slurm train.py")
