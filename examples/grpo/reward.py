"""The reward: a role of its own that marks answers. It owns the queue of samples, too."""

from __future__ import annotations

from examples.grpo.learning import Sample
from examples.grpo.problems import reward
from examples.grpo.settings import Settings
from runtime import DataQueue, current_worker, rpc

QUEUE = "samples"


class Reward:
    """Constructed once in its worker, which then serves calls of the `@rpc` methods until the job ends."""

    def __init__(self) -> None:
        settings = Settings(**current_worker().job_info.user_config)
        # Room for what two trainers take in one step: rollouts cannot run far ahead.
        size = 2 * settings.groups * settings.group
        self.queue = DataQueue[Sample](QUEUE, is_master=True, size=size)

    @rpc
    def score(self, texts: list[str]) -> list[float]:
        return [reward(text) for text in texts]
