"""Who belongs to the job, where each one is, and who is gone: a pure machine.

Actors are planned (`declare`); each process start of one is an *incarnation*, counted from 0:

    expected ─▶ starting ─▶ running ─▶ restarting ─▶ starting …      (the agent starts it anew)
                                └────▶ exited | failed                (gone for good; a newer
                                                                      incarnation revives it)

The agent that starts a process says `starting` and `exited`, the process itself `join` and `leave`. What
an older incarnation says is refused. Whoever asks for an actor (`resolve`) waits until it runs; whoever
saw a link break (`fate`) waits a little for the verdict; `watch` is a long poll for changes.

An agent's heartbeat renews all members that it started: a worker stuck in a C call is not dead.
When it stays away, they are lost, "host unreachable". A change is told to the other machines by two
events, which the plane hands on in the same log entry: `lost` (a process is gone) and `member` (what
is known of an actor now; `gone`: no incarnation will follow, as far as anybody knows).

Whether an actor is started again is not decided here but by whoever says `exited` (its `final`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.control.messages import (
    Operation,
    asked,
    call_from,
    call_state,
    flag,
    listed,
    mapping,
    operation,
    text,
    whole,
)
from runtime.errors import MisuseError, PeerLostError
from runtime.machine import Call, Effect, Emit, Fail, Message, Reply

_LIVE = ("starting", "running")
_GONE = ("exited", "failed")
_PUBLIC = (
    *("name", "role", "rank", "host", "state", "incarnation", "peer", "pid", "address", "metadata"),
    *("cause", "code", "step", "epoch"),
)
_ENDED_KEPT = 8
"""Past processes of one actor that a watcher which was away can still learn of."""


@dataclass(slots=True)
class _Member:
    """One planned actor and its newest incarnation."""

    name: str
    role: str
    rank: int
    host: str = ""
    state: str = "expected"
    incarnation: int = -1
    peer: str = ""
    agent: str = ""
    pid: int = 0
    address: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    cause: str = ""
    code: int | None = None
    settled: bool = False
    """The end of this incarnation came from who decides about restarts."""
    step: int | None = None
    epoch: int | None = None
    version: int = 0
    ended: list[list[Any]] = field(default_factory=list)
    """[version, peer, cause] of processes that ended, oldest first."""


@dataclass(slots=True)
class _Agent:
    """The agent of a host. `seen`: when it was last heard of."""

    seen: float
    host: str = ""
    address: str = ""
    node_rank: int = 0


@dataclass(slots=True)
class _Wait:
    """A question that has no answer yet."""

    op: str
    about: str = ""
    since: int = 0
    until: float | None = None


class Membership:
    """The machine "membership". `heartbeat_timeout`, `fate_timeout`: seconds.

    Operations: declare{actors}, starting{name, incarnation, peer, host, pid}, join{name, incarnation,
    peer, address, metadata}, leave{name, incarnation, peer, final?}, exited{name, incarnation, peer, cause,
    code, final}, agent{host, address, node_rank, peer?}, agents{}, gone{cause}, heartbeat{progress?},
    resolve{name}, fate{peer}, members{}, watch{since}.
    """

    def __init__(self, *, heartbeat_timeout: float = 10.0, fate_timeout: float = 2.0) -> None:
        self._heartbeat_timeout, self._fate_timeout = heartbeat_timeout, fate_timeout
        self._members: dict[str, _Member] = {}
        self._agents: dict[str, _Agent] = {}
        self._waits: dict[Call, _Wait] = {}
        self._version = 0
        self._operations: dict[str, Operation] = {
            "declare": self._declare,
            "starting": self._starting,
            "join": self._join,
            "leave": self._leave,
            "exited": self._exited,
            "agent": self._agent,
            "agents": self._list_agents,
            "gone": self._gone,
            "heartbeat": self._heartbeat,
            "resolve": self._resolve,
            "fate": self._fate,
            "members": self._list,
            "watch": self._watch,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return operation("membership", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for agent in [
            name for name, a in self._agents.items() if a.seen + self._heartbeat_timeout <= now
        ]:
            effects += self.lost(agent, "host unreachable", now)
        for call, wait in list(self._waits.items()):
            if wait.until is not None and wait.until <= now:
                del self._waits[call]
                effects.append(Reply(call, {"cause": None}))
        return effects

    def deadline(self) -> float | None:
        due = [wait.until for wait in self._waits.values() if wait.until is not None]
        due += [agent.seen + self._heartbeat_timeout for agent in self._agents.values()]
        return min(due, default=None)

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._waits.pop(call, None)
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        """A member is gone, or an agent, and with it all that it started."""
        for call in [call for call in self._waits if call.client == peer]:
            del self._waits[call]
        effects: list[Effect] = []
        for member in self._members.values():
            if member.state in _LIVE and peer in (member.peer, member.agent):
                effects += self._end(member, "failed", cause, None)
        if self._agents.pop(peer, None) is not None:
            effects.append(_lost_event(peer, cause, peer, gone=True))
        return effects

    def why(self, call: Call) -> str | None:
        wait = self._waits.get(call)
        if wait is None:
            return None
        if wait.op == "resolve":
            member = self._members[wait.about]
            return f"waiting for {member.name} to run; it is {member.state}{_reason(member)}"
        if wait.op == "fate":
            return f"waiting for the verdict on {wait.about}"
        return "waiting for a change of the membership"

    def dump(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "members": [asdict(member) for member in self._members.values()],
            "agents": {peer: asdict(agent) for peer, agent in self._agents.items()},
            "waits": [[call_state(call), asdict(wait)] for call, wait in self._waits.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._version = state["version"]
        self._members = {item["name"]: _Member(**item) for item in state["members"]}
        self._agents = {peer: _Agent(**agent) for peer, agent in state["agents"].items()}
        self._waits = {call_from(call): _Wait(**wait) for call, wait in state["waits"]}

    # -- what agents and members say ----------------------------------------------------------

    def _declare(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        actors = message.get("actors")
        if not isinstance(actors, list | tuple):
            raise MisuseError(f"'declare' needs 'actors', a list of dicts, found {actors!r}")
        planned = [
            _Member(text(a, "name"), text(a, "role"), whole(a, "rank"), text(a, "host", ""))
            for a in actors
        ]
        effects: list[Effect] = []
        for new in planned:
            if new.name not in self._members:
                self._members[new.name] = new
                effects += self._changed(new)
        return effects + _answer(call, {"version": self._version})

    def _starting(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        member, incarnation, peer = self._speaker(message)
        host, pid = text(message, "host", member.host), whole(message, "pid", 0)
        agent = text(message, "agent", call.client if call else "")
        if member.agent and member.incarnation == incarnation:
            return _answer(call, {"version": self._version})
        effects: list[Effect] = []
        if member.incarnation < incarnation:  # Else its `join` was quicker.
            effects = self._begin(member, incarnation, peer)
        member.host, member.pid, member.agent = host, pid, agent
        if agent:
            self._agents.setdefault(agent, _Agent(now))
        return effects + self._changed(member) + _answer(call, {"version": self._version})

    def _join(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        member, incarnation, peer = self._speaker(message)
        address = text(message, "address")
        metadata = mapping(message, "metadata", {})
        effects: list[Effect] = []
        if member.incarnation < incarnation:
            effects = self._begin(member, incarnation, peer)
        elif member.state not in _LIVE:
            raise MisuseError(
                f"{peer} cannot join: incarnation {incarnation} of {member.name} has ended"
                f"{_reason(member)}"
            )
        if member.state != "running":
            member.state, member.address, member.metadata = "running", address, metadata
            effects += self._changed(member)
        return effects + _answer(call, {"version": self._version})

    def _leave(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        member, _, _ = self._speaker(message)
        effects: list[Effect] = []
        if member.state in _LIVE:
            # Its agent will say whether it is started again; without one it is gone.
            again = bool(member.agent) and not flag(message, "final", False)
            effects = self._end(member, "restarting" if again else "exited", "left", None)
        # The answer first: with the end of its process nothing is owed to the caller any more.
        return _answer(call, {}) + effects

    def _exited(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        member = self._named(text(message, "name"))
        incarnation, cause = whole(message, "incarnation"), text(message, "cause")
        code, final = whole(message, "code", -1), flag(message, "final")
        effects: list[Effect] = []
        state = "restarting" if not final else "exited" if code == 0 else "failed"
        if incarnation > member.incarnation:  # It died before anybody heard of its start.
            effects = self._begin(member, incarnation, text(message, "peer", ""))
        current = incarnation == member.incarnation
        if current and (member.state in _LIVE or final or not member.settled):
            effects += self._end(member, state, cause, code)
            member.settled = final
        return effects + _answer(call, {"accepted": current})

    def _agent(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        peer = text(message, "peer", call.client if call else "")
        host, address = text(message, "host"), text(message, "address")
        self._agents[peer] = agent = _Agent(now, host, address, whole(message, "node_rank"))
        return [*_answer(call, {}), Emit({"kind": "agent", **_agent_facts(peer, agent)})]

    def _gone(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        """An agent says of itself that it takes part no more."""
        call = asked(message, call)
        return [Reply(call, {}), *self.lost(call.client, text(message, "cause"), now)]

    def _heartbeat(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        progress = mapping(message, "progress", {})
        agent = call.client if call else text(message, "agent")
        self._agents.setdefault(agent, _Agent(now)).seen = now
        for name, report in progress.items():
            if name in self._members and isinstance(report, dict):
                member = self._members[name]
                member.step = report.get("step", member.step)
                member.epoch = report.get("epoch", member.epoch)
        return _answer(call, {})

    # -- questions ----------------------------------------------------------------------------

    def _resolve(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, member = asked(message, call), self._named(text(message, "name"))
        answer = _resolved(call, member)
        if answer is None:
            self._waits[call] = _Wait("resolve", member.name)
            return []
        return [answer]

    def _fate(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, peer = asked(message, call), text(message, "peer")
        for member in self._members.values():
            if member.peer == peer and member.state in _LIVE:
                self._waits[call] = _Wait("fate", peer, until=now + self._fate_timeout)
                return []
            for _, past, cause in member.ended:
                if past == peer:
                    return [Reply(call, {"cause": cause})]
        return [Reply(call, {"cause": None})]

    def _list(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return _answer(call, [_facts(member) for member in self._members.values()])

    def _list_agents(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        agents = self._agents.items()
        return _answer(call, [{**_agent_facts(p, a), "quiet_s": now - a.seen} for p, a in agents])

    def _watch(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, since = asked(message, call), whole(message, "since", 0)
        if since < self._version:
            return [Reply(call, self._news(since))]
        self._waits[call] = _Wait("watch", since=since)
        return []

    # -- changes ------------------------------------------------------------------------------

    def _named(self, name: str) -> _Member:
        """The actor of that name; a role's name alone means its rank 0."""
        member = self._members.get(name) or self._members.get(f"{name}-0")
        if member is None:
            raise MisuseError(
                f"the job has no actor {name!r}; it has {listed(list(self._members))}"
            )
        return member

    def _speaker(self, message: Message) -> tuple[_Member, int, str]:
        """Who says this of itself, refusing what is not the newest incarnation."""
        member, peer = self._named(text(message, "name")), text(message, "peer")
        incarnation = whole(message, "incarnation")
        if incarnation < member.incarnation or (
            incarnation == member.incarnation and peer != member.peer
        ):
            raise MisuseError(
                f"{message.get('op')} of {peer} (incarnation {incarnation}) is refused: {member.name} "
                f"is {member.peer} (incarnation {member.incarnation}) by now"
            )
        return member, incarnation, peer

    def _begin(self, member: _Member, incarnation: int, peer: str) -> list[Effect]:
        """A new incarnation takes the place of the one before, which is dead by that."""
        effects: list[Effect] = []
        if member.state in _LIVE:
            effects = self._end(
                member, "restarting", f"replaced by incarnation {incarnation}", None
            )
        member.state, member.incarnation, member.peer = "starting", incarnation, peer
        member.address, member.pid, member.agent, member.metadata = "", 0, "", {}
        member.cause, member.code, member.settled = "", None, False
        member.step = member.epoch = None
        return effects

    def _end(self, member: _Member, state: str, cause: str, code: int | None) -> list[Effect]:
        effects: list[Effect] = []
        was_live = member.state in _LIVE
        if not was_live and (member.state, member.cause, member.code) == (state, cause, code):
            return []
        member.state, member.cause, member.code = state, cause, code
        if was_live and member.peer:
            # The first cause stands: what comes later (the exit after a `leave`) is its consequence.
            member.ended = [*member.ended, [self._version + 1, member.peer, cause]][-_ENDED_KEPT:]
            for call in [call for call in self._waits if call.client == member.peer]:
                del self._waits[call]
            effects.append(_lost_event(member.peer, cause, member.name, state in _GONE))
        return effects + self._changed(member)

    def _changed(self, member: _Member) -> list[Effect]:
        """Number the change, tell who waits for it, and the other machines."""
        self._version += 1
        member.version = self._version
        effects: list[Effect] = []
        news: dict[int, Any] = {}  # Thousands may watch; nearly all have seen the same.
        for call, wait in list(self._waits.items()):
            answer: Effect | None = None
            if wait.op == "watch":
                if wait.since not in news:
                    news[wait.since] = self._news(wait.since)
                answer = Reply(call, news[wait.since])
            elif wait.op == "resolve" and wait.about == member.name:
                answer = _resolved(call, member)
            elif wait.op == "fate" and any(past == wait.about for _, past, _ in member.ended):
                answer = Reply(call, {"cause": _cause_of(member, wait.about)})
            if answer is not None:
                del self._waits[call]
                effects.append(answer)
        event = {"kind": "member", **_facts(member), "gone": member.state in _GONE}
        return [*effects, Emit(event)]

    def _news(self, since: int) -> dict[str, Any]:
        changes = [
            {**_facts(m), "ended": [end for end in m.ended if end[0] > since]}
            for m in self._members.values()
            if m.version > since
        ]
        return {"version": self._version, "changes": changes}


def _facts(member: _Member) -> dict[str, Any]:
    """What others may know of a member."""
    return {name: getattr(member, name) for name in _PUBLIC}


def _agent_facts(peer: str, agent: _Agent) -> dict[str, Any]:
    where = {"host": agent.host, "address": agent.address, "node_rank": agent.node_rank}
    return {"peer": peer, **where}


def _resolved(call: Call, member: _Member) -> Effect | None:
    """The answer to a `resolve`, or None while it has to wait."""
    if member.state == "running":
        keys = ("peer", "address", "role", "rank", "host", "incarnation")
        return Reply(call, {key: getattr(member, key) for key in keys})
    if member.state in _GONE:
        where = f" on {member.host}" if member.host else ""
        error = PeerLostError(
            f"{member.name}{where} is gone{_reason(member)}",
            peer=member.peer,
            role=member.role,
            rank=member.rank,
            host=member.host,
            cause=member.cause,
        )
        return Fail(call, error)
    return None


def _reason(member: _Member) -> str:
    return f": {member.cause}" if member.cause else ""


def _cause_of(member: _Member, peer: str) -> str:
    return next(str(cause) for _, past, cause in reversed(member.ended) if past == peer)


def _lost_event(peer: str, cause: str, name: str, gone: bool) -> Emit:
    return Emit({"kind": "lost", "peer": peer, "cause": cause, "name": name, "gone": gone})


def _answer(call: Call | None, value: Any) -> list[Effect]:
    return [] if call is None else [Reply(call, value)]
