"""Links through other agents: one agent runs the ssh clients of some more hosts for the launcher.

A frame of such a link is the body of a RELAY frame: the link's number, the frame's kind and body. So links
nest: what a relayed agent carries itself is wrapped twice. A `Trunk` is the launcher's end, a `Relay` the
agent's; both take the place of the agent's own channel. A relay knows nothing of what it carries. When its
input ends, it lets go of its links; when it dies, they are lost with it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import signal
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from runtime import aio
from runtime.errors import WireError
from runtime.launcher import spawn, ssh
from runtime.launcher.channel import Frame, Frames, Kind
from runtime.launcher.link import AgentLink
from runtime.launcher.plan import Host

logger = logging.getLogger(__name__)

_INNER = struct.Struct("!HB")
_WAITING = 256
_LINGER_S = 15.0
"""How long a relay outlives its own agent's work for the links that it carries. They are let go of when the
launcher is gone."""
_MISSED_S, _SILENT_S = 2.0, 1.0
"""The agent that carries a link is to be missed so much before that link: where it is gone, where it is silent."""


class Branch(NamedTuple):
    """A host and those that it dials."""

    host: Host
    children: tuple[Branch, ...] = ()


def grow(hosts: Sequence[Host], fan_out: int) -> tuple[Branch, ...]:
    """A tree of the hosts, level by level, each with an even share of the next: nobody has more than
    `fan_out` children, and the launcher dials the first level."""
    levels: list[Sequence[Host]] = []
    at, width = 0, fan_out
    while at < len(hosts):
        levels.append(hosts[at : at + width])
        at, width = at + width, width * fan_out
    below: list[Branch] = []
    for level in reversed(levels):
        below = [Branch(host, tuple(below[n :: len(level)])) for n, host in enumerate(level)]
    return tuple(below)


def wrap(number: int, kind: Kind, body: bytes) -> bytes:
    """The body of a RELAY frame."""
    return _INNER.pack(number, kind) + body


def unwrap(body: bytes) -> tuple[int, Frame]:
    """Link and frame. Raises `WireError`."""
    try:
        number, kind = _INNER.unpack_from(body)
        return number, Frame(Kind(kind), body[_INNER.size :])
    except (struct.error, ValueError) as error:
        raise WireError("a RELAY frame that holds no frame", str(error)) from None


class _Split(aio.Service, ABC):
    """A channel that is shared: our own frames come out of `receive`, relayed ones go their way."""

    def __init__(self, name: str, channel: Frames) -> None:
        super().__init__(name)
        self._channel = channel
        self._own: asyncio.Queue[Frame | None] = asyncio.Queue(_WAITING)

    async def _on_start(self) -> None:
        self.serve(self._read(), "reader")

    async def _read(self) -> None:
        try:
            while (frame := await self._channel.receive()) is not None:
                await self._take(frame)
        except (WireError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: what came is no frame of ours: %r", self._name, error)
        await self._own.put(None)
        await self._over()
        await asyncio.Event().wait()

    async def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.RELAY:
            await self._relayed(*unwrap(frame.body))
        elif frame.kind not in (Kind.COMMAND, Kind.EVENT) or not self._told(frame.message()):
            await self._own.put(frame)

    @abstractmethod
    async def _relayed(self, number: int, frame: Frame) -> None: ...

    @abstractmethod
    def _told(self, message: Mapping[str, Any]) -> bool:
        """Whether this message was about relayed links."""

    @abstractmethod
    async def _over(self) -> None:
        """The channel has ended: so have all links."""

    # -- our own frames -----------------------------------------------------------------------

    @property
    def held(self) -> bool:
        return self._channel.held

    def send(self, kind: Kind, body: bytes) -> None:
        self._channel.send(kind, body)

    def send_message(self, kind: Kind, message: dict[str, Any]) -> None:
        self._channel.send_message(kind, message)

    async def drain(self) -> None:
        await self._channel.drain()

    async def receive(self) -> Frame | None:
        frame = await self._own.get()
        if frame is None:
            self._own.put_nowait(None)  # whoever asks again hears it again
        return frame


class Trunk(_Split):
    """The launcher's end: the channel of an agent that carries links to others."""

    pids: Sequence[int] = ()

    def __init__(self, host: str, channel: Frames) -> None:
        super().__init__(f"trunk {host}", channel)
        self.host = host
        self._full = False
        self._numbers = itertools.count()
        self._links: dict[int, RelayedLink] = {}

    @property
    def held(self) -> bool:
        return self._full or super().held

    def dial(self, host: Host, argv: Sequence[str], token: str) -> RelayedLink:
        """Let the agent run `argv` for us, whose marker has `token`; what comes of it the link tells."""
        number = next(self._numbers)
        link = self._links[number] = RelayedLink(host, number, self)
        message = {"op": "dial", "link": number, "host": host.name, "argv": list(argv)}
        self.send_message(Kind.COMMAND, {**message, "token": token})
        return link

    async def _relayed(self, number: int, frame: Frame) -> None:
        if (link := self._links.get(number)) is not None:
            self._full = True
            await link.take(frame)
            self._full = False

    def _told(self, message: Mapping[str, Any]) -> bool:
        match message.get("event"):
            case "dialled":
                self._links[message["link"]].answer(str(message["version"]))
            case "hung up":
                exit = spawn.Exit(int(message["code"]), int(message["signal"]))
                told = tuple(map(str, message["stderr"]))
                self._links.pop(message["link"]).end(exit, told, str(message["noise"]))
            case _:
                return False
        return True

    async def _over(self) -> None:
        await asyncio.sleep(_MISSED_S)
        self._end_links()

    def _end_links(self) -> None:
        gone = (f"the link went through host {self.host}, which is gone",)
        for link in self._links.values():
            link.end(spawn.Exit(ssh.LOST), gone)
        self._links.clear()

    async def close(self, timeout: float = 1.0) -> None:
        """Let go of the agent, and of the links that it carries."""
        await self._channel.close(timeout)
        await super().close()
        self._end_links()


class RelayedLink(AgentLink):
    """A link that another agent carries. It is its own channel."""

    pids: Sequence[int] = ()
    late_s = _SILENT_S

    def __init__(self, host: Host, number: int, trunk: Trunk) -> None:
        super().__init__(host, self)
        self._number, self._trunk = number, trunk
        self.via = f" (its link goes through host {trunk.host})"
        self._waiting: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._taken = asyncio.Event()
        self._version: asyncio.Future[str | None] = self.exit.get_loop().create_future()

    # -- what the trunk hears -----------------------------------------------------------------

    async def take(self, frame: Frame) -> None:
        """A frame for whoever reads this link; waits while too many are there."""
        if self.exit.done():
            return  # nobody reads it any more
        self._waiting.put_nowait(frame)
        if self._waiting.qsize() >= _WAITING:
            self._taken.clear()
            await self._taken.wait()

    def answer(self, version: str | None) -> None:
        if not self._version.done():
            self._version.set_result(version)

    def end(self, exit: spawn.Exit, told: tuple[str, ...], noise: str = "") -> None:
        if not self.exit.done():
            self.told, self.noise = told, noise
            self.answer(None)
            self.exit.set_result(exit)
            self._waiting.put_nowait(None)
            self._taken.set()

    # -- as a link and a channel --------------------------------------------------------------

    @property
    def held(self) -> bool:
        return self._trunk.held

    async def marker(self, token: str) -> tuple[str | None, str]:
        return await asyncio.shield(self._version), self.noise

    def send(self, kind: Kind, body: bytes) -> None:
        self._trunk.send(Kind.RELAY, wrap(self._number, kind, body))

    def send_message(self, kind: Kind, message: dict[str, Any]) -> None:
        self.send(kind, msgpack.packb(message))

    async def drain(self) -> None:
        await self._trunk.drain()

    async def receive(self) -> Frame | None:
        frame = await self._waiting.get()
        self._taken.set()
        if frame is None:
            self._waiting.put_nowait(None)  # whoever asks again hears it again
        return frame

    async def close(self, timeout: float = 1.0) -> None:
        """Let go: the agent at its end sees the end of its input."""
        trunk, self.channel = self.channel, self
        if trunk is not self:
            await trunk.close(timeout)  # what goes through here goes first
        self._hang_up(spawn.Exit())

    def kill(self) -> None:
        self._hang_up(spawn.Exit(signal=signal.SIGKILL))

    def _hang_up(self, exit: spawn.Exit) -> None:
        if not self.exit.done():
            hang_up = {"op": "hang up", "link": self._number, "now": exit.signal != 0}
            self._trunk.send_message(Kind.COMMAND, hang_up)
            self.end(exit, ())


class Relay(_Split):
    """The agent's end: its own channel to the launcher, and the links that it carries for it."""

    def __init__(self, channel: Frames) -> None:
        super().__init__("relay", channel)
        self._links: dict[int, AgentLink] = {}
        self._carrying: set[asyncio.Task[None]] = set()

    @property
    def pids(self) -> Sequence[int]:
        """The processes that carry links: they live as long as those."""
        return [link.pid for link in self._links.values()]

    async def _relayed(self, number: int, frame: Frame) -> None:
        # Not drained: one host that does not read must not stop the others; little goes down.
        if (link := self._links.get(number)) is not None:
            link.channel.send(frame.kind, frame.body)

    def _told(self, message: Mapping[str, Any]) -> bool:
        match message.get("op"):
            case "dial":
                task = self.spawn(self._carry(message), f"link {message['link']}")
                self._carrying.add(task)
                task.add_done_callback(self._carrying.discard)
            case "hang up":
                if (link := self._links.get(message["link"])) is None:
                    return True
                if message["now"]:
                    link.kill()
                else:
                    self.spawn(link.channel.close(), "hang up")
            case _:
                return False
        return True

    async def _carry(self, message: Mapping[str, Any]) -> None:
        number = message["link"]
        try:
            link = await AgentLink.through(Host(message["host"]), message["argv"])
        except OSError as error:
            self._hung_up(number, spawn.Exit(ssh.LOST), (str(error),))
            return
        self._links[number] = link
        noise = ""
        try:
            version, noise = await link.marker(message["token"])
            if version is not None:
                dialled = {"event": "dialled", "link": number, "version": version}
                self.send_message(Kind.EVENT, dialled)
                await self._up(number, link)
        except WireError as error:
            logger.warning("host %s: %s", message["host"], error)
        finally:
            exit = await link.ended()
            del self._links[number]
            self._hung_up(number, exit, link.stderr, noise)
            await link.close()

    async def _up(self, number: int, link: AgentLink) -> None:
        while (frame := await link.channel.receive()) is not None:
            self.send(Kind.RELAY, wrap(number, frame.kind, frame.body))
            await self.drain()

    def _hung_up(self, number: int, exit: spawn.Exit, told: Sequence[str], noise: str = "") -> None:
        message = {"event": "hung up", "link": number, "stderr": list(told), "noise": noise}
        self.send_message(Kind.EVENT, {**message, "code": exit.code, "signal": exit.signal})

    async def _over(self) -> None:
        for link in self._links.values():
            self.spawn(link.channel.close(), "hang up")

    async def close(self, timeout: float = 1.0) -> None:
        """Wait until the links that are carried have ended, for a while; then let go of them."""
        if self._carrying:
            await asyncio.wait(self._carrying, timeout=_LINGER_S)
        await super().close()
        await self._channel.close(timeout)
