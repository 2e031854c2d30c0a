"""How the end of somebody else's child is read."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cluster.adopted import how_it_ended
from runtime.launcher.spawn import Exit


def _ended(code: str) -> tuple[subprocess.Popen[bytes], int]:
    process = subprocess.Popen([sys.executable, "-S", "-c", code])
    pidfd = os.pidfd_open(process.pid)
    assert select.select([pidfd], [], [], 20)[0]
    return process, pidfd


@pytest.mark.parametrize(
    ("code", "exit"),
    [
        ("raise SystemExit(3)", Exit(3)),
        ("pass", Exit()),
        ("import os; os.kill(os.getpid(), 9)", Exit(signal=signal.SIGKILL)),
    ],
)
def test_the_end_is_known_before_and_after_the_parent_has_collected_it(
    code: str, exit: Exit
) -> None:
    process, pidfd = _ended(code)
    try:
        assert how_it_ended(process.pid, pidfd) == exit
        process.wait()
        major, minor = map(int, Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2])
        knows = (major, minor) >= (6, 15)
        assert how_it_ended(process.pid, pidfd) == (exit if knows else None)
    finally:
        process.wait()
        os.close(pidfd)


def test_a_process_that_runs_or_was_never_seen_has_not_ended_in_any_way() -> None:
    assert how_it_ended(os.getpid(), -1) is None
