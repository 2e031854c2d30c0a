"""Starts the job of job.toml with options: `python examples/sft/run.py --steps 600`.

Options that it does not know are the launcher's, as `--log-dir` (see `python -m runtime.launch --help`).
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))

from examples.sft.settings import FAST  # noqa: E402 - found only from the repository's folder
from runtime.job_toml import job_from_toml  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small GPT with two trainers and an evaluator."
    )
    parser.add_argument("--steps", type=int, help="how long to train (300)")
    parser.add_argument("--seed", type=int, help="of weights and batches (0)")
    parser.add_argument("--out", type=Path, help="where all results go (out/sft)")
    parser.add_argument(
        "--eval-every", type=int, metavar="N", help="ask the evaluator every N steps (25)"
    )
    parser.add_argument("--checkpoint-every", type=int, metavar="N", help="save every N steps (25)")
    parser.add_argument(
        "--resume", action="store_true", default=None, help="go on from the newest checkpoint"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a tiny model, 40 steps: is everything in place?"
    )
    options, launcher_options = parser.parse_known_args()

    given = {name: value for name, value in vars(options).items() if value is not None}
    fast = FAST if given.pop("fast") else {}
    job = job_from_toml((HERE / "job.toml").read_text())
    out = Path(given.pop("out", job.config["out"])).resolve()
    job = replace(job, config={**job.config, **fast, **given, "out": str(out)})

    out.mkdir(parents=True, exist_ok=True)
    (out / "job.toml").write_text(job.to_toml())
    if sys.stdout.isatty():
        os.environ.setdefault(
            "FORCE_COLOR", "1"
        )  # the workers' own output is a pipe to the launcher
    os.chdir(ROOT)  # where the workers find `examples.sft`
    command = [sys.executable, "-m", "runtime.launch", "--job", str(out / "job.toml")]
    os.execv(sys.executable, [*command, *launcher_options])


if __name__ == "__main__":
    main()
