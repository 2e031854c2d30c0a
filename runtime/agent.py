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
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from runtime.cluster.restart import Supervision
from runtime.cluster.supervisor import Supervisor
from runtime.config import LogSpec
from runtime.control.plane import Plane, standard_machines
from runtime.control.service import ControlService
from runtime.errors import RuntimeFault
from runtime.launcher import child, spawn, zygote
from runtime.launcher.assignment import Assignment, make_job_dir, remove_job_dir
from runtime.launcher.channel import Channel, Kind
from runtime.launcher.output import Outputs, Stream, make_job_folder
from runtime.launcher.starter import Starter
from runtime.observe.logs import configure_logging
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.sockets import SocketTransport

logger = logging.getLogger(__name__)

_LAUNCHER_LOST_GRACE_S = 2.0
_KILL_TIMEOUT_S = 3.0
_LAST_OUTPUT_S = 1.0
_LOST = 69
_KINDS: dict[Stream, Kind] = {"stdout": Kind.STDOUT, "stderr": Kind.STDERR}


def main(first: zygote.Started) -> None:
    """Run an agent until its job has ended; the process ends with 0 in any case but its own failure.

    `first`: a zygote that was started before this module was imported.
    """
    child.restore_path()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher's business; it tells us
    spawn.become_subreaper()
    gc.freeze()  # what was imported stays
    asyncio.run(_Agent().run(first))
    # Threads that write log files may sit in a stuck disk: nobody waits for them.
    sys.stdout.flush()
    os._exit(0)


class _Agent:
    """One job's agent, from its assignment to the end."""

    def __init__(self) -> None:
        self._starter = Starter()
        self._channel: Channel | None = None
        self._supervisor: Supervisor | None = None
        self._me = f"@agent-0.{secrets.token_hex(4)}"  # no role of a job can be called "@agent"

    async def run(self, first: zygote.Started) -> None:
        self._starter.adopt(first)
        channel = self._channel = await Channel.open(os.dup(0), os.dup(1))
        _free_standard_streams()
        configure_logging(LogSpec(), self._log)
        try:
            frame = await channel.receive()
            if frame is not None and frame.kind is Kind.JOB:
                end = await self._job(pickle.loads(frame.body))
                channel.send_message(Kind.EVENT, end)
        finally:
            self._end_everything()
            await channel.close()

    async def _job(self, assignment: Assignment) -> dict[str, Any]:
        """Run the job; gives the last event."""
        configure_logging(assignment.settings.log, self._log)
        try:
            folder = make_job_folder(assignment.log_dir, assignment.plan.job_id)
            make_job_dir(assignment.job_dir)
        except RuntimeFault as error:
            return {"event": "refused", "text": str(error)}
        try:
            output = replace(assignment.output, log_dir=folder)
            async with Outputs(output, self._show) as outputs:
                end = await self._control(assignment, outputs)
                self._end_everything()
                if not await outputs.drain(_LAST_OUTPUT_S):
                    logger.warning("output of the workers is still held open by somebody else")
            return {"event": "end", **end, "log_dir": folder}
        finally:
            remove_job_dir(assignment.job_dir)

    async def _control(self, assignment: Assignment, outputs: Outputs) -> dict[str, Any]:
        """The control plane and the supervisor, until the job has ended."""
        address = f"ipc://{assignment.job_dir}/agent"
        beat = assignment.settings.coordinator
        machines = standard_machines(heartbeat_timeout=beat.heartbeat_timeout_ms / 1000)
        machines["supervision"] = Supervision()
        endpoint = Endpoint(SocketTransport(self._me, address), role="@agent", rank=0)
        async with endpoint:
            service = ControlService(
                endpoint,
                Plane(machines),
                me=self._me,
                on_send=self._directed,
                on_emit=self._emitted,
                heartbeat_interval=beat.heartbeat_interval_ms / 1000,
            )
            async with service:
                supervisor = self._supervisor = Supervisor(
                    assignment,
                    PeerAddress(self._me, address),
                    service.ask,
                    starter=self._starter,
                    outputs=outputs,
                    notify=self._notify,
                )
                async with supervisor:
                    return await self._supervise(supervisor)

    async def _supervise(self, supervisor: Supervisor) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        terminated = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, terminated.set)
        await supervisor.begin()  # before anything can ask it to stop: that would be lost
        supervisor.serve(self._listen(supervisor), "launcher")
        supervisor.serve(self._on_terminated(supervisor, terminated), "SIGTERM")
        return await supervisor.ended

    async def _listen(self, supervisor: Supervisor) -> None:
        """Commands of the launcher; its end is the end of the job."""
        assert self._channel is not None
        while (frame := await self._channel.receive()) is not None:
            if frame.kind is Kind.COMMAND:
                command = frame.message()
                if command["op"] == "kill":
                    await supervisor.kill(command["reason"], command["code"])
                else:
                    await supervisor.stop(command["reason"], command["code"])
        await self._stop_soon(supervisor, "the launcher is gone")
        await asyncio.Event().wait()

    async def _on_terminated(self, supervisor: Supervisor, terminated: asyncio.Event) -> None:
        await terminated.wait()
        await self._stop_soon(supervisor, "the agent got SIGTERM")
        await asyncio.Event().wait()

    @staticmethod
    async def _stop_soon(supervisor: Supervisor, reason: str) -> None:
        await supervisor.stop(reason, _LOST)
        await asyncio.sleep(_LAUNCHER_LOST_GRACE_S)
        await supervisor.kill(reason, _LOST)

    # -- what the parts say -------------------------------------------------------------------

    def _directed(self, message: Mapping[str, Any]) -> None:
        if self._supervisor is not None and message.get("kind") == "directive":
            self._supervisor.directive(message)

    def _emitted(self, event: Mapping[str, Any]) -> None:
        if event.get("kind") == "restarting":
            self._notify({"event": "restarting", **event})

    def _log(self, line: str) -> None:
        self._notify({"event": "log", "text": line})

    def _notify(self, event: dict[str, Any]) -> None:
        assert self._channel is not None
        self._channel.send_message(Kind.EVENT, event)

    async def _show(self, stream: Stream, lines: bytes) -> None:
        assert self._channel is not None
        self._channel.send(_KINDS[stream], lines)
        await self._channel.drain()

    def _end_everything(self) -> None:
        """Kill whatever is below us. Blocks for a moment: there is nothing left to serve."""
        self._starter.close()
        for info in spawn.kill_descendants(_KILL_TIMEOUT_S):
            logger.error(
                "process %d (%s) does not die: it is in state %s", info.pid, info.name, info.state
            )


def _free_standard_streams() -> None:
    """Nothing of ours, nor a library's print, may come between the frames."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
