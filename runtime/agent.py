"""The process per host: control plane, workers, their output. Composition only; the parts decide.

An agent is told its job over standard input and says what happens over standard output, in frames
(`launcher/channel.py`). It is the subreaper of everything that it starts. When its input ends, the
launcher is gone: it stops all workers and leaves nothing behind. It imports neither torch nor boto3.

Standard error is the launcher's. What the agent logs goes there through the pipe, so that it does not
break the lines of workers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pickle
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from runtime.cluster import adopted
from runtime.cluster.command import Conductor, Follower, Part
from runtime.cluster.restart import Supervision
from runtime.cluster.starting import Control
from runtime.cluster.supervisor import Supervisor
from runtime.cluster.views import Views
from runtime.config import LogSpec
from runtime.control.client import ControlClient
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.errors import ConfigError, RuntimeFault
from runtime.launcher import child, spawn, zygote
from runtime.launcher.assignment import (
    Assignment,
    choose_job_dir,
    make_job_dir,
    remove_job_dir,
)
from runtime.launcher.channel import Channel, Frame, Frames, Kind
from runtime.launcher.outcome import keep, outcome_of, to_plain
from runtime.launcher.output import Outputs, Stream, make_job_folder
from runtime.launcher.report import Outcome, restarting
from runtime.launcher.starter import Starter
from runtime.machine import Message
from runtime.observe.logs import configure_logging
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.link import reached_by
from runtime.transport.sockets import SocketTransport

logger = logging.getLogger(__name__)

_KILL_TIMEOUT_S = 3.0
_LAST_OUTPUT_S = 1.0
_SIGTERM_HEAD_START_S = 0.2
_LINK_HEAD_START_S = 3.0
"""The launcher needs so long to know why a link ended that another agent carries."""
_LAST_DIRECTIVE_S = 2.5
_KINDS: dict[Stream, Kind] = {"stdout": Kind.STDOUT, "stderr": Kind.STDERR}


def main(patience_s: int = 0, first: zygote.Started | None = None) -> None:
    """Run an agent until its job has ended; the process ends with 0 in any case but its own failure.

    `patience_s`: it waits so many seconds for its job (0: for ever). `first`: a zygote that was started before
    this module was imported; none where somebody else starts the workers.
    """
    child.restore_path()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher's business; it tells us
    spawn.become_subreaper()
    gc.freeze()  # what was imported stays
    asyncio.run(_Agent().run(patience_s, first))
    # Threads that write log files may sit in a stuck disk: nobody waits for them.
    sys.stdout.flush()
    os._exit(0)


class _Agent:
    """One job's agent, from its assignment to the end."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.get_ident()
        self._starter = Starter()
        self._channel: Frames | None = None
        self._directive: Callable[[Message], None] | None = None
        self._views: Views | None = None
        self._detached = False
        """The launcher has left us to ourselves."""
        self._restarts = 0
        self._guard: int | None = None
        self._greeted = False
        """There are several hosts, or this is not the launcher's."""
        self._pinged = False
        """The launcher says each second that it is there."""
        self._silence_s = 30.0

    async def run(self, patience_s: int, first: zygote.Started | None) -> None:
        self._loop = asyncio.get_running_loop()
        if first is not None:
            self._starter.adopt(first)
            self._guard = first.guard
        channel = self._channel = await Channel.open(os.dup(0), os.dup(1))
        _free_standard_streams()
        configure_logging(LogSpec(), self._log)
        try:
            frame = None
            with suppress(TimeoutError):
                async with asyncio.timeout(patience_s or None):
                    frame = await self._told_job(channel)
            if frame is not None and frame.kind is Kind.COMMAND:
                frame = await self._channel.receive()  # "idle": we only carry others' links
            if frame is not None and frame.kind is Kind.JOB:
                assignment = _on_this_host(pickle.loads(frame.body), self._greeted)
                work = self._adopt if assignment.embedded else self._job
                self._channel.send_message(Kind.EVENT, await work(assignment))
        finally:
            self._end_everything()
            await self._channel.close()

    async def _told_job(self, channel: Channel) -> Frame | None:
        """The launcher's first frame, or the one after the greeting."""
        frame = await channel.receive()
        if frame is not None and frame.kind is Kind.COMMAND:
            self._greeted = True
            from runtime.launcher import greeting  # jobs of one host do without

            self._channel, frame = await greeting.meet(channel, frame)
        return frame

    async def _adopt(self, assignment: Assignment) -> dict[str, Any]:
        """Be there for workers that somebody else has started; gives the last event."""
        configure_logging(assignment.settings.log, sys.stderr)
        self._silence_s = assignment.settings.coordinator.heartbeat_timeout_ms / 1000
        try:
            make_job_dir(assignment.job_dir)
            async with _endpoint(assignment) as endpoint:
                told = partial(self._told_control, assignment)
                await adopted.run(assignment, endpoint, self._notify, told)
        except ConfigError as error:
            return {"event": "refused", "text": str(error)}
        finally:
            remove_job_dir(assignment.job_dir)
        return {"event": "end"}

    async def _job(self, assignment: Assignment) -> dict[str, Any]:
        """Run the job; gives the last event."""
        configure_logging(assignment.settings.log, self._log)
        self._silence_s = assignment.settings.coordinator.heartbeat_timeout_ms / 1000
        try:
            folder = make_job_folder(assignment.log_dir, assignment.plan.job_id)
            make_job_dir(assignment.job_dir)
            if self._guard is not None:
                os.write(self._guard, assignment.job_dir.encode())
        except RuntimeFault as error:
            return {"event": "refused", "text": str(error)}
        try:
            output = replace(assignment.output, log_dir=folder)
            async with _endpoint(assignment) as endpoint, Outputs(output, self._show) as outputs:
                work = self._conduct if assignment.node_rank == 0 else self._follow
                end = await work(assignment, endpoint, outputs)
                left = self._end_everything()
                if not await outputs.drain(_LAST_OUTPUT_S):
                    logger.warning("output of the workers is still held open by somebody else")
                words = await self._last_words(assignment, end, folder, endpoint.peer)
                if self._views is not None:
                    await self._views.finish(words.get("outcome"), left)
            return words
        except ConfigError as error:  # of the sockets: nothing has been started
            return {"event": "refused", "text": str(error)}
        finally:
            remove_job_dir(assignment.job_dir)

    async def _conduct(
        self, assignment: Assignment, endpoint: Endpoint, outputs: Outputs
    ) -> dict[str, Any]:
        """With the control plane here, until the job has ended."""
        beat = assignment.settings.coordinator
        machines = standard_machines(heartbeat_timeout=beat.heartbeat_timeout_ms / 1000)
        machines["supervision"] = Supervision()
        me = endpoint.peer
        conductor = Conductor(assignment, me, self._emitted)
        service = ControlService(
            endpoint,
            Plane(machines),
            me=me,
            on_send=self._directed,
            on_emit=conductor.emitted,
            heartbeat_interval=beat.heartbeat_interval_ms / 1000,
        )
        async with service:
            address = endpoint.address._replace(host=assignment.host)
            control = Control(me, address, service.ask)
            async with self._supervisor(assignment, control, outputs) as supervisor:
                conductor.take(service, supervisor)
                self._views = Views(endpoint, assignment, supervisor, service.ask, conductor)
                facts = {"peer": me, "address": address.address, "process": spawn.own_process()}
                self._notify({"event": "listening", "log_dir": assignment.log_folder, **facts})
                end = await self._carry_out(assignment, conductor, supervisor, conductor.run())
                if "undecided" not in end:  # else some host may not be there to hear it
                    await service.flush(_LAST_DIRECTIVE_S)
                return {**end, "lost_hosts": conductor.lost_hosts, "added": conductor.added}

    async def _follow(
        self, assignment: Assignment, endpoint: Endpoint, outputs: Outputs
    ) -> dict[str, Any]:
        """By the control plane of another host, until it ends the job or is lost."""
        address = await self._told_control(assignment)
        if address is None:
            return {"first": None, "others": []}
        patience = assignment.settings.coordinator.heartbeat_timeout_ms / 1000
        client = ControlClient(endpoint, address, me=None, patience=patience)
        follower = Follower(assignment, client, endpoint.address.address)
        control = Control(endpoint.peer, address, follower.ask)
        supervised = self._supervisor(assignment, control, outputs)
        async with client, follower, supervised as supervisor:
            follower.take(supervisor)
            self._views = Views(endpoint, assignment, supervisor, follower.ask)
            return await self._carry_out(assignment, follower, supervisor, follower.begin())

    async def _told_control(self, assignment: Assignment) -> PeerAddress | None:
        """Where the control plane is, from the launcher. None when that ends the job first."""
        first = assignment.plan.hosts[0].name
        while (frame := await self._receive()) is not None:
            command = frame.message()
            if command["op"] == "control":
                return PeerAddress(command["peer"], command["address"], "@agent", 0, first)
            if command["op"] in ("leave", "kill"):
                return None
        return None

    def _supervisor(self, assignment: Assignment, control: Control, outputs: Outputs) -> Supervisor:
        supervisor = Supervisor(
            assignment, control, starter=self._starter, outputs=outputs, notify=self._notify
        )
        supervisor.not_ours = self._carried
        self._directive = supervisor.directive
        return supervisor

    async def _carry_out(
        self,
        assignment: Assignment,
        part: Part,
        supervisor: Supervisor,
        begin: Coroutine[Any, Any, None],
    ) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        terminated = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, terminated.set)
        supervisor.spawn(begin, "begin")
        supervisor.serve(self._listen(part, assignment), "launcher")
        supervisor.serve(self._on_terminated(part, assignment.host, terminated), "SIGTERM")
        return await supervisor.ended

    async def _listen(self, part: Part, assignment: Assignment) -> None:
        """Commands of the launcher; its end is the end of the job, unless it has detached us."""
        while (frame := await self._receive()) is not None:
            command = frame.message()
            if command["op"] == "detach":
                self._detach(assignment)
            else:
                await part.command(command)
        if not self._detached:
            # Maybe the launcher lives and tells it to somebody: the guard was killed, or sshd's session.
            gone = f"the link of {assignment.host} to the launcher has ended"
            await part.launcher_gone(gone, _LINK_HEAD_START_S)
        await asyncio.Event().wait()

    async def _receive(self) -> Frame | None:
        """The next frame of the launcher that is no mere sign of life. None: it has ended, or has been
        silent for the heartbeat timeout although it pings."""
        assert self._channel is not None
        while True:
            try:
                async with asyncio.timeout(self._silence_s if self._pinged else None):
                    frame = await self._channel.receive()
            except TimeoutError:
                logger.error("no sign of life of the launcher for %g s", self._silence_s)
                return None
            op = frame.message()["op"] if frame and frame.kind is Kind.COMMAND else ""
            if op == "ping":
                self._pinged = True
                self._notify({"event": "pong"})
            elif op == "suspended":
                self._pinged = False
            else:
                return frame

    def _detach(self, assignment: Assignment) -> None:
        """From now on the end of our input is nobody's, and what we say goes to a file."""
        path = os.path.join(assignment.log_folder, f"agent_{assignment.node_rank}.log")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            logger.warning("no log file %s: %s", path, error.strerror)
            fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, 2)
        os.close(fd)
        self._notify({"event": "detached"})
        self._detached = True

    async def _on_terminated(self, part: Part, host: str, terminated: asyncio.Event) -> None:
        await terminated.wait()
        # Who ends all processes of a job, as Slurm does, signals the launcher, too: its word goes first.
        await asyncio.sleep(_SIGTERM_HEAD_START_S)
        await part.launcher_gone(f"the agent of {host} got SIGTERM", _SIGTERM_HEAD_START_S)
        await asyncio.Event().wait()

    async def _last_words(
        self, assignment: Assignment, end: dict[str, Any], folder: str, me: str
    ) -> dict[str, Any]:
        """The last event: of the first agent what became of the job, of others whether they were lost."""
        if assignment.node_rank > 0:
            return {"event": "end", "lost": end.get("lost", "")}
        plan = assignment.plan
        base = Outcome(
            "finished", plan.job_id, plan.job.name, log_dir=folder, restarts=self._restarts,
            timeout_s=assignment.timeout_s,
        )  # fmt: skip
        outcome = outcome_of(end, base, end["added"])
        try:
            async with asyncio.timeout(_LAST_OUTPUT_S):  # the disk may be stuck
                await asyncio.to_thread(keep, outcome, me)
        except (OSError, TimeoutError) as error:
            logger.warning("the outcome was not written into %s: %s", folder, error or "too slow")
        facts = {"lost_hosts": end["lost_hosts"], "undecided": "undecided" in end}
        return {"event": "end", "outcome": to_plain(outcome), **facts}

    # -- what the parts say -------------------------------------------------------------------

    def _directed(self, message: Message) -> None:
        if self._directive is not None and message.get("kind") == "directive":
            self._directive(message)

    def _emitted(self, event: dict[str, Any]) -> None:
        self._restarts += event["event"] == "restarting"
        self._notify(event)

    def _log(self, line: str) -> None:
        """From any thread: those that write log files log, too, and the channel is the loop's."""
        event = {"event": "log", "text": line}
        if threading.get_ident() == self._thread:
            self._notify(event)
        else:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._notify, event)

    def _notify(self, event: dict[str, Any]) -> None:
        if self._detached:
            text = restarting(event) if event["event"] == "restarting" else event.get("text", "")
            with suppress(OSError):  # its disk may be full
                os.write(2, f"{text.rstrip()}\n".encode() if text else b"")
            return
        assert self._channel is not None
        self._channel.send_message(Kind.EVENT, event)

    async def _show(self, stream: Stream, lines: bytes) -> None:
        assert self._channel is not None
        self._channel.send(_KINDS[stream], lines)
        await self._channel.drain()

    def _carried(self) -> Sequence[int]:
        """Processes of links to other hosts that go through here."""
        return self._channel.pids if self._channel is not None else ()

    def _end_everything(self) -> list[spawn.ProcessInfo]:
        """Kill whatever is below us; gives what does not die. Blocks for a moment: there is nothing left to
        serve."""
        self._starter.close()
        others = self._carried()
        left = spawn.kill_descendants(_KILL_TIMEOUT_S, without=others)
        for info in left:
            logger.error(
                "process %d (%s) does not die: it is in state %s", info.pid, info.name, info.state
            )
        return left


def _endpoint(assignment: Assignment) -> Endpoint:
    """Of this agent: in the job's folder, and where others reach this host."""
    peer = f"@agent-{assignment.node_rank}.{secrets.token_hex(4)}"  # no role can be called "@agent"
    where = reached_by(
        f"ipc://{assignment.job_dir}/agent",
        assignment.address,
        assignment.security,
        assignment.accept_from,
        assignment.port_range,
    )
    transport = SocketTransport(peer, *where)
    return Endpoint(transport, role="@agent", rank=assignment.node_rank)


def _on_this_host(assignment: Assignment, greeted: bool) -> Assignment:
    """With what the launcher could not know: this host's own environment, home and folders."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    return replace(
        assignment,
        env={**own, **assignment.env} if greeted else assignment.env,
        log_dir=os.path.expanduser(assignment.log_dir),
        job_dir=assignment.job_dir or choose_job_dir(secrets.token_hex(4), os.environ),
    )


def _free_standard_streams() -> None:
    """Nothing of ours, nor a library's print, may come between the frames."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
