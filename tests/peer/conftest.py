"""The job that tests of groups, futures, proxies, batches, streams and stubs share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from runtime.transport.memory import NetworkSettings
from tests.peer.support import World, world
from tests.peer.workers import handlers


@pytest.fixture
async def job() -> AsyncIterator[World]:
    """`me-0` is this process; the workers w-0 … w-2 serve; nobody of `other` has started."""
    brief = NetworkSettings(connect_s=0.1)  # time is real here: a dial to a dead worker ends soon
    async with world(brief, me=1, w=3, empty=0, other=2) as made:
        me = await made.start("me-0")
        made.install(me)
        for rank in range(3):
            await made.start(f"w-{rank}", **handlers(rank))
        yield made
