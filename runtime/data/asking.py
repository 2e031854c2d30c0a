"""How one process uses a queue: requests to its owner, each until it is answered.

`LocalSide` asks the owner in this very process; `remote.RemoteSide` calls it wherever it is.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Protocol

from runtime.data.intake import HANDLE_BITS
from runtime.data.owner import Answer, QueueOwner
from runtime.errors import Full, RuntimeFault, Timeout
from runtime.machine import Call
from runtime.peer.endpoint import Endpoint
from runtime.peer.future import Future


class Request:
    """One message for the owner, and the future of its answer. `timeout`: seconds that it may take."""

    __slots__ = ("future", "message", "timeout")

    def __init__(self, side: Side, message: dict[str, Any], timeout: float | None = None) -> None:
        self.message, self.timeout = message, timeout
        # The future knows the message, not us: a circle would keep the items until the next collection.
        self.future: Future[Any] = Future(
            side.endpoint.mailbox, (), lambda: side.why(message), lambda _: side.withdraw(message)
        )

    @property
    def op(self) -> str:
        return str(self.message["op"])

    def settle(self, value: Any, error: Exception | None = None) -> bool:
        """The owner's answer is there. False when nobody waits for it any more."""
        if error is None:
            error = shortfall(self.message, value, self.timeout)
        if error is not None:
            return self.future.set_exception(error)
        return self.future.set_result(None if self.message["op"] == "put" else value)

    def unclaimed(self) -> Any:
        """The answer, if it came; None otherwise."""
        future = self.future
        if not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()


def shortfall(
    message: dict[str, Any], value: dict[str, Any], timeout: float | None
) -> RuntimeFault | None:
    """What an answer that has a `why` comes to."""
    why = value.get("why")
    if why is None:
        return None
    waited = timeout or 0.0
    if message["op"] == "get":
        return Timeout(f"no items within {waited:g} s: {why}", waited)
    if timeout == 0:
        return Full(why, value["taken"])
    return Timeout(f"not all went in within {waited:g} s: {why}", waited, value["taken"])


class Side(Protocol):
    """The way to the owner. All of it from any thread."""

    endpoint: Endpoint

    def ask(self, message: dict[str, Any], timeout: float | None = None) -> Request:
        """Begin a request, whose future gives the owner's answer; `message` gets its id here."""
        ...

    def get(self, message: dict[str, Any], timeout: float | None) -> Request | dict[str, Any]:
        """As `ask`, for a get; or at once what it gives, which the caller has then. Raises what comes of it."""
        ...

    def took(self, request: Request) -> None:
        """The caller has what the get was answered with."""
        ...

    def withdraw(self, message: dict[str, Any], request: Request | None = None) -> None:
        """The caller gave up. What the get, `request`, was answered with goes back, if it was answered."""
        ...

    def why(self, message: dict[str, Any]) -> str:
        """In words, what it waits for."""
        ...


class LocalSide:
    """The owner is in this process."""

    def __init__(self, endpoint: Endpoint, owner: QueueOwner, handle: int) -> None:
        self.endpoint, self._owner, self._peer = endpoint, owner, endpoint.peer
        self._ids = count(handle << HANDLE_BITS)

    def ask(self, message: dict[str, Any], timeout: float | None = None) -> Request:
        message["timeout"] = timeout
        request = Request(self, message, timeout)
        outcome = self._owner.ask(message, self._peer, lambda: request.settle, self._ids)
        if outcome is not None:
            request.settle(*outcome)
        return request

    def get(self, message: dict[str, Any], timeout: float | None) -> Request | dict[str, Any]:
        message["timeout"], message["direct"] = timeout, True
        made: list[Request] = []

        def wait() -> Answer:
            made.append(Request(self, message, timeout))
            return made[0].settle

        outcome = self._owner.ask(message, self._peer, wait, self._ids)
        if outcome is None:
            return made[0]
        value: dict[str, Any]
        value, error = outcome
        error = error or shortfall(message, value, timeout)
        if error is not None:
            raise error
        return value

    def took(self, request: Request) -> None:
        message = {"op": "took", "about": request.message["id"]}
        self._owner.ask(message, self._peer, lambda: _ignore, self._ids)

    def withdraw(self, message: dict[str, Any], request: Request | None = None) -> None:
        self._owner.cancelled(Call(self._peer, message["id"]))

    def why(self, message: dict[str, Any]) -> str:
        return self._owner.why(Call(self._peer, message["id"]))


def _ignore(value: Any, error: Exception | None) -> None: ...
