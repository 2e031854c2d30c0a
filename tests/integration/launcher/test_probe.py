"""The probe of addresses with real sockets: agents in this process, each with loopback addresses of its own."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from runtime import aio
from runtime.launcher import probe, survey
from runtime.launcher.channel import Channel, Frame, Kind
from runtime.launcher.greeting import Hello
from runtime.launcher.link import AgentLink, HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.survey import choose_addresses

NOBODYS = "127.9.9.9"


async def agent(channel: Channel) -> None:
    """What an agent does before its job."""
    while (frame := await channel.receive()) is not None:
        await probe.serve(frame.message(), channel)


async def mute(channel: Channel) -> None:
    """An agent that hangs."""
    while await channel.receive() is not None:
        pass


async def dying(channel: Channel) -> None:
    """An agent that dies in the midst of it: it listens and is gone."""
    frame = await channel.receive()
    assert frame is not None
    channel.send_message(Kind.EVENT, {"event": "log", "text": "not what was asked"})


async def raving(channel: Channel) -> None:
    """An agent whose answer is none."""
    await channel.receive()
    channel.send(Kind.EVENT, b"\xc1")


@asynccontextmanager
async def linked(host: Host, addresses: Sequence[str], body=agent) -> AsyncIterator[AgentLink]:
    (down, to), (by, up) = os.pipe(), os.pipe()
    link = AgentLink(host, await Channel.open(by, to))
    found = tuple((f"eth{number}", address) for number, address in enumerate(addresses))
    came_from = "10.9.9.9" if host.name == "h1" else "UNKNOWN"  # by a pipe
    link.hello = Hello(host.name, "3.11", None, "0", 1, 1, 0, addresses=found, ssh_client=came_from)
    channel = await Channel.open(down, up)

    async def run() -> None:
        try:
            await body(channel)
        finally:
            await channel.close()

    async with aio.background(run(), host.name) as task:
        try:
            yield link
        finally:
            await link.channel.close()
            await asyncio.wait({task})


async def chosen(
    iface: tuple[str, ...] = (), ports: tuple[int, int] | None = None, **hosts: str
) -> survey.Chosen:
    async with AsyncExitStack() as stack:
        links = [
            await stack.enter_async_context(linked(Host(name, local=False), text.split()))
            for name, text in hosts.items()
        ]
        return await choose_addresses(links, iface, ports)


async def test_each_host_gets_the_address_that_the_others_reach() -> None:
    found = await chosen(h1="127.0.1.1", h2="127.0.1.2", h3="127.0.1.3")
    assert found.address == {"h1": "127.0.1.1", "h2": "127.0.1.2", "h3": "127.0.1.3"}
    assert found.interface == {"h1": "eth0", "h2": "eth0", "h3": "eth0"}
    assert found.accept_from == ("127.0.1.1", "10.9.9.9", "127.0.1.2", "127.0.1.3")
    assert not found.wished
    assert (await chosen(("127.0.0.0/8",), h1="127.0.1.1", h2="127.0.1.2")).wished


async def test_ipv6_and_ipv4_are_tried_alike() -> None:
    found = await chosen(h1="::1", h2="127.0.1.2")
    assert found.address == {"h1": "::1", "h2": "127.0.1.2"}


async def test_an_address_that_is_in_no_host_is_not_chosen() -> None:
    found = await chosen(h1="10.255.255.1 127.0.1.1", h2="127.0.1.2")
    assert found.address["h1"] == "127.0.1.1"


async def test_iface_without_a_fitting_address_names_the_host_and_what_it_has() -> None:
    with pytest.raises(HostsFailed) as caught:
        await chosen(("ib0", "127.0.2.0/24"), h1="127.0.2.1", h2="127.0.1.2")
    assert str(caught.value) == (
        "host h2: no address of --iface ib0,127.0.2.0/24; it has 127.0.1.2 (eth0)"
    )
    assert caught.value.code == 2


async def test_a_host_that_can_listen_nowhere_says_why() -> None:
    with pytest.raises(HostsFailed, match=r"h1: cannot listen on any .*10\.255\.255\.1: cannot"):
        await chosen(h1="10.255.255.1", h2="127.0.1.2")


async def test_ports_are_taken_from_the_range_and_one_that_is_full_says_so() -> None:
    with socket.create_server(("127.0.1.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostsFailed, match=f"no free port in {port}:{port}"):
            await chosen(ports=(port, port), h1="127.0.1.1", h2="127.0.1.2")
    assert (await chosen(ports=(port, port), h1="127.0.1.1", h2="127.0.1.2")).address[
        "h1"
    ] == "127.0.1.1"


async def test_the_name_of_a_host_decides_between_its_addresses() -> None:
    async with AsyncExitStack() as stack:
        first = Host("h1", addr="127.0.3.1", local=False)
        links = [
            await stack.enter_async_context(linked(first, ["127.0.1.1", "127.0.3.1"])),
            await stack.enter_async_context(
                linked(Host("127.0.3.2", local=False), ["127.0.1.2", "127.0.3.2"])
            ),
        ]
        found = await choose_addresses(links)
    assert found.address == {"h1": "127.0.3.1", "127.0.3.2": "127.0.3.2"}


async def test_what_addr_says_goes_before_the_network_of_the_others() -> None:
    async with (
        linked(Host("h1", addr="127.0.3.1", local=False), ["127.0.1.1", "127.0.3.1"]) as first,
        linked(Host("h2", local=False), ["127.0.1.2"]) as second,
    ):
        found = await choose_addresses([first, second])
        secrets = [survey._Survey([first, second], (), None)._secrets[h] for h in ("h1", "h2")]
    assert found.address == {"h1": "127.0.3.1", "h2": "127.0.1.2"}
    assert len({*secrets, bytes(32)}) == 3, "drawn for each host"


@pytest.mark.parametrize(
    ("body", "reason"),
    [(mute, "no answer within 0.2 s"), (dying, "its agent ended"), (raving, "is not msgpack")],
)
async def test_an_agent_that_hangs_or_dies_is_named(
    body, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_REPLY_S", 0.2)
    async with (
        linked(Host("h1", local=False), ["127.0.1.1"]) as well,
        linked(Host("h2", local=False), ["127.0.1.2"], body) as ill,
    ):
        with pytest.raises(HostsFailed, match=f"host h2: .*{reason}") as caught:
            await choose_addresses([well, ill])
        assert caught.value.code == 69


async def test_a_single_host_is_not_tried() -> None:
    async with linked(Host("h1", local=False), ["127.0.1.1"], mute) as link:
        assert (await choose_addresses([link])).address == {"h1": "127.0.1.1"}


# What strangers get, and who is taken for a host


@asynccontextmanager
async def listening(address: str = "127.0.1.1") -> AsyncIterator[tuple[int, bytes]]:
    """An agent that listens: its port and its secret."""
    async with linked(Host("h1"), [address]) as link:
        secret = os.urandom(32)
        message = {"op": "probe", "secret": secret, "addresses": [address], "ports": None}
        link.channel.send_message(Kind.COMMAND, message)
        frame = await link.channel.receive()
        assert isinstance(frame, Frame)
        yield frame.message()["opened"][address], secret
        link.channel.send_message(Kind.COMMAND, {"op": "probed"})


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096)])
async def test_a_stranger_gets_no_byte_and_is_let_go_at_the_end(said: bytes) -> None:
    async with listening() as (port, _):
        reader, writer = await asyncio.open_connection("127.0.1.1", port)
        writer.write(said)
        await asyncio.sleep(0.05)
    async with asyncio.timeout(1):
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
    writer.close()


def test_only_figures_are_addresses_so_that_no_resolver_is_waited_for() -> None:
    assert probe._numeric("127.0.0.1", 7)[1] == ("127.0.0.1", 7)
    with pytest.raises(OSError):
        probe._numeric("localhost", 7)


async def test_only_who_gives_the_right_answer_is_taken_for_the_host() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(16))
        writer.close()

    async with listening() as (port, secret):
        other = await asyncio.start_server(echo, "127.0.1.2", 0)
        elsewhere = other.sockets[0].getsockname()[1]
        closed = socket.create_server(("127.0.1.3", 0))
        targets = [
            ("right", "127.0.1.1", port, secret),
            ("wrong", "127.0.1.1", port, os.urandom(32)),
            ("echo", "127.0.1.2", elsewhere, secret),
            ("silent", *closed.getsockname(), secret),
            ("nobody", NOBODYS, 1, secret),
            ("scope", "fe80::1%nosuch0", 1, secret),
        ]
        trials = {host: rest for host, *rest in await probe._try_all(targets, 0.5)}
        other.close()
        closed.close()
    address, seconds, reason = trials.pop("right")
    assert (address, reason) == ("127.0.1.1", "")
    assert seconds is not None
    assert seconds < 0.5
    assert {host: reason for host, (_, _, reason) in trials.items()} == {
        "wrong": "somebody else answers",
        "echo": "somebody else answers",
        "silent": "no answer",
        "nobody": "connection refused",
        "scope": "name or service not known",
    }
