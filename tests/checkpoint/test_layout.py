"""Names of checkpoint files and their digests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoint.layout import Piece, digest_text, is_series_name, parse, read_digests

PIECES = st.builds(
    Piece,
    step=st.integers(0, 10**12),
    rank=st.integers(0, 100_000),
    compression=st.sampled_from([None, "gzip", "zstd", "lz4"]),
)


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (Piece(0), "checkpoint-0.ckpt"),
        (Piece(1200), "checkpoint-1200.ckpt"),
        (Piece(5, rank=3), "checkpoint-5.rank3.ckpt"),
        (Piece(5, compression="gzip"), "checkpoint-5.ckpt.gz"),
        (Piece(5, rank=12, compression="zstd"), "checkpoint-5.rank12.ckpt.zst"),
        (Piece(7, compression="lz4"), "checkpoint-7.ckpt.lz4"),
    ],
)
def test_names_are_those_of_the_format(piece: Piece, name: str) -> None:
    assert piece.name == name
    assert parse(name) == piece


@given(PIECES)
def test_every_piece_has_a_name_of_its_own_that_leads_back_to_it(piece: Piece) -> None:
    assert parse(piece.name) == piece
    assert parse(piece.digest_name) is None


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-.ckpt",
        "checkpoint--1.ckpt",
        "checkpoint-05.ckpt",
        "checkpoint-5.rank0.ckpt",
        "checkpoint-5.rank03.ckpt",
        "checkpoint-5.ckpt.xz",
        "checkpoint-5.ckpt~",
        "checkpoint-5.ckpt\n",
        "checkpoint-٥.ckpt",
        "my-checkpoint-5.ckpt",
        ".checkpoint-5.ckpt.0123456789ab.tmp",
        "checkpoint-5.ckpt.sha256",
    ],
)
def test_other_names_belong_to_somebody_else(name: str) -> None:
    assert parse(name) is None


def test_a_digest_file_is_what_sha256sum_writes() -> None:
    digest = "ab" * 32
    text = digest_text("checkpoint-5.ckpt", (digest,))
    assert text == f"{digest}  checkpoint-5.ckpt\n".encode()
    assert read_digests("checkpoint-5.ckpt", text) == (digest,)


def test_while_a_file_is_replaced_two_digests_are_right() -> None:
    digests = ("ab" * 32, "cd" * 32)
    assert read_digests("x", digest_text("x", digests)) == digests


@given(st.binary(max_size=200))
def test_a_damaged_digest_file_allows_nothing_that_was_not_written(noise: bytes) -> None:
    assert all(len(digest) == 64 for digest in read_digests("checkpoint-5.ckpt", noise))


def test_the_digest_of_another_file_does_not_count() -> None:
    assert read_digests("a", digest_text("b", ("ab" * 32,))) == ()


@pytest.mark.parametrize("name", ["policy", "value-2", "a.b_c", "x" * 100])
def test_a_series_may_have_a_plain_name(name: str) -> None:
    assert is_series_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "-x", "x" * 101, "a b", "a\n"])
def test_a_series_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    assert not is_series_name(name)
