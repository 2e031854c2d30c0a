"""The rollouts: they answer problems with the newest weights and put groups of answers into the queue."""

from __future__ import annotations

import random
import threading

import torch
from torch import Tensor

from examples.grpo.learning import Sample
from examples.grpo.model import Adder, sample
from examples.grpo.problems import QUESTION, decode, encode, questions
from examples.grpo.reward import QUEUE
from examples.grpo.settings import Settings
from runtime import Closed, DataQueue, RoleGroup, current_worker, rpc

Weights = dict[str, Tensor]


class Rollout:
    """`run` samples in the main thread; weights come in meanwhile, and count from the next samples on."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        worker = current_worker()
        self.settings = Settings(**worker.job_info.user_config)
        self.me = worker.actor_info
        self.newest: tuple[int, Weights] | None = None
        self.has_weights = threading.Event()
        self.model = Adder(self.settings).eval()

    @rpc
    def load_weights(self, weights: Weights, version: int) -> None:
        self.newest = (version, weights)
        self.has_weights.set()

    def run(self) -> None:
        trainers = RoleGroup("trainer").options(idempotent=True, retry=3)
        self.reward = RoleGroup("reward")[0].options(idempotent=True, retry=3)
        self.queue = DataQueue[Sample](QUEUE)
        # One that starts again in the middle of a run finds weights there; at the beginning they are to come.
        published = trainers.call_rank0("published_weights").result()
        if published and not self.newest:
            self.load_weights(published[1], published[0])
        self.has_weights.wait()

        seed = (self.settings.seed * 100 + self.me.rank) * 100 + self.me.restart_count
        self.draw, self.chance = random.Random(seed), torch.Generator().manual_seed(seed)
        problems = questions(held_out=False)
        try:
            while not current_worker().should_stop:
                self.sample_groups(self.draw.sample(problems, self.settings.sampled_groups))
        except Closed:
            return  # the trainers have learnt enough

    def sample_groups(self, problems: list[str]) -> None:
        assert self.newest is not None
        size = self.settings.group
        version, weights = self.newest
        self.model.load_state_dict(weights)
        tokens, logs = sample(self.model, encode(problems, QUESTION), size, self.chance)
        texts = decode(tokens)
        rewards = self.reward.call("score", texts).result()
        samples = [Sample(*parts) for parts in zip(texts, logs.tolist(), rewards, strict=True)]
        puts = [
            self.queue.put_async(*samples[row : row + size], group=problem, version=version)
            for row, problem in zip(range(0, len(samples), size), problems, strict=True)
        ]
        for put in puts:
            put.result()
