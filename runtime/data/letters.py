"""How the two sides of a queue write to each other: msgpack maps, with the items' buffers beside them.

A request goes to a raw handler, so that its buffers come out as the objects that they came in as and
can be sent on without a copy; an answer is read by the codec, like that of any other call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from runtime.data.pieces import Buffer
from runtime.errors import MisuseError, WireError
from runtime.wire import codec
from runtime.wire.codec import Encoded
from runtime.wire.values import APART_BYTES

_pack = msgpack.Packer().pack  # runs no code of ours while it packs: safe to share


def write_request(message: Mapping[str, Any]) -> Encoded:
    """One message for the owner."""
    buffers = message.get("buffers")
    if buffers is None:
        return Encoded(_pack(message), [])
    plain = {**message, "buffers": list(map(len, buffers))}
    return Encoded(_pack(plain), [part for parts in buffers for part in parts])


def read_request(encoded: Encoded) -> dict[str, Any]:
    """The message again. Raises `MisuseError` for what no client of ours sends."""
    try:
        message = msgpack.unpackb(encoded.body)
    except Exception as error:  # noqa: BLE001 - msgpack's own errors have no common base
        raise MisuseError(f"not a message for a queue: {error}") from None
    if type(message) is not dict or type(message.get("id")) is not int:
        raise MisuseError("not a message for a queue: a map with an 'id' was expected")
    counts = message.get("buffers")
    if counts is not None:
        message["buffers"] = _split(counts, encoded.buffers)
    return message


def _split(counts: Any, buffers: Sequence[Buffer]) -> list[Sequence[Buffer]]:
    if type(counts) is not list or not {int}.issuperset(map(type, counts)):
        raise MisuseError("not a message for a queue: counts of buffers were expected")
    if min(counts, default=0) < 0 or sum(counts) != len(buffers):
        raise MisuseError(f"a message for a queue promises {counts}, found {len(buffers)} buffers")
    parts, at = [], 0
    for count in counts:
        parts.append(buffers[at : at + count])
        at += count
    return parts


def write_answer(value: Mapping[str, Any]) -> Encoded:
    """What the owner answers."""
    buffers = value.get("buffers")
    if buffers is None:
        return Encoded(_pack(value), [])
    # Empty ones lie in the body; of the others the codec takes note in this order.
    apart = [part for parts in buffers for part in parts if len(part)]
    views = [[memoryview(part) if len(part) else b"" for part in parts] for parts in buffers]
    return Encoded(codec.encode({**value, "buffers": views}, pickle=False).body, apart)


def encode_items(items: Sequence[Any]) -> tuple[list[bytes], list[list[Buffer]] | None, bool]:
    """A body for each item, and its buffers (None: no item has any); and whether the bodies are the items
    themselves. Raises `MisuseError` naming the item that cannot be sent."""
    if {bytes}.issuperset(map(type, items)) and max(map(len, items)) < APART_BYTES:
        return list(items), None, True
    encoded = [codec.encode(item, what=f"item {place}") for place, item in enumerate(items)]
    buffers = [list(one.buffers) for one in encoded]
    return [one.body for one in encoded], buffers if any(buffers) else None, False


def decode_items(answer: Mapping[str, Any]) -> list[Any]:
    """The values of the items that a get was given. Raises `MisuseError` for what cannot be read in this process."""
    bodies: list[bytes] = answer["bodies"]
    runs = answer["runs"]
    if all(run[-1] for run in runs):
        return bodies
    plain = [as_is for _, count, _, _, as_is in runs for _ in range(count)]
    parts = answer["buffers"] or [()] * len(bodies)
    try:
        return [
            body if as_is else codec.decode(body, beside)
            for body, beside, as_is in zip(bodies, parts, plain, strict=True)
        ]
    except WireError as error:
        raise MisuseError(f"an item cannot be read here: {error}") from error
