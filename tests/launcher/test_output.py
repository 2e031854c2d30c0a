"""Lines, tails and what is shown: bytes in, bytes out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.launcher.flags import Streams
from runtime.launcher.output import (
    LONGEST_LINE,
    Lines,
    OutputSettings,
    Tail,
    make_job_folder,
    shown_streams,
)


def lines() -> Lines:
    return Lines(lambda: b"[a 0] ")


def test_a_line_is_shown_once_it_is_complete() -> None:
    tested = lines()
    assert tested.feed(b"one ") == b""
    assert tested.feed(b"line\nnext") == b"[a 0] one line\n"
    assert tested.end() == b"[a 0] next\n"


def test_empty_lines_keep_their_place() -> None:
    assert lines().feed(b"a\n\nb\n") == b"[a 0] a\n[a 0] \n[a 0] b\n"


def test_at_the_end_of_complete_lines_nothing_is_added() -> None:
    tested = lines()
    tested.feed(b"a\n")
    assert tested.end() == b""


def test_a_windows_line_end_is_no_progress_bar() -> None:
    assert lines().feed(b"a\r\nb\r\n") == b"[a 0] a\n[a 0] b\n"


def test_of_a_finished_progress_bar_the_last_state_is_shown() -> None:
    assert lines().feed(b"\r 10%\r 50%\r100%\ndone\n") == b"[a 0] 100%\n[a 0] done\n"


@pytest.mark.parametrize("text", [b"\r 10%\r 20%", b" 10%\r 20%\r"], ids=["before", "after"])
def test_a_running_bar_is_shown_at_its_last_state_once(text: bytes) -> None:
    tested = lines()
    assert tested.feed(text) == b""
    assert tested.unfinished() == b"[a 0]  20%\n"
    assert tested.unfinished() == b""
    tested.feed(b"\r 30%")
    assert tested.unfinished() == b"[a 0]  30%\n"


def test_a_bar_that_never_ends_does_not_grow() -> None:
    tested = lines()
    for step in range(10_000):
        tested.feed(b"\r%06d of many" % step)
    assert len(tested._partial) < 100


def test_a_bar_without_newline_ends_with_its_last_state() -> None:
    tested = lines()
    tested.feed(b"\r1\r2")
    assert tested.end() == b"[a 0] 2\n"


def test_a_prompt_is_shown_when_it_has_not_grown_and_only_once() -> None:
    tested = lines()
    tested.feed(b"load")
    assert tested.unfinished() == b""
    tested.feed(b"ing")
    assert tested.unfinished() == b""
    assert tested.unfinished() == b"[a 0] loading\n"
    assert tested.unfinished() == b""
    assert tested.end() == b""


def test_a_prompt_that_goes_on_is_shown_whole() -> None:
    tested = lines()
    tested.feed(b"loading")
    tested.unfinished()
    tested.unfinished()
    assert tested.feed(b" done\n") == b"[a 0] loading done\n"


def test_a_line_beyond_all_measure_is_cut_with_a_mark() -> None:
    tested = lines()
    shown = tested.feed(b"x" * LONGEST_LINE)
    assert shown.endswith(b" [line continues]\n")
    assert shown.count(b"x") == LONGEST_LINE
    assert tested.feed(b"y\n") == b"[a 0] y\n"


@given(st.lists(st.binary().map(lambda data: data.replace(b"\r", b"")), max_size=20))
def test_no_byte_is_lost_however_the_stream_is_cut(pieces: list[bytes]) -> None:
    tested = lines()
    shown = b"".join([*(tested.feed(piece) for piece in pieces), tested.end()])
    whole = b"".join(pieces)
    expected = whole if whole.endswith(b"\n") or not whole else whole + b"\n"
    assert shown == b"".join(b"[a 0] " + line + b"\n" for line in expected.split(b"\n")[:-1])


def test_a_tail_keeps_the_last_lines_and_little_memory() -> None:
    tail = Tail()
    for number in range(100_000):
        tail.feed(b"line %d\n" % number)
    assert tail.lines(3) == ["line 99997", "line 99998", "line 99999"]
    assert tail._size < 200_000


def test_a_tail_shows_undecodable_bytes_as_escapes_and_a_bar_at_its_last_state() -> None:
    tail = Tail()
    tail.feed(b"caf\xe9\n 10%\r 20%\n\n")
    assert tail.lines() == ["caf\\xe9", " 20%"]


BOTH: frozenset[str] = frozenset(("stdout", "stderr"))


@pytest.mark.parametrize(
    ("redirects", "tee", "only", "shown"),
    [
        (None, None, None, BOTH),
        (Streams(3), None, None, frozenset()),
        (Streams(1), None, None, frozenset(("stderr",))),
        (Streams(3), Streams(1), None, frozenset(("stdout",))),
        (Streams(0, {0: 2}), None, None, frozenset(("stdout",))),
        (Streams(0, {1: 3}), None, None, BOTH),
        (None, None, frozenset((1,)), frozenset()),
        (None, None, frozenset((0,)), BOTH),
    ],
)
def test_torchruns_options_narrow_the_console(
    redirects: Streams | None,
    tee: Streams | None,
    only: frozenset[int] | None,
    shown: frozenset[str],
) -> None:
    assert shown_streams(0, redirects, tee, only) == shown


def test_settings_without_a_choice_show_everything() -> None:
    assert OutputSettings().shows(3, "stderr")
    assert not OutputSettings(console={0: frozenset()}).shows(0, "stderr")


def test_latest_points_at_the_newest_folder(tmp_path: Path) -> None:
    make_job_folder(str(tmp_path), "one")
    folder = make_job_folder(str(tmp_path), "two")
    assert folder == str(tmp_path / "two")
    assert os.readlink(tmp_path / "latest") == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/job.*--log-dir"):
        make_job_folder(str(tmp_path / "file"), "job")
