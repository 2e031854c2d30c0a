"""Where actors are and what became of processes: what the directory says, and what we know before it does.

The directory may lag behind: a process that we were told is dead is never looked at again, and one whose
link broke is called only after its fate was asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from runtime.peer.context import Directory, PeerAddress

logger = logging.getLogger(__name__)

FATE_S = 2.0
"""How long a broken link's calls wait for the cause of the process's death."""

_LOOK_AGAIN_S = 0.05
_KEPT = 4096


class Finder:
    """Finds living processes. `lost(peer, cause)` is told of a death that was found out here."""

    def __init__(self, directory: Directory | None, lost: Callable[[str, str], None]) -> None:
        self.directory = directory
        self._lost = lost
        self._dead: dict[str, str] = {}
        self._doubtful: dict[str, None] = {}

    def died(self, peer: str, cause: str) -> None:
        """The process `peer` is dead, for certain."""
        self._dead[peer] = cause
        _keep_newest(self._dead)

    def doubt(self, peer: str) -> None:
        """The link to `peer` broke: it may be dead."""
        self._doubtful[peer] = None
        _keep_newest(self._doubtful)

    async def living(self, name: str) -> PeerAddress:
        """Where the actor `name` is. Waits for its next start where it has died; raises what the
        directory raises."""
        assert self.directory is not None
        while True:
            address = await self.directory.resolve(name)
            if address.peer in self._doubtful and address.peer not in self._dead:
                await self.fate(address.peer)
            if address.peer not in self._dead:
                return address
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def fate(self, peer: str) -> None:
        """Find out what became of a process whose link broke. `lost` is told if it is dead."""
        cause = self._dead.get(peer)
        if cause is None and self.directory is not None:
            try:
                async with asyncio.timeout(FATE_S):
                    cause = await self.directory.fate(peer)
            except Exception as error:  # noqa: BLE001 - whatever ails the directory, calls must end
                logger.debug("the fate of %s is not known: %r", peer, error)
        self._doubtful.pop(peer, None)
        if cause is not None:
            self._lost(peer, cause)


def _keep_newest(peers: dict[str, Any]) -> None:
    if len(peers) > _KEPT:
        del peers[next(iter(peers))]
