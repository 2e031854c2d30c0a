"""Reading messages, and writing calls and errors down as plain data: what all machines share.

A message comes from another process, so each field is checked where it is read, before anything is
changed: a machine's `handle` is all or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from runtime import errors
from runtime.errors import MisuseError, RuntimeFault
from runtime.machine import Call, Effect, Message

T = TypeVar("T")

Operation = Callable[[Message, Call | None, float], list[Effect]]
"""What a machine does for one verb."""


def operation(machine: str, operations: Mapping[str, Operation], message: Message) -> Operation:
    """The operation that the message's verb names; `MisuseError` lists those that there are."""
    found = operations.get(str(message.get("op")))
    if found is None:
        raise MisuseError(
            f"{machine} has no operation {message.get('op')!r}; it has {', '.join(sorted(operations))}"
        )
    return found


def _field(message: Message, name: str, kind: type[T], default: T | None) -> T:
    value = message.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise MisuseError(
            f"{message.get('op')!r} needs {name!r} of type {kind.__name__}, found {value!r}"
        )
    return value


def text(message: Message, name: str, default: str | None = None) -> str:
    """A field that is a string."""
    return _field(message, name, str, default)


def whole(message: Message, name: str, default: int | None = None) -> int:
    """A field that is an integer (not a bool)."""
    return _field(message, name, int, default)


def flag(message: Message, name: str, default: bool | None = None) -> bool:
    """A field that is true or false."""
    return _field(message, name, bool, default)


def mapping(message: Message, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A field that is a dict."""
    return _field(message, name, dict, default)


def seconds(message: Message, name: str) -> float | None:
    """A field that is a positive number of seconds, or absent."""
    value = message.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise MisuseError(
            f"{message.get('op')!r} needs {name!r} to be a number of seconds above 0, found {value!r}"
        )
    return float(value)


def asked(message: Message, call: Call | None) -> Call:
    """The call of a message that makes sense only when somebody awaits the answer."""
    if call is None:
        raise MisuseError(f"{message.get('op')!r} must be asked, not just sent: it has an answer")
    return call


def call_state(call: Call) -> list[Any]:
    """A call as plain data."""
    return [call.client, call.id]


def call_from(state: Any) -> Call:
    """The call that `call_state` wrote down."""
    client, number = state
    return Call(client, number)


def error_state(error: Exception) -> dict[str, Any]:
    """One of our errors as plain data: its class's name, its arguments and its attributes."""
    return {
        "type": type(error).__name__,
        "args": [item if isinstance(item, str | int | float) else str(item) for item in error.args],
        "state": {key: value for key, value in vars(error).items() if not key.startswith("_")},
    }


def error_from(state: Mapping[str, Any]) -> RuntimeFault:
    """The error that `error_state` wrote down. An unknown class becomes a plain `RuntimeFault`."""
    kind = getattr(errors, state["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, RuntimeFault)):
        return RuntimeFault(f"{state['type']}: {' '.join(map(str, state['args']))}")
    error = kind(*state["args"])
    vars(error).update(state["state"])
    return error


def listed(names: list[str], limit: int = 20) -> str:
    """Names for an error text, cut where they are too many to read."""
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
