"""Starts the job of an example with options: its `run.py` says which there are."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from runtime.job_toml import job_from_toml

ROOT = Path(__file__).resolve().parents[2]


def start(parser: argparse.ArgumentParser, folder: Path, fast: Mapping[str, Any]) -> NoReturn:
    """Become the launcher of `folder`'s job.toml, with the options that were given in its `[config]`.

    `--fast` sets what `fast` holds. Options that the parser does not know go to the launcher.
    """
    options, launcher_options = parser.parse_known_args()
    given = {name: value for name, value in vars(options).items() if value is not None}
    chosen = fast if given.pop("fast") else {}
    job = job_from_toml((folder / "job.toml").read_text())
    out = Path(given.pop("out", job.config["out"])).resolve()
    job = replace(job, config={**job.config, **chosen, **given, "out": str(out)})

    out.mkdir(parents=True, exist_ok=True)
    (out / "job.toml").write_text(job.to_toml())
    if sys.stdout.isatty():
        os.environ.setdefault(
            "FORCE_COLOR", "1"
        )  # the workers' own output is a pipe to the launcher
    os.chdir(ROOT)  # where the workers find `examples`
    command = [sys.executable, "-m", "runtime.launch", "--job", str(out / "job.toml")]
    os.execv(sys.executable, [*command, *launcher_options])


def options(description: str, steps: int, out: str, fast: str) -> argparse.ArgumentParser:
    """The options that every example has, with their defaults in the help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, help=f"how long to train ({steps})")
    parser.add_argument("--seed", type=int, help="of everything that is drawn by chance (0)")
    parser.add_argument("--out", type=Path, help=f"where all results go ({out})")
    parser.add_argument(
        "--eval-every", type=int, metavar="N", help="measure the curve every N steps (25)"
    )
    parser.add_argument("--checkpoint-every", type=int, metavar="N", help="save every N steps (25)")
    parser.add_argument(
        "--resume", action="store_true", default=None, help="go on from the newest checkpoint"
    )
    parser.add_argument("--fast", action="store_true", help=fast)
    return parser
