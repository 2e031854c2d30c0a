"""The launcher's part while a job runs: hand the agent its assignment, show what it says, pass on signals.

The first signal asks the job to stop, the second kills it, the third does not even wait for that. An
agent that dies without a last word was killed: its workers die with it, and what is left of them and
of the job's folder is removed from here.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from runtime import aio
from runtime.launcher import report, spawn
from runtime.launcher.assignment import Assignment, remove_job_dir
from runtime.launcher.channel import Channel, Frame, Kind
from runtime.launcher.console import Console
from runtime.launcher.watch import Watch
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
_AGENT_MARGIN_S = 8.0
"""What an agent may take beyond the time that its workers were given."""


class Signalled(NamedTuple):
    """The first signal that the launcher got."""

    number: int
    end: report.End
    name: str


class Session(aio.Service):
    """One attached job. `run` gives its outcome; everything it shows is on the console by then.

    `quiet`: restarts are not told.
    """

    def __init__(
        self, agent: spawn.LocalAgent, assignment: Assignment, *, quiet: bool = False
    ) -> None:
        super().__init__("session")
        self._agent, self._assignment, self._quiet = agent, assignment, quiet
        self._console = Console()
        configure_logging(assignment.settings.log, self._log)
        self._channel: Channel | None = None
        self._workers: dict[str, int] = {}
        self._restarts = 0
        self._signalled: Signalled | None = None
        self._signals = 0
        self._hurry = asyncio.Event()
        self._end: dict[str, Any] | None = None
        self._agent_exit: asyncio.Future[spawn.Exit] = asyncio.get_running_loop().create_future()

    async def run(self) -> report.Outcome:
        """Until the job has ended. The launcher must be a subreaper before."""
        loop = asyncio.get_running_loop()
        watch = Watch(self._agent.pid, lambda _, exit: self._agent_exit.set_result(exit))
        channel = self._channel = await Channel.open(self._agent.read_fd, self._agent.write_fd)
        channel.send(Kind.JOB, pickle.dumps(self._assignment, protocol=5))
        async with self:
            for number in _SIGNALS:
                loop.add_signal_handler(number, self._on_signal, number)
            while (frame := await channel.receive()) is not None:
                await self._take(frame)
            exit = await self._agent_ended(watch)
        await channel.close()
        outcome = self._outcome(exit)
        self._say(report.failure_box(outcome, _width()))
        await self._console.close(self._hurry)
        return outcome

    async def _agent_ended(self, watch: Watch) -> spawn.Exit:
        try:
            async with asyncio.timeout(_AFTER_END_S):
                return await asyncio.shield(self._agent_exit)
        except TimeoutError:
            watch.kill()
            return await self._agent_exit

    # -- what the agent says ------------------------------------------------------------------

    async def _take(self, frame: Frame) -> None:
        if frame.kind in (Kind.STDOUT, Kind.STDERR):
            stream = "stdout" if frame.kind is Kind.STDOUT else "stderr"
            self._console.write(stream, frame.body)  # type: ignore[arg-type]
            await self._console.drain()
            return
        event = frame.message()
        match event["event"]:
            case "started":
                self._workers[event["name"]] = event["pid"]
            case "exited":
                self._workers.pop(event["name"], None)
            case "restarting":
                self._restarts += 1
                if not self._quiet:
                    self._say(_restarting(event))
            case "log":
                self._log(event["text"])
            case "message":
                self._say(f"runtime: {event['text']}\n")
            case "end" | "refused":
                self._end = event

    def _say(self, text: str) -> None:
        """The launcher's own words: to standard error."""
        if text:
            self._console.write("stderr", text.encode(errors="replace"))

    def _log(self, line: str) -> None:
        self._say(f"runtime: {line}")

    # -- signals ------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        self._hurry.set()
        if not self.running:  # the job has ended; only its last output is still being written
            return
        if self._signalled is None:
            self._signalled = Signalled(number, *_SIGNALS[number])
            limit = self._assignment.shutdown_timeout_s
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
            self._kill_agent()

    def _expect_end_within(self, seconds: float) -> None:
        """An agent that is stopped itself, or hangs, must not keep the launcher."""
        asyncio.get_running_loop().call_later(seconds, self._kill_agent)

    def _kill_agent(self) -> None:
        if self.running and not self._agent_exit.done():
            spawn.send_signal(self._agent.pid, signal.SIGKILL)

    def _command(self, op: str) -> None:
        assert self._channel is not None
        assert self._signalled is not None
        code = 128 + self._signalled.number
        reason = f"stopped by {self._signalled.name}"
        self._channel.send_message(Kind.COMMAND, {"op": op, "reason": reason, "code": code})

    async def _tell_who_is_left(self) -> None:
        while True:
            await asyncio.sleep(_TOLD_EVERY_S)
            if self._workers:
                self._say(f"runtime: {report.waiting_for(sorted(self._workers))}\n")

    # -- the end ------------------------------------------------------------------------------

    def _outcome(self, exit: spawn.Exit) -> report.Outcome:
        plan = self._assignment.plan
        base = report.Outcome(
            "finished", plan.job_id, plan.job.name, log_dir=self._assignment.log_dir,
            restarts=self._restarts,
        )  # fmt: skip
        if self._end is None:
            return self._agent_lost(base, exit)
        if self._end["event"] == "refused":
            return replace(base, end="usage", detail=self._end["text"])
        return outcome_of_end(self._end, base, self._signalled, self._assignment.timeout_s)

    def _agent_lost(self, base: report.Outcome, exit: spawn.Exit) -> report.Outcome:
        """The agent died: its workers have the parent-death signal, the rest is ours to end."""
        spawn.kill_descendants(_CLEANUP_S)
        remove_job_dir(self._assignment.job_dir)
        how = f"killed by {exit.cause}" if exit.signal else f"ended with {exit.cause}"
        text = f"agent of host {self._assignment.host} {how}; its workers were ended"
        folder = os.path.join(self._assignment.log_dir, base.job_id)
        end: report.End = "host_lost" if self._signalled is None else self._signalled.end
        return replace(base, end=end, detail=text, log_dir=folder)


def outcome_of_end(
    end: Mapping[str, Any],
    base: report.Outcome,
    signalled: Signalled | None,
    timeout_s: float | None,
) -> report.Outcome:
    """What the agent's last event means, for the box and the exit code."""
    base = replace(base, log_dir=end["log_dir"])
    failures = [end["first"], *end["others"]] if end["first"] else []
    told = tuple(_failure(failure) for failure in failures)
    if signalled is not None and end["code"] == 128 + signalled.number:
        return replace(base, end=signalled.end)
    if end["code"] == report.TIMED_OUT and not told:
        return replace(base, end="timeout", timeout_s=timeout_s)
    if end["code"] == 0:
        return base
    if not told:
        return replace(base, end="host_lost", detail=end["reason"])
    return replace(base, end="failed", failures=told, detail=end["reason"])


def _failure(failure: Mapping[str, Any]) -> report.WorkerFailure:
    lines = failure.get("lines") or {}
    error = failure["error"] or None
    number = failure["signal"] or None
    _, oom, evidence = failure["cause"].partition(" (")
    return report.WorkerFailure(
        role=failure["role"],
        rank=failure["rank"],
        host=failure["host"],
        pid=failure["pid"] or None,
        when=datetime.fromtimestamp(failure["at"]).strftime("%H:%M:%S.%f")[:-3],
        code=None if number else failure["code"],
        signal=number,
        reason="" if failure["pid"] else failure["cause"],
        evidence=(evidence.rstrip(")"),) if oom else (),
        restart_count=failure["incarnation"],
        error=error and report.ErrorFile(error["message"], error["traceback"], error["type"]),
        last_lines=tuple(lines.get("stderr") or lines.get("stdout") or ()),
        log_dir=failure.get("folder") or "",
    )


def _restarting(event: Mapping[str, Any]) -> str:
    failure, names = event["failure"], event["names"]
    what = names[0] if len(names) == 1 else f"all {len(names)} of {event['role']}"
    return (
        f"runtime: {failure['name']} failed ({failure['cause']}): restarting {what}, "
        f"attempt {event['attempt']} of {event['max']}\n"
    )


def _width() -> int:
    try:
        return min(os.get_terminal_size(sys.stderr.fileno()).columns or 100, 120)
    except (OSError, ValueError):
        return 100
