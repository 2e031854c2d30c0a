"""The provider: `@rpc(remote_call.score)` takes name and signature from the stub."""

from __future__ import annotations

from examples.remote_call import remote_call
from runtime import current_worker, rpc


class Judge:
    """Scores texts until the job ends: it has no `run`, and its role is no driver."""

    def __init__(self) -> None:
        self._weights: dict[str, float] = {}
        self._scored = 0

    @rpc(remote_call.score)
    def score(self, texts: list[str], wanted: str) -> list[float]:
        self._scored += len(texts)
        return [
            sum(self._weights.get(letter, 1.0) for letter in text if letter in wanted)
            for text in texts
        ]

    @rpc(remote_call.longest)
    def longest(self, texts: list[str]) -> str:
        return max(texts, key=len)

    @rpc(remote_call.scored)
    async def scored(self) -> int:
        return self._scored

    @rpc(remote_call.weigh)
    def weigh(self, letter: str, weight: float) -> str:
        self._weights[letter] = weight
        return current_worker().actor_info.name
