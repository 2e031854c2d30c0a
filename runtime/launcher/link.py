"""The link to one agent: frames over a pipe, or over the stdio of a process such as `ssh`.

Killing an ssh client leaves what it started alive on the other side: only the end of its input ends an agent.
So closing a link is enough, and whatever happens to ssh or to us closes it. Who is dialled, and what the agents
say of themselves, is the business of `dial.py`; links through other agents are that of `relay.py`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runtime.errors import RuntimeFault
from runtime.launcher import spawn
from runtime.launcher.channel import Channel, Frames
from runtime.launcher.plan import Host
from runtime.launcher.watch import Watch

if TYPE_CHECKING:  # jobs of one host do without
    from runtime.launcher.greeting import Hello
    from runtime.launcher.records import Way
    from runtime.launcher.ssh import Failure, LastWords

UNREACHABLE, REFUSED, _LOST = 69, 2, 255
_NOISE_BYTES = 1 << 20
_TAIL_BYTES = 8192
_SRUN_ADDS = (
    r"(?m)^srun: (error: \S+: task 0: .*|cluster configuration lacks support for cpu binding)$"
)
"""What `srun` says that its exit code says, too, or that nobody needs to know."""
_STEERS = r"(\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f-\x9f])+"
"""What another host says is shown on our terminal, which it must not steer."""
_END_S = 2.0
_TAIL_S = 0.5


class HostsFailed(RuntimeFault):
    """Some hosts cannot be used; the text has a line for each. `.failures`, `.code` of the launcher's exit."""

    def __init__(self, reason: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(reason)
        self.failures = tuple(failures)
        self.code = UNREACHABLE if any(f.unreachable for f in failures) else REFUSED

    @classmethod
    def of(cls, failures: Sequence[Failure]) -> HostsFailed:
        return cls("\n".join(f"host {f.host}: {f.reason}" for f in failures), failures)


class _Tail(asyncio.Protocol):
    """The last words on somebody's standard error."""

    def __init__(self) -> None:
        self._data = bytearray()
        self.ended = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._data += data
        del self._data[:-_TAIL_BYTES]

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)

    def lines(self) -> tuple[str, ...]:
        text = re.sub(_SRUN_ADDS, "", self._data.decode(errors="replace"))
        lines = (re.sub(_STEERS, " ", line).strip() for line in text.splitlines())
        return tuple(filter(None, lines))


class AgentLink:
    """One agent: its host, the frames to and from it, and the local process that carries them.

    `exit` is done when that process (the agent itself, or the ssh client) has ended; `stderr` holds the last
    lines that it said. `way` leads to the host another time (None: no need, or not from elsewhere).

    A link that goes through another agent has no process: `pid` is 0, and `exit` is done when that agent says
    so; `via` names its host, in words. `late_s`: how much later than others such a link is missed.
    """

    via = ""
    late_s = 0.0
    ahead_s = 0.0
    """How far the host's clock is ahead of ours."""
    noise = ""
    """The last line before the marker."""

    def __init__(self, host: Host, channel: Frames, pid: int = 0) -> None:
        self.host, self.channel, self.pid = host, channel, pid
        self.hello: Hello | None = None
        self.way: Way | None = None
        self.exit: asyncio.Future[spawn.Exit] = asyncio.get_running_loop().create_future()
        self.told: tuple[str, ...] = ()
        self._watch = Watch(pid, self._process_ended) if pid else None
        self._tail: _Tail | None = None
        self._tail_transport: asyncio.BaseTransport | None = None

    @property
    def local(self) -> bool:
        return self.host.local

    @classmethod
    async def of_agent(cls, host: Host, agent: spawn.LocalAgent) -> AgentLink:
        """The link to an agent of this machine. Its standard error is ours."""
        return cls(host, await Channel.open(agent.read_fd, agent.write_fd), agent.pid)

    @classmethod
    async def through(cls, host: Host, argv: Sequence[str]) -> AgentLink:
        """Start `argv`, whose standard input and output are to become the frames. Raises `OSError`."""
        (down, to), (by, up), (heard, err) = os.pipe(), os.pipe(), os.pipe()
        try:
            pid = spawn.start(argv, streams=spawn.Streams(down, up, err), tied=True)
        except OSError:
            for fd in (to, by, heard):
                os.close(fd)
            raise
        finally:
            for fd in (down, up, err):
                os.close(fd)
        link = cls(host, await Channel.open(by, to), pid)
        tail = link._tail = _Tail()
        link._tail_transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: tail, os.fdopen(heard, "rb", 0)
        )
        return link

    async def marker(self, token: str) -> tuple[str | None, str]:
        """Wait for the marker line: the interpreter's version, and the last line of noise before it.

        The version is None when the link ended without one, or after more noise than start-up files make.
        """
        from runtime.launcher import ssh

        assert isinstance(self.channel, Channel)  # other links' markers are their relay's business
        read = 0
        while read < _NOISE_BYTES and (line := await self.channel.line()):
            version = ssh.marked_version(line, token)
            if version is not None:
                return version, self.noise
            self.noise, read = _text(line), read + len(line)
        return None, self.noise

    @property
    def stderr(self) -> tuple[str, ...]:
        """The last lines on the standard error of ssh or, through it, of the agent."""
        return self.told if self._tail is None else self._tail.lines()

    def last_words(self) -> str:
        """The last of them; "" if there was none."""
        return next(reversed(self.stderr), "")

    async def words(self, noise: str = "") -> LastWords:
        """How it ended, once it has; it is killed if it does not."""
        from runtime.launcher.ssh import LastWords

        exit = await self.ended()
        name = exit.cause if exit.signal else ""
        return LastWords(exit.code, name, self.stderr, noise)

    def kill(self) -> None:
        """End the local process now. An agent on another host sees the end of its input."""
        if self._watch is not None:
            self._watch.kill()

    async def ended(self, timeout: float = _END_S) -> spawn.Exit:
        """How the local process ended; it is killed after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                exit = await asyncio.shield(self.exit)
        except TimeoutError:
            if self._watch is None:
                return spawn.Exit(code=_LOST)
            self.kill()
            exit = await self.exit
        if self._tail is not None:  # what it said comes by another pipe than its end
            await asyncio.wait({self._tail.ended}, timeout=_TAIL_S)
        return exit

    async def close(self) -> None:
        """Let go: the agent sees the end of its input; a local process that stays is killed. Idempotent."""
        await self.channel.close()
        if self._watch is not None:
            await self.ended()
        if self._tail_transport is not None:
            self._tail_transport.close()
            await asyncio.sleep(0)

    def _process_ended(self, watch: Watch, exit: spawn.Exit) -> None:
        self.exit.set_result(exit)


def _text(line: bytes) -> str:
    return line.decode(errors="replace").strip()
