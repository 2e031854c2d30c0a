"""Starts the job of job.toml with options: `python examples/sft/run.py --steps 600`.

Options that it does not know are the launcher's, as `--log-dir` (see `python -m runtime.launch --help`).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from examples.common.start import options, start  # noqa: E402 - found only from the repository's folder
from examples.sft.settings import FAST  # noqa: E402

if __name__ == "__main__":
    about = "Train a small GPT with two trainers and an evaluator."
    start(
        options(about, 300, "out/sft", "a tiny model, 40 steps: is everything in place?"),
        HERE,
        FAST,
    )
