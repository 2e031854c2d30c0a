"""The one place that knows which node this process runs: what public objects without arguments use.

`RoleGroup("actor")`, `barrier("x")` or `@rpc` in a user's script name no connection; they find it here.
The composition (`node.py`) installs it when it starts and removes it when it closes. Apart from this
slot no module of the package has state of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from runtime.errors import MisuseError
from runtime.job import ActorInfo

if TYPE_CHECKING:
    from runtime.peer.endpoint import Endpoint


class PeerAddress(NamedTuple):
    """One process start of an actor: where it listens, and who it is."""

    peer: str
    """Id of the process: "<actor name>.<incarnation>"."""
    address: str
    role: str = ""
    rank: int = -1
    host: str = ""
    incarnation: int = 0


class Directory(Protocol):
    """What a process knows about the others of its job. Implemented by `control.client`."""

    def roles(self) -> Mapping[str, list[ActorInfo]]:
        """Every planned actor by role, in rank order: known from the plan, running or not."""
        ...

    async def resolve(self, name: str) -> PeerAddress:
        """Where the actor `name` is. Waits while it starts or restarts; raises `PeerLostError` when it
        is gone for good, `MisuseError` (listing what there is) when the job has no such actor."""
        ...

    async def fate(self, peer: str) -> str | None:
        """After a link broke: the cause of that process's death in words ("SIGKILL", "exit 1"), once it
        is known (bounded by about two seconds), or None if it is alive as far as anybody knows."""
        ...


@dataclass
class Context:
    """The running node of this process."""

    loop: asyncio.AbstractEventLoop
    endpoint: Endpoint
    directory: Directory
    control: Any = None
    """`control.client.ControlClient`; typed loosely since control stands above this layer."""


class _Slot:
    current: Context | None = None


_slot = _Slot()


def install(context: Context | None) -> None:
    """Make `context` the process's own; None removes it."""
    _slot.current = context


def installed() -> Context | None:
    """The running node of this process, or None."""
    return _slot.current


def current() -> Context:
    """The running node of this process; `MisuseError` outside of a job."""
    if _slot.current is None:
        raise MisuseError(
            "this process is not part of a job: start it with `python -m runtime.launch script.py`, "
            "or call `runtime.init()` under torchrun"
        )
    return _slot.current
