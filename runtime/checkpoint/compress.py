"""Compression of checkpoints: bytes to pieces on the way out, whole files on the way in.

gzip is Python's own; zstd and lz4 need their packages, which are imported when they are first asked
for. The same bytes always give the same pieces, so equal checkpoints stay equal when compressed.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from typing import Any

from runtime.errors import ConfigError

PIECE_BYTES = 8 << 20
"""Bytes handed on at a time: large enough for a disk, small enough to start writing at once."""

_PACKAGES = {"zstd": ("zstandard", "zstandard"), "lz4": ("lz4.frame", "lz4")}
_GZIP = 16 + zlib.MAX_WBITS
_FAST = 1
"""Weights hardly compress: the quickest level loses little and keeps up with a disk best."""


def check(compression: str | None) -> None:
    """`ConfigError` unless this compression exists and its package is installed."""
    allowed = [None, "gzip", *_PACKAGES]
    if compression not in allowed:
        raise ConfigError(f"compression={compression!r}: allowed are 'none', 'gzip', 'zstd', 'lz4'")
    if compression in _PACKAGES:
        _module(compression)


def pieces(data: memoryview, compression: str | None) -> Iterator[bytes | memoryview]:
    """What is to be written for `data`, in order."""
    parts = (data[i : i + PIECE_BYTES] for i in range(0, len(data), PIECE_BYTES))
    if compression is None:
        yield from parts
        return
    squeeze: Any
    if compression == "gzip":
        squeeze = zlib.compressobj(_FAST, wbits=_GZIP)
    elif compression == "zstd":
        squeeze = _module("zstd").ZstdCompressor(level=_FAST).compressobj()
    else:
        squeeze = _module("lz4").LZ4FrameCompressor()
        yield squeeze.begin()
    for part in parts:
        yield squeeze.compress(part)
    yield squeeze.flush()


def expand(stored: bytes, compression: str | None) -> bytes:
    """The bytes that were saved. `ValueError` (with its cause) when `stored` cannot be expanded."""
    if compression is None:
        return stored
    try:
        if compression == "lz4":
            whole: bytes = _module("lz4").decompress(stored)
            return whole
        stream: Any = zlib.decompressobj(wbits=_GZIP)
        if compression == "zstd":
            stream = _module("zstd").ZstdDecompressor().decompressobj()
        whole = stream.decompress(stored)
        if not stream.eof:
            raise ValueError("the end is missing")
        return whole
    except ConfigError:
        raise
    except Exception as error:  # each package has errors of its own for the same thing
        raise ValueError(f"not {compression} data: {error}") from error


def _module(compression: str) -> Any:
    module, package = _PACKAGES[compression]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"compression={compression!r} needs the package {package}, which is not installed "
            f"here: `pip install {package}`, or use 'gzip'"
        ) from None
