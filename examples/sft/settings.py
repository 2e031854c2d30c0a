"""What can be set about this run. `[config]` in job.toml and the options of run.py have the same names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """`batch` is what one trainer takes in one step; `out` is where everything goes that is written."""

    steps: int = 300
    seed: int = 0
    out: str = "out/sft"
    resume: bool = False
    eval_every: int = 25
    checkpoint_every: int = 25
    print_every: int = 10
    layers: int = 3
    heads: int = 4
    width: int = 192
    context: int = 128
    batch: int = 8
    learning_rate: float = 3e-3
    warmup: int = 20
    held_out_rows: int = 64
    sample_bytes: int = 160


FAST = {
    "steps": 40,
    "eval_every": 20,
    "checkpoint_every": 5,
    "layers": 1,
    "heads": 2,
    "width": 32,
    "context": 32,
    "batch": 4,
    "held_out_rows": 16,
    "sample_bytes": 40,
}
"""A run of a few seconds, which learns little: to see that everything is in place."""
