"""One Python value as a msgpack body and raw buffers beside it, and back, with every type as it was.

msgpack alone carries None, bool, int, float, str, bytes, list and dict. Types that it would change in
silence or not take (tuple, set, bytearray, big int, tensors …) become extension types; bytes of 64 KiB and
more, tensors and arrays lie in buffers beside the body, uncopied. The first value of any other type makes
the *whole* value a pickle (protocol 5, buffers beside it): objects that share a part still share it
over there. The same is done for a list or dict that occurs twice in a value.

With `pickle=False` nothing is pickled and, what counts, nothing is unpickled: not even for errors.
"""

from __future__ import annotations

import copyreg
import io
import pickle as pickling
import sys
from collections import ChainMap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgpack

from runtime.errors import MisuseError, WireError
from runtime.wire import tensors
from runtime.wire.frames import Buffer

APART_BYTES = 64 * 1024
"""bytes, bytearrays and pickles from this size on lie in a buffer of their own, uncopied."""
INLINE_TENSOR_BYTES = 2048
"""Smaller tensors lie in the body: a buffer of its own costs more than the copy."""

_PICKLE, _TUPLE, _SET, _FROZENSET, _BIG_INT, _BYTEARRAY, _COMPLEX = range(1, 8)
_APART, _MEMORYVIEW, _ODD_STR, _TENSOR = 8, 9, 10, 11

_LEAVES = frozenset({type(None), bool, int, float, str})
_INT_RANGE = range(-(2**63), 2**64)
_pack = msgpack.Packer(strict_types=True).pack  # runs no code of ours or of users while it packs


class Encoded(NamedTuple):
    """A value on its way: `body` is msgpack, `buffers` are what it refers to."""

    body: bytes
    buffers: list[Buffer]


class _NotPlain(Exception):
    """There is something that only pickle can carry: `args[0]`."""


class _Shared(Exception):
    """A list or dict occurs twice."""


def encode(value: Any, *, pickle: bool = True, what: str = "the value") -> Encoded:
    """Take `value` apart. What lies in the buffers must not change until it has left.

    Raises `MisuseError`, naming the type and its place in `what`, for what cannot be pickled, or would have
    to be although `pickle` is off.
    """
    if type(value) is bytes and len(value) < APART_BYTES:
        return tuple.__new__(Encoded, (_pack(value), []))
    try:
        try:
            return _encode_plain(value, share=not pickle)
        except (OverflowError, UnicodeEncodeError):
            # An int or str, seen by msgpack only, that it cannot carry: look at each one.
            return _encode_plain(value, share=not pickle, careful=True)
    except (_NotPlain, _Shared, RecursionError, ValueError) as error:
        if pickle:
            return _encode_pickle(value, what)
        if isinstance(error, _NotPlain):
            raise _refusal(value, error.args[0], what) from None
        raise MisuseError(f"{what} cannot be sent without pickle: nested too deeply") from error


def encode_leaves(values: Sequence[Any]) -> Encoded | None:
    """`[values, None]`, where none of them needs to be taken apart: most calls are such. Else None."""
    for value in values:
        kind = type(value)
        if kind not in _LEAVES and (kind is not bytes or len(value) >= APART_BYTES):
            return None
    try:
        return tuple.__new__(Encoded, (_pack([list(values), None]), []))
    except (OverflowError, UnicodeEncodeError):
        return None


def _encode_plain(value: Any, *, share: bool, careful: bool = False) -> Encoded:
    buffers: list[Buffer] = []
    return Encoded(_pack(_Encoder(buffers, share=share, careful=careful).plain(value)), buffers)


class _Encoder:
    """Turns one value into what msgpack packs as it is."""

    def __init__(self, buffers: list[Buffer], *, share: bool, careful: bool) -> None:
        self._buffers = buffers
        self._share = share
        self._seen: set[int] = set()
        self._leaves: frozenset[type] = frozenset({type(None), bool, float}) if careful else _LEAVES

    def plain(self, value: Any) -> Any:
        """`value` itself where msgpack can carry it; containers are made anew only where they must be."""
        kind = type(value)
        leaves = self._leaves
        if kind in leaves:
            return value
        if kind is list:
            self._see(value)
            if leaves.issuperset(map(type, value)):
                return value
            return [item if type(item) in leaves else self.plain(item) for item in value]
        if kind is dict:
            self._see(value)
            if leaves.issuperset(map(type, value)) and leaves.issuperset(map(type, value.values())):
                return value
            return {self.plain(key): self.plain(item) for key, item in value.items()}
        if kind is bytes:
            return value if len(value) < APART_BYTES else self._apart(bytes, value)
        special = _SPECIAL.get(kind)
        if special is not None:
            return special(self, value)
        describe = tensors.describer(kind)
        described = None if describe is None else describe(value)
        if described is None:
            raise _NotPlain(value)
        return self._tensor(*described)

    def _see(self, value: object) -> None:
        if id(value) in self._seen and not self._share:
            raise _Shared
        self._seen.add(id(value))

    def _sequence(self, code: int, value: Any) -> Any:
        return msgpack.ExtType(code, _pack([self.plain(item) for item in value]))

    def _tensor(self, which: int, description: list[Any], raw: Buffer) -> Any:
        if len(raw) < INLINE_TENSOR_BYTES:
            return msgpack.ExtType(_TENSOR, _pack([which, description, bytes(raw)]))
        self._buffers.append(raw)
        return msgpack.ExtType(_TENSOR, _pack([which, description, len(self._buffers) - 1]))

    def _apart(self, kind: type, value: Buffer) -> Any:
        self._buffers.append(value)
        return msgpack.ExtType(_APART, _pack([kind is bytearray, len(self._buffers) - 1]))

    def _bytearray(self, value: bytearray) -> Any:
        if len(value) >= APART_BYTES:
            return self._apart(bytearray, value)
        return msgpack.ExtType(_BYTEARRAY, bytes(value))

    def _memoryview(self, value: memoryview) -> Any:
        if not value.contiguous or value.nbytes == 0:
            raise _NotPlain(value)
        self._buffers.append(value.cast("B"))
        place = len(self._buffers) - 1
        return msgpack.ExtType(_MEMORYVIEW, _pack([value.format, list(value.shape or ()), place]))

    def _int(self, value: int) -> Any:
        if value in _INT_RANGE:
            return value
        size = value.bit_length() // 8 + 1
        return msgpack.ExtType(_BIG_INT, value.to_bytes(size, "little", signed=True))

    def _str(self, value: str) -> Any:
        try:
            value.encode()
        except UnicodeEncodeError:
            return msgpack.ExtType(_ODD_STR, value.encode("utf-8", "surrogatepass"))
        return value

    def _complex(self, value: complex) -> Any:
        return msgpack.ExtType(_COMPLEX, _pack([value.real, value.imag]))


_SPECIAL: dict[type, Callable[[_Encoder, Any], Any]] = {
    tuple: lambda encoder, value: encoder._sequence(_TUPLE, value),
    set: lambda encoder, value: encoder._sequence(_SET, value),
    frozenset: lambda encoder, value: encoder._sequence(_FROZENSET, value),
    bytearray: _Encoder._bytearray,
    memoryview: _Encoder._memoryview,
    int: _Encoder._int,
    str: _Encoder._str,
    complex: _Encoder._complex,
}


# pickle


def _encode_pickle(value: Any, what: str) -> Encoded:
    buffers: list[Buffer] = []
    stream = io.BytesIO()
    try:
        _pickler(stream, buffers).dump(value)
    except Exception as error:  # pickling runs users' code, which may raise anything
        raise _unpicklable(value, error, what) from error
    data = stream.getbuffer()
    if len(data) < APART_BYTES:
        return Encoded(_pack(msgpack.ExtType(_PICKLE, bytes(data))), buffers)
    buffers.append(data)
    return Encoded(_pack(msgpack.ExtType(_PICKLE, b"")), buffers)


def _pickler(stream: io.BytesIO, buffers: list[Buffer]) -> pickling.Pickler:
    """One that keeps buffers apart, of torch tensors too (torch's own pickles copy them)."""

    def keep(buffer: pickling.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < INLINE_TENSOR_BYTES:
            return True
        buffers.append(raw)
        return False

    pickler = pickling.Pickler(stream, protocol=5, buffer_callback=keep)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "Tensor"):
        own: dict[type, Any] = {torch.Tensor: _reduce_tensor}
        table: dict[type, Any] = copyreg.dispatch_table
        pickler.dispatch_table = ChainMap(own, table)
    return pickler


def _reduce_tensor(tensor: Any) -> tuple[Any, ...]:
    return tensors.reduce_tensor(tensor, pickling.PickleBuffer)


def _try_pickle(value: Any) -> Exception | None:
    try:
        _pickler(io.BytesIO(), []).dump(value)
    except Exception as error:  # noqa: BLE001 - pickling runs users' code, which may raise anything
        return error
    return None


def _unpicklable(value: Any, error: Exception, what: str) -> MisuseError:
    """Says which part of `value` it was: goes down into whatever child fails by itself."""
    if isinstance(error, RecursionError):
        return MisuseError(f"{what} cannot be sent: nested too deeply")
    place = what
    for _ in range(32):
        for step, child in _children(value):
            failure = _try_pickle(child)
            if failure is not None:
                value, error, place = child, failure, place + step
                break
        else:
            break
    return MisuseError(f"{place} ({_type_name(value)}) cannot be pickled: {error}")


def _refusal(value: Any, culprit: object, what: str) -> MisuseError:
    place = _find(value, culprit, what, 32) or what
    name = _type_name(culprit)
    return MisuseError(f"{place} ({name}) would have to be pickled, and pickle is off here")


def _find(value: Any, culprit: object, place: str, depth: int) -> str | None:
    if value is culprit:
        return place
    if depth:
        for step, child in _children(value):
            found = _find(child, culprit, place + step, depth - 1)
            if found is not None:
                return found
    return None


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        keys = [(f" key {key!r:.60}", key) for key in value]
        return [*((f"[{key!r:.60}]", item) for key, item in value.items()), *keys]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [(f"{{{item!r:.60}}}", item) for item in value]
    return [(f".{name}", item) for name, item in getattr(value, "__dict__", {}).items()]


def _type_name(value: object) -> str:
    return class_name(type(value))


def class_name(kind: type) -> str:
    """As Python's tracebacks write it."""
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


# decoding


def decode(body: Buffer, buffers: Sequence[Buffer] = (), *, pickle: bool = True) -> Any:
    """The value again. It owns `buffers` from now on.

    Raises `WireError`, and nothing else: "pickle refused" when `pickle` is off and the value needs it,
    "cannot rebuild" when a pickle names what does not exist here or its code raises.
    """
    hook = _Decoder(buffers, pickle).extension
    try:
        return msgpack.unpackb(body, ext_hook=hook, strict_map_key=False)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise WireError("malformed value", f"{type(error).__name__}: {error}"[:200]) from None


class _Decoder:
    def __init__(self, buffers: Sequence[Buffer], pickle: bool) -> None:
        self._buffers = buffers
        self._pickle = pickle

    def _unpack(self, data: Buffer) -> Any:
        return msgpack.unpackb(data, ext_hook=self.extension, strict_map_key=False)

    def extension(self, code: int, data: bytes) -> Any:
        if code == _PICKLE:
            return self._unpickle(data)
        reader = _READERS.get(code)
        if reader is None:
            raise WireError("malformed value", f"no such extension: {code}")
        return reader(self, data)

    def _fields(self, data: bytes, count: int) -> list[Any]:
        fields = self._unpack(data)
        if type(fields) is not list or len(fields) != count:
            raise WireError("malformed value", f"an extension of {count} fields was expected")
        return fields

    def _items(self, data: bytes) -> list[Any]:
        items = self._unpack(data)
        if type(items) is not list:
            raise WireError("malformed value", "a sequence was expected")
        return items

    def _buffer(self, place: object) -> Buffer:
        if type(place) is not int or not 0 <= place < len(self._buffers):
            raise WireError("malformed value", f"there is no buffer {place!r:.60}")
        return self._buffers[place]

    def _apart(self, data: bytes) -> bytes | bytearray:
        mutable, place = self._fields(data, 2)
        buffer = self._buffer(place)
        if mutable:
            return buffer if type(buffer) is bytearray else bytearray(buffer)
        return buffer if type(buffer) is bytes else bytes(buffer)

    def _memoryview(self, data: bytes) -> memoryview:
        format, shape, place = self._fields(data, 3)
        return memoryview(self._buffer(place)).cast("B").cast(format, shape)

    def _tensor(self, data: bytes) -> Any:
        which, description, place = self._fields(data, 3)
        raw = place if type(place) is bytes else self._buffer(place)
        return tensors.restore(which, description, raw)

    def _complex(self, data: bytes) -> complex:
        return complex(*self._fields(data, 2))

    def _unpickle(self, data: bytes) -> Any:
        if not self._pickle:
            raise WireError("pickle refused", "the value needs pickle, and pickle is off here")
        buffers = list(self._buffers)
        stream: Buffer = data or (buffers.pop() if buffers else b"")
        try:
            return pickling.loads(stream, buffers=[tensors.writable(b) for b in buffers])
        except Exception as error:  # unpickling runs users' code, which may raise anything
            text = f"{type(error).__name__}: {error}"
            raise WireError("cannot rebuild", text[:500]) from error


_READERS: dict[int, Callable[[_Decoder, bytes], Any]] = {
    _TUPLE: lambda decoder, data: tuple(decoder._items(data)),
    _SET: lambda decoder, data: set(decoder._items(data)),
    _FROZENSET: lambda decoder, data: frozenset(decoder._items(data)),
    _BIG_INT: lambda _, data: int.from_bytes(data, "little", signed=True),
    _BYTEARRAY: lambda _, data: bytearray(data),
    _ODD_STR: lambda _, data: data.decode("utf-8", "surrogatepass"),
    _COMPLEX: _Decoder._complex,
    _APART: _Decoder._apart,
    _MEMORYVIEW: _Decoder._memoryview,
    _TENSOR: _Decoder._tensor,
}
