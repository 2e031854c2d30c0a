"""Values and arguments through the codec (wire.codec, wire.values)."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import pickle as pickling
import random
import threading
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import MisuseError, WireError
from runtime.wire import codec


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    pass


class Numbers(list):
    pass


@dataclasses.dataclass
class Point:
    x: int
    y: Any


Pair = collections.namedtuple("Pair", "a b")


class Evil:
    opened = 0

    def __reduce__(self):
        return _open_evil, ()


def _open_evil() -> None:
    Evil.opened += 1


def _refusal(function: Callable[..., object], *args: Any, **options: Any) -> str | None:
    """The reason of the WireError that `function` raises; None when it raises nothing."""
    try:
        function(*args, **options)
    except WireError as error:
        return error.reason
    return None


def _through(value: Any, **options: Any) -> Any:
    body, buffers = codec.encode(value, **options)
    received = [memoryview(bytearray(buffer)) for buffer in buffers]
    return codec.decode(body, received, **options)


def _same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(map(type, one)) == list(map(type, other)) and all(
            k in other and _same(v, other[k]) for k, v in one.items()
        )
    if isinstance(one, set | frozenset):
        return one == other and {type(x) for x in one} == {type(x) for x in other}
    return bool(one == other) or one != one


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers()
    | st.text(st.characters()) | st.binary(max_size=20) | st.binary(max_size=9).map(bytearray)
)  # fmt: skip
keys = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys | st.tuples(keys, keys), inner, max_size=4)
        | st.sets(keys, max_size=4)
        | st.frozensets(keys, max_size=3)
    ),
    max_leaves=12,
)


@given(values, st.booleans())
def test_plain_values_keep_their_types_with_and_without_pickle(value: Any, pickle: bool) -> None:
    assert _same(_through(value, pickle=pickle), value)


@pytest.mark.parametrize(
    "value",
    [
        Colour.RED,
        Text("x"),
        Numbers([1, 2]),
        Pair(1, (2,)),
        collections.OrderedDict(b=1, a=2),
        collections.defaultdict(list, a=[1]),
        Point(1, Point(2, None)),
        [1, {"deep": (Colour.RED,)}],
        {Colour.RED: 1},
        datetime.datetime(2024, 2, 3, tzinfo=datetime.UTC),
        range(3),
        msgpack.ExtType(5, b"x"),
        msgpack.Timestamp(1, 2),
        int,
    ],
    ids=repr,
)
def test_other_types_are_pickled_and_keep_their_types(value: Any) -> None:
    assert _same(_through(value), value)
    with pytest.raises(MisuseError, match="pickle is off here"):
        codec.encode(value, pickle=False)


def test_large_bytes_lie_beside_the_body_uncopied() -> None:
    data, mutable = bytes(70_000), bytearray(70_000)
    body, buffers = codec.encode([data, {"k": mutable}])
    assert buffers[0] is data
    assert buffers[1] is mutable
    assert len(body) < 100
    assert _same(codec.decode(body, [memoryview(b) for b in buffers]), [data, {"k": mutable}])


def test_memoryviews_arrive_as_memoryviews() -> None:
    view = memoryview(bytearray(range(48))).cast("B").cast("i", [3, 4])
    got = _through({"v": view})["v"]
    assert (type(got), got.format, got.shape, got.tolist()) == (
        memoryview, "i", (3, 4), view.tolist(),
    )  # fmt: skip


def test_large_pickles_lie_beside_the_body() -> None:
    value = [Point(i, "x" * 20) for i in range(5000)]
    body, buffers = codec.encode(value)
    assert len(body) < 50
    assert len(buffers) == 1
    assert _through(value) == value


def test_objects_that_share_a_part_still_share_it() -> None:
    part = [1]
    one, other = _through([part, {"again": part}, "x"])[:2]
    assert one is other["again"]
    first, second = _through([Point(1, part), Point(2, part)])
    assert first.y is second.y
    assert _through([part, part], pickle=False) == [[1], [1]]


def test_cycles_and_depth() -> None:
    loop: list[Any] = []
    loop.append(loop)
    got = _through(loop)
    assert got[0] is got
    deep = _nested(200)
    assert _through(deep) == deep
    for value, pickle in ((loop, False), (_nested(5000), False), (_nested(5000), True)):
        with pytest.raises(MisuseError, match="too deeply"):
            codec.encode(value, pickle=pickle)


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_what_cannot_be_pickled_is_named_with_its_place() -> None:
    lock = threading.Lock()
    with pytest.raises(
        MisuseError, match=r"the value\[1\]\['k'\]\.y \(_thread.lock\) cannot be pickled"
    ):
        codec.encode([1, {"k": Point(1, lock)}])
    with pytest.raises(MisuseError, match=r"argument 1 \(_thread.lock\)"):
        codec.encode_arguments([1, lock])
    with pytest.raises(MisuseError, match=r"argument 'lr'\['x'\] \(_thread.lock\)"):
        codec.encode_arguments([], {"lr": {"x": lock}})
    with pytest.raises(MisuseError, match=r"argument 0 .*Colour\) would have to be pickled"):
        codec.encode_arguments([Colour.RED], pickle=False)


def test_arguments_come_out_as_they_went_in() -> None:
    args, kwargs = (1, "x", (2,), [3]), {"lr": 0.1}
    body, buffers = codec.encode_arguments(args, kwargs)
    assert codec.decode_arguments(body, buffers) == (list(args), kwargs)
    assert codec.decode_arguments(*codec.encode_arguments(())) == ([], {})


@pytest.mark.parametrize("value", [None, [], [1, None], [[], 5], [[], {1: 2}], {}, [[], None, 1]])
def test_what_are_no_arguments_is_refused(value: Any) -> None:
    with pytest.raises(WireError, match="malformed arguments"):
        codec.decode_arguments(codec.encode(value).body)


def test_pickle_false_opens_no_pickle() -> None:
    Evil.opened = 0
    body, buffers = codec.encode([Evil()])
    with pytest.raises(WireError, match="pickle refused"):
        codec.decode(body, buffers, pickle=False)
    assert Evil.opened == 0
    codec.decode(body, buffers)
    assert Evil.opened == 1


def test_a_pickle_of_what_does_not_exist_here_fails_in_words() -> None:
    stream = pickling.dumps(Point(1, 2)).replace(b"Point", b"Gone!")
    body = msgpack.packb(msgpack.ExtType(1, stream))
    with pytest.raises(WireError, match="cannot rebuild: AttributeError"):
        codec.decode(body)


@given(st.binary(max_size=60), st.lists(st.binary(max_size=5), max_size=2))
def test_random_bytes_are_a_value_or_a_wire_error(body: bytes, buffers: list[bytes]) -> None:
    assert _refusal(codec.decode, body, buffers, pickle=False) != ""


@given(st.integers(-128, 127), st.binary(max_size=30), st.lists(st.binary(max_size=5), max_size=2))
def test_random_extensions_are_a_value_or_a_wire_error(
    code: int, data: bytes, buffers: list[bytes]
) -> None:
    body = (
        msgpack.packb(msgpack.ExtType(code, data))
        if code >= 0
        else b"\xc7\x01" + bytes([code % 256])
    )
    assert _refusal(codec.decode, body, buffers, pickle=False) != ""


def test_mutated_values_are_values_or_wire_errors() -> None:
    import numpy

    value = [
        (1, {2}, 2**70, bytearray(3), 1j), {"k": bytes(70_000), "t": numpy.arange(900)},
        numpy.float32(1), numpy.zeros(3, [("a", "i4")]), memoryview(b"abc"), "\ud800",
    ]  # fmt: skip
    body, buffers = codec.encode(value, pickle=False)
    rng = random.Random(5)
    refused = 0
    for _ in range(10_000):
        data = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            codec.decode(bytes(data), [bytes(b) for b in buffers], pickle=False)
        except WireError:
            refused += 1
    assert 1000 < refused < 10_000
