"""What an agent answers to those who look at its job from outside: `python -m runtime status|logs|stop`.

Methods of the agent's endpoint, for any process that has the job's keys:

    agent.job()                     the job as its control plane knows it: stage, actors, members, agents
    agent.status(stays)             this host: its agent and the worker processes that it has; `stays`: the
                                    caller will ask for the end
    agent.logs(query, positions)    the next bytes of this host's log files; waits a while for some
    agent.wait(seconds)             how the job ended and what was left of it here; waits so long for that
    agent.stop(reason, force)       end the job

Those that wait do so for a few seconds only and are asked again: a caller that is gone costs nothing. At
the end of the job `finish` lets who follows the logs have the last of them, and who waits hear of the end.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from runtime.cluster.starting import Ask
from runtime.errors import MisuseError
from runtime.launcher import logfiles
from runtime.launcher.assignment import Assignment
from runtime.launcher.spawn import ProcessInfo
from runtime.peer.endpoint import Endpoint, current_call

WAIT_S = 5.0
"""How long a question that waits is kept before it is answered with nothing."""
STOPPED = 143
"""Exit code of a job that was stopped from outside."""
_LOOK_EVERY_S = 0.2
_FAREWELL_S = 1.5


class Workers(Protocol):
    """What is asked of the supervisor."""

    def workers(self) -> list[dict[str, Any]]:
        """Those that run here: name, pid, incarnation."""
        ...


class Stopper(Protocol):
    """What is asked of who holds the control plane."""

    async def stop(self, reason: str, code: int) -> None: ...

    async def kill(self, reason: str, code: int) -> None: ...


class Views:
    """Answers for one host. `stopper`: None where the control plane is elsewhere."""

    def __init__(
        self,
        endpoint: Endpoint,
        assignment: Assignment,
        supervisor: Workers,
        ask: Ask,
        stopper: Stopper | None = None,
    ) -> None:
        self._host = assignment.host
        self._folder = assignment.log_folder
        launches = assignment.plan.launches
        self._ranks = frozenset((w.role, w.rank) for w in launches if w.host == assignment.host)
        self._supervisor, self._ask, self._stopper = supervisor, ask, stopper
        self._ended = asyncio.Event()
        self._end: dict[str, Any] | None = None
        self._followers: dict[str, float] = {}
        """Who will ask again, and when it was answered last."""
        self._waiting = 0
        self._left = asyncio.Event()
        """Somebody less is to be told of the end."""
        for name in ("job", "status", "logs", "wait", "stop"):
            endpoint.export(f"agent.{name}", getattr(self, f"_{name}"))

    async def finish(
        self, outcome: Mapping[str, Any] | None, left: Sequence[ProcessInfo] = ()
    ) -> None:
        """The job has ended: `outcome` says how, where that is known, `left` what does not die here. Returns when those who asked
        have been told, after a second and a half at the latest. The endpoint must still be open."""
        found = [[info.pid, info.name, info.state] for info in left]
        self._end = {"outcome": outcome, "left": found}
        self._ended.set()
        # Who has not asked again for that long is gone, or stopped.
        recent = asyncio.get_running_loop().time() - WAIT_S
        self._followers = {peer: at for peer, at in self._followers.items() if at > recent}
        try:
            async with asyncio.timeout(_FAREWELL_S):
                while self._waiting or self._followers:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:  # somebody follows who has not read on: the files are there
            pass

    # -- questions ----------------------------------------------------------------------------

    async def _job(self) -> dict[str, Any]:
        return {
            "supervision": await self._ask("supervision", {"op": "status"}),
            "members": await self._ask("membership", {"op": "members"}),
            "agents": await self._ask("membership", {"op": "agents"}),
        }

    async def _status(self, stays: bool = False) -> dict[str, Any]:
        if stays:
            self._answered(last=False)
        workers = self._supervisor.workers()
        return {"host": self._host, "pid": os.getpid(), "workers": workers}

    async def _stop(self, reason: str, force: bool) -> None:
        if self._stopper is None:
            raise MisuseError("the job is stopped where its control plane is, which is not here")
        await (self._stopper.kill if force else self._stopper.stop)(reason, STOPPED)

    async def _wait(self, seconds: float) -> dict[str, Any] | None:
        await self._until_end(min(seconds, WAIT_S))
        self._answered(last=self._end is not None)
        return self._end

    async def _logs(
        self, query: Sequence[Any], positions: Mapping[str, int] | None, follow: bool
    ) -> dict[str, Any]:
        """`query`: a `logfiles.Query`. `over`: no more will come; then with the `end`, if it is that of the job."""
        wanted, clock = logfiles.Query(*query), asyncio.get_running_loop().time
        until = clock() + WAIT_S
        while True:
            ended = self._ended.is_set()
            found = await asyncio.to_thread(
                logfiles.read, self._folder, wanted, positions, self._ranks
            )
            over = not found.more and (ended or not follow)
            if found.pieces or over or clock() > until:
                break
            positions = found.positions
            await self._until_end(_LOOK_EVERY_S)
        self._answered(last=over or not follow)
        pieces = [list(piece) for piece in found.pieces]
        end = self._end if over else None
        return {"pieces": pieces, "positions": found.positions, "over": over, "end": end}

    def _answered(self, *, last: bool) -> None:
        """Our caller will ask again, unless this was its last answer."""
        peer = current_call().peer
        self._followers[peer] = asyncio.get_running_loop().time()
        if last:
            del self._followers[peer]
            self._left.set()

    async def _until_end(self, seconds: float) -> None:
        """Wait for the end of the job, but not longer. While we do, the end waits for us."""
        self._waiting += 1
        try:
            async with asyncio.timeout(seconds):
                await self._ended.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1
            self._left.set()
