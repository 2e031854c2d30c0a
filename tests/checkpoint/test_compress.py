"""Compression of checkpoints: round trips, what is missing, what was cut off."""

from __future__ import annotations

import gzip
import importlib.util
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.checkpoint import compress
from runtime.errors import ConfigError

OPTIONAL = {"zstd": "zstandard", "lz4": "lz4"}
INSTALLED = [None, "gzip", *(k for k, v in OPTIONAL.items() if importlib.util.find_spec(v))]


def _stored(data: bytes, kind: str | None) -> bytes:
    return b"".join(compress.pieces(memoryview(data), kind))


@pytest.mark.parametrize("kind", INSTALLED)
@given(data=st.binary(max_size=2000))
def test_what_goes_in_comes_out(kind: str | None, data: bytes) -> None:
    assert compress.expand(_stored(data, kind), kind) == data


@pytest.mark.parametrize("kind", INSTALLED)
def test_equal_bytes_are_stored_as_equal_bytes(kind: str | None) -> None:
    data = b"weights" * 1000
    assert _stored(data, kind) == _stored(data, kind)


def test_without_compression_the_pieces_are_the_bytes_and_nothing_is_copied() -> None:
    data = memoryview(bytes(2 * compress.PIECE_BYTES + 1))
    sizes = [len(piece) for piece in compress.pieces(data, None)]
    assert sizes == [compress.PIECE_BYTES, compress.PIECE_BYTES, 1]
    assert all(isinstance(piece, memoryview) for piece in compress.pieces(data, None))


def test_gzip_files_are_those_of_the_gzip_program() -> None:
    assert gzip.decompress(_stored(b"hello" * 100, "gzip")) == b"hello" * 100


@pytest.mark.parametrize("kind", [k for k in INSTALLED if k])
def test_a_compressed_file_that_is_cut_off_or_something_else_is_no_value(kind: str) -> None:
    stored = _stored(b"hello" * 100, kind)
    for damaged in (stored[:-5], b"", b"not compressed at all"):
        with pytest.raises(ValueError):
            compress.expand(damaged, kind)


def test_an_unknown_compression_is_named_with_what_is_allowed() -> None:
    with pytest.raises(
        ConfigError, match="compression='xz': allowed are 'none', 'gzip', 'zstd', 'lz4'"
    ):
        compress.check("xz")


@pytest.mark.parametrize(("kind", "package"), OPTIONAL.items())
def test_a_missing_package_is_named(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "lz4.frame", None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        compress.check(kind)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        compress.expand(b"x", kind)
