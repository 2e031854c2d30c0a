"""The guard of `tests/conftest.py` itself: each thing that a test can leave behind fails that test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.integration.support.job import ROOT

LEAKS = """
    import asyncio, os, socket, subprocess, threading, time
    import pytest

    kept = []

    async def test_clean():
        await asyncio.to_thread(time.sleep, 0.01)

    async def test_task():
        kept.append(asyncio.get_running_loop().create_task(asyncio.sleep(100)))

    def test_thread():
        kept.append(threading.Thread(target=time.sleep, args=(1,)))
        kept[-1].start()

    def test_socket():
        kept.append(socket.socket())

    def test_child():
        kept.append(subprocess.Popen(["sleep", "1"]))

    def test_directory():
        os.mkdir(os.environ["XDG_RUNTIME_DIR"] + "/left")

    def test_memory():
        open("/dev/shm/left-by-test-guard", "w").close()

    async def test_blocking():
        # Compiled as a file of the package: blocking is looked for in the package's code only.
        exec(compile("time.sleep(0.01)", "PACKAGE/blocks.py", "exec"))
    """


def test_the_guard_fails_every_test_that_leaves_something(
    write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    leaks = write("test_leaks.py", LEAKS.replace("PACKAGE", str(ROOT / "runtime")))
    settings = ["-p", "tests.conftest", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto"]
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rA", *settings, str(leaks)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RUNTIME_TEST_GRACE_S": "0.1"},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    finally:
        Path("/dev/shm/left-by-test-guard").unlink(missing_ok=True)
    text = run.stdout
    errors = {line.split("::")[1].split()[0] for line in text.splitlines() if line[:5] == "ERROR"}
    failed = {line.split("::")[1].split()[0] for line in text.splitlines() if line[:6] == "FAILED"}
    leaking = {"task", "thread", "socket", "child", "directory", "memory"}
    assert errors == {f"test_{what}" for what in leaking}, text
    assert failed == {"test_blocking"}, text
    assert "Blocking call to time.sleep" in text
