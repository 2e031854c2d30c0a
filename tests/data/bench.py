"""A queue's machine in the hands of a test."""

from __future__ import annotations

from typing import Any

from runtime.data.buffer import QueueBuffer
from runtime.machine import Call, Effect, Reply


def bodies(*items: str) -> list[bytes]:
    """As clients would encode them."""
    return [item.encode() for item in items]


class Bench:
    """A machine, the time, and shorter words."""

    def __init__(self, size: int = 1000, max_bytes: int | None = None, **more: Any) -> None:
        self.machine = QueueBuffer("q", size, max_bytes, **more)
        self.now = 0.0
        self._number = 0

    def call(self, who: str, op: str, **fields: Any) -> tuple[Call, list[Effect]]:
        self._number += 1
        call = Call(who, self._number)
        return call, self.machine.handle({"op": op, **fields}, call, self.now)

    def put(self, who: str, *items: str, **fields: Any) -> list[Effect]:
        return self.call(who, "put", bodies=bodies(*items), **fields)[1]

    def get(self, who: str, most: int = 1, least: int = 1, **fields: Any) -> list[str]:
        call, effects = self.call(who, "get", most=most, least=least, **fields)
        return [name for effect in effects if is_for(effect, call) for name in names(effect)]

    def took_all(self, who: str) -> None:
        for number in range(1, self._number + 1):
            self.call(who, "took", about=number)

    def figures(self) -> dict[str, Any]:
        (reply,) = self.call("anybody", "statistics")[1]
        assert isinstance(reply, Reply)
        figures: dict[str, Any] = reply.value
        return figures


def is_for(effect: Effect, call: Call) -> bool:
    return isinstance(effect, Reply) and effect.call == call


def names(effect: Effect) -> list[str]:
    assert isinstance(effect, Reply)
    return [body.decode() for body in effect.value["bodies"]]
