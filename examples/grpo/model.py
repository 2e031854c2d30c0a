"""A tiny transformer over the symbols of the task, in plain torch, and how it is sampled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.grpo.problems import ANSWER, END, LENGTH, QUESTION, SYMBOLS
from examples.grpo.settings import Settings

Memory = list[Tensor]
"""Keys and values of the places that a block has seen."""


class Block(nn.Module):
    """Attention, then a feed-forward layer; each is added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention_in(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        if memory:
            key, value = torch.cat([memory[0], key], dim=2), torch.cat([memory[1], value], dim=2)
        if memory is not None:
            memory[:] = key, value
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=length > 1)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed(x)


class Adder(nn.Module):
    """Symbols in; out come, for each place, the logarithms of the chances of the one that follows."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.symbols = nn.Embedding(len(SYMBOLS), width)
        self.places = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, settings.heads) for _ in range(settings.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(SYMBOLS)))
        for table in (self.symbols, self.places):
            nn.init.normal_(table.weight, std=0.5)

    def forward(self, tokens: Tensor, memories: list[Memory] | None = None) -> Tensor:
        """With `memories` (a list for each block, empty at first) the tokens go on from those seen before,
        as one at a time."""
        begin = memories[0][0].shape[2] if memories and memories[0] else 0
        x = self.symbols(tokens) + self.places.weight[begin : begin + tokens.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, memories[number] if memories else None)
        return F.log_softmax(self.head(x), dim=-1)


def answer_logs(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logarithms of the chances of all symbols at the places of the answers, [rows, ANSWER, symbols]."""
    return model(tokens[:, :-1])[:, QUESTION - 1 :]


def chosen(logs: Tensor, tokens: Tensor) -> Tensor:
    """Of those, the ones of the symbols that the answers have, [rows, ANSWER]."""
    return logs.gather(2, tokens[:, QUESTION:, None]).squeeze(2)


@torch.no_grad()
def sample(
    model: Adder, questions: Tensor, times: int, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Answer each question `times` times: the whole texts, and the logarithms of their chances.

    Each symbol is drawn with the chance that the model gives it. Behind a line end there are only more.
    """
    memories: list[Memory] = [[] for _ in model.blocks]
    following = model(questions, memories)[:, -1].repeat_interleave(times, dim=0)
    memories = [[part.repeat_interleave(times, dim=0) for part in memory] for memory in memories]
    drawn: list[Tensor] = []
    logs: list[Tensor] = []
    for place in range(ANSWER):
        if place:
            following = model(drawn[-1], memories)[:, -1]
        symbol = torch.multinomial(following.exp(), 1, generator=chance)
        if place:
            symbol = torch.where(drawn[-1] == END, END, symbol)
        drawn.append(symbol)
        logs.append(following.gather(1, symbol))
    texts = torch.cat([questions.repeat_interleave(times, dim=0), *drawn], dim=1)
    return texts, torch.cat(logs, dim=1)
