"""A job as seen from outside it: what its agents are asked, and one picture made of the answers.

`JobClient` is a peer of the job with the job's keys, in whatever process has the right to read them. It asks
the agent that has the control plane for the others, and then each about its own host. Whoever does not
answer in time is reported as such: a view never waits longer for a host than for the next one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from runtime import aio
from runtime.cluster.exits import wall_clock
from runtime.cluster.views import WAIT_S
from runtime.errors import Closed, MisuseError, PeerLostError, RuntimeFault, Timeout
from runtime.job import ActorInfo
from runtime.launcher import jobs
from runtime.launcher.afar import together
from runtime.launcher.assignment import choose_job_dir, make_job_dir, remove_job_dir
from runtime.launcher.logfiles import Piece, Query
from runtime.launcher.outcome import from_plain
from runtime.launcher.records import HostStatus, JobEndpoint, JobStatus, WorkerStatus
from runtime.launcher.report import Outcome
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.address import parse_all
from runtime.transport.link import SocketSettings
from runtime.transport.security import Security
from runtime.transport.sockets import SocketTransport

OUT_OF_REACH = (PeerLostError, Timeout, Closed)
"""What asking a job raises that has ended, ends at this moment, or cannot be reached."""
ANSWER_S = 5.0
"""How long an agent has to answer."""
_HURRY_S = 1.0
_FATE_S, _FATE_LOOKS = 1.0, 20


class _Fates:
    """What became of the agent that has the control plane, once its link broke. Implements `Directory` for an
    endpoint that calls nobody by name."""

    def __init__(self, job: JobEndpoint) -> None:
        self._job = job

    def roles(self) -> Mapping[str, list[ActorInfo]]:
        return {}

    async def resolve(self, name: str) -> PeerAddress:
        raise MisuseError(f"{name} is not called from outside of its job")

    async def fate(self, peer: str) -> str | None:
        for _ in range(_FATE_LOOKS if peer == self._job.peer else 0):
            if not await asyncio.to_thread(jobs.answers, self._job):
                return "it has ended"
            await asyncio.sleep(_FATE_S / _FATE_LOOKS)
        return None


class JobClient(aio.Service):
    """Asks one running job. `async with`. Whatever it asks raises one of `OUT_OF_REACH` when the job's control
    plane does not answer."""

    def __init__(self, job: JobEndpoint) -> None:
        super().__init__(f"client of {job.job_id}")
        self._job = job
        self._control = PeerAddress(job.peer, job.address, host=job.names[0])
        # In the folder of the job's own sockets, where we are on its host: that is removed with it.
        folders = [os.path.dirname(a.target) for a in parse_all(job.address) if a.scheme == "ipc"]
        theirs = next((folder for folder in folders if os.access(folder, os.W_OK)), None)
        self._own_dir = "" if theirs else choose_job_dir(secrets.token_hex(4), os.environ)
        settings = SocketSettings(security=Security(*job.security) if job.security else None)
        me = f"@cli.{secrets.token_hex(4)}"
        address = f"ipc://{theirs or self._own_dir}/{me[1:]}"
        transport = SocketTransport(me, address, settings)
        self._endpoint = Endpoint(transport, directory=_Fates(job), role="@cli", rank=0)
        self._agents: dict[str, PeerAddress] = {}
        """By host, in the order of the plan."""
        self.outcome: Outcome | None = None
        """How the job ended, once it has and we have heard of it."""

    async def _on_start(self) -> None:
        if self._own_dir:
            make_job_dir(self._own_dir)
        await self._endpoint.start()
        self.serve(self._endpoint.wait(), "endpoint")

    async def _on_close(self) -> None:
        await self._endpoint.close()
        if self._own_dir:
            remove_job_dir(self._own_dir)

    # -- questions ----------------------------------------------------------------------------

    async def status(self) -> JobStatus:
        """The job, its hosts and workers, now."""
        return await self._status(False, ANSWER_S)

    async def stop(self, reason: str, *, force: bool = False) -> JobStatus:
        """Ask the job to stop, or kill it; gives the job as it was before. It has heard of it when this returns,
        but not ended: see `ended`."""
        before = await self._status(
            True, _HURRY_S
        )  # no agent that answers ends without a word to us now
        await self._ask(self._control, "agent.stop", reason, force)
        return before

    async def wait_for_end(self, seconds: float) -> bool:
        """Wait until the job has ended, but not longer: whether it has."""
        self._heard(await self._ask(self._control, "agent.wait", seconds))
        return self.outcome is not None

    async def ended(self, within: float) -> dict[str, dict[str, Any] | RuntimeFault]:
        """After `stop`, wait until the job has ended: by host, its agent's last words {outcome, left: [[pid, name,
        state]]}, or why there are none; `within` so many seconds."""
        ends = await asyncio.gather(*(self._end(agent, within) for agent in self._agents.values()))
        return dict(zip(self._agents, ends, strict=True))

    async def logs(
        self, query: Query, *, follow: bool = False
    ) -> AsyncGenerator[tuple[str, Piece | RuntimeFault], None]:
        """What the job's workers printed, by host, as it comes. Ends with the job if it is to `follow`. A host
        that cannot be asked (any more) gives its error, once."""
        await self._look()
        sources = {host: self._read(agent, query, follow) for host, agent in self._agents.items()}
        async with aclosing(together(sources)) as found:
            async for item in found:
                yield item

    # -- one agent ----------------------------------------------------------------------------

    async def _read(
        self, agent: PeerAddress, query: Query, follow: bool
    ) -> AsyncGenerator[Piece, None]:
        positions: Mapping[str, int] | None = None
        over = False
        while not over:
            answer = await self._ask(agent, "agent.logs", list(query), positions, follow)
            positions, over = answer["positions"], answer["over"]
            self._heard(answer["end"])
            for piece in answer["pieces"]:
                yield Piece(*piece)

    async def _end(self, agent: PeerAddress, within: float) -> dict[str, Any] | RuntimeFault:
        try:
            async with asyncio.timeout(within):
                while (answer := await self._asked(agent, "agent.wait", WAIT_S)) is None:
                    continue
        except TimeoutError:
            answer = Timeout(f"the agent of {agent.host} has not ended in {within:g} s", within)
        if not isinstance(answer, RuntimeFault):
            self._heard(answer)
        found: dict[str, Any] | RuntimeFault = answer
        return found

    def _heard(self, end: Mapping[str, Any] | None) -> None:
        """An agent's last words; those of the first say how the job ended."""
        if end is not None and end["outcome"] is not None:
            self.outcome = from_plain(end["outcome"])

    async def _asked(
        self, agent: PeerAddress, method: str, *args: Any, within: float = ANSWER_S
    ) -> Any:
        """As `_ask`, but an error that is the agent's is given, not raised."""
        try:
            return await self._ask(agent, method, *args, within=within)
        except OUT_OF_REACH as error:
            return error

    async def _ask(
        self, agent: PeerAddress, method: str, *args: Any, within: float = ANSWER_S
    ) -> Any:
        waits = WAIT_S if method in ("agent.logs", "agent.wait") else 0.0
        try:
            return await self._endpoint.call(agent, method, args, timeout=waits + within)
        except Timeout as error:
            text = f"the agent of {agent.host} does not answer (waited {error.waited_s:.0f} s)"
            raise Timeout(text, error.waited_s) from None
        except PeerLostError as error:
            text = f"the agent of {agent.host} is out of reach: {error.cause or 'it is gone'}"
            raise PeerLostError(text, agent.peer, host=agent.host, cause=error.cause) from None

    async def _status(self, stays: bool, within: float) -> JobStatus:
        job = await self._look()
        asked = (
            self._asked(a, "agent.status", stays, within=within) for a in self._agents.values()
        )
        answers = dict(zip(self._agents, await asyncio.gather(*asked), strict=True))
        return job_status(self._job, job, answers, wall_clock())

    async def _look(self) -> Mapping[str, Any]:
        """What the control plane knows; `_agents` are those of now after it."""
        job: Mapping[str, Any] = await self._ask(self._control, "agent.job")
        self._agents = {self._control.host: self._control}
        for agent in sorted(job["agents"], key=lambda agent: agent["node_rank"]):
            if agent["peer"] != self._control.peer:
                host = agent["host"]
                self._agents[host] = PeerAddress(agent["peer"], agent["address"], host=host)
        return job


def job_status(
    endpoint: JobEndpoint, job: Mapping[str, Any], answers: Mapping[str, Any], now: float
) -> JobStatus:
    """One picture of what the control plane says (`agent.job`) and what the agents do (`agent.status`, or an
    error, by host). `now`: seconds since the epoch."""
    supervision = job["supervision"]
    quiet = {agent["host"] or endpoint.names[0]: agent.get("quiet_s") for agent in job["agents"]}
    processes = {
        worker["name"]: worker
        for answer in answers.values()
        if isinstance(answer, Mapping)
        for worker in answer["workers"]
    }
    roles: dict[str, list[WorkerStatus]] = {}
    for member in job["members"]:
        silent = not isinstance(answers.get(member["host"]), Mapping)
        process = processes.get(member["name"])
        status = _worker(member, process, quiet.get(member["host"]), silent)
        roles.setdefault(status.role, []).append(status)
    restarts = sum(
        role["attempt"] + sum(actor["restarts"] for actor in role["actors"])
        for role in supervision["roles"]
    )
    return JobStatus(
        stage=_stage(supervision, [w for r in roles.values() for w in r]),
        exit_code=supervision["code"] if supervision["stage"] == "ended" else None,
        restarts=restarts,
        roles=roles,
        job_id=endpoint.job_id,
        name=endpoint.name,
        started=endpoint.started,
        since=now - supervision["since_s"],
        hosts=tuple(_host(name, answers.get(name), quiet.get(name)) for name in endpoint.names),
        reason=supervision["reason"],
        log_dir=endpoint.log_dir,
    )


def _stage(supervision: Mapping[str, Any], members: Sequence[WorkerStatus]) -> str:
    stage = supervision["stage"]
    if stage == "ended":
        return "finished" if supervision["code"] == 0 else "failed"
    if stage in ("stopping", "finishing"):
        return "stopping"
    first = any(worker.state == "starting" and not worker.restart_count for worker in members)
    return "starting" if stage == "new" or first else "running"


def _worker(
    member: Mapping[str, Any],
    process: Mapping[str, Any] | None,
    quiet_s: float | None,
    silent: bool,
) -> WorkerStatus:
    """`silent`: its host does not answer."""
    state, code = member["state"], member["code"]
    there = process is not None and process["incarnation"] == member["incarnation"]
    if there or (silent and state == "starting"):
        state = "running"  # whether or not it has joined: a script need not know of us
    return WorkerStatus(
        name=member["name"],
        role=member["role"],
        rank=member["rank"],
        host=member["host"],
        pid=process["pid"] if process is not None else None,
        state="starting" if state == "expected" else state,
        exit_code=None if code == -1 else code,
        restart_count=max(0, member["incarnation"]),
        last_heartbeat_s=quiet_s,
        step=member["step"],
        stuck_s=None,
        cause=member["cause"],
    )


def _host(name: str, answer: Any, quiet_s: float | None) -> HostStatus:
    if isinstance(answer, Mapping):
        return HostStatus(name, answer["pid"], quiet_s)
    return HostStatus(name, None, quiet_s, str(answer or "the job has no agent there any more"))
