"""Checkpoints and what happens to processes and disks: SIGKILL anywhere, a full disk, two writers at once.

The programs below run in processes of their own. Every checkpoint's content follows from its step, so that
whoever reads one knows whether it is whole.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.support.needs import need

ROOT = Path(__file__).resolve().parents[2]

COMMON = """
import os, random, signal, sys, time
from runtime import CheckpointCorrupt, CheckpointError, CheckpointManager

path = sys.argv[1]


def content(step, writer=0):
    return (b"%d:%d;" % (step, writer)) * (1 + step * 7919 % 20_000)


def check_all(manager, writers=1):
    found = manager.list_checkpoints_sync()
    for step in found:
        data = manager.load_sync(step)
        assert data in [content(step, w) for w in range(writers)], (step, data[:50], len(data))
        assert manager.verify_sync(step)
    return found
"""


def run_program(
    body: str, *arguments: object, prefix: tuple[str, ...] = (), timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    code = COMMON + textwrap.dedent(body)
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("kills", "compression"),
    [(100, "none"), *(pytest.param(200, how, marks=pytest.mark.long) for how in ("none", "gzip"))],
)
def test_of_many_kills_none_leaves_a_torn_checkpoint_or_loses_a_durable_one(
    tmp_path: Path, kills: int, compression: str
) -> None:
    done = run_program(
        """
        chance = random.Random(1)
        durable, seen, killed_in_write = -1, 0, 0
        os.mkdir(path)
        check_all(CheckpointManager(path))  # imports all that a child will need
        for kill in range(int(sys.argv[3])):
            told, tell = os.pipe()
            child = os.fork()
            if child == 0:
                manager = CheckpointManager(path, keep_last_n=3, compression=sys.argv[2])
                step = durable + 1
                while True:
                    manager.save_sync(content(step), step)
                    manager.wait_sync()
                    os.write(tell, b"%d\\n" % step)
                    step += 1
            os.close(tell)
            time.sleep(chance.random() * 0.1)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            with os.fdopen(told) as lines:
                durable = max([durable, *map(int, lines.read().split())])
            killed_in_write += any(name.endswith(".tmp") for name in os.listdir(path))
            manager = CheckpointManager(path)
            found = check_all(manager)
            if durable >= 0:
                assert durable in found, (durable, found)
                assert manager.load_latest_sync() == content(found[-1])
            seen = max(seen, len(found))
        manager.save_sync(b"last", 10**6)
        manager.wait_sync()
        assert not [name for name in os.listdir(path) if name.startswith(".")]
        print(durable, seen, killed_in_write)
        """,
        tmp_path / "checkpoints",
        compression,
        kills,
    )
    assert done.returncode == 0, done.stderr
    durable, seen, killed_in_write = map(int, done.stdout.split())
    assert durable > kills // 4
    assert seen >= 3
    assert killed_in_write > kills // 40, "the kills never met a write: the test shows nothing"


SAVE_TWO = """
manager = CheckpointManager(path, keep_last_n=2)
for step in (2, 3):
    manager.save_sync(content(step), step)
try:
    manager.wait_sync()
except CheckpointError as error:
    sys.exit(f"{error.step}: {error}")
"""


def _strace(*options: str) -> tuple[str, ...]:
    return ("strace", "-f", "-qq", "-o", "/dev/null", *options)


@pytest.fixture
def strace() -> None:
    need(shutil.which("strace"), "strace")
    probe = subprocess.run(
        [*_strace("-e", "trace=none"), "true"], capture_output=True, text=True, check=False
    )
    need(probe.returncode == 0, f"to be allowed to trace ({probe.stderr.strip()})")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "rename", "flock"])
def test_killed_at_each_of_its_system_calls_a_writer_leaves_only_whole_checkpoints(
    tmp_path: Path, strace: None, call: str
) -> None:
    first, codes = tmp_path / "first", []
    assert run_program("CheckpointManager(path).save_sync(content(1), 1)", first).returncode == 0
    for number in range(1, 6):
        path = shutil.copytree(first, tmp_path / str(number))
        inject = _strace("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}")
        codes.append(run_program(SAVE_TWO, path, prefix=inject).returncode)
    look = "for n in range(1, 6): print(*check_all(CheckpointManager(f'{path}/{n}')))"
    checked = run_program(look, tmp_path)
    assert checked.returncode == 0, checked.stderr
    for code, found in zip(codes, checked.stdout.splitlines(), strict=True):
        assert found in (("2 3",) if code == 0 else ("1", "1 2", "2 3"))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("pwrite64", "ENOSPC", "No space left on device"),
        ("fsync", "EIO", "Input/output error"),
        ("rename", "EROFS", "Read-only file system"),
    ],
)
def test_a_system_call_that_fails_is_told_with_step_and_path(
    tmp_path: Path, strace: None, call: str, error: str, words: str
) -> None:
    assert run_program("CheckpointManager(path).save_sync(content(1), 1)", tmp_path).returncode == 0
    inject = _strace("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when=1")
    done = run_program(SAVE_TWO, tmp_path, prefix=inject)
    assert done.returncode == 1
    assert f"2: cannot save step 2 as {tmp_path}/checkpoint-2.ckpt: {words}" in done.stderr
    checked = run_program("print(*check_all(CheckpointManager(path)))", tmp_path)
    assert checked.stdout.split() == ["1", "3"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    need(mounted.returncode == 0, f"to be allowed to mount a small disk ({mounted.stderr.strip()})")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_costs_the_save_and_nothing_else(small_disk: Path) -> None:
    done = run_program(
        """
        manager = CheckpointManager(path, keep_last_n=3)
        manager.save_sync(content(1), 1)
        manager.wait_sync()
        manager.save_sync(b"x" * 2_000_000, 2)
        try:
            manager.wait_sync()
        except CheckpointError as error:
            print(error)
        assert check_all(manager) == [1]
        manager.save_sync(content(3), 3)
        manager.wait_sync()
        assert check_all(manager) == [1, 3]
        print(sorted(os.listdir(path)))
        """,
        small_disk,
    )
    assert done.returncode == 0, done.stderr
    assert f"cannot save step 2 as {small_disk}/checkpoint-2.ckpt: No space left" in done.stdout
    assert "checkpoint-2" not in done.stdout.splitlines()[-1]


def test_a_file_size_limit_costs_the_save_and_nothing_else(tmp_path: Path) -> None:
    done = run_program(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        manager = CheckpointManager(path)
        manager.save_sync(b"x" * 10_000_000, 2)
        manager.save_sync(content(3), 3)
        try:
            manager.wait_sync()
        except CheckpointError as error:
            print(error)
        print(check_all(manager), sorted(os.listdir(path)))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot save step 2 as" in done.stdout
    assert "File too large" in done.stdout
    assert "[3] ['checkpoint-3.ckpt', 'checkpoint-3.ckpt.sha256']" in done.stdout


def test_a_disk_that_may_not_be_written_to_is_named(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run_program(SAVE_TWO, small_disk)
    assert f"{small_disk}/checkpoint-2.ckpt: Read-only file system" in done.stderr


@pytest.mark.timeout(120)
def test_writers_in_several_processes_on_one_path_do_not_tear_each_other(tmp_path: Path) -> None:
    done = run_program(
        """
        WRITERS = 3
        children = []
        for writer in range(WRITERS):
            child = os.fork()
            if child == 0:
                manager = CheckpointManager(path, keep_last_n=None)
                for turn in range(12):
                    for step in range(4):
                        manager.save_sync(content(step, writer), step)
                manager.wait_sync()
                os._exit(0)
            children.append(child)
        reader = CheckpointManager(path)
        reads = 0
        while children:
            reads += len(check_all(reader, WRITERS))
            for child in list(children):
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    assert status == 0
                    children.remove(child)
        assert check_all(reader, WRITERS) == [0, 1, 2, 3]
        assert not [name for name in os.listdir(path) if name.startswith(".")]
        print(reads)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_a_process_that_ends_right_after_saving_still_writes_it(tmp_path: Path) -> None:
    done = run_program("CheckpointManager(path).save_sync(b'x' * 30_000_000, 1)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoint-1.ckpt").stat().st_size == 30_000_000


def test_a_manager_made_before_a_fork_works_in_the_child(tmp_path: Path) -> None:
    done = run_program(
        """
        manager = CheckpointManager(path)
        manager.save_sync(content(1), 1)
        manager.wait_sync()
        child = os.fork()
        manager.save_sync(content(2 if child else 3), 2 if child else 3)
        manager.wait_sync()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
        print(*check_all(manager))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "2", "3"]


def test_sha256sum_agrees(tmp_path: Path) -> None:
    need(shutil.which("sha256sum"), "sha256sum")
    run_program("CheckpointManager(path).save_sync(content(1), 1)", tmp_path)
    done = subprocess.run(
        ["sha256sum", "-c", "checkpoint-1.ckpt.sha256"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "checkpoint-1.ckpt: OK\n"
