"""Files that are whole or not there, whatever step their writer dies at."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from runtime.checkpoint.files import SystemFiles
from runtime.checkpoint.store import Folder, LocalBackend
from runtime.errors import CheckpointError, MisuseError
from tests.checkpoint.faults import FailingFiles, RecordingFiles, SlowDisk

LEFTOVER = ".checkpoint-1.ckpt.0123456789ab.tmp"


def _everything(path: Path) -> list[str]:
    return sorted(os.listdir(path))


# A folder of whole files


def test_a_file_is_synced_before_it_has_its_name_and_the_folder_after(tmp_path: Path) -> None:
    files = RecordingFiles()
    Folder(tmp_path, files).put("a", b"hello")
    operations = [operation for operation, _ in files.done]
    assert operations[:5] == ["create", "pwrite", "fsync", "rename", "sync_directory"]
    assert (tmp_path / "a").read_bytes() == b"hello"


def test_a_short_write_is_gone_on_with(tmp_path: Path) -> None:
    data = bytes(range(256))
    Folder(tmp_path, SlowDisk()).put("a", data)
    assert (tmp_path / "a").read_bytes() == data


def test_what_is_staged_but_not_published_is_gone(tmp_path: Path) -> None:
    with Folder(tmp_path).staged("a", [b"x"]) as staged:
        assert os.path.exists(staged.path)
    assert _everything(tmp_path) == []


def test_a_leftover_of_a_dead_writer_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / LEFTOVER).write_bytes(b"half")
    assert Folder(tmp_path).sweep() == [LEFTOVER]
    assert _everything(tmp_path) == []


def test_the_file_of_a_living_writer_is_not_swept_away(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with folder.staged("a", [b"x"]) as staged:
        assert Folder(tmp_path).sweep() == []
        folder.publish(staged, "a")
    assert _everything(tmp_path) == ["a"]


def test_what_only_looks_like_a_leftover_is_left_alone(tmp_path: Path) -> None:
    names = [".a.tmp", "a.0123456789ab.tmp", ".a.0123456789AB.tmp", ".a.0123456789ab.tmp.bak"]
    for name in names:
        (tmp_path / name).touch()
    assert Folder(tmp_path).sweep() == []
    assert _everything(tmp_path) == sorted(names)


def test_a_file_that_was_swept_before_its_writer_had_locked_it_is_made_anew(tmp_path: Path) -> None:
    class Swept(SystemFiles):
        first = True

        def create(self, path: str) -> int:
            fd = super().create(path)
            if self.first:
                self.first = False
                os.unlink(path)
            return fd

    Folder(tmp_path, Swept()).put("a", b"x")
    assert _everything(tmp_path) == ["a"]


def test_leftovers_are_no_names_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / LEFTOVER).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").touch()
    assert Folder(tmp_path).names() == ["a"]
    assert Folder(tmp_path / "none").names() == []


def test_one_at_a_time_holds_the_lock(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    try:
        with Folder(tmp_path).locked(), pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)


def test_a_lock_that_is_never_given_back_is_an_error_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.checkpoint.store.LOCK_LIMIT_S", 0.0)
    with (
        Folder(tmp_path).locked(),
        pytest.raises(CheckpointError, match="has held this folder's lock for"),
        Folder(tmp_path).locked(),
    ):
        pass


def test_without_locks_in_the_file_system_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = Folder(tmp_path)
    (tmp_path / LEFTOVER).touch()
    with folder.locked():
        folder.put("a", b"x")
    assert folder.sweep() == []
    assert folder.read("a") == b"x"


def test_folders_are_made_durably_from_the_top(tmp_path: Path) -> None:
    files = RecordingFiles()
    Folder(tmp_path / "a" / "b", files).create()
    assert files.done == [("sync_directory", tmp_path.name), ("sync_directory", "a")]
    assert (tmp_path / "a" / "b").is_dir()


def test_syncing_a_directory_may_be_unknown_to_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> None:
        def fsync(fd: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    SystemFiles().sync_directory(str(tmp_path))
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        SystemFiles().sync_directory(str(tmp_path))


# The public back-end


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend(tmp_path / "store")


async def test_a_backend_keeps_bytes_by_name(backend: LocalBackend) -> None:
    assert await backend.list() == []
    assert not await backend.exists("run/a")
    await backend.write("run/a", b"first")
    await backend.write("run/a", bytearray(b"second"))  # type: ignore[arg-type]
    await backend.write("b", b"")
    assert await backend.read("run/a") == b"second"
    assert await backend.exists("run/a")
    assert await backend.list() == ["b", "run/a"]
    assert await backend.list("run/") == ["run/a"]
    stat = await backend.stat("run/a")
    assert (stat.size, stat.modified_s > 0) == (6, True)
    await backend.delete("run/a")
    assert await backend.list() == ["b"]


async def test_a_name_that_is_not_there_is_not_found(backend: LocalBackend) -> None:
    for call in (backend.read, backend.stat, backend.delete):
        with pytest.raises(FileNotFoundError):
            await call("a")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a/", ".", LEFTOVER])
async def test_names_that_lead_out_of_the_directory_are_refused(
    backend: LocalBackend, name: str
) -> None:
    with pytest.raises(MisuseError, match="allowed are relative paths"):
        await backend.write(name, b"x")
    with pytest.raises(MisuseError, match="allowed are relative paths"):
        await backend.read(name)


@pytest.mark.may_block
async def test_what_the_file_system_says_is_an_error_of_ours_with_the_path(tmp_path: Path) -> None:
    backend = LocalBackend(tmp_path, FailingFiles("pwrite", errno.ENOSPC))
    with pytest.raises(CheckpointError, match="No space left on device") as raised:
        await backend.write("a", b"x")
    assert str(tmp_path) in str(raised.value)
    assert await backend.list() == []
    assert _everything(tmp_path) == []


@pytest.mark.may_block
async def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    await LocalBackend(tmp_path).write("a", b"before")
    for operation in ("create", "pwrite", "fsync", "rename"):
        with pytest.raises(CheckpointError):
            await LocalBackend(tmp_path, FailingFiles(operation, errno.EIO)).write("a", b"after")
        assert _everything(tmp_path) == ["a"]
        assert await LocalBackend(tmp_path).read("a") == b"before"
