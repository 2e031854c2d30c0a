"""A small GPT over bytes, in plain torch."""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.sft.settings import Settings


def rotate(x: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position (rotary embedding)."""
    length, width = x.shape[-2:]
    speeds = 1000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), speeds)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def evenly(x: Tensor) -> Tensor:
    """Scale the last dimension to a fixed length, so that attention stays calm at a high learning rate."""
    return 1.2 * F.rms_norm(x, x.shape[-1:])


class Block(nn.Module):
    """Attention, then a feed-forward layer; each is added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.attention_in(self.attention_norm(x)).view(rows, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        query, key = rotate(evenly(query)), rotate(evenly(key))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).reshape(rows, length, width))
        return x + self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))


class GPT(nn.Module):
    """Bytes in; out come, for each place, the scores of the byte that follows."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.context = settings.context
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, settings.heads) for _ in range(settings.layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.head.weight *= 0.2  # at first every byte is about as likely as any other

    def forward(self, data: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(data))))


def nats_per_byte(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


@torch.no_grad()
def write(model: GPT, start: bytes, length: int, seed: int) -> bytes:
    """Let the model go on from `start` for `length` bytes."""
    chance = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(start)])
    for _ in range(length):
        scores = model(text[:, -model.context :])[0, -1]
        following = torch.multinomial(F.softmax(scores / 0.8, dim=-1), 1, generator=chance)
        text = torch.cat([text, following[None]], dim=1)
    return bytes(text[0].tolist())


def fingerprint(model: GPT) -> str:
    """SHA-256 of all weights: two models have the same one only if they agree in every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
