"""A small job for tests of what users call: three workers that serve, and plain code in a thread."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.peer.support import World, echo

FEW_S = 10.0


def handlers(rank: int) -> dict[str, Any]:
    """What the worker of that rank exposes."""

    async def who() -> int:
        return rank

    async def odd_fails(text: str = "no") -> int:
        if rank % 2:
            raise KeyError(text)
        return rank

    async def hang() -> None:
        await asyncio.Event().wait()

    def plain(x: int, *, y: int = 0) -> int:
        return rank * 100 + x + y

    return {"who": who, "odd_fails": odd_fails, "hang": hang, "plain": plain, "echo": echo}


def worker(job: World, rank: int) -> Any:
    """The endpoint of the worker of that rank, as long as it runs."""
    return next(e for e in job._open if e.peer.startswith(f"w-{rank}."))


def blocking(work: Any, *args: Any) -> Any:
    """Run plain code in a thread, as a trainer's main thread would."""
    return asyncio.to_thread(work, *args)
