"""What happens when a worker ends: restart, stop, or the end of the job. The pure machine "supervision".

The agents report how each of their processes ended; the machine answers with *directives* to the agents
(`Send`): start these actors, stop those, the job has ended. Policies, by role:

    gang    one fails: the others of the role are stopped, then all start again as the next attempt
    one     only the one that failed starts again
    never   a failure is the end of the job

Each role (gang) or actor (one) may be restarted `max` times. The job ends well when every actor of every
driver role has returned 0; the other roles are then asked to stop. It ends badly when a failure cannot be
restarted, when it is stopped from outside, or when its time is up.

Which failure was the *first* is decided at the end, when all are known (`failures.py`). What a worker
does after it was asked to stop is no failure.

Three attempts of a role that fail with the same error at the same reported step are not tried a fourth time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from runtime.cluster.failures import SIGNAL_HEAD_START_S, Failure, first_of, root_of
from runtime.control.messages import Operation, mapping, operation, text, whole
from runtime.errors import MisuseError
from runtime.launcher.report import TIMED_OUT
from runtime.machine import Call, Effect, Emit, Message, Reply, Send

_SIGTERM = 15
_HOST_LOST = 69
_SAME_FAILURES = 3
_FAILURES_KEPT = 256


@dataclass(slots=True)
class _Actor:
    """One planned actor. `state`: "idle", "running", "stopping" (asked to), "killed" (told to be),
    "done", "failed"."""

    name: str
    rank: int
    agent: str
    host: str
    state: str = "idle"
    incarnation: int = -1
    restarts: int = 0

    @property
    def alive(self) -> bool:
        return self.state in ("running", "stopping", "killed")


@dataclass(slots=True)
class _Role:
    name: str
    policy: str
    max: int
    driver: bool
    actors: list[_Actor]
    attempt: int = 0
    restarting: bool = False
    stop_seen: float | None = None
    """Wall clock when its actors were asked to stop, in this attempt."""
    signatures: dict[str, list[list[Any]]] = field(default_factory=dict)
    """By actor ("" for a gang): what the last attempts failed with."""


class Supervision:
    """The machine "supervision".

    Operations: begin{agents, roles, stop_timeout_s, restart_timeout_s, timeout_s?}, exited{name,
    incarnation, pid, code, signal, cause, at, seen, error, step, stopped} -> {final}, stop{reason, code},
    kill{reason, code}, status{} -> {stage, since_s, code, reason, roles}.
    A role is {name, policy, max, driver, actors: [{name, rank, agent, host}]}; `agents` are all of the job's.
    Directives: start{role, attempt, actors: {name: incarnation}}, stop{names, grace_s, why},
    kill{names}, end{code, reason, first, others}.
    """

    def __init__(self) -> None:
        self._agents: list[str] = []
        self._roles: dict[str, _Role] = {}
        self._failures: list[Failure] = []
        self._stage = "new"
        self._since = self._now = 0.0
        """When the stage began, and when it is: log time."""
        self._code: int | None = None
        self._reason = ""
        self._stop_timeout_s = self._restart_timeout_s = 10.0
        self._deadline: float | None = None
        self._timeout_s = 0.0
        self._seen = 0.0
        """Wall clock of the report on the latest failure."""
        self._gone: set[str] = set()
        """Agents that were lost: nothing can be started there any more."""
        self._operations: dict[str, Operation] = {
            "begin": self._begin,
            "exited": self._exited,
            "stop": self._stop,
            "kill": self._kill,
            "status": self._status,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        self._now = now
        return operation("supervision", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        self._now = now
        if self._deadline is None or now < self._deadline:
            return []
        self._deadline = None
        if self._stage not in ("running", "finishing"):
            return []
        return self._stop_all(f"the job did not end within {self._timeout_s:g} s", TIMED_OUT)

    def deadline(self) -> float | None:
        return self._deadline

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        return []  # every question is answered at once

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        """A process is gone; how it ended and what follows comes with `exited`. A lost agent takes
        its workers with it: they fail here."""
        self._now = now
        if peer in self._agents or self._stage == "new":
            self._gone.add(peer)
        effects: list[Effect] = []
        for role, actor in [(r, a) for r in self._roles.values() for a in r.actors]:
            if actor.agent == peer and actor.alive:
                report = {"code": _HOST_LOST, "cause": cause, "lost": True}
                effects += self._ended(role, actor, report)
        return effects

    def why(self, call: Call) -> str | None:
        return None

    def dump(self) -> dict[str, Any]:
        return {
            "agents": self._agents,
            "roles": [asdict(role) for role in self._roles.values()],
            "failures": [asdict(failure) for failure in self._failures],
            "stage": self._stage,
            "since": self._since,
            "code": self._code,
            "reason": self._reason,
            "timeouts": [self._stop_timeout_s, self._restart_timeout_s, self._timeout_s],
            "deadline": self._deadline,
            "seen": self._seen,
            "gone": sorted(self._gone),
        }

    def load(self, state: dict[str, Any]) -> None:
        roles = [
            _Role(**{**role, "actors": [_Actor(**actor) for actor in role["actors"]]})
            for role in state["roles"]
        ]
        self._agents = list(state["agents"])
        self._roles = {role.name: role for role in roles}
        self._failures = [Failure(**failure) for failure in state["failures"]]
        self._stage, self._code, self._reason = state["stage"], state["code"], state["reason"]
        self._since = state["since"]
        self._stop_timeout_s, self._restart_timeout_s, self._timeout_s = state["timeouts"]
        self._deadline, self._seen = state["deadline"], state["seen"]
        self._gone = set(state["gone"])

    # -- operations ---------------------------------------------------------------------------

    def _begin(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        if self._stage != "new":
            raise MisuseError("the job has begun already")
        roles = [_role_from(item) for item in message.get("roles") or []]
        if not isinstance(message.get("agents"), list | tuple):
            raise MisuseError(
                f"'begin' needs 'agents', a list of peer ids, found {message.get('agents')!r}"
            )
        if not any(role.driver and role.actors for role in roles):
            raise MisuseError("a job needs at least one actor of a driver role")
        self._roles = {role.name: role for role in roles}
        self._agents = [str(agent) for agent in message["agents"]]
        self._stop_timeout_s = float(message.get("stop_timeout_s", 10.0))
        self._restart_timeout_s = float(message.get("restart_timeout_s", self._stop_timeout_s))
        if message.get("timeout_s") is not None:
            self._timeout_s = float(message["timeout_s"])
            self._deadline = now + self._timeout_s
        self._enter("running")
        effects: list[Effect] = []
        for role in roles:
            effects += self._start(role, role.actors)
        for agent in sorted(self._gone):
            effects += self.lost(agent, "host unreachable", now)
        return effects + _answer(call, {})

    def _exited(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        role, actor = self._actor(text(message, "name"))
        effects: list[Effect] = []
        if whole(message, "incarnation") == actor.incarnation and actor.alive:
            effects = self._ended(role, actor, message)
        # Taken after the decision, also for a report that comes twice: whether this actor is to be
        # started again, or has been.
        final = self._stage != "running" or not (role.restarting or actor.alive)
        return effects + _answer(call, {"final": final})

    def _stop(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        effects = self._stop_all(text(message, "reason"), whole(message, "code"))
        return effects + _answer(call, {})

    def _kill(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        effects: list[Effect] = []
        if self._stage in ("running", "finishing"):
            effects += self._stop_all(text(message, "reason"), whole(message, "code"))
        alive = self._alive()
        for actor in alive:
            actor.state = "killed"
        return effects + _to_names(alive, "kill") + _answer(call, {})

    def _status(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        stage = {"stage": self._stage, "since_s": now - self._since}
        roles = [{**asdict(role), "signatures": {}} for role in self._roles.values()]
        return _answer(call, {**stage, "code": self._code, "reason": self._reason, "roles": roles})

    # -- what an end means --------------------------------------------------------------------

    def _ended(self, role: _Role, actor: _Actor, report: Message) -> list[Effect]:
        asked = actor.state != "running"
        killed = actor.state == "killed"
        code, number = whole(report, "code", 0), whole(report, "signal", 0)
        actor.state = "done" if code == number == 0 else "failed"
        failed = actor.state == "failed" and self._note(role, actor, report, asked, killed)
        if self._stage in ("stopping", "finishing"):
            return self._maybe_end()
        if self._stage != "running":
            return []
        if role.restarting:
            return self._maybe_restart(role)
        if failed and not asked:
            return self._failed(role, actor)
        return self._maybe_finish()

    def _note(self, role: _Role, actor: _Actor, report: Message, asked: bool, killed: bool) -> bool:
        """Keep a failure, unless it only did what it was asked to. True when it is one."""
        error = mapping(report, "error", {})
        seen = float(report.get("seen") or 0.0)
        at = float(report.get("at") or seen)
        number = whole(report, "signal", 0)
        if asked and report.get("stopped") and number == _SIGTERM and not error:
            return False  # its agent had asked it: no need to compare the clocks of two hosts
        # Of a lost host nobody knows when it went, and what others fail with may well come of that: it
        # counts, and before them.
        if asked and role.stop_seen is not None and not report.get("lost"):
            # Before the stop could have reached it, or by somebody else's signal a moment later.
            foreign = not error and number not in (0, _SIGTERM) and not killed
            slack = SIGNAL_HEAD_START_S if foreign else 0.0
            when = (at if error else seen) or inf
            if when >= role.stop_seen + slack:
                return False
        failure = _failure(role, actor, report, at)
        self._failures = [*self._failures, failure][-_FAILURES_KEPT:]
        if role.stop_seen is None:
            role.stop_seen = self._seen = seen or at
        return True

    def _failed(self, role: _Role, actor: _Actor) -> list[Effect]:
        if role.policy == "one":
            return self._failed_alone(role, actor)
        reachable = not self._lost_of(role.actors)
        if role.policy == "gang" and role.attempt < role.max and reachable:
            role.restarting = True
            others = [other for other in role.actors if other.alive]
            stop = self._stop_actors(others, self._restart_timeout_s, f"{actor.name} failed")
            return stop + self._maybe_restart(role)
        return self._stop_all("")

    def _failed_alone(self, role: _Role, actor: _Actor) -> list[Effect]:
        failure = self._failures[-1]
        if actor.restarts >= role.max or self._lost_of([actor]):
            return self._stop_all("")
        if reason := _repeated(role, failure, actor.name):
            return self._stop_all(reason)
        actor.restarts += 1
        failure.recovered, role.stop_seen = True, None
        return [_restarting(role, [actor], failure, actor.restarts), *self._start(role, [actor])]

    def _maybe_restart(self, role: _Role) -> list[Effect]:
        if any(actor.alive for actor in role.actors):
            return []
        role.restarting = False
        mine = [f for f in self._failures if f.role == role.name and not f.recovered]
        first = first_of(mine)
        assert first is not None
        if reason := self._lost_of(role.actors) or _repeated(role, first, ""):
            return self._stop_all(reason)
        for failure in mine:
            failure.recovered = True
        role.attempt += 1
        role.stop_seen = None
        told = _restarting(role, role.actors, first, role.attempt)
        return [told, *self._start(role, role.actors)]

    def _maybe_finish(self) -> list[Effect]:
        drivers = [a for role in self._roles.values() if role.driver for a in role.actors]
        if not all(actor.state == "done" for actor in drivers):
            return []
        self._enter("finishing")
        self._code = 0
        stop = self._stop_actors(self._alive(), self._stop_timeout_s, "the job is finished")
        return stop + self._maybe_end()

    # -- stopping -----------------------------------------------------------------------------

    def _stop_all(self, reason: str, code: int | None = None) -> list[Effect]:
        """Without `code` the job fails: with what code is decided when everybody has ended. With one, nobody
        asks any more who failed."""
        if self._stage not in ("running", "finishing"):
            return []
        self._enter("stopping")
        self._reason, self._code = reason, code
        alive = self._alive()
        for role in self._roles.values():
            if role.stop_seen is None:
                role.stop_seen = self._seen
        return self._stop_actors(alive, self._stop_timeout_s, reason) + self._maybe_end()

    def _stop_actors(self, actors: Iterable[_Actor], grace_s: float, why: str) -> list[Effect]:
        running = [actor for actor in actors if actor.state == "running"]
        asked = [actor for actor in running if actor.agent not in self._gone]
        for actor in asked:
            actor.state = "stopping"
        return _to_names(asked, "stop", grace_s=grace_s, why=why)

    def _maybe_end(self) -> list[Effect]:
        if self._alive():
            return []
        self._enter("ended")
        self._deadline = None
        end = _end(self._failures, self._code, self._reason)
        return [Send(agent, end) for agent in self._agents]

    # -- helpers ------------------------------------------------------------------------------

    def _enter(self, stage: str) -> None:
        self._stage, self._since = stage, self._now

    def _start(self, role: _Role, actors: list[_Actor]) -> list[Effect]:
        for actor in actors:
            actor.state = "running"
            actor.incarnation += 1
        what = {"role": role.name, "attempt": role.attempt}
        return [
            Send(agent, _directive("start", **what, actors={a.name: a.incarnation for a in mine}))
            for agent, mine in _by_agent(actors).items()
        ]

    def _lost_of(self, actors: Iterable[_Actor]) -> str:
        """In words, which of these have no host any more; "" when all have one."""
        names = [actor.name for actor in actors if actor.agent in self._gone]
        return f"the host of {', '.join(names)} is lost: not restarted" if names else ""

    def _alive(self) -> list[_Actor]:
        return [a for role in self._roles.values() for a in role.actors if a.alive]

    def _actor(self, name: str) -> tuple[_Role, _Actor]:
        for role in self._roles.values():
            for actor in role.actors:
                if actor.name == name:
                    return role, actor
        raise MisuseError(f"supervision knows no actor {name!r}")


def _failure(role: _Role, actor: _Actor, report: Message, at: float) -> Failure:
    return Failure(
        actor.name,
        role.name,
        actor.rank,
        actor.host,
        whole(report, "pid", 0),
        role.attempt,
        actor.incarnation,
        whole(report, "code", 0),
        whole(report, "signal", 0),
        text(report, "cause", ""),
        at,
        mapping(report, "error", {}),
        report.get("step"),
    )


def _end(failures: list[Failure], code: int | None, reason: str) -> dict[str, Any]:
    """The last directive. Without `code` the job has failed: with that of the first failure."""
    current = [failure for failure in failures if not failure.recovered]
    first = root_of(current, failures) if code is None else None
    others = [f for f in sorted(current, key=lambda f: f.happened) if f is not first]
    if code is None:
        code = (first.exit_code if first is not None else 0) or 1
    else:
        others = []
    return _directive(
        "end",
        code=code,
        reason=reason,
        first=asdict(first) if first else None,
        others=[asdict(failure) for failure in others],
    )


def _repeated(role: _Role, failure: Failure, key: str) -> str:
    """In words, if the same error came at the same step in three attempts running."""
    error = failure.error
    signature = [error.get("type"), error.get("message"), error.get("traceback"), failure.step]
    last = [*role.signatures.get(key, []), signature][-_SAME_FAILURES:]
    role.signatures[key] = last
    if failure.step is None or not error or last != [signature] * _SAME_FAILURES:
        return ""
    return (
        f"{failure.name} failed with the same error at step {failure.step} in {_SAME_FAILURES} "
        "attempts running: not restarted again"
    )


def _restarting(role: _Role, actors: list[_Actor], failure: Failure, count: int) -> Emit:
    return Emit(
        {
            "kind": "restarting",
            "role": role.name,
            "names": [actor.name for actor in actors],
            "attempt": count,
            "max": role.max,
            "failure": asdict(failure),
        }
    )


def _directive(op: str, **values: Any) -> dict[str, Any]:
    return {"kind": "directive", "op": op, **values}


def _by_agent(actors: Iterable[_Actor]) -> dict[str, list[_Actor]]:
    agents: dict[str, list[_Actor]] = {}
    for actor in actors:
        agents.setdefault(actor.agent, []).append(actor)
    return agents


def _to_names(actors: Iterable[_Actor], op: str, **values: Any) -> list[Effect]:
    """A directive to each agent with the names of its actors."""
    return [
        Send(agent, _directive(op, names=[actor.name for actor in mine], **values))
        for agent, mine in _by_agent(actors).items()
    ]


def _role_from(item: dict[str, Any]) -> _Role:
    actors = [_Actor(a["name"], a["rank"], a["agent"], a.get("host", "")) for a in item["actors"]]
    return _Role(item["name"], item["policy"], item["max"], item["driver"], actors)


def _answer(call: Call | None, value: Any) -> list[Effect]:
    return [] if call is None else [Reply(call, value)]
