"""One agent's hands: it starts, watches and ends the workers of its host as the control plane directs.

Decisions (who restarts, when the job ends) are the machine's in `restart.py`. Here a directive "start"
becomes a rendezvous, environments, pipes and processes; an exit seen through a pidfd becomes a report,
with what the worker wrote about its error; "stop" becomes SIGTERM, and SIGKILL after a while.

Exits that are seen in one pass of the event loop are told in the order in which they must have happened:
deaths by signal first, then by the time of their error files. So the first failure is the true one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime import aio
from runtime.cluster.exits import OwnReport, oom_kills, read_report, wall_clock
from runtime.cluster.starting import Control, Starting
from runtime.errors import RuntimeFault
from runtime.job import RoleSpec
from runtime.launcher import spawn
from runtime.launcher.assignment import Assignment
from runtime.launcher.output import Capture, Outputs
from runtime.launcher.plan import WorkerSpec
from runtime.launcher.progress import reported
from runtime.launcher.starter import Starter
from runtime.launcher.watch import Watch

logger = logging.getLogger(__name__)

_LAST_OUTPUT_S = 1.0
_SHOWN_LINES = 50


@dataclass
class _Process:
    """One worker process of ours."""

    spec: WorkerSpec
    capture: Capture
    watch: Watch
    oom_kills: int
    kill_timer: asyncio.TimerHandle | None = None


class _Ended(NamedTuple):
    process: _Process
    exit: spawn.Exit
    seen: float
    report: OwnReport

    @property
    def at(self) -> float:
        """Wall clock: of the error file where there is one, else of when the exit was seen."""
        return self.report.at or self.seen


class Supervisor(aio.Service):
    """Carries out directives on this host. `ended` is set to the directive "end" when it came; what only
    this host knows of the failures is added then.

    `notify` gets events for the launcher (plain data): started, exited, message.
    """

    def __init__(
        self,
        assignment: Assignment,
        control: Control,
        *,
        starter: Starter,
        outputs: Outputs,
        notify: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__("supervisor")
        self._assignment, self._ask = assignment, control.ask
        self._starter, self._outputs, self._notify = starter, outputs, notify
        self._starting = Starting(
            assignment, control, starter=starter, outputs=outputs, service=self
        )
        self._incarnations: dict[str, int] = {}
        """The newest that was to be started, by actor."""
        self._left = False
        self._fewer = asyncio.Event()
        self._ahead_s = assignment.clock_ahead_s
        self._processes: dict[str, _Process] = {}
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._tails: dict[tuple[str, int], Capture] = {}
        self._seen: list[_Ended] = []
        self._reports: asyncio.Queue[list[_Ended] | dict[str, Any]] = asyncio.Queue()
        self._telling = asyncio.Lock()
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.not_ours: Callable[[], Sequence[int]] = tuple
        """Children of this process that somebody else waits for."""

    # -- from outside -------------------------------------------------------------------------

    def directive(self, message: Mapping[str, Any]) -> None:
        """Take a directive of the machine. Never blocks, never raises."""
        match message["op"]:
            case "start":
                self._begin_start(message)
            case "stop":
                self._ask_to_stop(message)
            case "kill":
                for name in message["names"]:
                    self._kill(name)
            case "end":
                self._reports.put_nowait(dict(message))

    def workers(self) -> list[dict[str, Any]]:
        """The worker processes that run here now."""
        return [
            {"name": p.spec.info.name, "incarnation": p.spec.incarnation, "pid": p.watch.pid}
            for p in self._processes.values()
        ]

    def progress(self) -> dict[str, Any]:
        """What they have reported, by name."""
        return reported(process.spec for process in self._processes.values())

    async def leave(self, grace_s: float) -> None:
        """The job is over for this host, for whatever reason: end all workers within `grace_s` seconds and
        tell nobody. What starts or lives after that is the caller's to kill."""
        self._left = True
        self._ask_to_stop({"names": [*self._starts, *self._processes], "grace_s": grace_s})
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self._processes:
                    self._fewer.clear()
                    await self._fewer.wait()

    # -- starting -----------------------------------------------------------------------------

    def _begin_start(self, message: Mapping[str, Any]) -> None:
        actors = {
            name: incarnation
            for name, incarnation in message["actors"].items()
            if incarnation > self._incarnations.get(name, -1)
        }
        if not actors or self._left:  # it came a second time, or too late
            return
        self._incarnations |= actors
        task = self.spawn(
            self._start({**message, "actors": actors}), f"start of {', '.join(actors)}"
        )
        self._starts.update(dict.fromkeys(actors, task))

    async def _start(self, message: Mapping[str, Any]) -> None:
        """Start some actors of one role. What cannot be started is reported as having failed."""
        role = self._assignment.plan.job.roles[message["role"]]
        incarnations: dict[str, int] = dict(message["actors"])
        try:
            place = await self._starting.place(role, int(message["attempt"]))
            await self._start_all(role, incarnations, place)
        except asyncio.CancelledError:
            reason = "stopped before it was started"
            self._report_unstarted(incarnations, spawn.Exit(signal=signal.SIGTERM), reason)
        except (OSError, RuntimeFault) as error:
            self._notify({"event": "message", "text": f"cannot start {role.name}: {error}"})
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self._report_unstarted(incarnations, spawn.Exit(code), str(error))
        finally:
            for name in incarnations:
                self._starts.pop(name, None)

    async def _start_all(
        self, role: RoleSpec, incarnations: Mapping[str, int], place: Mapping[str, Any]
    ) -> None:
        prepared = self._starting.prepare(role, incarnations, place)
        kills = oom_kills()
        try:
            async with self._telling:  # the death that this start answers is told before it
                await self._starting.announce(prepared)
        except BaseException:
            self._starting.drop(prepared)
            raise
        pids = await self._starting.processes(role, prepared)
        for pid, (spec, capture, _) in zip(pids, prepared, strict=True):
            capture.pid = pid
            process = _Process(spec, capture, Watch(pid, self._exited), kills)
            self._processes[spec.info.name] = process
            self._tails[spec.info.name, spec.incarnation] = capture
            started = {"name": spec.info.name, "pid": pid, "incarnation": spec.incarnation}
            self._notify({"event": "started", **started})
            logger.info("%s runs as process %d", spec.info.name, pid)

    # -- stopping -----------------------------------------------------------------------------

    def _ask_to_stop(self, message: Mapping[str, Any]) -> None:
        grace_s, names = float(message["grace_s"]), list(message["names"])
        why = message.get("why") or "the job has failed"
        logger.info("asking %s to stop: %s", ", ".join(names), why)
        loop = asyncio.get_running_loop()
        for name in names:
            if task := self._starts.get(name):
                task.cancel()
            elif process := self._processes.get(name):
                process.watch.send_signal(signal.SIGTERM)
                process.watch.send_signal(signal.SIGCONT)  # a stopped one could not heed it
                process.kill_timer = loop.call_later(grace_s, self._kill, name)

    def _kill(self, name: str) -> None:
        if task := self._starts.get(name):
            task.cancel()
        elif process := self._processes.get(name):
            process.watch.kill()

    # -- ends ---------------------------------------------------------------------------------

    def _exited(self, watch: Watch, exit: spawn.Exit) -> None:
        process = next(p for p in self._processes.values() if p.watch is watch)
        del self._processes[process.spec.info.name]
        self._fewer.set()
        if process.kill_timer is not None:
            process.kill_timer.cancel()
        self._reclaim(process.spec)
        if not self._seen:
            asyncio.get_running_loop().call_soon(self._report_seen)
        seen = wall_clock()
        report = OwnReport() if exit == spawn.Exit() else read_report(process.spec.error_file)
        self._seen.append(_Ended(process, exit, seen, report))

    def _reclaim(self, spec: WorkerSpec) -> None:
        """What the worker had of the arena. Its place there is fit for its next incarnation after this."""
        arena = self._starting.arena
        if arena is not None and spec.arena is not None:
            arena.reclaim(spec.arena[1])
            self.spawn(arena.settle(), f"arena after {spec.info.name}")

    def _report_seen(self) -> None:
        for process in list(self._processes.values()):
            process.watch.poll()  # who died in the same moment belongs to the same report
        ended, self._seen = self._seen, []
        ended.sort(key=lambda end: (end.exit.signal == 0, end.at))
        self._reports.put_nowait(ended)

    async def _on_start(self) -> None:
        self.serve(self._report(), "reports")
        self.serve(self._reap(), "orphans")

    async def _report(self) -> None:
        while True:
            item = await self._reports.get()
            if isinstance(item, dict):
                await self._finish(item)
                continue
            for end in item:
                await self._tell(end)

    async def _tell(self, end: _Ended) -> None:
        if self._left:
            return
        process, spec = end.process, end.process.spec
        name, incarnation = spec.info.name, spec.incarnation
        cause = end.exit.cause
        if end.exit.signal == signal.SIGKILL and oom_kills() > process.oom_kills:
            cause += " (out of memory: the cgroup's oom_kill count rose)"
        known = {"pid": process.watch.pid, "error": end.report.error, "step": end.report.step}
        times = {"at": end.at - self._ahead_s, "seen": end.seen - self._ahead_s}
        stopped = process.kill_timer is not None
        report = _exited(name, incarnation, end.exit, cause=cause, stopped=stopped, **times)
        if end.exit != spawn.Exit():
            spawn.kill_session(process.watch.pid)
        gone = {"op": "exited", "name": name, "incarnation": incarnation, "peer": spec.peer}
        gone |= {"cause": end.exit.cause, "code": end.exit.shell_code}
        # What others are told of this death comes before any decision about it is carried out.
        async with self._telling:
            answer = await self._ask("supervision", report | known)
            await self._ask("membership", {**gone, "final": bool(answer["final"])})
        self._notify({"event": "exited", "name": name, "cause": cause})
        logger.info("%s has ended: %s", name, cause)
        if end.exit == spawn.Exit():
            self._tails.pop((name, incarnation), None)
        self.spawn(self._last_output(process.capture), f"last output of {name}")

    async def _last_output(self, capture: Capture) -> None:
        await capture.wait(_LAST_OUTPUT_S)
        self._outputs.forget(capture)

    def _report_unstarted(
        self, incarnations: Mapping[str, int], exit: spawn.Exit, reason: str
    ) -> None:
        now = wall_clock() - self._ahead_s
        for name, incarnation in incarnations.items() if not self._left else ():
            if name in self._processes:  # this one was started before the start failed
                self._processes[name].watch.kill()
                continue
            report = _exited(name, incarnation, exit, cause=reason, at=now, seen=now)
            self.spawn(self._ask("supervision", report), f"report on {name}")

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            known = [process.watch.pid for process in self._processes.values()]
            spawn.reap_orphans([*known, *self._starter.zygote_pids, *self.not_ours()])

    async def _finish(self, end: dict[str, Any]) -> None:
        """Add what only this host knows to the job's end: last lines and where the logs are."""
        for failure in [end["first"], *end["others"]]:
            capture = failure and self._tails.get((failure["name"], failure["incarnation"]))
            if capture:
                await capture.wait(_LAST_OUTPUT_S)
                failure["folder"] = capture.folder
                failure["lines"] = {
                    name: tail.lines(_SHOWN_LINES) for name, tail in capture.tails.items()
                }
        if not self.ended.done():
            self.ended.set_result(end)


def _exited(name: str, incarnation: int, exit: spawn.Exit, **more: Any) -> dict[str, Any]:
    """A report to the machine "supervision"."""
    ended = {"incarnation": incarnation, "code": exit.code, "signal": exit.signal}
    return {"op": "exited", "name": name, **ended, **more}
