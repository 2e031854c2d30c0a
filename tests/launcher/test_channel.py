"""Frames: what is packed is unpacked, and what is no frame is refused."""

from __future__ import annotations

import asyncio
import os

import msgpack
import pytest

from runtime.errors import WireError
from runtime.launcher.channel import LIMIT, Channel, Frame, Kind, pack, unpack_head


def test_a_head_tells_kind_and_length_and_the_body_ends_a_line() -> None:
    frame = pack(Kind.STDOUT, b"four")
    assert unpack_head(frame[:5]) == (Kind.STDOUT, 4)
    assert frame[5:] == b"four\n"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(WireError, match="kind 77"):
        unpack_head(b"\x4d\x00\x00\x00\x01")


def test_a_body_beyond_the_limit_is_refused_before_it_is_read() -> None:
    head = bytes([Kind.EVENT]) + (LIMIT + 1).to_bytes(4, "big")
    with pytest.raises(WireError, match=str(LIMIT)):
        unpack_head(head)


def test_a_message_comes_back() -> None:
    packed = pack(Kind.EVENT, msgpack.packb({"event": "end", "code": 3, "lines": ["ä"]}))
    assert Frame(Kind.EVENT, packed[5:-1]).message() == {"event": "end", "code": 3, "lines": ["ä"]}


@pytest.mark.parametrize("body", [b"\xc1", b"", b"\x93\x01"], ids=["invalid", "empty", "cut"])
def test_what_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(WireError, match="EVENT"):
        Frame(Kind.EVENT, body).message()


def test_a_message_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(WireError, match="list"):
        Frame(Kind.COMMAND, b"\x91\x01").message()


async def channels() -> tuple[Channel, Channel]:
    (left_read, right_write), (right_read, left_write) = os.pipe(), os.pipe()
    return await Channel.open(left_read, left_write), await Channel.open(right_read, right_write)


async def test_frames_arrive_in_order_and_whole() -> None:
    left, right = await channels()
    big = os.urandom(3_000_000)
    left.send(Kind.STDOUT, b"first")
    left.send(Kind.STDERR, big)
    left.send_message(Kind.EVENT, {"event": "last"})
    assert await right.receive() == Frame(Kind.STDOUT, b"first")
    assert await right.receive() == Frame(Kind.STDERR, big)
    frame = await right.receive()
    assert frame is not None
    assert frame.message() == {"event": "last"}
    await left.close()
    await right.close()


async def test_lines_come_before_the_first_frame() -> None:
    left, right = await channels()
    left._writer.write(b"welcome\nmarker\n")
    left.send(Kind.STDOUT, b"frame")
    assert [await right.line(), await right.line()] == [b"welcome\n", b"marker\n"]
    assert await right.receive() == Frame(Kind.STDOUT, b"frame")
    left._writer.write(b"x" * 3_000_000)
    with pytest.raises(WireError, match="without an end"):
        await right.line()
    await left.close(timeout=0.01)
    await right.close()


async def test_the_end_of_the_other_side_is_none_and_sending_is_harmless_then() -> None:
    left, right = await channels()
    left.send(Kind.STDOUT, b"x")
    await left.close()
    assert await right.receive() == Frame(Kind.STDOUT, b"x")
    assert await right.receive() is None
    right.send(Kind.STDOUT, b"nobody hears")
    await right.drain()
    await right.close()
    await right.close()


async def test_a_sender_waits_while_the_other_side_does_not_read() -> None:
    left, right = await channels()
    left.send(Kind.STDOUT, bytes(20_000_000))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await left.drain()
    frame = await right.receive()
    assert frame is not None
    assert len(frame.body) == 20_000_000
    await left.drain()
    await left.close()
    await right.close()


async def test_closing_is_bounded_when_the_other_side_does_not_read() -> None:
    left, right = await channels()
    left.send(Kind.STDOUT, bytes(20_000_000))
    async with asyncio.timeout(5):
        await left.close(timeout=0.05)
    await right.close()
