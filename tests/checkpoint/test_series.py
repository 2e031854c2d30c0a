"""One series of checkpoints: order of commits, ranks, expiry."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.checkpoint.files import Files
from runtime.checkpoint.series import Series
from runtime.checkpoint.store import Folder
from runtime.errors import CheckpointCorrupt, CheckpointError
from tests.checkpoint.faults import Died, DyingFiles, FailingFiles, RecordingFiles


def _series(path: Path, files: Files | None = None, **options: object) -> Series:
    return Series(Folder(path, files), **options)  # type: ignore[arg-type]


def _save(series: Series, step: int, data: bytes) -> int:
    return series.commit(step, memoryview(data)).stored_bytes


def _names(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.endswith(".sha256"))


# Saving and loading


def test_a_step_is_a_file_of_exactly_its_bytes_with_its_digest_beside(tmp_path: Path) -> None:
    _save(_series(tmp_path), 7, b"weights")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-7.ckpt", "checkpoint-7.ckpt.sha256"]
    assert (tmp_path / "checkpoint-7.ckpt").read_bytes() == b"weights"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert (tmp_path / "checkpoint-7.ckpt.sha256").read_text() == f"{digest}  checkpoint-7.ckpt\n"


@settings(deadline=None, max_examples=50)
@given(
    saves=st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=50)), max_size=8),
    compression=st.sampled_from([None, "gzip"]),
)
def test_the_last_save_of_each_step_is_what_loads(
    tmp_path_factory: pytest.TempPathFactory,
    saves: list[tuple[int, bytes]],
    compression: str | None,
) -> None:
    series = _series(tmp_path_factory.mktemp("series"), compression=compression)
    for step, data in saves:
        _save(series, step, data)
    expected = dict(saves)
    assert series.steps() == sorted(expected)
    assert {step: series.fetch(step) for step in series.steps()} == expected
    assert all(series.verify(step) for step in expected)


def test_the_digest_is_durable_before_the_checkpoint_can_be_seen(tmp_path: Path) -> None:
    files = RecordingFiles()
    _save(_series(tmp_path, files), 1, b"x")
    changes = [change for change in files.done if change[0] in ("rename", "sync_directory")]
    folder = tmp_path.name
    assert changes == [
        ("rename", "checkpoint-1.ckpt.sha256"),
        ("sync_directory", folder),
        ("rename", "checkpoint-1.ckpt"),
        ("sync_directory", folder),
    ]


def test_a_step_saved_with_another_compression_replaces_the_first(tmp_path: Path) -> None:
    _save(_series(tmp_path), 1, b"plain")
    _save(_series(tmp_path, compression="gzip"), 1, b"squeezed")
    assert _names(tmp_path) == ["checkpoint-1.ckpt.gz"]
    assert _series(tmp_path).fetch(1) == b"squeezed"


def test_a_step_that_is_not_there_is_named_with_the_newest(tmp_path: Path) -> None:
    series = _series(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 3 in .* at all"):
        series.fetch(3)
    _save(series, 5, b"x")
    for call in (series.fetch, series.verify, series.delete):
        with pytest.raises(FileNotFoundError, match=r"step 3 in .*: the newest is step 5"):
            call(3)


def test_delete_removes_a_step_and_its_digests(tmp_path: Path) -> None:
    _save(_series(tmp_path), 1, b"a")
    _save(_series(tmp_path, rank=2), 1, b"b")
    _save(_series(tmp_path), 2, b"c")
    _series(tmp_path).delete(1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2.ckpt", "checkpoint-2.ckpt.sha256"]


# By hand


def test_a_file_put_there_by_hand_loads_but_cannot_be_verified(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4.ckpt").write_bytes(b"by hand")
    series = _series(tmp_path)
    assert series.steps() == [4]
    assert series.fetch(4) == b"by hand"
    assert series.verify(4) is False


def test_a_file_put_there_by_hand_is_never_expired(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1.ckpt").write_bytes(b"by hand")
    (tmp_path / "notes.txt").touch()
    series = _series(tmp_path, keep_last_n=1)
    for step in (2, 3, 4):
        _save(series, step, b"x")
    assert _names(tmp_path) == ["checkpoint-1.ckpt", "checkpoint-4.ckpt", "notes.txt"]


def test_a_file_put_there_by_hand_may_be_replaced_and_deleted(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1.ckpt").write_bytes(b"by hand")
    series = _series(tmp_path)
    _save(series, 1, b"saved")
    assert series.fetch(1) == b"saved"
    assert series.verify(1) is True
    (tmp_path / "checkpoint-2.ckpt").write_bytes(b"by hand")
    series.delete(2)
    assert series.steps() == [1]


# Ranks


def test_other_ranks_have_files_of_their_own_and_load_their_own(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        _save(_series(tmp_path, rank=rank), 1, b"rank %d" % rank)
    assert _names(tmp_path) == [
        "checkpoint-1.ckpt",
        "checkpoint-1.rank1.ckpt",
        "checkpoint-1.rank2.ckpt",
    ]
    assert [_series(tmp_path, rank=rank).fetch(1) for rank in (0, 1, 2, 3)] == [
        b"rank 0",
        b"rank 1",
        b"rank 2",
        b"rank 0",
    ]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_equal_bytes_are_stored_once_whoever_comes_first(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    for rank in order:
        _save(_series(tmp_path, rank=rank), 1, b"the same")
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1.ckpt", "checkpoint-1.ckpt.sha256"]
    assert _series(tmp_path, rank=1).fetch(1) == b"the same"


def test_equal_bytes_of_another_rank_are_not_written_at_all(tmp_path: Path) -> None:
    _save(_series(tmp_path), 1, b"the same")
    files = RecordingFiles()
    assert _save(_series(tmp_path, files, rank=1), 1, b"the same") == 0
    assert not any(operation == "pwrite" for operation, _ in files.done)


def test_a_rank_that_had_bytes_of_its_own_and_now_rank_zeros_loads_those(tmp_path: Path) -> None:
    _save(_series(tmp_path, rank=1), 1, b"own")
    _save(_series(tmp_path), 1, b"the same")
    _save(_series(tmp_path, rank=1), 1, b"the same")
    assert _names(tmp_path) == ["checkpoint-1.ckpt"]
    assert _series(tmp_path, rank=1).fetch(1) == b"the same"


def test_rank_zero_that_commits_the_same_in_between_is_noticed_before_publishing(
    tmp_path: Path,
) -> None:
    class RankZeroComesFirst(RecordingFiles):
        def fsync(self, fd: int) -> None:
            super().fsync(fd)
            if not (tmp_path / "checkpoint-1.ckpt").exists():
                _save(_series(tmp_path), 1, b"the same")

    assert _save(_series(tmp_path, RankZeroComesFirst(), rank=1), 1, b"the same") == 0
    assert _names(tmp_path) == ["checkpoint-1.ckpt"]


def test_a_rank_sees_its_own_steps_and_rank_zeros_only(tmp_path: Path) -> None:
    _save(_series(tmp_path), 1, b"0")
    _save(_series(tmp_path, rank=1), 2, b"1")
    _save(_series(tmp_path, rank=2), 3, b"2")
    assert _series(tmp_path).steps() == [1]
    assert _series(tmp_path, rank=1).steps() == [1, 2]


def test_a_rank_deletes_only_its_own_file(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        _save(_series(tmp_path, rank=rank), 1, b"%d" % rank)
    _series(tmp_path, rank=1).delete(1)
    assert _names(tmp_path) == ["checkpoint-1.ckpt", "checkpoint-1.rank2.ckpt"]


# Keeping


def test_the_last_commits_stay(tmp_path: Path) -> None:
    series = _series(tmp_path, keep_last_n=3)
    expired = [series.commit(step, memoryview(b"x")).expired for step in range(6)]
    assert series.steps() == [3, 4, 5]
    assert expired == [[], [], [], [0], [1], [2]]


def test_the_last_commits_count_even_where_an_older_run_had_gone_further(tmp_path: Path) -> None:
    for step in (90, 100):
        _save(_series(tmp_path), step, b"old")
    series = _series(tmp_path, keep_last_n=2)
    for step in (10, 20, 30):
        _save(series, step, b"new")
    assert series.steps() == [20, 30, 100]  # the newest step there is always stays


def test_ranks_expire_their_own_files_so_that_a_slow_one_loses_nothing(tmp_path: Path) -> None:
    fast, slow = (_series(tmp_path, rank=rank, keep_last_n=1) for rank in (0, 1))
    _save(slow, 1, b"slow")
    for step in (1, 2, 3):
        _save(fast, step, b"fast")
    assert slow.fetch(1) == b"slow"
    _save(slow, 4, b"slow")
    assert _names(tmp_path) == ["checkpoint-3.ckpt", "checkpoint-4.rank1.ckpt"]


def test_what_cannot_be_expired_is_logged_and_the_save_is_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _save(_series(tmp_path), 1, b"x")
    files = FailingFiles("unlink", errno.EACCES, suffix=".ckpt")
    with caplog.at_level(logging.WARNING):
        _save(_series(tmp_path, files, keep_last_n=1), 2, b"y")
    assert "cannot clear away" in caplog.text
    assert _series(tmp_path).steps() == [1, 2]


# Damage


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_every_flipped_bit_is_found(tmp_path: Path, compression: str | None) -> None:
    series = _series(tmp_path, compression=compression)
    _save(series, 3, b"some weights")
    (path,) = (path for path in tmp_path.iterdir() if path.suffix != ".sha256")
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointCorrupt):
            series.fetch(3)
    path.write_bytes(good)
    assert series.fetch(3) == b"some weights"


@pytest.mark.parametrize("damage", [b"", b"weight", b"weightsx"])
def test_a_file_cut_off_or_longer_is_found(tmp_path: Path, damage: bytes) -> None:
    series = _series(tmp_path)
    _save(series, 3, b"weights")
    (tmp_path / "checkpoint-3.ckpt").write_bytes(damage)
    with pytest.raises(
        CheckpointCorrupt, match=r"step 3: .*/checkpoint-3\.ckpt is damaged"
    ) as found:
        series.verify(3)
    assert (found.value.step, found.value.piece) == (3, "checkpoint-3.ckpt")


def test_verify_reads_the_files_of_all_ranks(tmp_path: Path) -> None:
    for rank in (0, 1):
        _save(_series(tmp_path, rank=rank), 3, b"%d" % rank)
    (tmp_path / "checkpoint-3.rank1.ckpt").write_bytes(b"?")
    with pytest.raises(CheckpointCorrupt, match="rank1"):
        _series(tmp_path).verify(3)


def test_a_compressed_file_put_there_by_hand_that_is_none_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.ckpt.gz").write_bytes(b"no gzip")
    with pytest.raises(CheckpointCorrupt, match="cannot be expanded"):
        _series(tmp_path).fetch(3)


def test_a_file_that_is_replaced_while_it_is_read_is_not_taken_for_damaged(tmp_path: Path) -> None:
    class ReplacedBetweenReads(RecordingFiles):
        def read(self, path: str) -> bytes:
            data = super().read(path)
            if len(self.done) == 1:
                _save(_series(tmp_path), 1, b"after")
            return data

    _save(_series(tmp_path), 1, b"before")
    assert _series(tmp_path, ReplacedBetweenReads()).fetch(1) == b"after"


def test_a_file_that_is_deleted_while_it_is_read_is_not_found(tmp_path: Path) -> None:
    class DeletedBeforeTheRead(RecordingFiles):
        def read(self, path: str) -> bytes:
            if os.path.exists(path):
                _series(tmp_path).delete(1)
            return super().read(path)

    _save(_series(tmp_path), 1, b"x")
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 1"):
        _series(tmp_path, DeletedBeforeTheRead()).fetch(1)


# Failing and dying


@pytest.mark.parametrize(
    ("operation", "suffix"),
    [
        ("create", ""),
        ("pwrite", ""),
        ("fsync", ""),
        ("rename", "checkpoint-2.ckpt.sha256"),
        ("rename", "checkpoint-2.ckpt"),
        ("sync_directory", ""),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_save_that_fails_is_not_seen_and_costs_nothing(
    tmp_path: Path, operation: str, suffix: str, number: int
) -> None:
    _save(_series(tmp_path), 1, b"good")
    before = sorted(os.listdir(tmp_path))
    failing = _series(tmp_path, FailingFiles(operation, number, suffix), keep_last_n=1)
    with pytest.raises(CheckpointError, match=os.strerror(number)) as raised:
        _save(failing, 2, b"bad")
    assert raised.value.step == 2
    assert f"{tmp_path}/checkpoint-2.ckpt" in str(raised.value)
    assert sorted(set(os.listdir(tmp_path)) - {"checkpoint-2.ckpt.sha256"}) == before
    assert _series(tmp_path).steps() == [1]
    assert _series(tmp_path).fetch(1) == b"good"


def test_a_save_whose_name_is_not_durable_is_taken_back(tmp_path: Path) -> None:
    class SecondSyncFails(FailingFiles):
        def sync_directory(self, path: str) -> None:
            if ("rename", "checkpoint-2.ckpt") in self.done:
                super().sync_directory(path)

    _save(_series(tmp_path), 1, b"good")
    with pytest.raises(CheckpointError):
        _save(_series(tmp_path, SecondSyncFails("sync_directory", errno.EIO)), 2, b"bad")
    assert _series(tmp_path).steps() == [1]


@pytest.mark.parametrize("operation", ["create", "pwrite", "fsync", "rename", "sync_directory"])
def test_a_failed_second_save_of_a_step_leaves_one_of_the_two(
    tmp_path: Path, operation: str
) -> None:
    _save(_series(tmp_path), 1, b"first")
    with pytest.raises(CheckpointError):
        _save(_series(tmp_path, FailingFiles(operation, errno.EIO)), 1, b"second")
    assert _series(tmp_path).fetch(1) in (b"first", b"second")
    assert _series(tmp_path).verify(1)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot save step 1 as .*/x/checkpoint-1\.ckpt"):
        _save(_series(tmp_path / "file" / "x"), 1, b"x")


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _save(_series(tmp_path), 1, b"x")
    with pytest.raises(CheckpointError, match=r"cannot load step 1 as .*ckpt: Input/output error"):
        _series(tmp_path, FailingFiles("read", errno.EIO)).fetch(1)


@pytest.mark.parametrize("replaced", ["nothing", "saved", "by hand"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_at_any_point_leaves_old_or_new_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, replaced: str, rank: int
) -> None:
    for point in range(100):
        path = tmp_path_factory.mktemp("point")
        series = _series(path, rank=rank, keep_last_n=2)
        _save(series, 1, b"previous")
        if replaced == "saved":
            _save(series, 2, b"old")
        elif replaced == "by hand":
            name = "checkpoint-2.ckpt" if rank == 0 else "checkpoint-2.rank1.ckpt"
            (path / name).write_bytes(b"old")
        dying = DyingFiles(point)
        died = False
        try:
            _save(_series(path, dying, rank=rank, keep_last_n=2), 2, b"new")
        except Died:
            died = True
        assert series.fetch(1) == b"previous"
        found = series.fetch(2) if 2 in series.steps() else None
        assert found in (
            (b"new",) if not died else (b"new", None if replaced == "nothing" else b"old")
        )
        _save(series, 3, b"next")
        assert not [name for name in os.listdir(path) if name.startswith(".")]
        if not died:
            break
    else:
        pytest.fail("a save takes more than a hundred calls")
    assert point > 8


def test_a_digest_whose_checkpoint_never_came_is_cleared_away(tmp_path: Path) -> None:
    series = _series(tmp_path)
    (tmp_path / "checkpoint-9.ckpt.sha256").write_text("left by a dead writer\n")
    (tmp_path / "other.sha256").write_text("not ours\n")
    _save(series, 1, b"x")
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-1.ckpt",
        "checkpoint-1.ckpt.sha256",
        "other.sha256",
    ]
