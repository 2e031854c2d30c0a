"""Every error of ours, as one tree: whose fault it is and what can be done next.

    RuntimeFault                     anything that this package raises on purpose; `.reason` in words
    ├─ MisuseError (ValueError)      the caller is wrong: bad argument, unknown role, wrong thread
    │  ├─ ArgumentError (TypeError)  arguments do not fit the signature of what was called
    │  └─ VersionConflict            a conditional `kv.put` met another version
    ├─ NotExposedError (AttributeError)  the peer has no such method; lists what it has
    ├─ RemoteError                   the handler over there raised
    ├─ PeerLostError (ConnectionError)   the process that was called is gone
    ├─ CallGroupError (ExceptionGroup)   calls to several members of a group failed
    ├─ WorkerFailureError            one or more workers of a group failed
    ├─ BarrierBroken                 a barrier cannot be completed any more
    ├─ Timeout (TimeoutError)        waited as long as was asked
    ├─ Closed, Full, Empty, LeaseLost    ends of queues and streams
    ├─ ResourceInsufficientError     more was asked for than there is
    ├─ RendezvousError, QuorumLost   control plane
    ├─ CheckpointError               saving or loading failed
    │  └─ CheckpointCorrupt          bytes are there but not those that were written
    ├─ WireError (ValueError)        bytes of a peer that are not our protocol
    └─ ConfigError (ValueError)      a file, a flag or a variable says something that is not allowed

Errors cross process borders, so each one is rebuilt from its `args` and its `__dict__`
(`BaseException.__reduce__`): constructors must accept what they put into `args`.
How a `RemoteError` is made from the wire is `wire.codec`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class RuntimeFault(Exception):
    """Base of all errors of this package. `reason` says in words what happened."""

    @property
    def reason(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return self.reason


class MisuseError(RuntimeFault, ValueError):
    """The caller is wrong. The text names what was found and what would be right."""


class ArgumentError(MisuseError, TypeError):
    """Arguments do not fit the signature of what was called, or cannot be sent."""


class VersionConflict(MisuseError):
    """`kv.put(if_version=...)` met another version. `.key`, `.expected`, `.found`."""

    def __init__(self, reason: str, key: str = "", expected: int = 0, found: int = 0) -> None:
        super().__init__(reason)
        self.key, self.expected, self.found = key, expected, found


class NotExposedError(RuntimeFault, AttributeError):
    """The peer exposes no method of that name. `.exposed` lists those it does expose."""

    def __init__(self, reason: str, exposed: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.exposed = list(exposed)


class RemoteError(RuntimeFault):
    """A handler raised. Also an instance of the original class where that could be rebuilt.

    Attributes: `type_name` (qualified name of the original class), `message` (its text),
    `remote_traceback` (text), `peer` (process id string), `role`, `rank`.
    """

    def __init__(
        self,
        type_name: str,
        message: str = "",
        remote_traceback: str = "",
        peer: str = "",
        role: str = "",
        rank: int = -1,
    ) -> None:
        super().__init__(type_name, message, remote_traceback, peer, role, rank)
        self.type_name, self.message, self.remote_traceback = type_name, message, remote_traceback
        self.peer, self.role, self.rank = peer, role, rank

    @property
    def reason(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name

    def __str__(self) -> str:
        where = f" in {self.role}-{self.rank}" if self.role else f" in {self.peer}"
        text = f"{self.reason} (raised{where})"
        return (
            f"{text}\n\nRemote traceback:\n{self.remote_traceback}"
            if self.remote_traceback
            else text
        )


class PeerLostError(RuntimeFault, ConnectionError):
    """The called process is gone. `.cause` says why ("SIGKILL", "exit 1", "host unreachable")."""

    def __init__(
        self,
        reason: str,
        peer: str = "",
        role: str = "",
        rank: int = -1,
        host: str = "",
        cause: str = "",
    ) -> None:
        super().__init__(reason)
        self.peer, self.role, self.rank, self.host, self.cause = peer, role, rank, host, cause


class Failure(NamedTuple):
    """One failed worker: who, where, why, and the last lines that it logged."""

    role: str
    rank: int
    host: str
    cause: str
    last_lines: tuple[str, ...] = ()
    error: Exception | None = None


class WorkerFailureError(RuntimeFault):
    """Workers of a group failed. `.failures` names each; `.partial` holds results by rank."""

    def __init__(
        self,
        reason: str,
        failures: Sequence[Failure] = (),
        partial: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(reason)
        self.failures = list(failures)
        self.partial = dict(partial or {})


class CallGroupError(RuntimeFault, ExceptionGroup[Exception]):
    """Members of a group failed in one call. `.exceptions` as in every group (so `except*` works);
    `.failures` names each failed member, `.partial` holds the results of the others by index."""

    failures: list[Failure]
    partial: dict[int, Any]

    def __new__(
        cls,
        reason: str,
        exceptions: Sequence[Exception],
        failures: Sequence[Failure] = (),
        partial: dict[int, Any] | None = None,
    ) -> CallGroupError:
        return super().__new__(cls, reason, exceptions)

    def __init__(
        self,
        reason: str,
        exceptions: Sequence[Exception],
        failures: Sequence[Failure] = (),
        partial: dict[int, Any] | None = None,
    ) -> None:
        super().__init__(reason, exceptions)
        self.failures, self.partial = list(failures), dict(partial or {})

    def derive(self, excs: Sequence[Exception]) -> CallGroupError:  # type: ignore[override]
        kept = [failure for failure in self.failures if failure.error in excs]
        return CallGroupError(self.reason, excs, kept, self.partial)


class BarrierBroken(RuntimeFault):
    """`.name` of the barrier, `.missing` actor names that cannot arrive any more."""

    def __init__(self, reason: str, name: str = "", missing: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.name, self.missing = name, list(missing)


class Timeout(RuntimeFault, TimeoutError):
    """Waited `.waited_s` seconds; the text says what for. `.taken`: items a `put` got in."""

    def __init__(self, reason: str, waited_s: float = 0.0, taken: int = 0) -> None:
        super().__init__(reason)
        self.waited_s, self.taken = waited_s, taken


class Closed(RuntimeFault):
    """The queue, stream or node was closed."""


class Full(RuntimeFault):
    """`put_nowait` found no room. `.taken` items went in."""

    def __init__(self, reason: str, taken: int = 0) -> None:
        super().__init__(reason)
        self.taken = taken


class Empty(RuntimeFault):
    """`get_nowait` on a closed and drained queue."""


class LeaseLost(RuntimeFault):
    """The lease had expired or was handed to another holder."""


class ResourceInsufficientError(RuntimeFault):
    """What was asked, what is free and who holds the rest stand in the text."""


class RendezvousError(RuntimeFault):
    """A rendezvous did not come together. `.missing` names who was awaited."""

    def __init__(self, reason: str, missing: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.missing = list(missing)


class QuorumLost(RuntimeFault):
    """Too few voters of the control plane are left to decide anything."""


class CheckpointError(RuntimeFault):
    """Saving, loading or deleting a checkpoint failed. `.step`, `.piece` where known."""

    def __init__(self, reason: str, step: int | None = None, piece: str = "") -> None:
        super().__init__(reason)
        self.step, self.piece = step, piece


class CheckpointCorrupt(CheckpointError):
    """The bytes that were found are not those that were written."""


class WireError(RuntimeFault, ValueError):
    """Bytes of a peer that are not our protocol. The connection they came by ends; no other does.

    `.reason` is one of a few fixed phrases ("truncated", "version"), fit to be counted; `.detail` says
    what was found this time.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class ConfigError(RuntimeFault, ValueError):
    """A setting is wrong: the text names file, line or key, what was found and what is allowed."""


def nearest(name: str, known: Iterable[str], *, quoted: bool = False) -> str:
    """ " (did you mean x?)" for a message, where `known` has something close to `name`; else "".

    `quoted`: in quotes, as names of Python are shown.
    """
    import difflib  # only for messages: it would cost every start a millisecond

    # The dashes of options are like each other, which says nothing.
    names = {other.lstrip("-"): other for other in known}
    bare = name.lstrip("-")
    close = [other for other in names if len(bare) > 2 and other.startswith(bare)]
    close = close or difflib.get_close_matches(bare, names, n=1, cutoff=0.6)
    if not close:
        return ""
    found = names[close[0]]
    return f" (did you mean {repr(found) if quoted else found}?)"
