"""Sockets: the contract over ipc and tcp. What needs other processes or raw bytes is in tests/integration."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.transport.address import parse, parse_all
from runtime.transport.base import Lane, Record
from runtime.transport.sockets import SocketSettings, SocketTransport, mint
from tests.contracts.transport_contract import Inbox, Network, Peers, TransportContract, echo

KEYS = mint()
SETTINGS = SocketSettings(connect_s=1.5, security=KEYS)


class IpcNetwork:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def transport(self, peer: str) -> SocketTransport:
        return SocketTransport(peer, f"ipc://{self.directory}/{peer}", SETTINGS)


class TcpNetwork:
    """Addresses must be known before a peer listens, so each peer id gets a free port once."""

    def __init__(self) -> None:
        self._addresses: dict[str, str] = {}

    def transport(self, peer: str) -> SocketTransport:
        fresh = f"tcp://127.0.0.1:{_free_port()}?key={KEYS.public.hex()}"
        address = self._addresses.setdefault(peer, fresh)
        return SocketTransport(peer, address, SETTINGS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestContract(TransportContract):
    @pytest.fixture(params=["ipc", "tcp"])
    def network(self, request: pytest.FixtureRequest, directory: Path) -> Network:
        return IpcNetwork(directory) if request.param == "ipc" else TcpNetwork()


async def test_the_socket_file_is_private_and_removed(directory: Path) -> None:
    transport = SocketTransport("a.1", f"ipc://{directory}/a")
    await transport.start(Inbox())
    assert stat.S_IMODE(os.stat(directory / "a").st_mode) == 0o600
    await transport.close()
    assert os.listdir(directory) == []


async def test_a_file_left_by_a_dead_process_is_taken_over(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(directory / "a"))
    transport = SocketTransport("a.1", f"ipc://{directory}/a")
    await transport.start(Inbox())
    await transport.close()


async def test_a_failed_bind_leaves_the_owner_of_the_address_alone(directory: Path) -> None:
    peers = Peers(IpcNetwork(directory))
    _, inbox = await peers.start("a.1")
    with pytest.raises(ConfigError, match="another process listens there"):
        await peers.start("a.1")
    other, _ = await peers.start("b.1")
    other.connect("a.1", f"ipc://{directory}/a.1").send(Record(b"x"))
    await inbox.until_count(1)
    await peers.close()


async def test_port_zero_becomes_a_real_port() -> None:
    transport = SocketTransport("a.1", "tcp://127.0.0.1:0", SETTINGS)
    await transport.start(Inbox())
    bound = parse(transport.address)
    assert (bound.target, bound.key) == ("127.0.0.1", KEYS.public)
    assert bound.port > 0
    await transport.close()


async def test_a_directory_that_is_missing_is_named() -> None:
    transport = SocketTransport("a.1", "ipc:///nowhere/at/all")
    with pytest.raises(ConfigError, match="ipc:///nowhere/at/all"):
        await transport.start(Inbox())
    await transport.close()


def test_wrong_ids_and_addresses_are_refused_at_once() -> None:
    with pytest.raises(MisuseError, match="peer id"):
        SocketTransport("", "ipc:///tmp/a")
    with pytest.raises(MisuseError, match="peer id"):
        SocketTransport("x" * 300, "ipc:///tmp/a")
    with pytest.raises(ConfigError, match="mem://a"):
        SocketTransport("a.1", "mem://a")


async def test_one_transport_is_reached_by_ipc_from_its_folder_and_by_tcp_from_elsewhere(
    directory: Path,
) -> None:
    os.mkdir(directory / "elsewhere")
    texts = {
        name: f"ipc://{directory}/{name} tcp://127.0.0.1:0" for name in ("a", "b", "elsewhere/c")
    }
    made = {}
    for name, text in texts.items():
        made[name] = SocketTransport(f"{name}.1", text, SETTINGS), Inbox()
        await made[name][0].start(made[name][1])
    (b, at_b), reached = made["b"], {}
    ipc, tcp = parse_all(b.address)
    assert (str(ipc), tcp.key) == (f"ipc://{directory}/b", KEYS.public)
    for name in ("a", "elsewhere/c"):
        for lane in (Lane.CONTROL, Lane.RPC):  # one socket that dials connects both ways, in turn
            link = made[name][0].connect("b.1", b.address, lane)
            link.send(Record(b"x", [bytes(3_000_000)]))
            reached[name] = link.where
        itself = made[name][0].connect(f"{name}.1", made[name][0].address)
        assert itself.where.startswith("ipc:")
    await at_b.until_count(4)
    assert reached == {"a": ipc.endpoint, "elsewhere/c": tcp.endpoint}
    assert [inbox.lost for _, inbox in made.values()] == [[], [], []]
    for transport, _ in made.values():
        await transport.close()
    assert os.listdir(directory) == ["elsewhere"]


async def test_a_socket_that_dials_has_encrypted_and_plain_connections_at_once(
    directory: Path,
) -> None:
    a, at_a = SocketTransport("a.1", f"ipc://{directory}/a", SETTINGS), Inbox()
    await a.start(at_a)
    others = []
    for number, text in enumerate(
        ["tcp://127.0.0.1:0", f"ipc://{directory}/c", "tcp://[::1]:0"] * 2
    ):
        other = SocketTransport(f"b.{number}", text.replace("/c", f"/c{number}"), SETTINGS)
        await other.start(Inbox(echo))
        others.append(other)
        a.connect(other.peer, other.address).send(Record(b"%d" % number))
    await at_a.until_count(6)
    assert sorted(at_a.headers) == [b"%d" % number for number in range(6)]
    assert at_a.lost == []
    for transport in (a, *others):
        await transport.close()


async def test_a_port_is_one_of_the_range_and_a_full_range_is_named() -> None:
    low = _free_port()
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("127.0.0.1", low))
        settings = replace(SETTINGS, ports=(low, low + 3))
        made = [SocketTransport(f"a.{n}", "tcp://127.0.0.1:0", settings) for n in range(5)]
        started = 0
        words = rf"cannot bind 127\.0\.0\.1: none of the 4 ports {low} to {low + 3} is free"
        with pytest.raises(ConfigError, match=words):  # noqa: PT012 - how many are free is not known
            for transport in made:
                await transport.start(Inbox())
                started += 1
    ports = {parse(transport.address).port for transport in made[:started]}
    assert 0 < len(ports) == started
    assert ports <= {low + 1, low + 2, low + 3}
    for transport in made:
        await transport.close()


async def test_a_range_that_may_not_be_bound_is_not_tried_to_its_end() -> None:
    settings = replace(SETTINGS, ports=(20_000, 29_999))
    transport = SocketTransport("a.1", "tcp://192.0.2.1:0", settings)
    with pytest.raises(ConfigError, match=r"cannot bind tcp://192\.0\.2\.1:2\d+: "):
        await transport.start(Inbox())
    await transport.close()


async def test_a_bind_that_fails_takes_the_other_addresses_along(directory: Path) -> None:
    text = f"tcp://192.0.2.1:0 ipc://{directory}/a"
    transport = SocketTransport("a.1", text, SETTINGS)
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        await transport.start(Inbox())
    assert os.listdir(directory) == []
    await transport.close()


async def test_nothing_goes_over_tcp_without_keys(directory: Path) -> None:
    plain = SocketSettings()
    with pytest.raises(ConfigError, match="is not encrypted: this process has no keys"):
        SocketTransport("a.1", f"ipc://{directory}/a tcp://127.0.0.1:0", plain)
    for settings, key, words in (
        (plain, "", "is not encrypted: this process has no keys"),
        (plain, f"?key={KEYS.public.hex()}", "is encrypted, and this process has no keys"),
        (SETTINGS, "", "is not encrypted: this address has no key"),
        (replace(SETTINGS, insecure=True), "", "is not encrypted: this address has no key"),
    ):
        transport = SocketTransport("a.1", f"ipc://{directory}/a", settings)
        await transport.start(Inbox())
        with pytest.raises(ConfigError, match=words):
            transport.connect("b.1", f"tcp://127.0.0.1:1{key}")
        await transport.close()


@pytest.mark.parametrize(
    ("accept_from", "words"),
    [
        (("::1",), "nobody could connect, of ::1 none is IPv4"),
        (("127.0.0.1", "host-1"), "accept_from has 'host-1', no IP address"),
    ],
)
async def test_a_filter_that_would_let_in_nobody_or_everybody_is_refused(
    accept_from: tuple[str, ...], words: str
) -> None:
    settings = replace(SETTINGS, accept_from=accept_from)
    transport = SocketTransport("a.1", "tcp://127.0.0.1:0", settings)
    with pytest.raises(ConfigError, match=words):
        await transport.start(Inbox())
    await transport.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_addresses_of_both_kinds_may_be_let_in(host: str, directory: Path) -> None:
    settings = replace(SETTINGS, accept_from=("127.0.0.1", "::1", "fe80::1%of-another"))
    where = f"[{host}]" if ":" in host else host
    a, b = (SocketTransport(f"{n}.1", f"tcp://{where}:0", settings) for n in "ab")
    inbox = Inbox(echo)
    await a.start(Inbox())
    await b.start(inbox)
    a.connect("b.1", b.address).send(Record(b"x", [bytes(3_000_000)]))
    await inbox.until_count(1)
    await a.close()
    await b.close()
