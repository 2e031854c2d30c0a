"""Sockets: the contract over ipc and tcp. What needs other processes or raw bytes is in tests/integration."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.errors import ConfigError, MisuseError
from runtime.transport.sockets import SocketSettings, SocketTransport
from tests.contracts.transport_contract import Inbox, Network, Peers, TransportContract

SETTINGS = SocketSettings(connect_s=1.5)


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
        address = self._addresses.setdefault(peer, f"tcp://127.0.0.1:{_free_port()}")
        return SocketTransport(peer, address, SETTINGS)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def directory() -> Iterator[Path]:
    # Not pytest's tmp_path: a unix socket's path must be short.
    made = Path(tempfile.mkdtemp(prefix="rt-"))
    yield made
    shutil.rmtree(made)


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
    import socket

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
    from runtime.transport.base import Record

    other.connect("a.1", f"ipc://{directory}/a.1").send(Record(b"x"))
    await inbox.until_count(1)
    await peers.close()


async def test_port_zero_becomes_a_real_port() -> None:
    transport = SocketTransport("a.1", "tcp://127.0.0.1:0")
    await transport.start(Inbox())
    assert transport.address.startswith("tcp://127.0.0.1:")
    assert not transport.address.endswith(":0")
    await transport.close()


async def test_a_directory_that_is_missing_is_named() -> None:
    transport = SocketTransport("a.1", "ipc:///nowhere/at/all")
    with pytest.raises(ConfigError, match="ipc:///nowhere/at/all"):
        await transport.start(Inbox())
    await transport.close()


def test_wrong_ids_and_addresses_are_refused_at_once() -> None:
    with pytest.raises(MisuseError, match="peer id"):
        SocketTransport("", "tcp://127.0.0.1:0")
    with pytest.raises(MisuseError, match="peer id"):
        SocketTransport("x" * 300, "tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match="mem://a"):
        SocketTransport("a.1", "mem://a")
