"""The task: `17+25=42`, a problem of two numbers of two digits and an answer of one to four symbols.

An answer is written as people do, first digit first, and ends with a line end.
"""

from __future__ import annotations

import torch
from torch import Tensor

SYMBOLS = "0123456789+=\n"
END = SYMBOLS.index("\n")
QUESTION = len("17+25=")
ANSWER = len("198\n")
LENGTH = QUESTION + ANSWER

_ALL = [f"{first}+{second}=" for first in range(10, 100) for second in range(10, 100)]
_HELD_OUT = 405


def questions(held_out: bool) -> list[str]:
    """All problems of one part, shuffled: a twentieth is never trained on. The same in every process and run."""
    order = torch.randperm(len(_ALL), generator=torch.Generator().manual_seed(0)).tolist()
    return [_ALL[n] for n in (order[:_HELD_OUT] if held_out else order[_HELD_OUT:])]


def solved(question: str) -> str:
    """The question with its right answer."""
    first, second = question.rstrip("=").split("+")
    return f"{question}{int(first) + int(second)}\n"


def reward(text: str) -> float:
    """1 for the right answer and not a symbol more or less, else 0."""
    return float(text == solved(text[:QUESTION]))


def encode(texts: list[str], length: int) -> Tensor:
    """The symbols as numbers, [texts, length], filled up with line ends."""
    return torch.tensor([[SYMBOLS.index(c) for c in text.ljust(length, "\n")] for text in texts])


def decode(tokens: Tensor) -> list[str]:
    """Whole texts, each up to the first line end."""
    texts = ("".join(SYMBOLS[n] for n in row) for row in tokens.tolist())
    return ["".join(text.partition("\n")[:2]) for text in texts]


def answered(texts: list[str]) -> Tensor:
    """1 where a text has a symbol of an answer, 0 behind its line end: [texts, ANSWER]."""
    lengths = torch.tensor([len(text) - QUESTION for text in texts])
    return (torch.arange(ANSWER) < lengths[:, None]).float()
