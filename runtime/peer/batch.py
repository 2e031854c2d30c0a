"""What each member of a group gets of the arguments: pieces of a batch, or one item of each list.

What has items is cut: lists, tuples and other sequences, tensors and arrays along their first dimension
(views), and anything with a `size` and a `slice(start, stop)`, as a `BatchedDataDict`. Texts, bytes, dicts,
named tuples and everything else go whole to every member, as does `Whole(x)`. Pure; who is called with
the pieces is decided in `group`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from runtime.errors import MisuseError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Whole(Generic[T]):
    """In a `call_batch`: give `value` to every member as it is, although it could be cut."""

    value: T


class Piece(NamedTuple):
    """Items `start` to `stop` of a batch, and the arguments of the member that gets them."""

    start: int
    stop: int
    args: list[Any]
    kwargs: dict[str, Any]


def items_of(value: Any) -> int | None:
    """How many items `value` can be cut into; None: it goes whole."""
    if isinstance(value, str | bytes | bytearray | memoryview | Whole):
        return None
    size = getattr(value, "size", None)
    if type(size) is int and callable(getattr(value, "slice", None)):
        return size
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):  # torch.Size is one
        return shape[0] if shape else None
    if isinstance(value, Sequence) and not hasattr(value, "_fields"):
        return len(value)
    return None


def cut(value: Any, start: int, stop: int) -> Any:
    """Items `start` to `stop` of a value that has items."""
    slicer = getattr(value, "slice", None)
    return value[start:stop] if slicer is None else slicer(start, stop)


def item(value: Any, index: int) -> Any:
    """One item of a value that has items."""
    slicer = getattr(value, "slice", None)
    return value[index] if slicer is None else slicer(index, index + 1)


def common_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How many items the arguments have that can be cut. `MisuseError`: none can, or they differ."""
    sizes = {name: n for name, value in _named(args, kwargs) if (n := items_of(value)) is not None}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{name}: {size}" for name, size in sizes.items()) or "none can be cut"
        raise MisuseError(f"a batch needs arguments of one common length; found: {found}")
    return next(iter(sizes.values()))


def pieces(size: int, members: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Piece]:
    """Cut a batch of `size` items for `members` into pieces of ceil(size / members), in order; members
    that would get nothing have none. `MisuseError` for arguments of another length."""
    if type(size) is not int or size < 0:
        raise MisuseError(f"size={size!r}: allowed are whole numbers from 0")
    for name, value in _named(args, kwargs):
        found = items_of(value)
        if found not in (None, size):
            raise MisuseError(
                f"{name} ({type(value).__name__}) has {found} items, the batch {size}; what is to go "
                "whole to every member is given as Whole(x)"
            )
    each = -(-size // members)
    made = []
    for start in range(0, size, each or 1):
        stop = min(start + each, size)
        own = [_part(value, start, stop) for value in args]
        named = {name: _part(value, start, stop) for name, value in kwargs.items()}
        made.append(Piece(start, stop, own, named))
    return made


def scattered(
    members: int, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[list[Any], dict[str, Any]]]:
    """The arguments of each member: one item of each list. `MisuseError` for what is no list of one item
    a member."""
    for name, value in _named(args, kwargs):
        if not isinstance(value, list | tuple):
            raise MisuseError(
                f"{name} is a {type(value).__name__}; with _scatter each argument is a list of "
                f"{members} items, one a member"
            )
        if len(value) != members:
            raise MisuseError(
                f"{name} has {len(value)} items; with _scatter it needs {members}, one a member"
            )
    return [
        ([value[i] for value in args], {name: value[i] for name, value in kwargs.items()})
        for i in range(members)
    ]


def _part(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Whole):
        return value.value
    return value if items_of(value) is None else cut(value, start, stop)


def _named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(args):
        yield f"argument {index}", value
    for name, value in kwargs.items():
        yield f"argument {name!r}", value
