"""Strangers of all kinds: raw TCP, ZMTP by hand, CURVE with some key or the right one; and the process they visit.

`python -m tests.integration.support.strangers DIRECTORY` is that process: a transport at ipc:// in the directory and
at tcp://127.0.0.1, whose keys come by standard input. It prints its address. A record "how are you" is answered with
what it has counted and what it uses (`Health`), any other one with itself.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import psutil
import zmq

from runtime.transport.address import Address, parse_all
from runtime.transport.base import Link, Record
from runtime.transport.link import SocketSettings
from runtime.transport.security import Security
from runtime.transport.sockets import SocketTransport
from runtime.wire import frames

HANDSHAKE_S = 1.0
HOST = "h.1"


class Health(NamedTuple):
    """Of the visited process."""

    rejected: dict[str, int]
    messages: int
    links: int
    known: int
    rss: int
    fds: int


class Visited:
    """That process, seen from outside."""

    def __init__(self, directory: Path, keys: Security) -> None:
        argv = [sys.executable, "-m", __name__, str(directory)]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump(keys, self.process.stdin)
        self.process.stdin.flush()
        self.address = self.process.stdout.readline().decode().strip()
        self.ipc, self.tcp = parse_all(self.address)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Changed in one of the ways that parsers fear."""
    place = draw.randrange(len(data) + 1)
    way = draw.randrange(6)
    if way == 0:
        return data[:place]
    if way == 1:
        return data + draw.randbytes(draw.randrange(40))
    if way == 2:
        return data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:]
    if way == 3:
        extreme = draw.choice([b"\0", b"\x7f", b"\xff", b"\xff" * 8, b"\x80" + bytes(7)])
        return data[:place] + extreme + data[place + len(extreme) :]
    if way == 4:
        return data[:place] + data[place // 2 :]
    changed = bytearray(data or b"\0")
    for _ in range(draw.randrange(1, 4)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)


def zmtp(flags: int, body: bytes) -> bytes:
    """A frame; flags: 1 more, 2 long, 4 command."""
    size = struct.pack(">Q", len(body)) if flags & 2 else bytes([len(body) & 255])
    return bytes([flags]) + size + body


_COMMANDS = [
    zmtp(4, b"\x05HELLO\x01\0" + bytes(72) + bytes(range(120))),
    zmtp(6, b"\x08INITIATE" + bytes(400)),
    zmtp(4, b"\x07MESSAGE" + bytes(40)),
    zmtp(2, b"\x07MESSAGE" + bytes(70_000)),
    zmtp(4, b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"),
    zmtp(4, b"\x05ERROR\x03400"),
    zmtp(4, b"\x04PING\0\x10ping"),
    zmtp(1, b""),
    zmtp(0, b"hello"),
    b"\x02\x7f" + b"\xff" * 7,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(60),
]


def raw_frames(draw: random.Random) -> list[bytes]:
    """What one connection without keys sends: mostly a greeting, then commands, most of them changed."""
    head = draw.choice([GREETING, GREETING, GREETING.replace(b"CURVE", b"NULL\0"), b""])
    some = [draw.choice(_COMMANDS) for _ in range(draw.randrange(1, 6))]
    return [head if draw.random() < 0.7 else mutated(head, draw), *(mutated(f, draw) for f in some)]


def _batches() -> list[list[bytes]]:
    """One good message of each kind."""
    text = struct.pack("<?QIQ", True, 0, 0, 10)
    made = [
        frames.encode_batch([Record(b"x" * 30, [b"y" * 50]), Record(b"z")]),
        frames.encode_batch([Record(msgpack.packb([1, 2, "method", None, b"body"]))]),
        frames.encode_batch([Record(b"loose")], frames.LOOSE),
        frames.encode_batch([Record(text), Record(b"large")], frames.SPLIT),
        frames.encode_batch([Record(struct.pack("<QQQ", 0, 9, 0), [b"123456789"])], frames.PIECE),
        frames.encode_batch([Record(b"a reason")], frames.BYE),
        hello("again.1"),
    ]
    return [[bytes(part) for part in message] for message in made]


def hello(peer: str, lane: str = "RPC", wanted: str = HOST) -> list[bytes]:
    records = [Record(text.encode()) for text in (peer, wanted, lane)]
    return [bytes(part) for part in frames.encode_batch(records, frames.HELLO)]


_BATCHES = _batches()


def message(draw: random.Random) -> list[bytes]:
    """What a peer that is let in sends: parts of a message, most of them changed."""
    parts = list(draw.choice(_BATCHES))
    if draw.random() < 0.3:
        return parts
    place = draw.randrange(len(parts))
    parts[place] = mutated(parts[place], draw)
    if draw.random() < 0.1:
        parts.insert(draw.randrange(len(parts) + 1), draw.randbytes(draw.randrange(30)))
    return parts


def dealer(context: zmq.Context[Any], to: Address, keys: Security | None) -> zmq.Socket[Any]:
    """Connected with these keys; to ipc:// without any."""
    made = context.socket(zmq.DEALER)
    dial(made, to, keys)
    return made


def dial(made: zmq.Socket[Any], to: Address, keys: Security | None) -> None:
    """As `dealer`, with a socket that is there already."""
    made.setsockopt(zmq.LINGER, 2000)
    made.setsockopt(zmq.SNDHWM, 0)
    if keys is not None:
        made.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        made.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        made.setsockopt(zmq.CURVE_SERVERKEY, to.key)
    made.connect(to.endpoint)


def visit_raw(to: Address, sent: list[bytes]) -> bytes:
    """One connection that sends all that, and what was answered until its end."""
    answer = b""
    with socket.create_connection((to.target, to.port), timeout=HANDSHAKE_S * 5) as connection:
        try:
            connection.sendall(b"".join(sent))
            connection.shutdown(socket.SHUT_WR)
            while got := connection.recv(4096):
                answer += got
        except OSError:
            pass  # it did not read to the end
    return answer


def visit_with_keys(
    context: zmq.Context[Any], to: Address, keys: Security | None, draw: random.Random, count: int
) -> Iterator[list[bytes]]:
    """One connection that is let in, says hello (mostly), and sends so many messages that it yields."""
    made = dealer(context, to, keys)
    try:
        if draw.random() < 0.9:
            lane = draw.choice(["RPC", "RPC", "CONTROL", "BULK"])
            made.send_multipart(hello(f"f.{draw.getrandbits(64):x}", lane))
        for _ in range(count):
            parts = message(draw)
            made.send_multipart(parts)
            yield parts
    finally:
        made.close()


class _Host:
    """Receiver of the visited process."""

    def __init__(self, transport: SocketTransport) -> None:
        self._transport = transport

    def received(self, link: Link, record: Record) -> None:
        if record.header != b"how are you":
            link.send(record)
            return
        counted, me = self._transport.statistics(), psutil.Process()
        known = sum(len(router.links) for router in self._transport._routers())
        used = me.memory_info().rss, me.num_fds()
        health = Health(counted.rejected, counted.messages_in, counted.links, known, *used)
        link.send(Record(json.dumps(health).encode()))

    def link_lost(self, link: Link, reason: str) -> None:
        pass


async def _main(directory: str) -> None:
    keys = pickle.load(sys.stdin.buffer)
    settings = SocketSettings(connect_s=HANDSHAKE_S, security=keys, accept_from=("127.0.0.1",))
    transport = SocketTransport(HOST, f"ipc://{directory}/h tcp://127.0.0.1:0", settings)
    await transport.start(_Host(transport))
    print(transport.address, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1]))
