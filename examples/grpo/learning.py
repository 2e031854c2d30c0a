"""What is learnt from: supervised at first, then from groups of samples (GRPO)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.grpo.model import answer_logs, chosen
from examples.grpo.problems import LENGTH, answered, encode
from examples.grpo.settings import Settings


class Sample(NamedTuple):
    """A problem and what the model wrote, with the logarithm of the chance that it gave each symbol."""

    text: str
    logs: list[float]
    reward: float


def supervised_loss(model: nn.Module, texts: list[str]) -> Tensor:
    """Nats per symbol of the right answers."""
    tokens, counts = encode(texts, LENGTH), answered(texts)
    return -(chosen(answer_logs(model, tokens), tokens) * counts).sum() / counts.sum()


def advantages(rewards: Tensor) -> Tensor:
    """How much better each sample is than its group, in deviations of that group: [groups, group]."""
    apart = rewards - rewards.mean(dim=1, keepdim=True)
    return apart / (rewards.std(dim=1, keepdim=True) + 1e-4)


def policy_loss(model: nn.Module, samples: list[Sample], settings: Settings) -> Tensor:
    """Make what was better than its group more likely, by a ratio of 1 + `clip` at most.

    A small bonus for entropy keeps the model from being sure too early: what it never tries, it never learns.

    `samples`: whole groups, one after the other. A group that is all right or all wrong says nothing and
    costs nothing; the first one always counts, because in a data-parallel step every rank takes part.
    """
    rewards = torch.tensor([sample.reward for sample in samples]).view(-1, settings.group)
    telling = rewards.min(dim=1).values < rewards.max(dim=1).values
    telling[0] = True
    better = advantages(rewards)[telling].view(-1, 1)
    rows = telling.repeat_interleave(settings.group).nonzero().flatten().tolist()
    texts = [samples[row].text for row in rows]
    tokens, counts = encode(texts, LENGTH), answered(texts)
    logs = answer_logs(model, tokens)
    ratio = (chosen(logs, tokens) - torch.tensor([samples[row].logs for row in rows])).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    gain = torch.minimum(ratio * better, clipped * better)
    entropy = -(logs.exp() * logs).sum(dim=2)
    return -((gain + settings.entropy * entropy) * counts).sum() / counts.sum()
