"""The trainers: data-parallel training that can be killed at any moment and goes on with the same bits.

`main` runs in every trainer. The process group is there when it is called. Everything that decides
about the weights follows from the seed, the step and the rank, and stands in the checkpoint; the
evaluator gets copies, and nothing waits for it but the end.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.common.report import Curve, Progress
from examples.common.saving import pack, restore, start_anew
from examples.sft.data import load_text, random_rows
from examples.sft.evaluate import Evaluation
from examples.sft.model import GPT, fingerprint, nats_per_byte
from examples.sft.settings import Settings
from runtime import CheckpointManager, Future, PeerLostError, RoleGroup, current_worker


def main(config: dict[str, Any]) -> None:
    settings = Settings(**config)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(settings.seed)
    model = GPT(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95))
    checkpoints = CheckpointManager(Path(settings.out) / "checkpoints", keep_last_n=3)

    first = 0
    resume = settings.resume or current_worker().actor_info.restart_count > 0
    if resume:
        first = restore(checkpoints, model, optimizer, settings.seed, settings.steps) or 0
    elif dist.get_rank() == 0:
        start_anew(checkpoints)

    text = load_text(held_out=False)
    parallel = DistributedDataParallel(model)
    watcher = Watcher(settings, first, resume, model) if dist.get_rank() == 0 else None
    for step in range(first, settings.steps):
        loss = train_step(parallel, optimizer, text, settings, step)
        current_worker().report(step=step + 1, loss=loss)
        if watcher:
            watcher.after_step(step + 1, loss, model)
            if (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.steps:
                checkpoints.save_sync(pack(model, optimizer, settings.seed, step + 1), step + 1)

    if watcher:
        checkpoints.wait_sync()
        watcher.finish(model)


def train_step(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    text: torch.Tensor,
    settings: Settings,
    step: int,
) -> float:
    data, targets = random_rows(
        text, settings.batch, settings.context, settings.seed, step, dist.get_rank()
    )
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * pace(step, settings)
    loss = nats_per_byte(model(data), targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def pace(step: int, settings: Settings) -> float:
    """The share of the learning rate at this step: a short rise, then half a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / settings.warmup)
    return rise * (0.55 + 0.45 * math.cos(math.pi * step / settings.steps))


class Watcher:
    """What only rank 0 does: the progress line, and asking the evaluator without waiting for it."""

    def __init__(self, settings: Settings, first: int, resume: bool, model: GPT) -> None:
        self.settings = settings
        self.out = Path(settings.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.curve = Curve(
            self.out / "curve.csv", "nats_per_byte", until_step=first if resume else -1
        )
        self.progress = Progress(
            first,
            settings.steps,
            settings.batch * settings.context * dist.get_world_size(),
            "tokens",
        )
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{count:,} parameters, steps {first} to {settings.steps}", flush=True)

        self.evaluator = RoleGroup("evaluator")[0]
        self.answer: Future[Evaluation] | None = None
        self.sample = ""
        if first not in self.curve.values:
            self.ask(first, model)

    def after_step(self, step: int, loss: float, model: GPT) -> None:
        if step % self.settings.print_every == 0 or step == self.settings.steps:
            self.progress.show(step, f"loss {loss:.3f}")
        if self.answer is not None and self.answer.done():
            self.take_answer()
        due = step % self.settings.eval_every == 0 and step < self.settings.steps
        if due and self.answer is None:
            self.ask(step, model)

    def ask(self, step: int, model: GPT) -> None:
        """Send a copy of the weights: training changes its own while they are on their way."""
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.question = (step, weights)
        self.lost = 0
        self.answer = self.evaluator.call("evaluate", *self.question)

    def take_answer(self) -> None:
        """Note the result. An evaluator that died is asked again: its role starts another one."""
        assert self.answer is not None
        try:
            found = self.answer.result()
        except PeerLostError as error:
            self.lost += 1
            if self.lost == 3:
                raise
            print(f"the evaluator was lost ({error.cause}): asking again", flush=True)
            self.answer = self.evaluator.call("evaluate", *self.question)
            return
        self.answer = None
        self.sample = found.sample
        self.curve.add(found.step, found.loss)
        print(f"step {found.step}: held-out loss {found.loss:.3f} nats per byte", flush=True)

    def finish(self, model: GPT) -> None:
        """Wait for the last answers, then write and tell what came out."""
        while self.answer is not None:
            self.take_answer()
        self.ask(self.settings.steps, model)
        while self.answer is not None:
            self.take_answer()

        self.curve.draw(self.out / "curve.png", "held-out loss, nats per byte")
        torch.save(model.state_dict(), self.out / "model.pt")
        digest = fingerprint(model)
        (self.out / "weights.sha256").write_text(digest + "\n")
        losses = self.curve.values
        print(f"what it writes now:\n{self.sample}\n")
        print(f"held-out loss {losses[min(losses)]:.2f} -> {losses[max(losses)]:.2f} nats per byte")
        print(f"weights {digest}")
        print(f"in {self.out}: curve.png, curve.csv, model.pt, checkpoints/", flush=True)
