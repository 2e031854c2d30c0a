"""The trainers: a supervised warm-up, then GRPO with what the rollouts sample.

Both take whole groups from the queue and step together (DDP). Rank 0 also gives out the weights after each
step, measures, draws and saves. The gang can be killed at any moment and goes on from the last checkpoint.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from examples.common.report import Curve, Progress
from examples.common.saving import pack, restore, start_anew
from examples.grpo.learning import Sample, policy_loss, supervised_loss
from examples.grpo.model import Adder, sample
from examples.grpo.problems import QUESTION, decode, encode, questions, solved
from examples.grpo.reward import QUEUE
from examples.grpo.rollout import Weights
from examples.grpo.settings import Settings
from runtime import CheckpointManager, DataQueue, RoleGroup, current_worker, rpc

LONGEST_WARM_UP = 2000
MEASURED = 810


class Trainer:
    """`run` is called when the process group is there."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        worker = current_worker()
        self.settings = Settings(**worker.job_info.user_config)
        self.restarts = worker.actor_info.restart_count
        self.published: tuple[int, Weights] | None = None

    @rpc
    def published_weights(self) -> tuple[int, Weights] | None:
        """The version and the weights that were given out last, for a rollout that starts."""
        return self.published

    def run(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        self.model = Adder(settings)
        self.parallel = DistributedDataParallel(self.model)
        self.reward = RoleGroup("reward")[0].options(idempotent=True, retry=3)
        self.rollouts = RoleGroup("rollout").options(return_exceptions=True)
        self.queue = DataQueue[Sample](QUEUE)
        checkpoints = CheckpointManager(Path(settings.out) / "checkpoints", keep_last_n=3)
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)

        first = None
        if settings.resume or self.restarts:
            first = restore(checkpoints, self.model, optimizer, settings.seed, settings.steps)
        elif dist.get_rank() == 0:
            start_anew(checkpoints)
        if first is None:
            self.warm_up()
        watcher = Watcher(self, first or 0) if dist.get_rank() == 0 else None
        if watcher and first is None:
            checkpoints.save_sync(pack(self.model, optimizer, settings.seed, 0), 0)

        for step in range(first or 0, settings.steps):
            if watcher:
                self.publish(self.version(step))
            mean = self.train_step(optimizer, step)
            current_worker().report(step=step + 1, reward=mean)
            if watcher:
                watcher.after_step(step + 1, mean)
                if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                    packed = pack(self.model, optimizer, settings.seed, step + 1)
                    checkpoints.save_sync(packed, step + 1)
        if watcher:
            watcher.finish()
            checkpoints.wait_sync()

    def version(self, step: int) -> int:
        """Versions only grow: those of a restarted gang are above all of the one that died, whose samples
        are stale therefore."""
        return self.restarts * (self.settings.steps + self.settings.staleness + 1) + step

    def publish(self, version: int) -> None:
        """Nobody waits for the rollouts to have them. One that is dead asks when it starts again."""
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.published = (version, weights)
        self.rollouts.broadcast(weights, version=version)

    # -- learning -----------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Learn from right answers until the mean reward has come to `warm_reward`."""
        settings = self.settings
        problems = questions(held_out=False)
        draw = random.Random(settings.seed * dist.get_world_size() + dist.get_rank())
        optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(LONGEST_WARM_UP):
            if step % 10 == 0 and self.common_mean_reward() >= settings.warm_reward:
                return
            texts = [solved(question) for question in draw.sample(problems, settings.warm_batch)]
            rate = settings.warm_rate * min(1.0, (step + 1) / 20)
            descend(self.parallel, optimizer, supervised_loss(self.parallel, texts), rate)
        raise RuntimeError(f"no mean reward of {settings.warm_reward} in {LONGEST_WARM_UP} steps")

    def train_step(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Learn from what comes next out of the queue. The mean reward of that."""
        settings = self.settings
        count = settings.groups * settings.group
        oldest = max(0, self.version(step) - settings.staleness)
        samples = self.queue.get(count, min_size=count, min_version=oldest)
        loss = policy_loss(self.parallel, samples, settings)
        rise = min(1.0, (step + 1) / 20)
        rate = settings.learning_rate * rise * (1 - 0.9 * step / settings.steps)
        descend(self.parallel, optimizer, loss, rate)
        return sum(sample.reward for sample in samples) / len(samples)

    # -- measuring ----------------------------------------------------------------------------

    def mean_reward(self, held_out: bool = False) -> float:
        """Of the newest weights: one fresh sample for each of the same 810 problems (or those never trained
        on), marked by the reward role."""
        chance = torch.Generator().manual_seed(self.settings.seed)
        problems = questions(held_out)[:MEASURED]
        tokens, _ = sample(self.model, encode(problems, QUESTION), 1, chance)
        rewards = self.reward.call("score", decode(tokens)).result(timeout=60)
        return float(sum(rewards) / len(rewards))

    def common_mean_reward(self) -> float:
        """`mean_reward`, measured once and known to all trainers."""
        found = torch.tensor(self.mean_reward() if dist.get_rank() == 0 else 0.0)
        dist.broadcast(found, src=0)
        return found.item()


def descend(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float
) -> None:
    """One step of the optimizer; the ranks' gradients are averaged."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


class Watcher:
    """What only rank 0 does: the progress line, the curve, and what is told at the end."""

    def __init__(self, trainer: Trainer, first: int) -> None:
        settings = trainer.settings
        self.trainer, self.settings = trainer, settings
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.curve = Curve(self.out / "curve.csv", "mean_reward", until_step=first or -1)
        samples = settings.group * settings.groups * dist.get_world_size()
        self.progress = Progress(first, settings.steps, samples, "samples")
        if first not in self.curve.values:
            self.measure(first)
        warm = self.curve.values[first]
        print(f"steps {first} to {settings.steps}, mean reward {warm:.3f}", flush=True)

    def measure(self, step: int) -> None:
        self.curve.add(step, self.trainer.mean_reward())

    def after_step(self, step: int, mean: float) -> None:
        """`mean`: reward of what was learnt from in this step."""
        learnt = f"samples {mean:.3f}"
        if step % self.settings.eval_every == 0 or step == self.settings.steps:
            self.measure(step)
            learnt += f"  mean reward {self.curve.values[step]:.3f}"
        if step % self.settings.print_every == 0 or step == self.settings.steps:
            self.progress.show(step, learnt)

    def finish(self) -> None:
        """End the rollouts, then write and tell what came out."""
        queue = self.trainer.queue
        queue.close()
        unseen = self.trainer.mean_reward(held_out=True)
        figures = queue.statistics()
        values = self.curve.values
        self.curve.draw(self.out / "curve.png", "mean reward", top=1.05)
        torch.save(self.trainer.model.state_dict(), self.out / "model.pt")
        print(f"{figures.got_total:,} samples used, {figures.dropped:,} dropped as too old")
        print(f"mean reward {unseen:.2f} on the problems that were never trained on")
        print(f"mean reward {values[min(values)]:.2f} -> {values[max(values)]:.2f}")
        print(f"in {self.out}: curve.png, curve.csv, model.pt, checkpoints/", flush=True)
