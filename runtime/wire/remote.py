"""Exceptions across process borders.

An error travels as its type's name, its message and the traceback as text; beside them, if pickle is allowed and
they can be pickled, its class (by reference), arguments and attributes. At the caller it becomes a `RemoteError`
that is also an instance of that class, so that `except KeyError` works over there. It is made without calling the
class's constructor, whose parameters nobody knows; the members of an exception group travel likewise. Some types are never made again, since raised in the middle of
somebody's coroutine they would mean something else: what is no `Exception`, cancellation, the ends of iterators.

Errors of our own machinery (`own=True`: "no such method", "timed out") arrive as themselves.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os.path
import traceback
import types
from collections.abc import Sequence
from typing import Any

import runtime.errors
from runtime.errors import CallGroupError, MisuseError, RemoteError, RuntimeFault, WireError
from runtime.wire.frames import Buffer
from runtime.wire.values import Encoded, class_name, decode, encode

MAX_TEXT = 32 * 1024
"""Characters of a message or a traceback; of longer ones the middle is left out."""

_PACKAGE = os.path.dirname(runtime.errors.__file__) + os.sep
_NEVER = (
    StopIteration,
    StopAsyncIteration,
    concurrent.futures.CancelledError,
)
_REMOTE_FIELDS = ("type_name", "message", "remote_traceback", "peer", "role", "rank")
_C_FIELDS = (types.MemberDescriptorType, types.GetSetDescriptorType)


# sending


def encode_error(error: BaseException, *, own: bool = False, pickle: bool = True) -> Encoded:
    """Take an error apart. With `own` (ours only) it arrives as itself. Never raises."""
    if own and isinstance(error, RuntimeFault) and _own_class(type(error).__name__) is type(error):
        return _encode_state([True, type(error).__name__, list(error.args)], vars(error), pickle)
    if isinstance(error, RemoteError):
        name, message = vars(error)["type_name"], vars(error)["message"]
    else:
        name, message = class_name(type(error)), _text(error)
    head = [False, _short(name), _short(message), _short(_traceback(error))]
    origin = origin_class(error)
    if not pickle or origin is None:
        return encode([*head, None], pickle=False)
    least: dict[str, Any] = {"class": origin, "args": error.args}
    if isinstance(error, ExceptionGroup):
        members = (encode_error(member) for member in error.exceptions)
        least["members"] = [[body, list(map(bytes, buffers))] for body, buffers in members]
        least["args"] = (error.message,)
    whole = dict(least)
    if not isinstance(error, CallGroupError):  # the results that it holds stay with its caller
        whole |= {"dict": _attributes(error), "fields": _c_fields(origin, error)}
    for attempt in (whole, least, {"class": origin}):
        try:
            return encode([*head, _nested(attempt)], pickle=False)
        except MisuseError:
            continue  # something in it cannot be pickled: less of it then
    return encode([*head, None], pickle=False)


def _encode_state(head: list[Any], state: dict[str, Any], pickle: bool) -> Encoded:
    for attempt in ([*head, state], [*head, {}], [*head[:2], [str(a) for a in head[2]], {}]):
        try:
            return encode(attempt, pickle=pickle)
        except MisuseError:
            continue  # an attribute that cannot travel: the words still can
    raise AssertionError("words can always be encoded")


def _nested(value: dict[str, Any]) -> list[Any]:
    """An encoding inside of an encoding: opened only where pickle is allowed."""
    body, buffers = encode(value)
    return [body, [bytes(buffer) for buffer in buffers]]


def origin_class(error: BaseException) -> type[Exception] | None:
    """The class that `error` is to be an instance of at the caller; None if it is none that may be."""
    kind = type(error)
    if isinstance(error, RemoteError):
        kind = getattr(kind, "_origin", kind)
        if kind is RemoteError:
            return None
    if not issubclass(kind, Exception) or issubclass(kind, _NEVER):
        return None
    return ExceptionGroup if kind is CallGroupError else kind


def _attributes(error: BaseException) -> dict[str, Any]:
    if not isinstance(error, RemoteError):
        return dict(vars(error))
    return {name: value for name, value in vars(error).items() if name not in _REMOTE_FIELDS}


def _c_fields(kind: type, error: BaseException) -> dict[str, Any]:
    """What builtin exceptions keep outside of `__dict__`: errno, filename, lineno …"""
    fields: dict[str, Any] = {}
    for base in kind.__mro__:
        if base in (Exception, BaseException, BaseExceptionGroup, object):
            continue
        for name, descriptor in vars(base).items():
            if isinstance(descriptor, _C_FIELDS) and not name.startswith("__"):
                value = getattr(error, name, None)
                if value is not None:
                    fields[name] = value
    return fields


def _traceback(error: BaseException) -> str:
    """As Python prints it, without our own frames at the top (those that called the handler)."""
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        start = start.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, start or error.__traceback__))
    except Exception as failure:  # noqa: BLE001 - formatting runs users' __str__ and __repr__
        return f"(the traceback could not be printed: {type(failure).__name__})"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # noqa: BLE001 - a user's __str__ may raise anything
        return f"(its __str__ raised {type(failure).__name__})"


def _short(text: str) -> str:
    if len(text) > MAX_TEXT:
        half = MAX_TEXT // 2
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


# receiving


def decode_error(
    body: Buffer,
    buffers: Sequence[Buffer] = (),
    *,
    peer: str = "",
    role: str = "",
    rank: int = -1,
    pickle: bool = True,
) -> Exception:
    """The error to raise at the caller. Raises `WireError` when the body is none of `encode_error`.

    Without `pickle` it is a plain `RemoteError`, unless it is one of our own.
    """
    value = decode(body, buffers, pickle=pickle)
    if type(value) is not list or not value:
        raise WireError("malformed error")
    if value[0] is True and len(value) == 4:
        return _restore_own(*value[1:])
    if value[0] is not False or len(value) != 5 or not {str}.issuperset(map(type, value[1:4])):
        raise WireError("malformed error")
    name, message, text, packed = value[1:]
    remote = (name, message, text, peer, role, rank)
    error = _rebuild(packed, remote) if pickle and packed is not None else None
    return RemoteError(*remote) if error is None else error


def _own_class(name: object) -> type[RuntimeFault] | None:
    found = getattr(runtime.errors, name, None) if type(name) is str else None
    return found if isinstance(found, type) and issubclass(found, RuntimeFault) else None


def _restore_own(name: object, args: object, state: object) -> Exception:
    kind = _own_class(name)
    if kind is None or type(args) is not list or type(state) is not dict:
        raise WireError("malformed error")
    error = kind.__new__(kind, *args)
    error.args = tuple(args)
    vars(error).update({key: value for key, value in state.items() if type(key) is str})
    return error


def _rebuild(packed: Any, remote: tuple[Any, ...]) -> RemoteError | None:
    """None when the class or what belongs to it does not exist here: a plain `RemoteError` does then."""
    try:
        body, buffers = packed
        state = decode(body, buffers)
        kind, fields = state["class"], state.get("fields", {})
        args, attributes = state.get("args", ()), state.get("dict", {})
        if not issubclass(kind, Exception) or issubclass(kind, _NEVER):
            return None
        if issubclass(kind, ExceptionGroup):
            at = dict(zip(("peer", "role", "rank"), remote[3:], strict=True))
            args = (*args, [decode_error(*member, **at) for member in state["members"]])
        return _make(kind, remote, args, attributes, fields)
    except Exception:  # noqa: BLE001 - runs users' classes; without them there is still a RemoteError
        return None


def _make(
    kind: type[Exception],
    remote: tuple[Any, ...],
    args: tuple[Any, ...],
    attributes: dict[str, Any],
    fields: dict[str, Any],
) -> RemoteError:
    """An instance of the class that is both. Also what its pickles call."""
    both: type[RemoteError] = _both(kind)  # type: ignore[arg-type]  # classes do hash
    if issubclass(both, ExceptionGroup):  # its own `__new__` checks the members, and keeps them
        error: RemoteError = ExceptionGroup.__new__(both, *args)
    else:
        error = both.__new__(both, *args)
    for name, value in fields.items():
        try:
            setattr(error, name, value)
        except (AttributeError, TypeError):
            continue  # read-only, or shadowed by a property of RemoteError
    vars(error).update(attributes)
    vars(error).update(zip(_REMOTE_FIELDS, remote, strict=True))
    error.args = args
    return error


@functools.lru_cache(maxsize=512)
def _both(kind: type[Exception]) -> type[RemoteError]:
    """The class whose instances are `RemoteError` and `kind`. Raises TypeError where there can be none."""
    body = {
        "__module__": "runtime",
        "_origin": kind,
        "__reduce__": _reduce,
        "__init__": _initialise,
    }
    name = f"RemoteError[{kind.__qualname__}]"
    return type(name, (RemoteError, kind), {**body, "__qualname__": name})


def _initialise(self: RemoteError, *args: Any, **kwargs: Any) -> None:
    """Takes anything and does nothing: `_make` fills the instance in."""


def _reduce(self: RemoteError) -> tuple[Any, ...]:
    kind: type[Exception] = type(self)._origin  # type: ignore[attr-defined]
    remote = tuple(vars(self)[name] for name in _REMOTE_FIELDS)  # past properties of `kind`
    return _make, (kind, remote, self.args, _attributes(self), _c_fields(kind, self))
