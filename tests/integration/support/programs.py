"""Pieces of the programs that the jobs of these tests run."""

from __future__ import annotations

WRITE_PID = """
import os, pathlib
rank = int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
new = pathlib.Path(f"new.{rank}.{attempt}")
new.write_text(str(os.getpid()))
new.rename(f"pid.{rank}.{attempt}")
"""
"""Tells the test the pid: the file `pid.<rank>.<attempt>` appears whole."""

SLEEP_FOR_LONG = """
import time
time.sleep(600)
"""

SIMPLE_ROLE = """
[roles.{role}]
entry = "{entry}"
kind = "simple"
total = {total}
restart = {{ policy = "never", max = 0 }}
"""


def simple_role(entry: str, *, role: str = "worker", total: int = 1) -> str:
    """A job.toml of one simple role that is not restarted: no torch is imported for it."""
    return SIMPLE_ROLE.format(role=role, entry=entry, total=total)
