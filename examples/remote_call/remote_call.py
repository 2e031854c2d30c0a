"""What the judges of this job offer, as functions that everybody may import and call.

The bodies are never run: `@remote` says which role answers, and how its members share the work.
"""

from __future__ import annotations

from runtime import remote


@remote("judge", how="batch")
def score(texts: list[str], wanted: str) -> list[float]:
    """How much of `wanted` each text has. Every judge gets a piece of the texts."""
    raise NotImplementedError


@remote("judge", how="any")
def longest(texts: list[str]) -> str:
    """The longest of the texts. Whichever judge has the least to do answers."""
    raise NotImplementedError


@remote("judge", how="rank0")
async def scored() -> int:
    """How many texts the first judge has scored. Awaited, since it is an `async def`."""
    raise NotImplementedError


@remote("judge")
def weigh(letter: str, weight: float) -> str:
    """Let a letter count `weight` times from now on. Every judge is told; who, is the result."""
    raise NotImplementedError
