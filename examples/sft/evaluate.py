"""The evaluator: a role of its own that waits for weights and says how good they are."""

from __future__ import annotations

from typing import NamedTuple

import torch

from examples.sft.data import load_text, random_rows
from examples.sft.model import GPT, nats_per_byte, write
from examples.sft.settings import Settings
from runtime import current_worker, rpc


class Evaluation(NamedTuple):
    """`loss`: nats per byte on files that no trainer has seen."""

    step: int
    loss: float
    sample: str


class Evaluator:
    """Constructed once in its worker, which then serves calls of the `@rpc` methods until the job ends."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.settings = Settings(**current_worker().job_info.user_config)
        self.model = GPT(self.settings).eval()
        text = load_text(held_out=True)
        self.data, self.targets = random_rows(
            text, self.settings.held_out_rows, self.settings.context, self.settings.seed
        )

    @rpc
    def evaluate(self, step: int, weights: dict[str, torch.Tensor]) -> Evaluation:
        self.model.load_state_dict(weights)
        with torch.no_grad():
            loss = nats_per_byte(self.model(self.data), self.targets).item()
        sample = write(self.model, b"def ", self.settings.sample_bytes, seed=step)
        return Evaluation(step, loss, printable(sample))


def printable(text: bytes) -> str:
    """What a terminal can show; a model that has learnt little writes anything."""
    shown = text.decode("utf-8", "replace")
    return "".join(c if c.isprintable() or c == "\n" else "\N{MIDDLE DOT}" for c in shown)
