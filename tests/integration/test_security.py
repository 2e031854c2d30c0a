"""Strangers at the door of a running process: who is let in, what the others are told, and what it costs.

`RUNTIME_FUZZ_FRAMES=1000000` has the test of changed frames send that many (three minutes); CI sends fewer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import json
import os
import random
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from runtime.transport.base import Record
from runtime.transport.link import SocketSettings
from runtime.transport.security import Security
from runtime.transport.sockets import Authenticator, RouterSocket, SocketTransport, mint
from runtime.wire import frames
from tests.contracts.transport_contract import Inbox
from tests.integration.support import strangers
from tests.integration.support.hosts import Hosts
from tests.integration.support.strangers import GREETING, HANDSHAKE_S, HOST, Health, Visited

KEYS = mint()
SSH = {"0.0.0.0"}
SETTINGS = SocketSettings(connect_s=2.0, security=KEYS)


@pytest.fixture
def visited(directory: Path) -> Iterator[Visited]:
    made = Visited(directory, KEYS)
    yield made
    made.close()


class Friend:
    """A process of the same job."""

    def __init__(self, directory: Path, visited: Visited) -> None:
        self._transport = SocketTransport("f.1", f"ipc://{directory}/f", SETTINGS)
        self._address = str(visited.tcp)
        self._inbox = Inbox()

    async def ask(self, header: bytes = b"how are you") -> bytes:
        count = len(self._inbox.records)
        self._transport.connect(HOST, self._address).send(Record(header))
        await self._inbox.until_count(count + 1)
        assert self._inbox.lost == []
        return self._inbox.headers[-1]

    async def health(self) -> Health:
        return Health(*json.loads(await self.ask()))

    async def rejected(self, reason: str, count: int) -> Health:
        """Once so many have been counted."""
        async with asyncio.timeout(10):
            while (health := await self.health()).rejected.get(reason, 0) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return health


@pytest.fixture
async def friend(directory: Path, visited: Visited) -> AsyncIterator[Friend]:
    made = Friend(directory, visited)
    await made._transport.start(made._inbox)
    yield made
    await made._transport.close(0.2)


async def test_with_the_jobs_public_key_but_another_of_his_own_nobody_is_let_in(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys, inbox = mint(), Inbox()
    transport = SocketTransport("h.1", "tcp://127.0.0.1:0", SETTINGS)
    await transport.start(inbox)
    (to,) = strangers.parse_all(transport.address)
    context = zmq.Context()
    for _ in range(3):
        stranger = context.socket(zmq.DEALER)
        monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        strangers.dial(stranger, to, keys)
        stranger.send_multipart(strangers.hello("x.1"))
        stranger.send_multipart([b"garbage"])
        assert await asyncio.to_thread(monitor.poll, 5000)
        assert recv_monitor_message(monitor)["value"] == 400
        assert await asyncio.to_thread(stranger.poll, 50) == 0
        stranger.disable_monitor()
        monitor.close(0)
        stranger.close(0)
    context.term()
    async with asyncio.timeout(5):
        while transport.statistics().rejected.get("unknown key", 0) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert transport.statistics().rejected == {"unknown key": 3}
    assert transport.statistics()[0] == transport.statistics().messages_in == 0
    assert inbox.records == []
    logged = [r.message for r in caplog.records if "unknown key" in r.message]
    assert len(logged) == 1
    assert "127.0.0.1" in logged[0]
    assert KEYS.secret.hex() not in caplog.text
    await transport.close()


async def test_whoever_is_asked_for_is_answered_in_order_and_2000_a_second_at_most() -> None:
    refused: list[str] = []
    context = zmq.Context()
    asked = Authenticator(context, KEYS, SimpleNamespace(refuse=refused.append))  # type: ignore[arg-type]
    libzmq = context.socket(zmq.DEALER)
    libzmq.connect("inproc://zeromq.zap.01")
    who = [[b"CURVE", KEYS.public]] * 97 + [[b"CURVE", mint().public], [b"NULL"], [b"CURVE"]]
    for number, words in enumerate(who):
        head = [b"", b"1.0", b"%d" % number, b"job", b"10.0.0.9", b""]
        libzmq.send_multipart([*head, *words])
    began = asyncio.get_running_loop().time()
    asked._answer()
    answers = [libzmq.recv_multipart(zmq.NOBLOCK) for _ in range(20)]
    assert libzmq.poll(0) == 0, "twenty at once"
    assert asked._again is not None
    assert asked._again.when() - began >= 0.01
    answers += [await asyncio.to_thread(libzmq.recv_multipart) for _ in range(80)]
    assert [(int(number), status) for _, _, number, status, *_ in answers] == [
        (number, b"200" if number < 97 else b"400") for number in range(100)
    ]
    assert refused == ["10.0.0.9"] * 3
    asked.close()
    libzmq.close(0)
    context.term()


def test_where_nobody_can_be_asked_nobody_is_let_in() -> None:
    context = zmq.Context()
    bound = RouterSocket(context, SETTINGS)
    friend = context.socket(zmq.DEALER)
    monitor = friend.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
    strangers.dial(friend, bound.bind(strangers.parse_all("tcp://127.0.0.1:0")[0]), KEYS)
    assert monitor.poll(10_000)
    assert recv_monitor_message(monitor)["event"] == zmq.EVENT_DISCONNECTED
    friend.disable_monitor()
    for one in (monitor, friend):
        one.close(0)
    bound.close(0.0)
    context.term()


async def test_a_crowd_that_comes_at_once_is_let_in_by_turns(
    visited: Visited, friend: Friend
) -> None:
    context = zmq.Context()
    crowd = [strangers.dealer(context, visited.tcp, KEYS) for _ in range(60)]
    for number, one in enumerate(crowd):
        one.send_multipart(strangers.hello(f"c.{number}"))
    for one in crowd:
        assert await asyncio.to_thread(one.poll, 20_000)
        assert frames.decode_batch(one.recv_multipart()).kind == frames.WELCOME
    assert (await friend.health())[:1] == ({},)
    for one in crowd:
        one.close(0)
    context.term()


async def test_a_port_tells_a_stranger_nothing_but_that_it_speaks_zeromq(
    visited: Visited, friend: Friend
) -> None:
    to = (visited.tcp.target, visited.tcp.port)

    def scan() -> None:
        with socket.create_connection(to, source_address=("127.0.0.2", 0)) as outside:
            assert _all(outside) == b""
        for sent, greeting in ((b"", 10), (GREETING, 64), (GREETING[:20], 64), (b"\x01\0", 10)):
            with socket.create_connection(to) as silent:
                silent.sendall(sent)
                began = time.monotonic()
                assert len(_all(silent)) in (greeting, 0)  # a reset takes it back
                assert time.monotonic() - began < HANDSHAKE_S + 4
        null = GREETING.replace(b"CURVE", b"NULL\0") + strangers.zmtp(4, b"\x05READY")
        for sent in ([b"GET / HTTP/1.1\r\n\r\n" * 9], [null], [GREETING, strangers._COMMANDS[0]]):
            assert len(strangers.visit_raw(visited.tcp, sent)) in (0, 10, 64)

    await asyncio.to_thread(scan)
    health = await friend.rejected("no handshake", 7)
    assert set(health.rejected) == {"no handshake"}
    assert health.known == health.links == 1


def _all(connection: socket.socket) -> bytes:
    """What comes until the other side ends it."""
    connection.settimeout(HANDSHAKE_S * 3)
    got = b""
    try:
        while data := connection.recv(4096):
            got += data
    except ConnectionResetError:
        pass
    return got


async def test_a_peer_restarted_at_the_same_port_is_reached_again(directory: Path) -> None:
    a, at_a = SocketTransport("a.1", f"ipc://{directory}/a", SETTINGS), Inbox()
    await a.start(at_a)
    address = "tcp://127.0.0.1:0"
    for incarnation in range(3):
        b, at_b = SocketTransport(f"b.{incarnation}", address, SETTINGS), Inbox()
        await b.start(at_b)
        address = b.address
        a.connect(b.peer, address).send(Record(b"x", [bytes(3_000_000)]))
        await at_b.until_count(1)
        await b.close()
        await at_a.until(lambda n=incarnation: len(at_a.lost) == n + 1)
    await a.close()


async def test_links_go_on_while_strangers_use_up_all_file_descriptors(
    visited: Visited, friend: Friend, directory: Path
) -> None:
    before = await friend.health()
    psutil.Process(visited.process.pid).rlimit(psutil.RLIMIT_NOFILE, (60, 60))
    to = (visited.tcp.target, visited.tcp.port)
    with contextlib.ExitStack() as stack:
        for _ in range(70):
            stack.enter_context(socket.create_connection(to))
        began = time.monotonic()
        for _ in range(5):
            assert await friend.ask(b"still there") == b"still there"
        assert time.monotonic() - began < HANDSHAKE_S, "they were all there meanwhile"
        await asyncio.sleep(2.5 * HANDSHAKE_S)  # until all of them had their turn
    after = await friend.rejected("no handshake", 70)
    assert (after.fds, after.known) == (before.fds, 1)


async def test_a_flood_while_the_loop_is_busy_does_not_hold_up_the_close() -> None:
    transport = SocketTransport("h.1", "tcp://127.0.0.1:0", SETTINGS)
    await transport.start(Inbox())
    (to,) = strangers.parse_all(transport.address)
    stop, made = threading.Event(), []

    def flood() -> None:
        with contextlib.suppress(ConnectionError):  # the last one may come after the close
            while not stop.is_set():
                with socket.create_connection((to.target, to.port), 5) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 9)
                    made.append(connection)

    thread = threading.Thread(target=flood)
    thread.start()
    time.sleep(1.5)  # noqa: ASYNC251 - some thousand connections, whose events nobody reads
    stop.set()
    async with asyncio.timeout(5):
        await transport.close()
    await asyncio.to_thread(thread.join)
    assert len(made) > 100


@pytest.mark.timeout(900)
async def test_changed_frames_end_their_connections_and_nothing_else(
    visited: Visited, friend: Friend
) -> None:
    total = int(os.environ.get("RUNTIME_FUZZ_FRAMES", "6000"))
    draw = random.Random(int(os.environ.get("RUNTIME_FUZZ_SEED", "7")))
    await _fuzz(visited, friend, draw, max(4000, total // 10))
    before = await _at_rest(friend)
    began = time.monotonic()
    sent = await _fuzz(visited, friend, draw, total)
    after = await _at_rest(friend)
    print(f"{sent} in {time.monotonic() - began:.0f} s", before, after, sep="\n")
    assert visited.process.poll() is None
    assert after.fds <= before.fds
    assert after.known == after.links == 1
    assert after.rss - before.rss < 8 * 1024 * 1024
    assert sum(after.rejected.values()) - sum(before.rejected.values()) > sent["connections"] // 2


async def _fuzz(visited: Visited, friend: Friend, draw: random.Random, total: int) -> Counter[str]:
    """In bits, so that what waits to be read is never much."""
    sent: Counter[str] = Counter()
    while sent["raw"] + sent["curve"] + sent["plain"] < total:
        sent += await asyncio.to_thread(_fuzz_a_bit, visited, draw)
        assert await friend.ask(b"still there") == b"still there"
        await _drained(friend)
    return sent


def _fuzz_a_bit(visited: Visited, draw: random.Random) -> Counter[str]:
    sent: Counter[str] = Counter()
    with zmq.Context() as context:
        for _ in range(40):
            some = strangers.raw_frames(draw)
            strangers.visit_raw(visited.tcp, some)
            sent["raw"] += len(some)
            for kind, to, keys in (("curve", visited.tcp, KEYS), ("plain", visited.ipc, None)):
                messages = strangers.visit_with_keys(context, to, keys, draw, 12)
                sent[kind] += sum(map(len, messages))
            sent["connections"] += 3
    return sent


async def _drained(friend: Friend) -> None:
    """When all connections of strangers have ended, and what came by them was read."""
    async with asyncio.timeout(20):
        while (await friend.health()).known > 1:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def _at_rest(friend: Friend) -> Health:
    await _drained(friend)
    await asyncio.sleep(HANDSHAKE_S + 0.5)
    return await friend.health()


def test_no_key_is_in_an_argument_an_environment_or_a_file_that_others_can_read(
    visited: Visited, directory: Path
) -> None:
    child = psutil.Process(visited.process.pid)
    assert leaks(KEYS, [os.getpid(), child.pid], [directory]) == []
    assert stat.S_IMODE(os.stat(visited.ipc.target).st_mode) == 0o600
    found = directory / "found"
    found.write_text(KEYS.secret.hex())
    found.chmod(0o644)
    argv = ["sleep", "60", z85.encode(KEYS.secret)]
    with subprocess.Popen(argv[:2], env={"KEY": base64.b64encode(KEYS.secret)}) as other:
        until = time.monotonic() + 5.0  # exec closes files before the new environment can be seen
        while len(leaks(KEYS, [other.pid], [directory])) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        found_by_us = leaks(KEYS, [other.pid], [directory])
        other.kill()
    assert len(found_by_us) == 2


def leaks(keys: Security, pids: list[int], folders: list[Path]) -> list[str]:
    """Where the secret key stands that it should not, in any way of writing it."""
    secret = keys.secret
    texts = (secret, secret.hex().encode(), z85.encode(secret), base64.b64encode(secret)[:40])
    paths = [Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")]
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        paths += [path for path in files if stat.S_IMODE(path.stat().st_mode) & 0o044]
    return [str(path) for path in paths if any(text in path.read_bytes() for text in texts)]


_TALK = """
import os, pathlib, time
import runtime
from runtime.peer import context

runtime.export_rpc_method("host", lambda: os.uname().nodename)
runtime.barrier("exported")
spec = context.held()
if os.environ["RANK"] == "0":
    assert runtime.RoleGroup("default").call("host").result(20) == ["host1", "host2"]
    path = pathlib.Path("keys")
    path.touch(0o600)
    path.write_bytes(spec.security.secret)
runtime.barrier("asked")
pathlib.Path("ready." + os.environ["RANK"]).touch()
while not pathlib.Path("enough").exists():
    time.sleep(0.05)
"""
_SCAN = """
import json, socket, sys
answers = []
for port in sys.argv[2:]:
    with socket.create_connection((sys.argv[1], int(port)), 5) as one:
        one.settimeout(8)
        got = b""
        try:
            one.sendall(b"GET / HTTP/1.1" + bytes(90))
            while data := one.recv(4096):
                got += data
        except ConnectionError:
            pass
        answers.append(len(got))
print(json.dumps(answers))
"""


def test_a_job_on_two_hosts_shows_its_key_nowhere_and_its_ports_are_closed_to_others(
    hosts: Hosts, write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    script = write("talk.py", _TALK)
    words = (sys.executable, "-m", "runtime.launch", "--hosts", "host1:1,host2:1", script)
    job = hosts.popen("host1", *words, cwd=tmp_path)
    try:
        until = time.monotonic() + 30
        while not all((tmp_path / f"ready.{rank}").exists() for rank in "01"):
            assert time.monotonic() < until
            assert job.poll() is None
            time.sleep(0.05)
        secret = (tmp_path / "keys").read_bytes()
        pids = [pid for host in ("host1", "host2") for pid in hosts.pids(host)]
        folders = [tmp_path, *(hosts.path(host, "/tmp") for host in ("host1", "host2"))]
        assert len(pids) >= 5
        assert leaks(KEYS._replace(secret=secret), pids, folders) == []
        for host in ("host1", "host2"):
            address, ports = hosts.address(host), _listening(hosts.pids(host)[0])
            assert {where for where, _ in ports} <= {address, "127.0.0.1"} | SSH, ports
            ours = [str(port) for where, port in ports if where == address and port != 22]
            assert len(ours) >= 2
            for scanner, most in (("host3", 0), ("host2", 64), ("host1", 64)):
                found = hosts.python(scanner, "-c", _SCAN, address, *ours).stdout
                assert max(json.loads(found)) <= most, (host, scanner, found)
    finally:
        (tmp_path / "enough").touch()
        try:
            assert job.wait(20) == 0
        finally:
            job.kill()
            job.wait()
    hosts.assert_empty()


def _listening(pid: int) -> set[tuple[str, int]]:
    """Where somebody listens on the host of a process."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    found = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {
        (str(ipaddress.IPv4Address(bytes.fromhex(ip)[::-1])), int(port, 16)) for ip, port in found
    }
