"""Links that an agent carries for the launcher, to real processes: here `cat`, which sends every frame back."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import pytest

from runtime.launcher import spawn
from runtime.launcher.channel import Channel, Frame, Kind
from runtime.launcher.plan import Host
from runtime.launcher.relay import Relay, RelayedLink, Trunk
from tests.integration.launcher.waiting import until

CAT = "echo hello from a login; echo runtime-agent f00 3.11.7; exec cat"
HOST = Host("h2", local=False)


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def pair() -> tuple[Channel, Channel]:
    (left_read, right_write), (right_read, left_write) = os.pipe(), os.pipe()
    return await Channel.open(left_read, left_write), await Channel.open(right_read, right_write)


class Ends:
    """A trunk, and the relay at its other end."""

    def __init__(self, near: Channel, far: Channel) -> None:
        self.near, self.far = near, far
        self.trunk, self.relay = Trunk("h1", near), Relay(far)

    async def dial(self, argv: Sequence[str]) -> RelayedLink:
        link = self.trunk.dial(HOST, argv, "f00")
        assert await link.marker("f00") == ("3.11.7", "")
        return link


@asynccontextmanager
async def ends() -> AsyncIterator[Ends]:
    both = Ends(*await pair())
    await both.trunk.start()
    await both.relay.start()
    try:
        yield both
    finally:
        await both.trunk.close()
        await both.relay.close()
        assert not both.relay.pids


async def message(frame: Frame | None) -> Any:
    assert frame is not None
    return frame.message()


async def test_frames_of_a_carried_link_and_of_the_agent_itself_go_their_own_ways() -> None:
    async with ends() as both:
        link = await both.dial(sh(CAT))
        link.send(Kind.STDOUT, b"there and back")
        link.send_message(Kind.COMMAND, {"op": "for the other end"})
        both.trunk.send_message(Kind.COMMAND, {"op": "for the agent"})
        both.relay.send(Kind.STDERR, b"of the agent")
        assert await link.receive() == Frame(Kind.STDOUT, b"there and back")
        assert await message(await link.receive()) == {"op": "for the other end"}
        assert await message(await both.relay.receive()) == {"op": "for the agent"}
        assert await both.trunk.receive() == Frame(Kind.STDERR, b"of the agent")
        assert len(both.relay.pids) == 1


async def test_how_a_carried_link_ends_is_told_with_its_last_words() -> None:
    async with ends() as both:
        link = both.trunk.dial(HOST, sh("echo noise; echo gone >&2; exit 255"), "f00")
        assert await link.marker("f00") == (None, "noise")
        words = await link.words("noise")
        assert (words.code, words.stderr, await link.receive()) == (255, ("gone",), None)
        missing = both.trunk.dial(HOST, ["/no/such/ssh"], "f00")
        assert await missing.marker("f00") == (None, "")
        assert "/no/such/ssh" in missing.last_words()
        running = await both.dial(sh(CAT))
        os.kill(both.relay.pids[0], 9)
        assert await running.receive() is None
        assert await running.ended() == spawn.Exit(signal=9)


async def test_letting_go_of_a_link_ends_its_input_and_its_process() -> None:
    async with ends() as both:
        link, other = await both.dial(sh(CAT)), await both.dial(sh(CAT))
        await link.close()
        await until(lambda: len(both.relay.pids) == 1)
        assert await link.receive() is None
        other.send(Kind.STDOUT, b"still there")
        assert await other.receive() == Frame(Kind.STDOUT, b"still there")


async def test_killing_a_link_ends_a_process_that_does_not_heed_its_input() -> None:
    async with ends() as both:
        link = await both.dial(sh("echo runtime-agent f00 3.11.7; exec sleep 600"))
        link.kill()
        async with asyncio.timeout(1):
            assert await link.receive() is None
            assert await link.ended() == spawn.Exit(signal=9)
        await until(lambda: not both.relay.pids, timeout=1.5)


async def test_a_link_that_is_let_go_lets_go_of_those_that_go_through_it() -> None:
    async with ends() as both:
        link = await both.dial(sh(CAT))
        link.channel = below = Trunk("h2", link)
        await below.start()
        further = below.dial(Host("h3", local=False), sh(CAT), "f00")
        await link.close()
        assert await further.receive() is None
        assert not below.running


async def test_when_the_agent_is_gone_its_links_are_lost_and_say_through_whom() -> None:
    async with ends() as both:
        link = await both.dial(sh(CAT))
        await both.far.close()
        async with asyncio.timeout(1):
            assert await both.trunk.receive() is None
        assert not link.exit.done(), "who carried it is to be missed first"
        async with asyncio.timeout(3):
            assert await link.receive() is None
        assert link.last_words() == "the link went through host h1, which is gone"
        assert await link.ended() == spawn.Exit(255)


async def test_when_the_launcher_is_gone_carried_links_end_within_seconds() -> None:
    async with ends() as both:
        await both.dial(sh(CAT))
        pid = both.relay.pids[0]
        await both.near.close()
        assert await both.relay.receive() is None
        started = time.monotonic()
        await both.relay.close()
        assert time.monotonic() - started < 4
        assert spawn.look_at(pid) is None


async def test_a_relay_waits_for_the_links_that_it_carries() -> None:
    async with ends() as both:
        link = await both.dial(sh("echo runtime-agent f00 3.11.7; sleep 0.5; exec head -c 9"))
        closing = asyncio.timeout(10)
        link.send(Kind.STDOUT, b"abc")  # five bytes of head, three, and a line feed
        async with closing:
            await both.relay.close()
        assert await link.receive() == Frame(Kind.STDOUT, b"abc")
        assert await link.receive() is None
        assert await link.ended() == spawn.Exit(0)


def flood(frames: int) -> list[str]:
    script = (
        "import sys; from runtime.launcher.channel import pack, Kind; print('runtime-agent f00 3.11.7', flush=True);"
        f"[sys.stdout.buffer.write(pack(Kind.STDOUT, bytes(50_000))) for _ in range({frames})]"
    )
    return [sys.executable, "-c", script]


async def test_what_nobody_reads_is_held_back_at_its_source() -> None:
    frames = 3_000
    async with ends() as both:
        link, other = await both.dial(flood(frames)), await both.dial(sh(CAT))
        await until(lambda: link._waiting.qsize() == 256)
        assert both.trunk.held, "the agent cannot be heard"
        assert other.held, "nor can those whose links it carries"
        count = 0
        async with asyncio.timeout(20):
            while await link.receive() is not None:
                count += 1
        assert count == frames
        assert not both.trunk.held


async def test_what_still_comes_of_a_link_that_was_let_go_stops_nobody() -> None:
    async with ends() as both:
        link, other = await both.dial(flood(1_000_000)), await both.dial(sh(CAT))
        await until(lambda: link._waiting.qsize() == 256)
        link.kill()
        other.send(Kind.STDOUT, b"still there")
        async with asyncio.timeout(5):
            assert await other.receive() == Frame(Kind.STDOUT, b"still there")


@pytest.mark.parametrize(
    ("kind", "garbage"), [(Kind.RELAY, b"?"), (Kind.EVENT, msgpack.packb({"event": "hung up"}))]
)
async def test_what_is_no_frame_ends_the_trunk_and_what_has_no_link_is_dropped(
    kind: Kind, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with ends() as both:
        link = await both.dial(sh(CAT))
        both.trunk.send(Kind.RELAY, b"\0\x63\4to nobody")
        both.relay.send(Kind.RELAY, b"\0\x63\4from nobody")
        link.send(Kind.STDOUT, b"x")
        assert await link.receive() == Frame(Kind.STDOUT, b"x")
        both.relay.send(kind, garbage)
        assert await link.receive() is None
        assert await both.trunk.receive() is None
        assert await both.trunk.receive() is None, "whoever asks again hears it again"
        assert "no frame" in caplog.text
