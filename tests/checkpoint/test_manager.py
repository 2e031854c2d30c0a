"""The public manager: what it promises, and what it says when it cannot keep it."""

from __future__ import annotations

import array
import asyncio
import errno
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.checkpoint.files import Files
from runtime.checkpoint.manager import CheckpointManager
from runtime.errors import CheckpointCorrupt, CheckpointError, ConfigError, MisuseError, Timeout
from runtime.peer import context
from tests.checkpoint.faults import FailingFiles, RecordingFiles

Make = Callable[..., CheckpointManager]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(files=…, **options)`: a manager on the test's directory."""

    def make(files: Files | None = None, **options: Any) -> CheckpointManager:
        kind = CheckpointManager
        if files is not None:
            kind = type("OnThatDisk", (CheckpointManager,), {"_files": files})
        return kind(tmp_path, **options)

    return make


@pytest.fixture
def manager(make: Make) -> CheckpointManager:
    return make()


class GatedFiles(RecordingFiles):
    """A disk that writes nothing before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self.open.wait(20)
        return super().pwrite(fd, data, offset)


# Saving and loading


async def test_what_was_saved_loads(manager: CheckpointManager, tmp_path: Path) -> None:
    await manager.save_async(b"weights", 3)
    await manager.wait()
    assert (tmp_path / "checkpoint-3.ckpt").read_bytes() == b"weights"
    assert await manager.load(3) == b"weights"
    assert await manager.list_checkpoints() == [3]
    assert await manager.verify(3) is True


def test_plain_code_has_a_twin_of_everything(manager: CheckpointManager) -> None:
    for step in (0, 1, 2):
        manager.save_sync(b"%d" % step, step)
    manager.wait_sync()
    assert manager.list_checkpoints_sync() == [0, 1, 2]
    assert manager.load_sync(0) == b"0"
    assert manager.load_sync() == manager.load_latest_sync() == b"2"
    assert manager.verify_sync(1)
    manager.delete_sync(2)
    assert manager.load_latest_sync() == b"1"


async def test_a_load_sees_the_saves_before_it_without_waiting(manager: CheckpointManager) -> None:
    await manager.save_async(b"x" * 1_000_000, 3)
    assert await manager.load(3) == b"x" * 1_000_000


@pytest.mark.parametrize("kind", [bytearray, lambda data: memoryview(bytearray(data))])
@pytest.mark.may_block
async def test_bytes_may_change_once_save_has_returned(
    make: Make, kind: Callable[[bytes], bytearray]
) -> None:
    disk = GatedFiles()
    manager = make(disk)
    data = kind(b"before")
    await manager.save_async(data, 1)
    data[:] = b"after!"
    disk.open.set()
    assert await manager.load(1) == b"before"


async def test_a_view_of_numbers_and_of_every_second_byte_are_bytes_all_the_same(
    manager: CheckpointManager,
) -> None:
    numbers = array.array("d", [1.0, 2.0])
    await manager.save_async(memoryview(numbers), 1)
    await manager.save_async(memoryview(b"abcd")[::2], 2)
    await manager.save_async(b"", 3)
    assert await manager.load(1) == numbers.tobytes()
    assert await manager.load(2) == b"ac"
    assert await manager.load(3) == b""


async def test_the_latest_is_none_and_step_zero_is_step_zero(manager: CheckpointManager) -> None:
    await manager.save_async(b"zero", 0)
    await manager.save_async(b"nine", 9)
    assert await manager.load(None) == b"nine"
    assert await manager.load(0) == b"zero"


async def test_a_step_may_be_any_integer_type(manager: CheckpointManager) -> None:
    await manager.save_async(b"x", np.int64(5))  # type: ignore[arg-type]
    assert await manager.load(5) == b"x"


async def test_without_a_checkpoint_the_error_says_so(manager: CheckpointManager) -> None:
    for call in (manager.load(), manager.load_latest()):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint in"):
            await call
    await manager.save_async(b"x", 4)
    with pytest.raises(FileNotFoundError, match="the newest is step 4"):
        await manager.load(0)


@pytest.mark.may_block
async def test_series_on_one_path_do_not_see_each_other(make: Make, tmp_path: Path) -> None:
    policy, value = make(name="policy"), make(name="value")
    await policy.save_async(b"p", 1)
    await value.save_async(b"v", 2)
    assert await policy.list_checkpoints() == [1]
    assert await value.list_checkpoints() == [2]
    assert (tmp_path / "policy" / "checkpoint-1.ckpt").read_bytes() == b"p"


@pytest.mark.may_block
async def test_compressed_checkpoints_are_smaller_and_load_without_being_told(
    make: Make, manager: CheckpointManager, tmp_path: Path
) -> None:
    squeezing = make(compression="gzip")
    await squeezing.save_async(bytes(100_000), 1)
    await squeezing.wait()
    assert (tmp_path / "checkpoint-1.ckpt.gz").stat().st_size < 2000
    assert squeezing.statistics().stored_bytes < 2000
    assert await manager.load(1) == bytes(100_000)


# The newest good one


async def test_a_damaged_newest_is_passed_over_and_logged(
    manager: CheckpointManager, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        await manager.save_async(b"%d" % step, step)
    await manager.wait()
    (tmp_path / "checkpoint-3.ckpt").write_bytes(b"?")
    with caplog.at_level(logging.WARNING):
        assert await manager.load_latest() == b"2"
        assert await manager.load() == b"2"
    assert "step 3 is passed over" in caplog.text
    with pytest.raises(CheckpointCorrupt):
        await manager.load(3)


async def test_when_all_are_damaged_the_newest_ones_error_is_raised(
    manager: CheckpointManager, tmp_path: Path
) -> None:
    for step in (1, 2):
        await manager.save_async(b"%d" % step, step)
    await manager.wait()
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}.ckpt").write_bytes(b"?")
    with pytest.raises(CheckpointCorrupt) as found:
        await manager.load_latest()
    assert found.value.step == 2


# In the background


@pytest.mark.may_block
async def test_a_failure_in_the_background_is_raised_by_wait_once(
    make: Make, manager: CheckpointManager, caplog: pytest.LogCaptureFixture
) -> None:
    await manager.save_async(b"good", 1)
    await manager.wait()
    full = make(FailingFiles("pwrite", errno.ENOSPC, times=2))
    for step in (2, 3, 4):
        await full.save_async(b"data", step)
    with pytest.raises(CheckpointError, match=r"step 2 as .*No space left on device") as raised:
        await full.wait()
    assert raised.value.step == 2
    assert [note.startswith("and then: cannot save step 3") for note in raised.value.__notes__] == [
        True
    ]
    await full.wait()
    assert await full.list_checkpoints() == [1, 4]
    assert full.statistics().failed == 2
    assert "checkpoint of step 2 failed" in caplog.text


@pytest.mark.may_block
async def test_saves_are_written_in_the_order_of_the_calls(make: Make) -> None:
    disk = GatedFiles()
    disk.open.set()
    manager = make(disk, keep_last_n=None)
    for step in (5, 3, 9, 1):
        await manager.save_async(b"x", step)
    await manager.wait()
    renamed = [name for operation, name in disk.done if operation == "rename"]
    assert [name for name in renamed if name.endswith(".ckpt")] == [
        f"checkpoint-{step}.ckpt" for step in (5, 3, 9, 1)
    ]


@pytest.mark.may_block
async def test_a_third_save_waits_until_the_first_is_written(make: Make) -> None:
    disk = GatedFiles()
    manager = make(disk)
    for step in (1, 2):
        await manager.save_async(b"x", step)
    assert manager.statistics().in_flight == 2
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await manager.save_async(b"x", 3)
    disk.open.set()
    await manager.save_async(b"x", 4)
    assert await manager.list_checkpoints() == [1, 2, 4]  # the cancelled one was never taken


@pytest.mark.may_block
async def test_wait_says_what_it_waited_for_when_time_is_up(make: Make, tmp_path: Path) -> None:
    disk = GatedFiles()
    manager = make(disk)
    await manager.save_async(b"x", 7)
    with pytest.raises(Timeout, match=r"after 0\.05 s, step 7 is still being written to") as raised:
        await manager.wait(timeout=0.05)
    assert raised.value.waited_s == 0.05
    disk.open.set()
    await manager.wait()


def test_wait_in_plain_code_has_its_limit_too(make: Make) -> None:
    disk = GatedFiles()
    manager = make(disk)
    manager.save_sync(b"x", 7)
    with pytest.raises(Timeout, match="step 7"):
        manager.wait_sync(timeout=0.05)
    disk.open.set()
    manager.wait_sync()


@pytest.mark.may_block
async def test_a_load_that_is_given_up_leaves_the_manager_working(make: Make) -> None:
    disk = GatedFiles()
    manager = make(disk)
    await manager.save_async(b"x", 1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await manager.load(1)
    disk.open.set()
    assert await manager.load(1) == b"x"


def test_what_is_under_way_survives_the_end_of_its_loop(make: Make) -> None:
    disk = GatedFiles()
    manager = make(disk)

    async def save_and_give_up() -> None:
        await manager.save_async(b"x", 1)
        with pytest.raises(Timeout):
            await manager.wait(timeout=0.01)

    asyncio.run(save_and_give_up())
    disk.open.set()
    assert manager.load_sync(1) == b"x"


@pytest.mark.may_block
async def test_statistics_count_what_was_done(make: Make) -> None:
    manager = make(keep_last_n=1)
    for step in (1, 2):
        await manager.save_async(b"four", step)
    await manager.load(2)
    found = manager.statistics()
    assert (found.saves, found.saved_bytes, found.stored_bytes, found.expired) == (2, 8, 8, 1)
    assert (found.last_step, found.loads, found.in_flight, found.failed) == (2, 1, 0, 0)
    assert found.last_save_s > 0


@pytest.mark.may_block
async def test_two_managers_on_one_path_do_not_tear_each_other(make: Make) -> None:
    managers = [make(keep_last_n=None) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for n, manager in enumerate(managers):
            for step in range(5):
                group.create_task(manager.save_async(b"%d" % n * 100_000, step))
    for manager in managers:
        await manager.wait()
    for step in range(5):
        data = await managers[0].load(step)
        assert data in {b"%d" % n * 100_000 for n in range(4)}


# Settings


def test_the_rank_is_the_launchers(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    manager = make()
    manager.save_sync(b"three", 1)
    manager.wait_sync()
    assert manager.load_sync(1) == b"three"
    with pytest.raises(FileNotFoundError):
        make(rank=0).load_sync(1)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="RANK='first'"):
        make()


def test_what_is_left_out_comes_from_the_config_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runtime.toml"
    file.write_text('[checkpoint]\nkeep_last_n = 1\ncompression = "gzip"\n')
    monkeypatch.setenv("RUNTIME_CONFIG", str(file))
    configured, given = make(name="a"), make(name="b", keep_last_n=None, compression="none")
    for manager in (configured, given):
        for step in (1, 2):
            manager.save_sync(b"x", step)
        manager.wait_sync()
    assert configured.list_checkpoints_sync() == [2]
    assert (tmp_path / "a" / "checkpoint-2.ckpt.gz").exists()
    assert given.list_checkpoints_sync() == [1, 2]


def test_five_commits_stay_by_default(manager: CheckpointManager) -> None:
    for step in range(8):
        manager.save_sync(b"x", step)
    manager.wait_sync()
    assert manager.list_checkpoints_sync() == [3, 4, 5, 6, 7]


def test_nothing_is_touched_before_the_first_save(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path / "not" / "there")
    assert manager.list_checkpoints_sync() == []
    assert os.listdir(tmp_path) == []
    manager.save_sync(b"x", 1)
    manager.wait_sync()
    assert (tmp_path / "not" / "there" / "checkpoint-1.ckpt").exists()


# Misuse


@pytest.mark.parametrize("step", [-1, True, "3", 1.0, None])
async def test_a_step_that_is_no_whole_number_is_refused(
    manager: CheckpointManager, step: Any
) -> None:
    with pytest.raises(MisuseError, match="a step is a whole number from 0"):
        await manager.save_async(b"x", step)
    if step is not None:
        with pytest.raises(MisuseError, match="a step is a whole number from 0"):
            await manager.load(step)


@pytest.mark.parametrize("data", [{"w": 1}, "text", None, [1, 2]])
async def test_what_is_not_bytes_is_refused_saying_how_to_make_it_bytes(
    manager: CheckpointManager, data: Any
) -> None:
    with pytest.raises(MisuseError, match=r"not (dict|str|NoneType|list): .*torch\.save"):
        await manager.save_async(data, 1)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"backend": "s3"}, "S3 are not there yet"),
        ({"backend": "ftp"}, "backend='ftp': allowed is 'local'"),
        ({"keep_last_n": 0}, "keep_last_n=0: allowed is a whole number from 1"),
        ({"keep_last_n": "5"}, "keep_last_n='5'"),
        ({"rank": -1}, "rank=-1"),
        ({"name": "../x"}, "name='../x': allowed are letters"),
        ({"compression": "xz"}, "compression='xz': allowed are"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(
    make: Make, options: dict[str, Any], text: str
) -> None:
    with pytest.raises((MisuseError, ConfigError), match=text):
        make(**options)


def test_a_path_that_is_a_file_or_below_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MisuseError, match=r"storage_path: .*/file is not a directory"):
            CheckpointManager(path)


def test_a_bucket_is_not_taken_for_a_folder() -> None:
    with pytest.raises(MisuseError, match="S3 are not there yet"):
        CheckpointManager("s3://bucket/prefix")


def test_a_missing_package_is_found_when_the_manager_is_made(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match="pip install zstandard"):
        make(compression="zstd")


async def test_plain_calls_on_the_runtimes_own_loop_are_refused_naming_the_twin(
    manager: CheckpointManager,
) -> None:
    endpoint = SimpleNamespace(export_function=lambda *_: None)
    node = SimpleNamespace(loop=asyncio.get_running_loop(), endpoint=endpoint)
    context.install(node)  # type: ignore[arg-type]
    try:
        with pytest.raises(MisuseError, match=r"await manager\.save_async"):
            manager.save_sync(b"x", 1)
        with pytest.raises(MisuseError, match=r"await manager\.load_latest"):
            manager.load_latest_sync()
        with pytest.raises(MisuseError, match=r"await manager\.wait"):
            manager.wait_sync()
    finally:
        context.install(None)
