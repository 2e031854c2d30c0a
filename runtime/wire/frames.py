"""Batches of records and the parts of one ZeroMQ message that carries them.

    part 0      magic (3 bytes), version, kind, 3 zero bytes; then one msgpack array: the headers of the
                records in order, each one followed by a number when buffers belong to it
    part 1..n   the buffers of all records, in order, as they are

Part 0 of a batch of small calls is thus everything: one copy, one C call to take it apart. A single record
needs not even that: its part 0 is preamble and header (kind `_SINGLE`), and all buffers are its own. The kind says
whether the batch carries records (`DATA`; `LOOSE`: not in order with others; `SPLIT`, `PIECE`: with large buffers that
travel apart, see `transport.bulk`) or belongs to the making and ending of a link (`HELLO`, `WELCOME`,
`BYE`); what is in those is the transport's business, what headers mean is `wire.messages`'.
Everything that comes in is checked against `Limits` before anything is made of it: whatever is wrong is a
`WireError` whose reason is a fixed phrase, so that it can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgpack

from runtime.errors import WireError

Buffer = bytes | bytearray | memoryview
"""A contiguous stretch of bytes. Given to `send`, it must not change until it has left."""


class Record(NamedTuple):
    """One message: an encoded header, and the buffers that belong to it."""

    header: bytes
    buffers: Sequence[Buffer] = ()


class Batch(NamedTuple):
    """What one message of the network held."""

    kind: int
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that a peer may send in one go. What we send ourselves stays within it, too."""

    header_bytes: int = 256 * 1024
    """Of one record's header. Bodies longer than a few pages travel as buffers."""
    batch_bytes: int = 1024 * 1024
    """Of part 0."""
    records: int = 16384
    """In one batch."""
    record_buffers: int = 32768
    """That belong to one record."""
    buffers: int = 65536
    """In one batch."""
    buffer_bytes: int = 16 * 1024**3
    """Of one buffer."""


LIMITS = Limits()

VERSION = 2
DATA, HELLO, WELCOME, BYE, _SINGLE, LOOSE, SPLIT, PIECE = range(8)

_MAGIC = b"PR\xf5"
_PREAMBLE_BYTES = 8
_PREAMBLES = {k: _MAGIC + bytes((VERSION, k, 0, 0, 0)) for k in range(8)}
_KINDS = {preamble: kind for kind, preamble in _PREAMBLES.items()}
_ONE = _PREAMBLES[_SINGLE]
_BYTES_ONLY = frozenset({bytes})
_new = tuple.__new__
"""Makes records in half the time that their class takes."""
_packer = msgpack.Packer()  # runs no code of ours or of users while it packs: safe to share


def encode_batch(records: Sequence[Record], kind: int = DATA) -> list[Buffer]:
    """The parts of one message. The records must have been found within limits (`check_record`)."""
    if len(records) == 1 and kind == DATA:
        header, buffers = records[0]
        return [_ONE + header, *buffers]
    items: list[bytes | int] = []
    parts: list[Buffer] = [b""]
    for header, buffers in records:
        items.append(header)
        if buffers:
            items.append(len(buffers))
            parts.extend(buffers)
    parts[0] = _PREAMBLES[kind] + _packer.pack(items)
    return parts


def check_record(record: Record, limits: Limits = LIMITS) -> int:
    """The size of a record in bytes; `WireError` when it is more than a peer would accept."""
    header, buffers = record
    size = len(header)
    if size > limits.header_bytes:
        raise WireError("oversized header", f"{size} bytes, at most {limits.header_bytes}")
    if buffers:
        if len(buffers) > limits.record_buffers:
            raise WireError("buffer count", f"{len(buffers)}, at most {limits.record_buffers}")
        for buffer in buffers:
            length = buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)
            if length > limits.buffer_bytes:
                raise WireError(
                    "oversized buffer", f"{length} bytes, at most {limits.buffer_bytes}"
                )
            size += length
    return size


def decode_batch(parts: Sequence[Buffer], limits: Limits = LIMITS) -> Batch:
    """The records of one message. Raises `WireError`, and nothing else, for anything amiss."""
    if not parts:
        raise WireError("truncated", "a message without parts")
    if not 0 < len(parts[0]) <= limits.batch_bytes:
        raise _head_error(parts[0], limits)
    head = bytes(parts[0])  # no copy where it is that already
    if head.startswith(_ONE):
        return _single(head, parts, limits)
    kind = _KINDS.get(head[:_PREAMBLE_BYTES])
    if kind is None:
        raise _preamble_error(head)
    items = _unpack(head, limits)
    if type(items) is not list:
        raise WireError("malformed header", f"an array was expected, found {type(items).__name__}")
    if len(parts) == 1 and _BYTES_ONLY.issuperset(map(type, items)):
        if len(items) > limits.records:
            raise WireError("record count", f"{len(items)}, at most {limits.records}")
        return Batch(kind, [_new(Record, (header, ())) for header in items])
    return Batch(kind, _records_with_buffers(items, parts, limits))


def _single(head: bytes, parts: Sequence[Buffer], limits: Limits) -> Batch:
    size = len(head) - _PREAMBLE_BYTES
    if size > limits.header_bytes:
        raise WireError("oversized header", f"{size} bytes, at most {limits.header_bytes}")
    if len(parts) - 1 > limits.record_buffers:
        raise WireError("buffer count", f"{len(parts) - 1}, at most {limits.record_buffers}")
    return Batch(DATA, [_new(Record, (head[_PREAMBLE_BYTES:], parts[1:]))])


def _records_with_buffers(
    items: list[object], parts: Sequence[Buffer], limits: Limits
) -> list[Record]:
    records: list[Record] = []
    at, last = 1, len(parts)
    if last - 1 > limits.buffers:
        raise WireError("buffer count", f"{last - 1} in a batch, at most {limits.buffers}")
    fresh = False  # is the last record one that has not been given its buffers yet?
    for item in items:
        if type(item) is bytes:
            records.append(Record(item))
            fresh = True
        elif type(item) is int and fresh and 0 < item <= limits.record_buffers:
            if at + item > last:
                raise WireError("buffer count", f"{at + item - 1} announced, {last - 1} came")
            records[-1] = Record(records[-1].header, parts[at : at + item])
            at += item
            fresh = False
        elif type(item) is int:
            raise WireError("buffer count", f"{item} is not allowed there")
        else:
            raise WireError("malformed header", f"a header cannot be {type(item).__name__}")
    if at != last:
        raise WireError("buffer count", f"{at - 1} announced, {last - 1} came")
    if len(records) > limits.records:
        raise WireError("record count", f"{len(records)}, at most {limits.records}")
    return records


def _unpack(head: bytes, limits: Limits) -> object:
    try:
        return msgpack.unpackb(
            memoryview(head)[_PREAMBLE_BYTES:],
            max_array_len=2 * limits.records,
            max_bin_len=limits.header_bytes,
            max_str_len=0,
            max_map_len=0,
            max_ext_len=0,
        )
    except msgpack.ExtraData:
        raise WireError("trailing bytes") from None
    except (msgpack.FormatError, msgpack.StackError) as error:
        raise WireError("malformed header", type(error).__name__) from None
    except (ValueError, TypeError) as error:
        raise WireError(_phrase(str(error)), str(error)) from None


def _phrase(text: str) -> str:
    """The fixed phrase for what msgpack said."""
    if "max_bin_len" in text:
        return "oversized header"
    if "max_array_len" in text:
        return "record count"
    return "truncated" if "incomplete" in text else "malformed header"


def _head_error(head: Buffer, limits: Limits) -> WireError:
    if len(head) == 0:
        return WireError("truncated", "an empty first part")
    return WireError("oversized header", f"{len(head)} bytes, at most {limits.batch_bytes}")


def _preamble_error(head: bytes) -> WireError:
    if head[:3] != _MAGIC[: len(head)]:
        return WireError("magic", f"starts with {head[:8]!r}")
    if len(head) < _PREAMBLE_BYTES:
        return WireError("truncated", f"{len(head)} bytes")
    if head[3] != VERSION:
        return WireError("version", f"{head[3]}, ours is {VERSION}")
    if head[4] not in _PREAMBLES:
        return WireError("kind", str(head[4]))
    return WireError("flags", repr(head[5:8]))
