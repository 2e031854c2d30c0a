"""The shape of every stateful service: a plain object that decides and returns what is to be done.

A machine knows no I/O, no clock and no randomness. `now` is an argument, ids and ports are drawn
by whoever sends the message. It answers with effects, a small closed set, and somebody else
(`driver.py`, or the control plane's service) performs them.

A wait is a reply not yet sent: a machine keeps the `Call` and answers it later. So it must also be
told when a caller gave up (`cancelled`) or is gone (`lost`), and forget that caller's waits.
`handle` is all or nothing: it raises before it changes anything, or it does not raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

Message = Mapping[str, Any]
"""What is asked of a machine: plain data (msgpack types only) with the verb under ``"op"``."""


class Call(NamedTuple):
    """One question of one client. Not a connection: it stays the same when the question is repeated."""

    client: str
    id: int


class Send(NamedTuple):
    """Tell `to` (a peer id, or the name of an agent) something it did not ask for."""

    to: str
    message: Message


class Reply(NamedTuple):
    """Answer a call."""

    call: Call
    value: Any


class Fail(NamedTuple):
    """Answer a call with an error (one of `runtime.errors`)."""

    call: Call
    error: Exception


class Emit(NamedTuple):
    """Something happened that logs, metrics or the composing process may want to know."""

    event: Message


Effect = Send | Reply | Fail | Emit


class Machine(Protocol):
    """A service as a plain object. Times are seconds of one clock that only moves forward."""

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        """Take one message. `call` is None for a message that nobody awaits an answer to."""
        ...

    def tick(self, now: float) -> list[Effect]:
        """Do what is due at `now`."""
        ...

    def deadline(self) -> float | None:
        """The next moment at which `tick` has something to do; None for never."""
        ...

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        """The caller gave up on `call`: forget it. Unknown calls are ignored."""
        ...

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        """The process `peer` is gone for good: forget its waits and what it held."""
        ...

    def why(self, call: Call) -> str | None:
        """In words, what an unanswered `call` waits for; None when it waits for nothing here."""
        ...

    def dump(self) -> dict[str, Any]:
        """The whole state, waiting calls included, as msgpack types."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `dump` gave."""
        ...
