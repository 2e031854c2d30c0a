"""What the records between two peers say: calls and their answers, streams, what keeps both sides in step.

A record's header is one msgpack array: the kind, its fields, and last the body (see `wire.codec`). A body
of more than `INLINE_BODY` bytes travels as the first buffer instead, so that headers stay short. `encode_*`
build records of values that this process vouches for; `decode` checks every field of what a peer sent and
raises `WireError`, and nothing else. What is done about a message is decided in `peer/`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgpack

from runtime.errors import MisuseError, WireError
from runtime.wire.frames import Buffer, Record

INLINE_BODY = 32 * 1024
MAX_NAME = 512
"""Characters of a method name, of a path element."""
MAX_PATH = 256
"""Elements of a path."""
MAX_REASON = 4096
"""Characters; longer reasons are cut."""

_MAX_ID = 2**63
_MAX_DEADLINE_S = 1e9
_CALL, _CAST, _RESULT, _ERROR, _CANCEL, _PROBE, _GOODBYE = range(1, 8)
_STREAM, _ITEM, _MORE, _ACK, _CREDIT, _RESUME, _RESUMED = range(8, 15)
_HELD, _MISSING, _WHOLE = range(15, 18)


class Call(NamedTuple):
    """Do `method` and answer with the same `id`.

    `deadline_s`: how long the caller will still wait, None for ever. `stream`: its answer is any number
    of items before the result.
    """

    id: int
    method: str
    body: Buffer
    buffers: Sequence[Buffer] = ()
    deadline_s: float | None = None
    stream: bool = False


class Held(NamedTuple):
    """A call without its arguments: the process `peer` at `address`, of the receiver's host, has them as `payload`."""

    call: Call
    peer: str
    address: str
    payload: bytes


class Missing(NamedTuple):
    """Of a callee: it cannot get the arguments of call `id`, which was a `Held`, and has not begun it. Of a caller: nobody
    has them, say so."""

    id: int


class Whole(NamedTuple):
    """The arguments of call `id`, which was a `Held`."""

    id: int
    body: Buffer
    buffers: Sequence[Buffer] = ()


class Cast(NamedTuple):
    """Do `method`; nobody awaits an answer."""

    method: str
    body: Buffer
    buffers: Sequence[Buffer] = ()


class Result(NamedTuple):
    """The answer to call `id`."""

    id: int
    body: Buffer
    buffers: Sequence[Buffer] = ()


class Error(NamedTuple):
    """Call `id` failed; the body is of `codec.encode_error`."""

    id: int
    body: Buffer
    buffers: Sequence[Buffer] = ()


class Cancel(NamedTuple):
    """Nobody waits for call `id` any more."""

    id: int


class Probe(NamedTuple):
    """Does what the receiver's call `subject` (an id of the sender's) waits for lead to a handler of
    the process `origin`? `number` tells its probes apart; `path`: whom the probe passed on its way."""

    origin: str
    path: tuple[str, ...] = ()
    number: int = 0
    subject: int = 0


class Goodbye(NamedTuple):
    """The sender is leaving: it will answer no more calls, and awaits no more answers."""

    reason: str


class Item(NamedTuple):
    """The next item of the stream `id`."""

    id: int
    body: Buffer
    buffers: Sequence[Buffer] = ()


class More(NamedTuple):
    """So many items of the stream `id`, counted from its start, have been used up."""

    id: int
    used: int


class Ack(NamedTuple):
    """The answers to the calls `ids` have arrived: they need not be kept."""

    ids: Sequence[int]


class Credit(NamedTuple):
    """The calls `ids`, and casts of `cast_bytes` in all since the link began, wait here no longer."""

    cast_bytes: int
    ids: Sequence[int]


class Resume(NamedTuple):
    """First on every link of a caller: it is later than those with a lower `epoch`, and answers to the
    calls `ids` of those, and to no others, are still awaited."""

    epoch: int
    ids: Sequence[int]


class Resumed(NamedTuple):
    """The answer to a `Resume` with calls: of these, `ids` have not arrived, send them again."""

    epoch: int
    ids: Sequence[int]


Message = (
    Call
    | Held
    | Missing
    | Whole
    | Cast
    | Result
    | Error
    | Cancel
    | Probe
    | Goodbye
    | Item
    | More
    | Ack
    | Credit
    | Resume
    | Resumed
)

_T = TypeVar("_T")
_new = tuple.__new__
"""Makes tuples with names in half the time that their classes take: for what is done for every call."""
_unpack = msgpack.unpackb
_pack = msgpack.Packer().pack  # runs no code of ours or of users while it packs: safe to share


def encode_call(
    id: int,
    method: str,
    body: Buffer,
    buffers: Sequence[Buffer] = (),
    deadline_s: float | None = None,
    stream: bool = False,
) -> Record:
    """See `Call`. Raises `MisuseError` for a method name that no peer would accept."""
    if not method.isascii() or not 0 < len(method) <= MAX_NAME:
        _check_name(method)
    kind = _STREAM if stream else _CALL
    if len(body) <= INLINE_BODY:
        return _new(Record, (_pack((kind, id, method, deadline_s, body)), buffers))
    return Record(_pack((kind, id, method, deadline_s, None)), (body, *buffers))


def encode_held(
    id: int, method: str, deadline_s: float | None, where: tuple[str, str, bytes]
) -> Record:
    """See `Held`. Raises `MisuseError` for a method name that no peer would accept."""
    _check_name(method)
    return Record(_pack((_HELD, id, method, deadline_s, *where)))


def encode_missing(id: int) -> Record:
    return Record(_pack((_MISSING, id)))


def encode_whole(id: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> Record:
    return _record((_WHOLE, id), body, buffers)


def encode_cast(cast: Cast) -> Record:
    """Raises `MisuseError` for a method name that no peer would accept."""
    _check_name(cast.method)
    return _record((_CAST, cast.method), cast.body, cast.buffers)


def encode_result(id: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> Record:
    if len(body) <= INLINE_BODY:
        return _new(Record, (_pack((_RESULT, id, body)), buffers))
    return Record(_pack((_RESULT, id, None)), (body, *buffers))


def encode_error(id: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> Record:
    return _record((_ERROR, id), body, buffers)


def encode_cancel(id: int) -> Record:
    return Record(_pack((_CANCEL, id)))


def encode_probe(probe: Probe) -> Record:
    origin, path, number, subject = probe
    return Record(_pack((_PROBE, origin, list(path), number, subject)))


def encode_goodbye(reason: str) -> Record:
    text = reason[:MAX_REASON].encode("utf-8", "replace").decode()
    return Record(_pack((_GOODBYE, text)))


def encode_item(id: int, body: Buffer, buffers: Sequence[Buffer] = ()) -> Record:
    return _record((_ITEM, id), body, buffers)


def encode_more(id: int, used: int) -> Record:
    return Record(_pack((_MORE, id, used)))


def encode_ack(ids: Sequence[int]) -> Record:
    return _record((_ACK,), _pack_ids(ids), ())


def encode_credit(cast_bytes: int, ids: Sequence[int]) -> Record:
    return _record((_CREDIT, cast_bytes), _pack_ids(ids), ())


def encode_resume(epoch: int, ids: Sequence[int]) -> Record:
    return _record((_RESUME, epoch), _pack_ids(ids), ())


def encode_resumed(epoch: int, ids: Sequence[int]) -> Record:
    return _record((_RESUMED, epoch), _pack_ids(ids), ())


def _pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}Q", *ids)


def _record(fields: tuple[Any, ...], body: Buffer, buffers: Sequence[Buffer]) -> Record:
    if len(body) <= INLINE_BODY:
        return Record(_pack((*fields, body)), buffers)
    return Record(_pack((*fields, None)), (body, *buffers))


def _check_name(name: str) -> None:
    if not 0 < len(name) <= MAX_NAME:
        raise MisuseError(f"a method name has 1 to {MAX_NAME} characters, this one {len(name)}")
    if not name.isascii() and not name.isprintable():
        raise MisuseError(f"a method name cannot have such characters: {name!a}")


def decode(record: Record) -> Message:
    """What a record says. Raises `WireError`, and nothing else, for anything amiss."""
    header, buffers = record
    try:
        # Lists are made as long as they say they are; maps and extensions no reader takes.
        fields = _unpack(header, max_array_len=MAX_PATH)
    except (ValueError, TypeError) as error:
        raise WireError("malformed message", str(error)[:200]) from None
    if type(fields) is not list or not fields or type(fields[0]) is not int:
        raise WireError("malformed message", "no kind")
    reader = _READERS.get(fields[0])
    if reader is None:
        raise WireError("unknown message", str(fields[0]))
    message = reader(fields, buffers)
    if message is None:
        raise WireError("malformed message", f"the fields of kind {fields[0]}")
    return message


def _body(field: object, buffers: Sequence[Buffer]) -> tuple[Buffer, Sequence[Buffer]] | None:
    if type(field) is bytes:
        return field, buffers
    if field is None and buffers:
        return buffers[0], buffers[1:]
    return None


def _is_id(field: object) -> bool:
    return type(field) is int and 0 <= field < _MAX_ID


def _is_name(field: object) -> bool:
    return type(field) is str and 0 < len(field) <= MAX_NAME


def _names(field: object) -> tuple[str, ...] | None:
    if type(field) is list and len(field) <= MAX_PATH and all(map(_is_name, field)):
        return tuple(field)
    return None


def _read_call(fields: list[Any], buffers: Sequence[Buffer]) -> Call | None:
    if len(fields) != 5:
        return None
    _, id, method, deadline_s, field = fields
    # Written out, here and for results: all that is done for every call counts.
    if type(id) is not int or not 0 <= id < _MAX_ID:
        return None
    if type(method) is not str or not 0 < len(method) <= MAX_NAME:
        return None
    if deadline_s is not None and not _is_deadline(deadline_s):
        return None
    if type(field) is bytes:
        return _new(Call, (id, method, field, buffers, deadline_s, False))
    body = _body(field, buffers)
    return None if body is None else Call(id, method, *body, deadline_s)


def _read_stream(fields: list[Any], buffers: Sequence[Buffer]) -> Call | None:
    call = _read_call(fields, buffers)
    return None if call is None else call._replace(stream=True)


def _read_held(fields: list[Any], buffers: Sequence[Buffer]) -> Held | None:
    if len(fields) != 7 or buffers or type(fields[6]) is not bytes:
        return None
    call = _read_call([*fields[:4], b""], ())
    if call is None or not (_is_name(fields[4]) and _is_name(fields[5])):
        return None
    return Held(call, *fields[4:])


def _is_deadline(field: object) -> bool:
    # Written so that NaN fails, too.
    return (type(field) is float or type(field) is int) and 0 <= field <= _MAX_DEADLINE_S


def _read_cast(fields: list[Any], buffers: Sequence[Buffer]) -> Cast | None:
    if len(fields) != 3 or not _is_name(fields[1]):
        return None
    body = _body(fields[2], buffers)
    return None if body is None else Cast(fields[1], *body)


def _read_result(fields: list[Any], buffers: Sequence[Buffer]) -> Result | None:
    if len(fields) != 3:
        return None
    _, id, field = fields
    if type(id) is not int or not 0 <= id < _MAX_ID:
        return None
    if type(field) is bytes:
        return _new(Result, (id, field, buffers))
    body = _body(field, buffers)
    return None if body is None else Result(id, *body)


def _like_result(
    kind: Callable[[int, Buffer, Sequence[Buffer]], _T],
    fields: list[Any],
    buffers: Sequence[Buffer],
) -> _T | None:
    same = _read_result(fields, buffers)
    return None if same is None else kind(*same)


def _of_call(kind: Callable[[int], _T], fields: list[Any], buffers: Sequence[Buffer]) -> _T | None:
    if len(fields) != 2 or buffers or not _is_id(fields[1]):
        return None
    return kind(fields[1])


def _read_probe(fields: list[Any], buffers: Sequence[Buffer]) -> Probe | None:
    if len(fields) != 5 or buffers or not _is_name(fields[1]):
        return None
    _, origin, elements, number, subject = fields
    path = _names(elements)
    if path is None or not (_is_id(number) and _is_id(subject)):
        return None
    return Probe(origin, path, number, subject)


def _read_more(fields: list[Any], buffers: Sequence[Buffer]) -> More | None:
    if len(fields) != 3 or buffers or not (_is_id(fields[1]) and _is_id(fields[2])):
        return None
    return More(fields[1], fields[2])


def _read_ack(fields: list[Any], buffers: Sequence[Buffer]) -> Ack | None:
    ids = _ids(fields[1], buffers) if len(fields) == 2 else None
    return None if ids is None else Ack(ids)


def _numbered(
    kind: Callable[[int, Sequence[int]], _T], fields: list[Any], buffers: Sequence[Buffer]
) -> _T | None:
    ids = _ids(fields[2], buffers) if len(fields) == 3 and _is_id(fields[1]) else None
    return None if ids is None else kind(fields[1], ids)


def _ids(field: object, buffers: Sequence[Buffer]) -> Sequence[int] | None:
    body = _body(field, buffers)
    if body is None or len(body[0]) % 8 or len(body[1]):
        return None
    return struct.unpack(f"<{len(body[0]) // 8}Q", body[0])


def _read_goodbye(fields: list[Any], buffers: Sequence[Buffer]) -> Goodbye | None:
    if len(fields) != 2 or buffers or type(fields[1]) is not str or len(fields[1]) > MAX_REASON:
        return None
    return Goodbye(fields[1])


_READERS: dict[int, Callable[[list[Any], Sequence[Buffer]], Message | None]] = {
    _CALL: _read_call,
    _CAST: _read_cast,
    _RESULT: _read_result,
    _ERROR: partial(_like_result, Error),
    _CANCEL: partial(_of_call, Cancel),
    _PROBE: _read_probe,
    _GOODBYE: _read_goodbye,
    _STREAM: _read_stream,
    _ITEM: partial(_like_result, Item),
    _MORE: _read_more,
    _ACK: _read_ack,
    _CREDIT: partial(_numbered, Credit),
    _RESUME: partial(_numbered, Resume),
    _RESUMED: partial(_numbered, Resumed),
    _HELD: _read_held,
    _MISSING: partial(_of_call, Missing),
    _WHOLE: partial(_like_result, Whole),
}
