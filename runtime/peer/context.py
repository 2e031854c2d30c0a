"""The one place that knows which node this process runs: what public objects without arguments use.

`RoleGroup("actor")`, `barrier("x")` or `@rpc` in a user's script name no connection; they find it here.
The composition (`node.py`) installs it when it starts and removes it when it closes. Apart from this
slot, and the list of declared functions in `method.py`, no module of the package has state of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from runtime.errors import MisuseError
from runtime.job import ActorInfo
from runtime.peer.method import listen

if TYPE_CHECKING:
    import asyncio

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


_OUTSIDE = "this process is not part of a job: start it with `python -m runtime.launch script.py`"


class _Slot:
    current: Context | None = None
    starter: Callable[[], None] | None = None
    absent: str = _OUTSIDE
    held: Any = None


_slot = _Slot()


def install(context: Context | None) -> None:
    """Make `context` the process's own; None removes it. Functions declared with `@rpc(export=True)`
    are exposed by it, also those of modules that are imported later."""
    _slot.current = context
    listen(context.endpoint.export_function if context is not None else None)


def installed() -> Context | None:
    """The running node of this process, or None."""
    return _slot.current


def on_first_use(starter: Callable[[], None] | None, absent: str = _OUTSIDE) -> None:
    """Call `starter` when `current` is first asked for and no node runs: it must start one and
    install its context. None: there is none to start, and `absent` says why."""
    _slot.starter, _slot.absent = starter, absent


def hold(spec: Any) -> None:
    """Keep what this process was started as (a `launcher.plan.WorkerSpec`) for a node that the program
    makes itself; None: it may not make one (any more)."""
    _slot.held = spec


def held() -> Any:
    """What `hold` kept; None in a process that has no node to make."""
    return _slot.held


def current() -> Context:
    """The running node of this process, started now where it starts on first use; `MisuseError`
    outside of a job."""
    if _slot.current is None and _slot.starter is not None:
        _slot.starter()
    if _slot.current is None:
        raise MisuseError(_slot.absent)
    return _slot.current
