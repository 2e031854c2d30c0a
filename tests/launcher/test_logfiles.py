"""Log files read back: the last lines, what is added, and never more than fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.launcher import logfiles
from runtime.launcher.logfiles import Batch, Query


def write(folder: Path, data: bytes, *, attempt: int = 0, role: str = "t", rank: int = 0) -> Path:
    path = folder / f"attempt_{attempt}" / role / str(rank) / "stdout.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(data)
    return path


def text(batch: Batch) -> bytes:
    return b"".join(piece.data for piece in batch.pieces)


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (0, b""),
        (1, b"c\n"),
        (2, b"b\nc\n"),
        (3, b"a\nb\nc\n"),
        (9, b"a\nb\nc\n"),
        (None, b"a\nb\nc\n"),
    ],
)
def test_it_begins_with_the_last_lines(tmp_path: Path, lines: int | None, found: bytes) -> None:
    write(tmp_path, b"a\nb\nc\n")
    assert text(logfiles.read(str(tmp_path), Query(lines=lines))) == found


def test_a_last_line_without_an_end_is_a_line(tmp_path: Path) -> None:
    write(tmp_path, b"a\nb\nc")
    assert text(logfiles.read(str(tmp_path), Query(lines=2))) == b"b\nc"


def test_lines_longer_than_a_piece_are_found(tmp_path: Path) -> None:
    long = b"x" * 200_000 + b"\n"
    write(tmp_path, b"first\n" + long + b"last\n")
    batch = logfiles.read(str(tmp_path), Query(lines=2))
    assert batch.more
    assert batch.positions["attempt_0/t/0/stdout.log"] == len(b"first\n") + len(text(batch))


def test_lines_that_the_latest_attempt_lacks_are_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, b"a\nb\nc\n", attempt=0)
    write(tmp_path, b"d\n", attempt=1)
    batch = logfiles.read(str(tmp_path), Query(lines=3))
    assert [(piece.attempt, piece.data) for piece in batch.pieces] == [(0, b"b\nc\n"), (1, b"d\n")]


def test_the_tenth_attempt_comes_after_the_ninth(tmp_path: Path) -> None:
    write(tmp_path, b"b\n", attempt=10)
    write(tmp_path, b"a\n", attempt=9)
    assert text(logfiles.read(str(tmp_path), Query())) == b"a\nb\n"


def test_what_is_added_is_read_once_also_in_files_that_are_new(tmp_path: Path) -> None:
    write(tmp_path, b"a\n")
    first = logfiles.read(str(tmp_path), Query())
    nothing = logfiles.read(str(tmp_path), Query(), first.positions)
    assert (nothing.pieces, nothing.more) == ([], False)
    write(tmp_path, b"b\n")
    write(tmp_path, b"c\n", rank=1)
    write(tmp_path, b"d\n", attempt=1)
    second = logfiles.read(str(tmp_path), Query(), nothing.positions)
    assert sorted(piece.data for piece in second.pieces) == [b"b\n", b"c\n", b"d\n"]


def test_a_large_file_comes_in_pieces(tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    write(tmp_path, data)
    positions, more, got = None, True, b""
    while more:
        batch = logfiles.read(str(tmp_path), Query(lines=None), positions)
        assert len(text(batch)) <= logfiles.BATCH_BYTES
        got += text(batch)
        positions, more = batch.positions, batch.more
    assert got == data


def test_many_files_together_fit_into_one_batch(tmp_path: Path) -> None:
    for rank in range(20):
        write(tmp_path, b"x" * 60_000, rank=rank)
    batch = logfiles.read(str(tmp_path), Query(lines=None))
    assert len(text(batch)) <= logfiles.BATCH_BYTES
    assert batch.more


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    write(tmp_path, b"t0\n")
    write(tmp_path, b"t1\n", rank=1)
    write(tmp_path, b"e1\n", role="e", rank=1)
    folder = str(tmp_path)
    assert text(logfiles.read(folder, Query(role="e"))) == b"e1\n"
    assert sorted(text(logfiles.read(folder, Query(rank=1))).split()) == [b"e1", b"t1"]
    assert text(logfiles.read(folder, Query(role="t", rank=0))) == b"t0\n"
    assert text(logfiles.read(folder, Query(streams=("stderr",)))) == b""
    assert text(logfiles.read(folder, Query(), ranks={("t", 1)})) == b"t1\n"


def test_a_folder_without_logs_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "outcome.json").write_text("{}")
    (tmp_path / "attempt_x" / "t").mkdir(parents=True)
    assert logfiles.read(str(tmp_path / "none"), Query()) == Batch([], {}, False)
    assert logfiles.read(str(tmp_path), Query()) == Batch([], {}, False)
