"""Barriers that count members by identity, not arrivals: a pure machine.

A barrier is (scope, name): the scope is a role, or "*" for every actor of the job. It is complete when
each member of its scope has arrived with its newest incarnation; then all are answered at once and the
barrier is forgotten, so the same name can be used again by whoever is released first. Arriving twice
is arriving once, and each of the calls is answered. An arrival ends with its last call: when the caller
gives up (deadlines are the caller's), or when the process is lost.

A barrier that cannot complete any more, since a member is gone for good, breaks: everybody who waits,
and everybody who comes later, gets `BarrierBroken` naming who is missing. A member that is being
restarted is waited for.

Who the members are is told by the membership: {"op": "member", name, role, state, peer, gone, cause}.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from runtime.control.messages import (
    Operation,
    asked,
    call_from,
    call_state,
    flag,
    listed,
    operation,
    text,
)
from runtime.errors import BarrierBroken, MisuseError
from runtime.machine import Call, Effect, Emit, Fail, Message, Reply

EVERYBODY = "*"
"""The scope that holds every actor of the job."""


@dataclass(slots=True)
class _Member:
    """What a barrier must know of an actor."""

    role: str
    state: str
    peer: str
    gone: bool
    cause: str


_LIVE = ("starting", "running")

_Key = tuple[str, str]
"""Scope and name."""


class Barrier:
    """The machine "barrier". Operations: arrive{name, role?}, and member{…} from the membership.

    `arrive` without a role means the caller's own. It is answered {"generation": n}, where n counts
    the completed barriers of the job.
    """

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._actor_of: dict[str, str] = {}
        """Peer id to actor, of the newest incarnations only."""
        self._arrived: dict[_Key, dict[str, list[Call]]] = {}
        self._waits: dict[Call, tuple[_Key, str]] = {}
        self._completed = 0
        self._operations: dict[str, Operation] = {"arrive": self._arrive, "member": self._member}

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return operation("barrier", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        return []

    def deadline(self) -> float | None:
        return None

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._withdraw(call)
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        for call in [call for call in self._waits if call.client == peer]:
            self._withdraw(call)
        return []

    def why(self, call: Call) -> str | None:
        if call not in self._waits:
            return None
        key, _ = self._waits[call]
        names, arrived = self._expected(key[0]), self._arrived[key]
        missing = [f"{n} ({self._members[n].state})" for n in names if n not in arrived]
        return (
            f"{_called(key)}: {len(arrived)} of {len(names)} have arrived, "
            f"waiting for {listed(missing)}"
        )

    def dump(self) -> dict[str, Any]:
        return {
            "members": {name: asdict(member) for name, member in self._members.items()},
            "arrived": [
                [
                    *key,
                    [[name, [call_state(call) for call in calls]] for name, calls in there.items()],
                ]
                for key, there in self._arrived.items()
            ],
            "completed": self._completed,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._members = {name: _Member(**item) for name, item in state["members"].items()}
        self._actor_of = {m.peer: n for n, m in self._members.items() if m.state in _LIVE}
        self._arrived, self._waits = {}, {}
        for scope, barrier, there in state["arrived"]:
            for actor, calls in there:
                for call in calls:
                    self._enter((scope, barrier), actor, call_from(call))
        self._completed = state["completed"]

    # -- arrivals -----------------------------------------------------------------------------

    def _arrive(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, name = asked(message, call), text(message, "name")
        actor = self._actor_of.get(call.client)
        if actor is None:
            raise MisuseError(
                f"{call.client} cannot arrive at barrier {name!r}: it is no running actor of the job"
            )
        role = text(message, "role", self._members[actor].role)
        names = self._expected(role)
        if not names:
            roles = sorted({member.role for member in self._members.values()})
            raise MisuseError(f"barrier {name!r}: no role {role!r}; the job has {listed(roles)}")
        if actor not in names:
            raise MisuseError(
                f"{actor} cannot arrive at barrier {name!r} of role {role!r}: it is no member of it; "
                f"members are {listed(names)}"
            )
        broken = self._broken((role, name))
        if broken is not None:
            return [Fail(call, broken)]
        self._enter((role, name), actor, call)
        return self._maybe_complete((role, name))

    def _enter(self, key: _Key, actor: str, call: Call) -> None:
        calls = self._arrived.setdefault(key, {}).setdefault(actor, [])
        if call not in calls:
            calls.append(call)
        self._waits[call] = (key, actor)

    def _withdraw(self, call: Call) -> None:
        if call not in self._waits:
            return
        key, actor = self._waits.pop(call)
        arrived = self._arrived[key]
        arrived[actor].remove(call)
        if not arrived[actor]:
            del arrived[actor]
        if not arrived:
            del self._arrived[key]

    # -- ends ---------------------------------------------------------------------------------

    def _maybe_complete(self, key: _Key) -> list[Effect]:
        """Release everybody if everybody is there."""
        arrived = self._arrived[key]
        if any(name not in arrived for name in self._expected(key[0])):
            return []
        self._completed += 1
        return [Reply(call, {"generation": self._completed}) for call in self._forget(key)]

    def _forget(self, key: _Key) -> list[Call]:
        calls = [call for calls in self._arrived.pop(key).values() for call in calls]
        for call in calls:
            del self._waits[call]
        return calls

    def _broken(self, key: _Key) -> BarrierBroken | None:
        """The error of a barrier that cannot complete any more."""
        gone = [name for name in self._expected(key[0]) if self._members[name].gone]
        if not gone:
            return None
        causes = [f"{name} ({self._members[name].cause or 'ended'})" for name in gone]
        return BarrierBroken(
            f"{_called(key)} cannot complete: gone for good: {listed(causes)}",
            name=key[1],
            missing=gone,
        )

    # -- members ------------------------------------------------------------------------------

    def _expected(self, scope: str) -> list[str]:
        if scope == EVERYBODY:
            return list(self._members)
        return [name for name, member in self._members.items() if member.role == scope]

    def _member(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        name, role = text(message, "name"), text(message, "role")
        state, peer = text(message, "state"), text(message, "peer", "")
        new = _Member(role, state, peer, flag(message, "gone"), text(message, "cause", ""))
        old = self._members.get(name)
        if old is not None and old.peer and (old.peer != peer or state not in _LIVE):
            self._actor_of.pop(old.peer, None)
            self.lost(old.peer, "ended", now)  # What an older incarnation arrived at is void.
        self._members[name] = new
        if state in _LIVE:
            self._actor_of[peer] = name
        if not new.gone:
            return []
        effects: list[Effect] = []
        for key in [key for key in self._arrived if key[0] in (role, EVERYBODY)]:
            broken = self._broken(key)
            assert broken is not None
            effects.append(Emit({"kind": "barrier broken", "reason": broken.reason}))
            effects += [Fail(call, broken) for call in self._forget(key)]
        return effects


def _called(key: _Key) -> str:
    scope, name = key
    return f"barrier {name!r} of " + ("the whole job" if scope == EVERYBODY else f"role {scope!r}")
