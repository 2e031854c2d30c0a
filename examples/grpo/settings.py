"""What can be set about this run. `[config]` in job.toml and the options of run.py have the same names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """A group is `group` samples of one problem. `out` is where everything goes that is written."""

    steps: int = 500
    seed: int = 0
    out: str = "out/grpo"
    resume: bool = False
    eval_every: int = 25
    checkpoint_every: int = 25
    print_every: int = 25
    layers: int = 2
    heads: int = 4
    width: int = 64
    warm_reward: float = 0.3
    """The supervised warm-up ends when the mean reward has come so far."""
    warm_batch: int = 128
    warm_rate: float = 5e-3
    group: int = 8
    groups: int = 64
    """What one trainer takes in one step."""
    sampled_groups: int = 16
    """What a rollout samples at once."""
    staleness: int = 2
    """So many steps old may the weights be that a trained group was sampled with."""
    clip: float = 0.2
    entropy: float = 0.02
    learning_rate: float = 2e-3


FAST = {"steps": 60, "eval_every": 20, "checkpoint_every": 10, "print_every": 10}
"""Less than a minute, which is enough to see the reward rise."""
