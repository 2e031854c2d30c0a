"""The launcher's part while a job runs: hand the agents their assignments, show what they say, pass on signals.

The first agent decides; the others only hear of what the launcher alone can know: which link has ended.
The first signal asks the job to stop, the second kills it, the third does not even wait for that. An agent
whose link ends without a last word is lost with its host. Of this machine, what it leaves is removed from here.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from math import inf
from typing import Any, NamedTuple

from runtime import aio
from runtime.errors import ConfigError, WireError
from runtime.launcher import jobs, report, spawn
from runtime.launcher.assignment import Assignment, remove_job_dir
from runtime.launcher.channel import Frame, Kind
from runtime.launcher.console import Console
from runtime.launcher.link import AgentLink
from runtime.launcher.outcome import from_plain
from runtime.launcher.records import JobEndpoint, JobHost
from runtime.observe.logs import configure_logging

_SIGNALS: Mapping[int, tuple[report.End, str]] = {
    signal.SIGINT: ("interrupted", "Ctrl-C"),
    signal.SIGTERM: ("terminated", "SIGTERM"),
    signal.SIGHUP: ("hangup", "SIGHUP"),
    signal.SIGQUIT: ("quit", "SIGQUIT"),
}
_TOLD_EVERY_S = 2.0
_CLEANUP_S = 3.0
_AFTER_END_S = 5.0
_LAST_S = 3.0
_LAST_WORDS_S = 2.0
_AGENT_MARGIN_S = 8.0
"""What an agent may take beyond the time that its workers were given."""
_PING_S = 1.0
_FILES_S = 2.0
"""Nobody waits longer for a home directory whose server is stuck."""


class Signalled(NamedTuple):
    """The first signal that the launcher got."""

    number: int
    end: report.End
    name: str


@dataclass(eq=False)
class _Host:
    """One agent, and what is known of it. `heard`: when, infinite where it was not greeted and still starts.
    `why`: how it was lost."""

    rank: int
    link: AgentLink
    assignment: Assignment
    heard: float
    reading: bool = True
    end: dict[str, Any] | None = None
    why: str = ""
    detached: bool = False
    """It goes on without us."""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        return self.assignment.host

    def tell(self, op: str, **values: Any) -> None:
        self.link.channel.send_message(Kind.COMMAND, {"op": op, **values})


class Session(aio.Service):
    """One attached job. `run` gives its outcome; everything it shows is on the console by then.

    `links`, `assignments`: of the plan's hosts, in their order. `quiet`: restarts are not told.
    """

    def __init__(
        self,
        links: Sequence[AgentLink],
        assignments: Sequence[Assignment],
        *,
        quiet: bool = False,
    ) -> None:
        super().__init__("session")
        now = asyncio.get_running_loop().time()
        pairs = enumerate(zip(links, assignments, strict=True))
        self._hosts = [
            _Host(rank, link, assignment, inf if link.hello is None else now)
            for rank, (link, assignment) in pairs
        ]
        self._first = self._hosts[0]
        self._settings, self._quiet = self._first.assignment, quiet
        beat = self._settings.settings.coordinator
        self._silence_s = beat.heartbeat_timeout_ms / 1000
        self._console = Console()
        configure_logging(self._settings.settings.log, self._log)
        self._workers: dict[str, int] = {}
        self._started: set[str] = set()
        self._job: JobEndpoint | None = None
        self._restarts = 0
        self._signalled: Signalled | None = None
        self._signals = 0
        self._hurry = asyncio.Event()

    async def run(self) -> report.Outcome:
        """Until the job has ended. The launcher must be a subreaper before."""
        loop = asyncio.get_running_loop()
        for host in self._hosts:
            host.link.channel.send(Kind.JOB, pickle.dumps(host.assignment, protocol=5))
        async with self:
            for host in self._hosts:
                self.spawn(self._read(host), f"agent of {host.name}")
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._on_signal, number)
            if len(self._hosts) > 1 or not self._first.link.local:
                loop.add_signal_handler(signal.SIGTSTP, self._suspend)
                self.spawn(self._ping(), "ping")
            await self._first.done.wait()
            if not self._detached:
                await self._end_others()
                await self._close_links()
        if self._detached:
            return await self._leave()
        outcome = self._outcome()
        await self._keep(outcome)
        self._say(report.failure_box(outcome, _width()))
        await self._console.close(self._hurry)
        return outcome

    @property
    def _detached(self) -> bool:
        """Every agent knows that it goes on without us."""
        return self._first.end is None and all(host.detached for host in self._hosts)

    async def _leave(self) -> report.Outcome:
        """The job goes on without us."""
        for host in self._hosts:
            if not host.link.local:
                host.link.kill()  # the ssh client, not the agent
            await host.link.channel.close()
        assert self._job is not None
        self._console.write("stdout", f"{self._job.job_id}\n".encode())
        self._say(jobs.detached_text(self._job))
        await self._console.close(self._hurry)
        return report.Outcome("finished", self._job.job_id)

    async def _end_others(self) -> None:
        """The first agent has ended, or is gone: nobody else has anything more to do."""
        others = self._hosts[1:]
        end = self._first.end
        reason = f"{self._first.name} is lost" if end is None else "the job has ended"
        gone = end.get("lost_hosts", ()) if end else ()
        # The others hear of the end by the control plane, unless it could not tell them.
        after_s = 0.0 if end is None or end.get("undecided", True) else _LAST_WORDS_S
        for host in others:
            if host.rank in gone:  # what it does when it comes back is its own business
                host.link.kill()
            host.tell("leave", reason=reason, after_s=after_s)
        waits = [self.spawn(host.done.wait(), f"end of {host.name}") for host in others]
        if waits:
            await asyncio.wait(waits, timeout=_LAST_S)
        for host in others:
            if not host.done.is_set():
                host.link.kill()

    async def _close_links(self) -> None:
        """All at last: one may carry others. Agents that have said their last word end by themselves."""
        async with asyncio.TaskGroup() as group:
            for host in self._hosts:
                group.create_task(host.link.ended(_AFTER_END_S), name=f"exit of {host.name}")
        for host in self._hosts:
            await host.link.close()

    # -- what the agents say ------------------------------------------------------------------

    async def _read(self, host: _Host) -> None:
        """Take what one agent says, until its link has ended."""
        clock = asyncio.get_running_loop().time
        try:
            while (frame := await host.link.channel.receive()) is not None:
                host.reading = False  # a console that is full is not the host's silence
                await self._take(host, frame)
                host.reading, host.heard = True, clock()
        except WireError as error:
            host.why = f"what came from it cannot be understood: {error}"
            host.link.kill()
        if host.end is None and not self._detached:
            self._lost(host, await host.link.ended(_AFTER_END_S))
        host.done.set()

    async def _take(self, host: _Host, frame: Frame) -> None:
        if frame.kind in (Kind.STDOUT, Kind.STDERR):
            stream = "stdout" if frame.kind is Kind.STDOUT else "stderr"
            self._console.write(stream, frame.body)  # type: ignore[arg-type]
            await self._console.drain()
            return
        event = frame.message()
        match event["event"]:
            case "listening":
                for other in self._hosts[1:]:
                    other.tell("control", peer=event["peer"], address=event["address"])
                await self._register(event)
            case "started":
                self._workers[event["name"]] = event["pid"]
                self._detach_if_all_run(event["name"])
            case "detached":
                host.detached = True
                if self._detached:
                    self._first.done.set()
            case "exited":
                self._workers.pop(event["name"], None)
            case "restarting":
                self._restarts += 1
                if not self._quiet:
                    self._say(f"runtime: {report.restarting(event)}\n")
            case "log":
                self._log(self._where(host) + event["text"])
            case "message":
                self._say(f"runtime: {event['text']}\n")
            case "end" | "refused":
                self._ended(host, event)

    async def _register(self, event: Mapping[str, Any]) -> None:
        """Let the job be found by those who want to see or stop it."""
        self._job = _endpoint(self._hosts, event)
        try:
            async with asyncio.timeout(_FILES_S):
                await asyncio.to_thread(jobs.register, self._job)
        except (ConfigError, TimeoutError) as error:
            why = error if isinstance(error, ConfigError) else "the home directory is too slow"
            self._say(f"runtime: nobody else can find this job: {why}\n")

    async def _keep(self, outcome: report.Outcome) -> None:
        """Where its first agent could not, or on another machine: say here how the job ended."""
        if self._job is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(_FILES_S):
                    await asyncio.to_thread(jobs.remember, self._job, outcome)

    def _detach_if_all_run(self, name: str) -> None:
        before, planned = len(self._started), len(self._settings.plan.launches)
        self._started.add(name)
        if self._settings.detached and before < len(self._started) == planned:
            for host in self._hosts:
                host.tell("detach")

    def _ended(self, host: _Host, event: dict[str, Any]) -> None:
        """The last word of an agent."""
        host.end = event
        host.done.set()
        why = event.get("lost") or event.get("text")
        if why and host is not self._first:
            self._first.tell("lost", node_rank=host.rank, why=why)

    def _lost(self, host: _Host, exit: spawn.Exit) -> None:
        """A link has ended without a last word. Of an agent of this machine the workers have the
        parent-death signal; the rest is ours to end."""
        how = f"killed by {exit.cause}" if exit.signal else f"ended with {exit.cause}"
        if host.link.local:
            host.why = host.why or f"its agent {how}"
            if len(self._hosts) == 1:
                spawn.kill_descendants(_CLEANUP_S)
            remove_job_dir(host.assignment.job_dir)
        elif not host.why:
            how = f"{'was ' if exit.signal else ''}{how}"
            words = host.link.last_words() or "or its agent was killed"
            host.why = f"its connection {how}: {words}"
        if host is not self._first:
            self._first.tell("lost", node_rank=host.rank, why=host.why)

    def _say(self, text: str) -> None:
        """The launcher's own words: to standard error."""
        if text:
            self._console.write("stderr", text.encode(errors="replace"))

    def _log(self, line: str) -> None:
        self._say(f"runtime: {line}")

    # -- signs of life ------------------------------------------------------------------------

    async def _ping(self) -> None:
        """Say each second that we are there, and end the links to hosts that say nothing any more."""
        clock = asyncio.get_running_loop().time
        last = clock()
        while True:
            now = clock()
            if now - last > 3 * _PING_S:  # it was us who did not run
                for host in self._hosts:
                    host.heard = max(host.heard, now)
            last = now
            for host in self._hosts:
                host.tell("ping")
                link = host.link
                if not host.reading or link.channel.held:
                    host.heard = now
                if now - host.heard > self._silence_s + link.late_s and not host.why:
                    host.why = f"no sign of life for {self._silence_s:g} s{link.via}"
                    link.kill()
            await asyncio.sleep(_PING_S)

    def _suspend(self) -> None:
        """Ctrl-Z: the job goes on, and is not to take our silence for our death."""
        for host in self._hosts:
            host.tell("suspended")
        os.kill(os.getpid(), signal.SIGSTOP)

    # -- signals ------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        self._hurry.set()
        if not self.running:  # the job has ended; only its last output is still being written
            return
        if self._signalled is None:
            self._signalled = Signalled(number, *_SIGNALS[number])
            limit = self._settings.shutdown_timeout_s
            self._say(
                f"runtime: {self._signalled.name}: stopping the job, for at most {limit:g} s "
                "(again: kill it now)\n"
            )
            self._command("stop")
            self._expect_end_within(limit + _AGENT_MARGIN_S)
            self.spawn(self._tell_who_is_left(), "who is left")
        elif self._signals == 2:
            self._say("runtime: killing the job\n")
            self._command("kill")
            self._expect_end_within(_CLEANUP_S)
        else:
            self._kill_agents()

    def _expect_end_within(self, seconds: float) -> None:
        """An agent that is stopped itself, or hangs, must not keep the launcher."""
        asyncio.get_running_loop().call_later(seconds, self._kill_agents)

    def _kill_agents(self) -> None:
        if self.running:
            for host in self._hosts:
                host.link.kill()

    def _command(self, op: str) -> None:
        assert self._signalled is not None
        code = 128 + self._signalled.number
        self._first.tell(op, reason=f"stopped by {self._signalled.name}", code=code)

    async def _tell_who_is_left(self) -> None:
        while True:
            await asyncio.sleep(_TOLD_EVERY_S)
            if self._workers:
                self._say(f"runtime: {report.waiting_for(sorted(self._workers))}\n")

    # -- the end ------------------------------------------------------------------------------

    def _outcome(self) -> report.Outcome:
        plan = self._settings.plan
        folder = self._settings.log_folder
        base = report.Outcome(
            "finished", plan.job_id, plan.job.name, log_dir=folder, restarts=self._restarts
        )
        for host in self._hosts:
            if host.end is not None and host.end["event"] == "refused":
                detail = self._where(host) + host.end["text"]
                return replace(base, end="usage", detail=detail, log_dir="")
        end = self._first.end
        if end is None:
            gone: report.End = self._signalled.end if self._signalled else "host_lost"
            return replace(base, end=gone, detail=_lost_words(self._hosts))
        return from_plain(end["outcome"])

    def _where(self, host: _Host) -> str:
        return f"{host.name}: " if len(self._hosts) > 1 else ""


def _lost_words(hosts: Sequence[_Host]) -> str:
    """Of a job whose first agent is lost."""
    name, why = hosts[0].name, hosts[0].why
    if len(hosts) == 1 and hosts[0].link.local:
        return f"agent of host {name} {why.removeprefix('its agent ')}; its workers were ended"
    what = ", which held the control plane," if len(hosts) > 1 else ""
    return f"host {name}{what} was lost: {why}; its workers were ended"


def _endpoint(hosts: Sequence[_Host], event: Mapping[str, Any]) -> JobEndpoint:
    settings = hosts[0].assignment
    return JobEndpoint(
        job_id=settings.plan.job_id,
        name=settings.plan.job.name,
        started=datetime.now(UTC).timestamp(),
        hosts=tuple(_job_host(host, event) for host in hosts),
        peer=event["peer"],
        address=event["address"],
        detached=settings.detached,
        shutdown_timeout_s=settings.shutdown_timeout_s,
        machine=socket.gethostname(),
        security=settings.security,
    )


def _job_host(host: _Host, event: Mapping[str, Any]) -> JobHost:
    process = event["process"] if host.link.hello is None else host.link.hello.process
    launches = host.assignment.plan.launches
    return JobHost(
        host.name,
        event["log_dir"] if host.rank == 0 else host.assignment.log_folder,
        (process[0], process[1]),
        tuple((launch.role, launch.rank) for launch in launches if launch.host == host.name),
        host.link.way,
        host.link.local,
    )


def _width() -> int:
    try:
        return min(os.get_terminal_size(sys.stderr.fileno()).columns or 100, 120)
    except (OSError, ValueError):
        return 100
