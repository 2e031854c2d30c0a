"""Starts the job of job.toml with options: `python examples/grpo/run.py --steps 1000`.

Options that it does not know are the launcher's, as `--log-dir` (see `python -m runtime.launch --help`).
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from examples.common.start import options, start  # noqa: E402 - found only from the repository's folder
from examples.grpo.settings import FAST  # noqa: E402

if __name__ == "__main__":
    about = "Two trainers, two rollouts and a reward teach a tiny transformer to add."
    start(options(about, 500, "out/grpo", "60 steps: does it begin to learn?"), HERE, FAST)
