"""The names of checkpoint files, and the text of the digest files beside them.

One save of one rank is one file that holds exactly the bytes (`docs/checkpoint-format.md`):

    checkpoint-<step>.ckpt             rank 0
    checkpoint-<step>.rank<k>.ckpt     rank k, where its bytes are not rank 0's
    ….ckpt.gz  ….ckpt.zst  ….ckpt.lz4  compressed
    <file>.sha256                      its digest, as `sha256sum` writes and checks it

Only what these rules give is ours; every other name in the folder belongs to somebody else. How the
files are written, and in which order, is decided by `series.py` and `store.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

DIGEST_SUFFIX = ".sha256"
SUFFIX_OF = {None: "", "gzip": ".gz", "zstd": ".zst", "lz4": ".lz4"}
"""What a compression adds to a file's name."""

_COMPRESSION_OF = {suffix: kind for kind, suffix in SUFFIX_OF.items()}
_NAME = re.compile(
    r"checkpoint-(?P<step>0|[1-9][0-9]*)(?:\.rank(?P<rank>[1-9][0-9]*))?\.ckpt"
    r"(?P<suffix>|\.gz|\.zst|\.lz4)"
)
_DIGEST_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>.+)")
_SERIES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class Piece(NamedTuple):
    """One checkpoint file: whose bytes of which step, and how they are stored."""

    step: int
    rank: int = 0
    compression: str | None = None

    @property
    def name(self) -> str:
        rank = f".rank{self.rank}" if self.rank else ""
        return f"checkpoint-{self.step}{rank}.ckpt{SUFFIX_OF[self.compression]}"

    @property
    def digest_name(self) -> str:
        return self.name + DIGEST_SUFFIX


def parse(name: str) -> Piece | None:
    """The piece that a file of this name holds; None for names that are not ours."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Piece(
        step=int(found["step"]),
        rank=int(found["rank"] or 0),
        compression=_COMPRESSION_OF[found["suffix"]],
    )


def digest_text(name: str, digests: tuple[str, ...]) -> bytes:
    """The content of a digest file. Two digests while a file is replaced: either of them is right."""
    return "".join(f"{digest}  {name}\n" for digest in digests).encode()


def read_digests(name: str, text: bytes) -> tuple[str, ...]:
    """The digests that a digest file allows for the file `name`; none if its text is not of ours."""
    lines = text.decode("utf-8", "replace").splitlines()
    found = [_DIGEST_LINE.fullmatch(line) for line in lines]
    return tuple(line["digest"] for line in found if line is not None and line["name"] == name)


def is_series_name(name: str) -> bool:
    """Whether `name` may name a series: it becomes a folder."""
    return _SERIES.fullmatch(name) is not None
