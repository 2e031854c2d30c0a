"""What the hosts of a job say when its agents cannot: asked of a program that is started there for it.

The launcher's own ssh leads there, by the words that it used then. The program reads in the job's log folder how
the job ended and what it printed, or kills an agent that hangs. On this machine nothing is started for that.
No host is waited for longer than `ANSWER_S` before it is said to be out of reach, and none waits for another.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from functools import partial
from typing import Any

from runtime import aio
from runtime.errors import RuntimeFault
from runtime.launcher import jobs, logfiles, spawn, ssh
from runtime.launcher.channel import Channel, Kind
from runtime.launcher.link import AgentLink
from runtime.launcher.logfiles import Piece, Query
from runtime.launcher.outcome import from_plain, read_kept, to_plain
from runtime.launcher.plan import Host
from runtime.launcher.records import Ended, JobEndpoint, JobHost, Missing
from runtime.launcher.spawn import ProcessInfo

ANSWER_S = 10.0
"""How long a host has to be reached, and then for each answer."""
_AT_ONCE = 8
_CLEANS_S, _DIES_S = 2.0, 2.0

Ask = Callable[..., Awaitable[dict[str, Any]]]
"""`ask(op, **values)` gives the answer of a host (`answer`)."""


# Asking


@asynccontextmanager
async def visit(job: JobEndpoint, host: JobHost, *, here: bool = False) -> AsyncIterator[Ask]:
    """Ask one host of a job; `here`: this machine in its place. Raises `RuntimeFault` with the reason when it
    cannot be reached, does not answer, or cannot do what it was asked."""
    if here or jobs.is_here(job, host):
        yield _asked_here
        return
    if host.way is None:
        launched = f"it is {job.machine}, from which the job was launched: ask there"
        raise RuntimeFault(launched if host.local else "only srun leads there")
    token = secrets.token_hex(8)
    code = spawn.bootstrap("runtime.launcher.afar")
    command = ssh.remote_command(host.way.python, code, token)
    try:
        link = await AgentLink.through(Host(host.name, local=False), [*host.way.words, command])
    except OSError as error:
        raise RuntimeFault(str(error)) from None
    try:
        async with _in_time():
            version, noise = await link.marker(token)
            if version is None:
                raise await _no_answer(host, link, noise)
        yield partial(_asked, host, link)
    finally:
        link.kill()
        await link.close()


async def _asked_here(op: str, **values: Any) -> dict[str, Any]:
    return _believed(await asyncio.to_thread(answer, {"op": op, **values}))


async def _asked(host: JobHost, link: AgentLink, op: str, **values: Any) -> dict[str, Any]:
    link.channel.send_message(Kind.COMMAND, {"op": op, **values})
    async with _in_time():
        frame = await link.channel.receive()
        if frame is None:
            raise await _no_answer(host, link, "")
        return _believed(frame.message())


@asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(ANSWER_S):
            yield
    except TimeoutError:
        raise RuntimeFault(f"no answer within {ANSWER_S:g} s") from None


async def _no_answer(host: JobHost, link: AgentLink, noise: str) -> RuntimeFault:
    assert host.way is not None
    words = await link.words(noise)
    return RuntimeFault(ssh.why(host.name, words, host.way.python, spawn.ROOT).reason)


def _believed(found: dict[str, Any]) -> dict[str, Any]:
    if problem := found.get("problem"):
        raise RuntimeFault(str(problem))
    return found


# What is asked


async def how_it_ended(job: JobEndpoint) -> Ended | Missing:
    """Of a job whose control plane does not answer: what its first host knows."""
    first = job.hosts[0]
    question = {"folder": first.log_dir, "peer": job.peer, "process": list(first.process)}
    try:
        async with visit(job, first) as ask:
            found = await ask("outcome", **question)
        if found["outcome"] is not None:
            return Ended(from_plain(found["outcome"]), float(found["at"]))
    except RuntimeFault as error:
        why = f"{first.name} cannot be asked ({error}); whether the job runs is not known"
        return Missing("unknown", why)
    except (KeyError, TypeError, ValueError) as error:
        return Missing("unknown", f"what {first.name} answers is no outcome: {error!r}")
    if found["runs"]:
        agent = f"process {first.process[0]} on {first.name}"
        return Missing(
            "unknown", f"its agent ({agent}) lives, but its control plane does not answer from here"
        )
    where = f"{first.log_dir} on {first.name}"
    return Missing("lost", f"its control plane is gone; how it ended is not in {where}")


async def logs(
    job: JobEndpoint, query: Query
) -> AsyncGenerator[tuple[str, Piece | RuntimeFault], None]:
    """What the workers of a job that has ended printed, by host. A host that cannot be asked gives its error, once."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def of(host: JobHost) -> AsyncGenerator[Piece, None]:
        found_here = await asyncio.to_thread(logfiles.ranks, host.log_dir)
        shared = found_here.issuperset(host.ranks)  # all hosts see that folder: no way to go
        question = {"folder": host.log_dir, "query": list(query), "ranks": host.ranks}
        async with gate, visit(job, host, here=shared) as ask:
            positions, more = None, True
            while more:
                found = await ask("logs", **question, positions=positions)
                positions, more = found["positions"], found["more"]
                for piece in found["pieces"]:
                    yield Piece(*piece)

    async with aclosing(
        together({host.name: of(host) for host in job.hosts if host.ranks})
    ) as found:
        async for item in found:
            yield item


async def end(job: JobEndpoint, names: Sequence[str]) -> dict[str, list[str] | RuntimeFault]:
    """Kill the job's agents on these hosts, and all that they have started: by host, in words, what does not
    die, or why that is not known."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def on(host: JobHost) -> list[str] | RuntimeFault:
        try:
            async with gate, visit(job, host) as ask:
                left = (await ask("end", process=list(host.process)))["left"]
        except RuntimeFault as error:
            return error
        return [f"process {pid} ({name}) does not die" for pid, name in left]

    hosts = [host for host in job.hosts if host.name in names]
    left = await asyncio.gather(*map(on, hosts))
    return {host.name: words for host, words in zip(hosts, left, strict=True)}


async def together(
    sources: Mapping[str, AsyncGenerator[Piece, None]],
) -> AsyncGenerator[tuple[str, Piece | RuntimeFault], None]:
    """What all of these give, by name, as it comes; the error of one that fails is its last."""
    found: asyncio.Queue[tuple[str, Piece | RuntimeFault | None]] = asyncio.Queue(4)

    async def read(name: str, source: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    await found.put((name, piece))
        except RuntimeFault as error:
            await found.put((name, error))
        await found.put((name, None))

    async with AsyncExitStack() as stack:
        for name, source in sources.items():
            await stack.enter_async_context(aio.background(read(name, source), f"of {name}"))
        left = len(sources)
        while left:
            name, item = await found.get()
            if item is None:
                left -= 1
            else:
                yield name, item


# Answering


def main() -> None:
    """The program there: it answers one question after the other, until its input ends."""
    asyncio.run(_answer_all())


async def _answer_all() -> None:
    channel = await Channel.open(os.dup(0), os.dup(1))
    while (frame := await channel.receive()) is not None:
        channel.send_message(Kind.EVENT, answer(frame.message()))
        await channel.drain()
    await channel.close()


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """What this host knows, or does. Blocks. "outcome": how the job ended; "logs": a `logfiles.Batch`;
    "end": what is left of an agent and what it had started, when they were killed."""
    match question["op"]:
        case "outcome":
            kept = read_kept(os.path.expanduser(question["folder"]), question["peer"])
            runs = _agent(question) is not None
            if kept is None:
                return {"outcome": None, "runs": runs}
            return {"outcome": to_plain(kept.outcome), "at": kept.at}
        case "logs":
            folder = os.path.expanduser(question["folder"])
            if not os.path.isdir(folder):
                return {"problem": f"there is no directory {folder}"}
            query, ranks = (
                Query(*question["query"]),
                {(role, rank) for role, rank in question["ranks"]},
            )
            return logfiles.read(folder, query, question["positions"], ranks)._asdict()
        case _:
            agent = _agent(question)
            return {"left": [] if agent is None else _end(agent)}


def _agent(question: Mapping[str, Any]) -> ProcessInfo | None:
    pid, started = question["process"]
    found = spawn.look_at(pid)
    return found if found and found.started == started and _lives(found) else None


def _end(agent: ProcessInfo) -> list[tuple[int, str]]:
    """Its guard, or its launcher, ends what outlives it; if that hangs, too, we do."""
    found = [agent, *spawn.descendants(agent.pid)]
    above = spawn.look_at(agent.parent)
    if above is not None and _command(above.pid) == _command(agent.pid):  # its guard
        found.append(above)
    _kill(agent)
    found = outliving(found, _CLEANS_S)
    for info in found:
        _kill(info)
    return [(info.pid, info.name) for info in outliving(found, _DIES_S)]


def outliving(processes: Sequence[ProcessInfo], within: float) -> list[ProcessInfo]:
    """Which of these are still there after `within` seconds; returns as soon as none is."""
    until = time.monotonic() + within
    while True:
        found = [info for info in processes if _lives(info)]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.02)


def _lives(info: ProcessInfo) -> bool:
    now = spawn.look_at(info.pid)
    return now is not None and now.started == info.started and now.state not in "ZX"


def _kill(info: ProcessInfo) -> None:
    """That process, and none that has got its number since."""
    try:
        fd = os.pidfd_open(info.pid)
    except ProcessLookupError:
        return
    try:
        if _lives(info):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(fd)


def _command(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""
