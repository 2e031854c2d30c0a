"""Opens the links to all hosts of a job, or says of every host that cannot be used why.

Each agent is greeted and says what it is; nothing is started before all of them fit. Few hosts are dialled from
here, a handful at a time. Many are a tree: each of the first dials some more, by the same command, which it gets
from here; where it cannot reach one, that is dialled from here after all.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from runtime.errors import WireError
from runtime.launcher import greeting, slurm, spawn, ssh
from runtime.launcher.channel import Kind
from runtime.launcher.link import AgentLink, HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.records import Way
from runtime.launcher.relay import Branch, Trunk, grow
from runtime.launcher.ssh import DialSettings, Failure

_IN = ("sh", "-c", 'cd "$0"; exec "$@"')
"""Files that ssh is told of may be meant from there."""
_BUSY_S = (1.0, 3.0)
"""So long after it turned us away a host is dialled again."""
_AFTER_DIAL_S = 60.0
"""An agent whose job has not come so long after all must have been dialled goes: if who dialled it has lost its
power, nothing else tells it for hours."""
_SSH_FIRST = 0.9
"""Of the time that a dial has, ssh may take so much: then the reason is its own."""
_ADDRESSES = 2
"""A name may stand for so many, of which only the last is alive: ssh tries each as long as it may try at all."""


async def dial_all(
    hosts: Sequence[Host], settings: DialSettings, own: spawn.LocalAgent | None = None
) -> list[AgentLink]:
    """A link to a greeted agent on each of `hosts`, in their order; each fits what the launcher is.

    `own` is an agent of this machine that was started already; it ends if no host is this machine. Raises
    `HostsFailed`; nothing is left open then, nor when this is cancelled.
    """
    dials = _Dials(settings, own)
    try:
        await dials.all(hosts)
        dials.check(hosts)
    except BaseException:
        await dials.close()
        raise
    dials.spare()
    return [dials.links[host.name] for host in hosts]


def carried(host: Host, settings: DialSettings, command: str, connect_s: float) -> list[str]:
    """The local command that runs `command` on the host; connecting may take `connect_s` seconds."""
    if settings.carrier == "srun":
        return slurm.srun_argv(host, command)
    return ssh.ssh_argv(host, settings, command, connect_s)


class _Dials:
    """The dials of one launch: what has answered, what has failed."""

    def __init__(self, settings: DialSettings, own: spawn.LocalAgent | None) -> None:
        self._settings, self._own = settings, own
        self._gate = asyncio.Semaphore(settings.at_once)
        self._until = asyncio.get_running_loop().time() + settings.timeout_s
        self._connect_s = settings.timeout_s * _SSH_FIRST
        self._failures: dict[str, Failure] = {}
        self.links: dict[str, AgentLink] = {}

    async def all(self, hosts: Sequence[Host]) -> None:
        """Dial them all; what fails is kept for `check`."""
        remote = [host for host in hosts if not host.local]
        branches = tuple(Branch(host) for host in hosts)
        if len(hosts) >= self._settings.tree_from:
            branches = (
                *(Branch(host) for host in hosts if host.local),
                *grow(remote, self._settings.fan_out),
            )
            self._connect_s /= 1 + _depth(branches)  # one more for what is dialled a second time
        else:
            self._connect_s /= max(_ADDRESSES, -(-len(hosts) // self._settings.at_once))
        async with asyncio.TaskGroup() as group:
            for branch in branches:
                group.create_task(self._branch(branch, None), name=f"dial {branch.host.name}")

    def check(self, hosts: Sequence[Host]) -> None:
        """Raise `HostsFailed` if any host failed or does not fit."""
        hellos = {name: link.hello for name, link in self.links.items() if link.hello is not None}
        unfit = greeting.check(hellos, greeting.describe({}))
        by_name = {failure.host: failure for failure in (*self._failures.values(), *unfit)}
        if by_name:
            raise HostsFailed.of([by_name[h.name] for h in hosts if h.name in by_name])

    def spare(self) -> None:
        """End the agent that was started for this machine, if no host turned out to be it."""
        if self._own is not None:
            os.close(self._own.read_fd)
            os.close(self._own.write_fd)
            self._own = None

    async def close(self) -> None:
        """Close every link."""
        self.spare()
        async with asyncio.TaskGroup() as group:
            for link in self.links.values():
                group.create_task(link.close())

    async def _branch(self, branch: Branch, trunk: Trunk | None) -> None:
        """A host, and what it is to dial."""
        await self._host(branch.host, trunk)
        link, below = self.links.get(branch.host.name), None
        if link is not None and branch.children:
            below = Trunk(branch.host.name, link.channel)
            link.channel = below
            await below.start()
        async with asyncio.TaskGroup() as group:
            for child in branch.children:
                group.create_task(self._branch(child, below), name=f"dial {child.host.name}")

    async def _host(self, host: Host, trunk: Trunk | None) -> None:
        failure: Failure | None = None
        if trunk is not None:
            until = min(self._until, asyncio.get_running_loop().time() + self._connect_s)
            failure = await self._try(host, trunk, until)
        if trunk is None or (failure is not None and failure.unreachable):
            failure = await self._try(host, None, self._until)
            for pause_s in _BUSY_S:
                if failure is None or not ssh.is_busy(failure):
                    break
                await asyncio.sleep(random.uniform(0.5, 1) * pause_s)
                failure = await self._try(host, None, self._until)
        if failure is not None:
            self._failures[host.name] = failure

    async def _try(self, host: Host, trunk: Trunk | None, until: float) -> Failure | None:
        """One way to reach a host: a link to its greeted agent, or why not."""
        attempt = _Attempt(host, self._settings)
        try:
            limit = asyncio.timeout_at(until)
            async with limit, self._gate if trunk is None else nullcontext():
                if host.local:
                    agent, self._own = self._own or spawn.start_agent(), None
                    attempt.link = await AgentLink.of_agent(host, agent)
                else:
                    await attempt.interpreter(trunk, self._connect_s)
                # It is there, perhaps slow. It may be who carries the link that hangs: then it is our turn.
                limit.reschedule(max(until, self._until - self._connect_s))
                await attempt.greeted()
        except TimeoutError:
            waited = f"waited for {attempt.stage}{attempt.heard()}"
            reason = f"no answer within {self._settings.timeout_s:g} s ({waited})"
            failure = Failure(host.name, reason, True)
        except HostsFailed as error:
            (failure,) = error.failures
        except (OSError, WireError) as error:
            failure = Failure(host.name, str(error), True)
        except BaseException:
            await attempt.close()
            raise
        else:
            assert attempt.link is not None
            self.links[host.name] = attempt.link
            return None
        await attempt.close()
        return failure


class _Attempt:
    """One attempt to reach one host. Its methods raise `HostsFailed`."""

    def __init__(self, host: Host, settings: DialSettings) -> None:
        self._host, self._settings = host, settings
        self._python = host.python or settings.python
        self.link: AgentLink | None = None
        self.stage = "its turn to be dialled"

    async def interpreter(self, trunk: Trunk | None, connect_s: float) -> None:
        """Start the interpreter there. It must be like ours."""
        host, token = self._host, secrets.token_hex(8)
        env = self._settings.env
        agent = spawn.guarded_agent(int(self._settings.timeout_s + _AFTER_DIAL_S))
        command = ssh.remote_command(self._python, agent, token, env)
        argv = carried(host, self._settings, command, connect_s)
        self.stage = f"ssh and {self._python}"
        if trunk is None:
            link = self.link = await AgentLink.through(host, argv)
        else:
            link = self.link = trunk.dial(host, argv, token)
        if self._settings.carrier == "ssh":
            link.way = Way(self._python, (*_IN, self._settings.workdir, *argv[:-1]))
        version, noise = await link.marker(token)
        if version is None:
            raise await self._ended(noise)
        here = greeting.minor(sys.version.split()[0])
        if greeting.minor(version) != here:
            reason = f"python {version} there ({self._python}), but {here} here"
            raise HostsFailed.of([Failure(host.name, reason)])

    async def greeted(self) -> None:
        """Ask the agent what it is."""
        assert self.link is not None
        self.stage = "its agent"
        asked = greeting.now()
        self.link.channel.send_message(Kind.COMMAND, self._settings.greeting)
        frame = await self.link.channel.receive()
        if frame is None:
            raise await self._ended("")
        hello = self.link.hello = greeting.read_hello(frame)
        self.link.ahead_s = greeting.ahead_s(hello.clock, asked, greeting.now())

    def heard(self) -> str:
        """What may tell why nothing comes: a question that a start-up file asks, what `srun` waits for."""
        said = (self.link.noise or self.link.last_words()) if self.link else ""
        return f"; it said {said!r}" if said else ""

    async def _ended(self, noise: str) -> HostsFailed:
        assert self.link is not None
        words = await self.link.words(noise)
        return HostsFailed.of([ssh.why(self._host.name, words, self._python, spawn.ROOT)])

    async def close(self) -> None:
        if self.link is not None:
            self.link.kill()
            await self.link.close()


def _depth(branches: Sequence[Branch]) -> int:
    return 1 + max(_depth(branch.children) for branch in branches) if branches else 0
