"""One agent's hands: it starts, watches and ends the workers of its host as the control plane directs.

Decisions (who restarts, when the job ends) are the machine's in `restart.py`. Here a directive "start"
becomes a rendezvous, environments, pipes and processes; an exit seen through a pidfd becomes a report,
with what the worker wrote about its error; "stop" becomes SIGTERM, and SIGKILL after a while.

Exits that are seen in one pass of the event loop are told in the order in which they must have happened:
deaths by signal first, then by the time of their error files. So the first failure is the true one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import secrets
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from runtime import aio
from runtime.cluster.ports import PortChooser
from runtime.errors import RuntimeFault
from runtime.job import ActorInfo, RoleSpec
from runtime.launcher import child, spawn
from runtime.launcher.output import Capture, Outputs, Source
from runtime.launcher.plan import Launch, Plan, Start, WorkerSpec, planned_actors, worker_env
from runtime.launcher.starter import NewWorker, Starter, close_streams
from runtime.launcher.watch import Watch

logger = logging.getLogger(__name__)

Ask = Callable[[str, Mapping[str, Any]], Awaitable[Any]]
"""Ask a machine of the control plane: its name and a message."""

WORKER = "runtime.worker:main"
PROGRAM = "runtime.launcher.child:exec_program"
BASE_PRELOAD = ("runtime.worker", "runtime.node", "runtime.transport.sockets")
"""What every worker of ours imports; the fork server does it once."""
_RESTART_GRACE_S = 2.0
_LAST_OUTPUT_S = 1.0
_SHOWN_LINES = 50


@dataclass(frozen=True)
class HostSettings:
    """What the supervisor of one host works with. Times are seconds.

    `env` is what workers inherit; `job_dir` the private folder of the job's sockets.
    """

    plan: Plan
    host: str
    agent: str
    agent_address: str
    job_dir: str
    workdir: str
    env: Mapping[str, str]
    addr: str = "127.0.0.1"
    port_range: tuple[int, int] | None = None
    shutdown_timeout_s: float = 10.0
    timeout_s: float | None = None


@dataclass
class _Process:
    """One worker process of ours."""

    info: ActorInfo
    incarnation: int
    peer: str
    error_file: str
    capture: Capture
    watch: Watch
    oom_kills: int
    kill_timer: asyncio.TimerHandle | None = None


class _Ended(NamedTuple):
    process: _Process
    exit: spawn.Exit
    at: float
    """Wall clock: of the error file where there is one, else of now."""
    seen: float
    error: dict[str, Any]
    step: int | None


class Supervisor(aio.Service):
    """Carries out directives on this host. `ended` is set to the directive "end" when it came.

    `notify` gets events for the launcher (plain data): started, exited, restarting, stopping.
    """

    def __init__(
        self,
        settings: HostSettings,
        ask: Ask,
        *,
        starter: Starter,
        outputs: Outputs,
        notify: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__("supervisor")
        self._settings, self._ask = settings, ask
        self._starter, self._outputs, self._notify = starter, outputs, notify
        self._actors = {info.name: info for info in planned_actors(settings.plan)}
        self._launches = {launch.env["RUNTIME_ACTOR"]: launch for launch in settings.plan.launches}
        self._processes: dict[str, _Process] = {}
        self._starts: dict[str, asyncio.Task[None]] = {}
        self._tails: dict[tuple[str, int], Capture] = {}
        self._seen: list[_Ended] = []
        self._reports: asyncio.Queue[list[_Ended] | dict[str, Any]] = asyncio.Queue()
        self._telling = asyncio.Lock()
        self._ports = PortChooser(settings.port_range)
        self.ended: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    # -- from outside -------------------------------------------------------------------------

    async def begin(self) -> None:
        """Declare the job's actors and start them all."""
        plan, settings = self._settings.plan, self._settings
        actors = [
            {"name": info.name, "role": info.role, "rank": info.rank, "host": info.host}
            for info in self._actors.values()
        ]
        await self._ask("membership", {"op": "declare", "actors": actors})
        for role in plan.job.roles.values():
            if role.kind == "elastic" and self._mine(role.name):
                nodes = sum(host.local or True for host in plan.hosts)
                low = min(role.nnodes[0], nodes)
                opened = {"op": "open", "role": role.name, "min": low, "max": max(low, 1)}
                await self._ask("rendezvous", opened)
        begin = {
            "op": "begin",
            "roles": [self._supervised(role) for role in plan.job.roles.values()],
            "stop_timeout_s": settings.shutdown_timeout_s,
            "restart_timeout_s": min(_RESTART_GRACE_S, settings.shutdown_timeout_s),
            "timeout_s": settings.timeout_s,
        }
        await self._ask("supervision", begin)

    async def stop(self, reason: str, code: int) -> None:
        """Ask all workers to stop; the job ends with `code`."""
        message = {"op": "stop", "reason": reason, "code": code, "seen": _wall_clock()}
        await self._ask("supervision", message)

    async def kill(self, reason: str, code: int) -> None:
        """Kill all workers now."""
        await self._ask("supervision", {"op": "kill", "reason": reason, "code": code})

    @property
    def alive(self) -> list[str]:
        """Names of the workers that run, or are being started."""
        return sorted({*self._processes, *self._starts})

    def directive(self, message: Mapping[str, Any]) -> None:
        """Take a directive of the machine. Never blocks, never raises."""
        match message["op"]:
            case "start":
                names = ", ".join(message["actors"])
                task = self.spawn(self._start(message), f"start of {names}")
                self._starts.update(dict.fromkeys(message["actors"], task))
            case "stop":
                self._ask_to_stop(message)
            case "kill":
                for name in message["names"]:
                    self._kill(name)
            case "end":
                self._reports.put_nowait(dict(message))

    # -- starting -----------------------------------------------------------------------------

    def _mine(self, role: str) -> list[Launch]:
        return [
            launch
            for launch in self._settings.plan.launches
            if launch.role == role and launch.host == self._settings.host
        ]

    def _supervised(self, role: RoleSpec) -> dict[str, Any]:
        actors = [info for info in self._actors.values() if info.role == role.name]
        return {
            "name": role.name,
            "policy": role.restart.policy if role.restart.max > 0 else "never",
            "max": role.restart.max,
            "driver": role.driver,
            "actors": [
                {"name": a.name, "rank": a.rank, "agent": self._settings.agent, "host": a.host}
                for a in actors
            ],
        }

    async def _start(self, message: Mapping[str, Any]) -> None:
        """Start some actors of one role. What cannot be started is reported as having failed."""
        role = self._settings.plan.job.roles[message["role"]]
        incarnations: dict[str, int] = dict(message["actors"])
        code, reason = 0, ""
        try:
            place = await self._rendezvous(role, int(message["attempt"]))
            await self._start_all(role, incarnations, place)
        except asyncio.CancelledError:
            reason = "stopped before it was started"
            self._report_unstarted(incarnations, spawn.Exit(signal=signal.SIGTERM), reason)
            return
        except (OSError, RuntimeFault) as error:
            code, reason = 126, str(error)
            if isinstance(error, FileNotFoundError):
                code = 127
        finally:
            for name in incarnations:
                self._starts.pop(name, None)
        if code:
            self._notify({"event": "message", "text": f"cannot start {role.name}: {reason}"})
            self._report_unstarted(incarnations, spawn.Exit(code=code), reason)

    async def _rendezvous(self, role: RoleSpec, attempt: int) -> Mapping[str, Any]:
        if role.kind != "elastic":
            return {}
        message = {
            "op": "join",
            "role": role.name,
            "round": attempt,
            "node": self._settings.agent,
            "slots": len(self._mine(role.name)),
            "addr": self._settings.addr,
            "port": self._ports.choose(),
        }
        place: Mapping[str, Any] = await self._ask("rendezvous", message)
        return place

    async def _start_all(
        self, role: RoleSpec, incarnations: Mapping[str, int], place: Mapping[str, Any]
    ) -> None:
        workers: list[NewWorker] = []
        specs: list[WorkerSpec] = []
        captures: list[Capture] = []
        for name, incarnation in incarnations.items():
            capture = self._capture(name, incarnation)
            spec = self._spec(role, name, incarnation, place, capture)
            _remove(spec.error_file)
            stdout, stderr = capture.open()
            workers.append(NewWorker(self._order(spec), stdout, stderr))
            specs.append(spec)
            captures.append(capture)
        for capture in captures:
            capture.run(self._outputs)
        oom_kills = _oom_kills()
        async with self._telling:  # the death that this start answers is told before it
            for spec in specs:
                await self._ask("membership", self._starting(spec))
        pids = await self._new_processes(role, workers)
        for pid, spec, capture in zip(pids, specs, captures, strict=True):
            capture.pid = pid
            watch = Watch(pid, self._exited)
            process = _Process(
                spec.info, spec.incarnation, spec.peer, spec.error_file, capture, watch, oom_kills
            )
            self._processes[spec.info.name] = process
            self._tails[spec.info.name, spec.incarnation] = capture
            started = {"name": spec.info.name, "pid": pid, "incarnation": spec.incarnation}
            self._notify({"event": "started", **started})

    async def _new_processes(self, role: RoleSpec, workers: Sequence[NewWorker]) -> list[int]:
        """Their pids. May be cancelled at any time: what was started by then is killed."""
        starter = self._starter
        if role.start_method == "spawn" or role.python is not None:
            work = starter.exec(role.python or sys.executable, workers)
        else:
            try:
                await starter.prepare([worker.order for worker in workers])
            except BaseException:
                close_streams(workers)
                raise
            work = starter.fork(workers)
        starting = self.spawn(_pids_or_error(work), f"processes of {role.name}")
        try:
            pids = await asyncio.shield(starting)
        except asyncio.CancelledError:
            started = await starting  # a matter of milliseconds: nothing is imported in it
            for pid in started if isinstance(started, list) else []:
                spawn.send_signal(pid, signal.SIGKILL)
            raise
        if isinstance(pids, OSError):
            raise pids
        return pids

    def _capture(self, name: str, incarnation: int) -> Capture:
        info = self._actors[name]
        position = list(self._settings.plan.job.roles).index(info.role)
        source = Source(info.role, info.rank, info.local_rank, info.host, incarnation, position)
        return self._outputs.capture(source)

    def _spec(
        self,
        role: RoleSpec,
        name: str,
        incarnation: int,
        place: Mapping[str, Any],
        capture: Capture,
    ) -> WorkerSpec:
        settings, info, launch = self._settings, self._actors[name], self._launches[name]
        rank, world_size = info.rank, info.world_size
        if place:
            rank, world_size = place["first_rank"] + info.local_rank, place["world_size"]
        info = replace(info, rank=rank, world_size=world_size, restart_count=incarnation)
        folder = capture.folder or settings.job_dir
        error_file = os.path.join(folder, "error.json" if capture.folder else f"{name}.json")
        start = Start(
            incarnation,
            incarnation,
            error_file,
            place.get("master_addr"),
            place.get("master_port"),
            rank if place else None,
            world_size if place else None,
            place.get("group_rank"),
            place.get("group_world_size"),
        )
        token = secrets.token_hex(4)
        number = launch.env["RUNTIME_GLOBAL_RANK"]
        return WorkerSpec(
            job_id=settings.plan.job_id,
            job=settings.plan.job,
            info=info,
            entry=role.entry,
            env=worker_env(launch, settings.env, start),
            actors=tuple(self._actors.values()),
            peer=f"{name}.{token}",
            address=f"ipc://{settings.job_dir}/{number}.{token}",
            agent_peer=settings.agent,
            agent_address=settings.agent_address,
            agent_pid=os.getpid(),
            incarnation=incarnation,
            workdir=role.workdir or settings.workdir,
            error_file=error_file,
            preload=(*BASE_PRELOAD, *(role.preload or ())),
            init_process_group=role.sets_up_process_group,
            node_check=role.checks_node,
            shutdown_timeout_s=settings.shutdown_timeout_s,
        )

    @staticmethod
    def _order(spec: WorkerSpec) -> child.Order:
        program = spec.entry.form == "program"
        argument: Any = (spec.entry.target, *spec.entry.args) if program else spec
        return child.Order(
            PROGRAM if program else WORKER,
            pickle.dumps(argument, protocol=5),
            dict(spec.env),
            spec.workdir,
            spec.agent_pid,
            spec.preload,
            spec.info.name,
        )

    def _starting(self, spec: WorkerSpec) -> dict[str, Any]:
        return {
            "op": "starting",
            "name": spec.info.name,
            "incarnation": spec.incarnation,
            "peer": spec.peer,
            "host": self._settings.host,
            "agent": self._settings.agent,
        }

    # -- stopping -----------------------------------------------------------------------------

    def _ask_to_stop(self, message: Mapping[str, Any]) -> None:
        grace_s, names = float(message["grace_s"]), list(message["names"])
        self._notify({"event": "stopping", "names": names, "why": message["why"]})
        loop = asyncio.get_running_loop()
        for name in names:
            if task := self._starts.get(name):
                task.cancel()
            elif process := self._processes.get(name):
                process.watch.send_signal(signal.SIGTERM)
                process.kill_timer = loop.call_later(grace_s, self._kill, name)

    def _kill(self, name: str) -> None:
        if task := self._starts.get(name):
            task.cancel()
        elif process := self._processes.get(name):
            process.watch.kill()

    # -- ends ---------------------------------------------------------------------------------

    def _exited(self, watch: Watch, exit: spawn.Exit) -> None:
        process = next(p for p in self._processes.values() if p.watch is watch)
        del self._processes[process.info.name]
        if process.kill_timer is not None:
            process.kill_timer.cancel()
        if not self._seen:
            asyncio.get_running_loop().call_soon(self._report_seen)
        seen = _wall_clock()
        failed = exit != spawn.Exit()
        at, error, step = _read_error(process.error_file) if failed else (None, {}, None)
        self._seen.append(_Ended(process, exit, at or seen, seen, error, step))

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
        process, name = end.process, end.process.info.name
        cause = end.exit.cause
        if end.exit.signal == signal.SIGKILL and _oom_kills() > process.oom_kills:
            cause += " (out of memory: the cgroup's oom_kill count rose)"
        report = {
            "op": "exited",
            "name": name,
            "incarnation": process.incarnation,
            "pid": process.watch.pid,
            "code": end.exit.code,
            "signal": end.exit.signal,
            "cause": cause,
            "at": end.at,
            "seen": end.seen,
            "error": end.error,
            "step": end.step,
        }
        if end.exit != spawn.Exit():
            spawn.kill_session(process.watch.pid)
        message = {
            "op": "exited",
            "name": name,
            "incarnation": process.incarnation,
            "peer": process.peer,
            "cause": end.exit.cause,
            "code": end.exit.shell_code,
        }
        # What others are told of this death comes before any decision about it is carried out.
        async with self._telling:
            answer = await self._ask("supervision", report)
            await self._ask("membership", {**message, "final": bool(answer["final"])})
        self._notify({"event": "exited", "name": name, "cause": cause})
        if end.exit == spawn.Exit():
            self._tails.pop((name, process.incarnation), None)
        self.spawn(self._last_output(process.capture), f"last output of {name}")

    async def _last_output(self, capture: Capture) -> None:
        await capture.wait(_LAST_OUTPUT_S)
        self._outputs.forget(capture)

    def _report_unstarted(
        self, incarnations: Mapping[str, int], exit: spawn.Exit, reason: str
    ) -> None:
        now = _wall_clock()
        for name, incarnation in incarnations.items():
            if name in self._processes:  # this one was started before the start failed
                self._processes[name].watch.kill()
                continue
            report = {
                "op": "exited",
                "name": name,
                "incarnation": incarnation,
                "code": exit.code,
                "signal": exit.signal,
                "cause": reason,
                "at": now,
                "seen": now,
            }
            self.spawn(self._tell_unstarted(report), f"report on {name}")

    async def _tell_unstarted(self, report: Mapping[str, Any]) -> None:
        await self._ask("supervision", report)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            known = [process.watch.pid for process in self._processes.values()]
            spawn.reap_orphans([*known, *self._starter.zygote_pids])

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


async def _pids_or_error(work: Awaitable[list[int]]) -> list[int] | OSError:
    """A program that cannot be executed is the role's failure, not that of the service it runs in."""
    try:
        return await work
    except OSError as error:
        return error


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _wall_clock() -> float:
    return datetime.now(UTC).timestamp()


def _read_error(path: str) -> tuple[float | None, dict[str, Any], int | None]:
    """When a worker wrote about its error, what, and at which step: torchelastic's file."""
    try:
        with open(path, "rb") as file:
            record = json.load(file)
            # The file's own time: the one inside has whole seconds only, as torchelastic's.
            at = os.fstat(file.fileno()).st_mtime
        message = record["message"]
        if isinstance(message, str):
            message = {"message": message}
        extra = message.get("extraInfo") or {}
        error = {
            "type": str(record.get("type", "")),
            "message": str(message.get("message", "")),
            "traceback": str(extra.get("py_callstack", "")),
        }
        step = record.get("step")
        return at, error, step if isinstance(step, int) else None
    except FileNotFoundError:
        return None, {}, None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        logger.warning("cannot read %s: %s", path, problem)
        return None, {}, None


def _oom_kills() -> int:
    """How often the kernel killed for memory in our cgroup; 0 where that cannot be seen."""
    try:
        with open("/proc/self/cgroup") as file:
            path = next(line[3:].strip() for line in file if line.startswith("0::"))
        with open(f"/sys/fs/cgroup{path}/memory.events") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
