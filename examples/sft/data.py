"""The text: the source of Python's own standard library, as bytes, split by file.

Every machine has it, nothing is downloaded, and whether a file is held out depends on its name
alone, so the split is the same everywhere.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT_PERCENT = 5
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def is_held_out(name: str) -> bool:
    return hashlib.sha256(name.encode()).digest()[0] * 100 < HELD_OUT_PERCENT * 256


def load_text(held_out: bool) -> Tensor:
    """All files of one part, one after the other, as one tensor of bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    files = {path.relative_to(library): path for path in library.rglob("*.py")}
    texts = [
        files[name].read_bytes()
        for name in sorted(files)
        if not SKIPPED & set(name.parts) and is_held_out(name.as_posix()) == held_out
    ]
    return torch.from_numpy(np.frombuffer(b"\n".join(texts), dtype=np.uint8).copy())


def random_rows(text: Tensor, rows: int, length: int, *key: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (each one byte further on), [rows, length] each.

    They follow from `key` alone. A trainer's key is (seed, step, rank): so the step is all that has
    to be remembered of the position in the data.
    """
    starts = np.random.default_rng(key).integers(len(text) - length, size=rows)
    cut = torch.stack([text[start : start + length + 1] for start in starts]).long()
    return cut[:, :-1], cut[:, 1:]
