"""How one process uses a queue: requests to its owner, each until it is answered.

`LocalSide` asks the owner in this very process; `remote.RemoteSide` calls it wherever it is.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol

from runtime.data.intake import HANDLE_BITS
from runtime.data.owner import QueueOwner
from runtime.errors import Full, RuntimeFault, Timeout
from runtime.machine import Call
from runtime.peer.endpoint import Endpoint
from runtime.peer.future import Future


class Request:
    """One message for the owner, and the future of its answer. `timeout`: seconds that it may take."""

    __slots__ = ("future", "message", "timeout")

    def __init__(self, side: Side, message: dict[str, Any], timeout: float | None = None) -> None:
        self.message, self.timeout = message, timeout
        self.future: Future[Any] = Future(
            side.endpoint.mailbox, (), lambda: side.why(self), lambda _: side.withdraw(self)
        )

    @property
    def op(self) -> str:
        return str(self.message["op"])

    def settle(self, value: Any, error: Exception | None = None) -> bool:
        """The owner's answer is there. False when nobody waits for it any more."""
        if error is None:
            error = self._shortfall(value)
        if error is not None:
            return self.future.set_exception(error)
        return self.future.set_result(None if self.op == "put" else value)

    def unclaimed(self) -> Any:
        """The answer, if it came; None otherwise."""
        future = self.future
        if not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()

    def _shortfall(self, value: dict[str, Any]) -> RuntimeFault | None:
        why = value.get("why")
        if why is None:
            return None
        waited = self.timeout or 0.0
        if self.op == "get":
            return Timeout(f"no items within {waited:g} s: {why}", waited)
        if self.timeout == 0:
            return Full(why, value["taken"])
        return Timeout(f"not all went in within {waited:g} s: {why}", waited, value["taken"])


class Side(Protocol):
    """The way to the owner. All of it from any thread."""

    endpoint: Endpoint

    def ask(self, message: dict[str, Any], timeout: float | None = None) -> Request:
        """Begin a request, whose future gives the owner's answer; `message` gets its id here."""
        ...

    def took(self, request: Request) -> None:
        """The caller has what the get was answered with."""
        ...

    def withdraw(self, request: Request) -> None:
        """The caller gave up: what the get was answered with goes back, if it was answered."""
        ...

    def why(self, request: Request) -> str:
        """In words, what it waits for."""
        ...


class LocalSide:
    """The owner is in this process."""

    def __init__(self, endpoint: Endpoint, owner: QueueOwner, handle: int) -> None:
        self.endpoint, self._owner = endpoint, owner
        self._ids = count(handle << HANDLE_BITS)

    def ask(self, message: dict[str, Any], timeout: float | None = None) -> Request:
        message["timeout"] = timeout
        request = Request(self, message, timeout)
        self._owner.ask(message, self.endpoint.peer, request.settle, self._ids)
        return request

    def took(self, request: Request) -> None:
        message = {"op": "took", "about": request.message["id"]}
        self._owner.ask(message, self.endpoint.peer, _ignore, self._ids)

    def withdraw(self, request: Request) -> None:
        self._owner.cancelled(self._call(request))

    def why(self, request: Request) -> str:
        return self._owner.why(self._call(request))

    def _call(self, request: Request) -> Call:
        return Call(self.endpoint.peer, request.message["id"])


def _ignore(value: Any, error: Exception | None) -> None: ...
