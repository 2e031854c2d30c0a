"""Machines with one thing wrong each. A simulator that does not find them is worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.cluster.failures import Failure
from runtime.cluster.restart import Supervision
from runtime.control.barrier import Barrier
from runtime.control.directory import NameDirectory
from runtime.control.kv import Kv
from runtime.control.membership import Membership
from runtime.control.messages import text, whole
from runtime.control.plane import Plane, standard_machines
from runtime.control.rendezvous import Rendezvous
from runtime.machine import Call, Effect, Machine, Message, Reply
from tests.sim.referee import HEARTBEAT_TIMEOUT
from tests.sim.supervision import supervised
from tests.sim.world import Kit


def _with(name: str, make: Callable[[], Machine]) -> Kit:
    """The standard machines, one of them replaced."""
    return Kit(lambda: {**standard_machines(heartbeat_timeout=HEARTBEAT_TIMEOUT), name: make()})


class _NoIncarnationCheck(Membership):
    def _speaker(self, message: Message) -> Any:
        return (
            self._named(text(message, "name")),
            whole(message, "incarnation"),
            text(message, "peer"),
        )


class _NeverExpires(Membership):
    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        self._agents.pop(peer, None)
        return []


class _ForgetsResolvers(Membership):
    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._waits = {c: wait for c, wait in self._waits.items() if wait.op != "resolve"}


class _BarrierKeepsWithdrawn(Barrier):
    def cancelled(self, call: Call, now: float) -> list[Effect]:
        return []


class _BarrierKeepsTheDead(Barrier):
    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return []


class _BarrierCountsCalls(Barrier):
    def _maybe_complete(self, key: tuple[str, str]) -> list[Effect]:
        calls = sum(len(calls) for calls in self._arrived[key].values())
        if calls < len(self._expected(key[0])):
            return []
        return super()._maybe_complete(key) or [
            effect for call in self._forget(key) for effect in [Reply(call, {"generation": 0})]
        ]


class _BarrierLosesWaitsInDumps(Barrier):
    def dump(self) -> dict[str, Any]:
        return {**super().dump(), "arrived": []}


class _BarrierNeverBreaks(Barrier):
    def _member(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return super()._member({**message, "gone": False}, call, now)


class _KvIgnoresConditions(Kv):
    def _check(self, message: Message, key: str, now: float) -> None: ...


class _KvCountsByKey(Kv):
    def _put(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        self._version = self._version_of(message["key"], now)
        return super()._put(message, call, now)


class _KvKeepsExpired(Kv):
    def tick(self, now: float) -> list[Effect]:
        for entry in self._entries.values():
            if entry.expires is not None and entry.expires <= now:
                entry.expires = None
        return []


class _KvForgetsWatchers(Kv):
    def _tell(self, key: str, now: float) -> list[Effect]:
        return super()._tell(key, now)[:1]


class _RendezvousGuestsBegin(Rendezvous):
    def _join(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        role = self._roles.get(text(message, "role"))
        if role is not None and role.complete and message["node"] not in role.places:
            self._next_round(role, role.round + 1)
        return super()._join(message, call, now)


class _RendezvousKeepsWithdrawn(Rendezvous):
    def _withdraw(self, call: Call, now: float) -> None:
        self._joins.pop(call, None)


class _RendezvousForgetsPlaces(Rendezvous):
    def _complete(self, name: str, role: Any) -> list[Effect]:
        role.round += 1
        return super()._complete(name, role)


class _DirectoryKeepsTheDead(NameDirectory):
    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return []


class _DirectoryIsTaken(NameDirectory):
    def _register(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        self._names.pop(message["name"], None)
        return super()._register(message, call, now)


class _PlaneForgetsAnswers(Plane):
    def _keep(self, call: Call, answer: list[Any]) -> bool:
        kept = super()._keep(call, answer)
        self._clients[call.client].answers.clear() if kept else None
        return kept


class _PlaneNeverFences(Plane):
    def _apply_lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        effects = super()._apply_lost(peer, cause, now)
        if not peer.startswith("agent"):
            self._fenced.pop(peer, None)
        return effects


class _PlaneTellsNobody(Plane):
    def _hand_on(self, event: Message, now: float) -> list[Effect]:
        return [] if event.get("kind") == "lost" else super()._hand_on(event, now)


class _ForgetsTheBudget(Supervision):
    def _failed(self, role: Any, actor: Any) -> list[Effect]:
        role.max = 99
        return super()._failed(role, actor)


class _CountsInTheRoleOnly(Supervision):
    def _failed_alone(self, role: Any, actor: Any) -> list[Effect]:
        actor.restarts = 0
        return super()._failed_alone(role, actor)


class _DoesNotWaitForTheGang(Supervision):
    def _maybe_restart(self, role: Any) -> list[Effect]:
        for actor in role.actors:
            actor.state = "failed"
        return super()._maybe_restart(role)


class _RestartsPartOfTheGang(Supervision):
    def _start(self, role: Any, actors: Any) -> list[Effect]:
        return super()._start(role, [actor for actor in actors if actor.state != "done"])


class _ForgetsWhoWasAsked(Supervision):
    def _note(self, role: Any, actor: Any, report: Message, asked: bool, killed: bool) -> bool:
        # As if it had been long ago, so that it counts before all others.
        return super()._note(role, actor, {**report, "at": 1.0}, False, False)


class _NamesConsequences(Supervision):
    def _note(self, role: Any, actor: Any, report: Message, asked: bool, killed: bool) -> bool:
        noted = super()._note(role, actor, report, asked, killed)
        for failure in self._failures:
            failure.error = {**failure.error, "type": "ValueError"} if failure.error else {}
        return noted


class _StartsAfterTheEnd(Supervision):
    def _exited(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        # A report that comes again after the job has ended.
        late = self._stage == "ended"
        effects = super()._exited(message, call, now)
        role, actor = self._actor(message["name"])
        return effects + self._start(role, [actor]) if late else effects


class _RestartsThoughStopped(Supervision):
    def _stop_all(
        self, reason: str, code: int | None = None, seen: float | None = None
    ) -> list[Effect]:
        restarting = [role for role in self._roles.values() if role.restarting]
        effects = super()._stop_all(reason, code, seen)
        for role in restarting:
            role.restarting = True
        return effects

    def _maybe_end(self) -> list[Effect]:
        restarting = [role for role in self._roles.values() if role.restarting]
        return [e for r in restarting for e in self._maybe_restart(r)] or super()._maybe_end()


class _StartsOnLostHosts(Supervision):
    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        effects = super().lost(peer, cause, now)
        self._gone.clear()
        return effects

    def _lost_of(self, actors: Any) -> str:
        return ""


class _IgnoresLostHosts(Supervision):
    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        return []


class _StopsWithTheFirstDriver(Supervision):
    def _maybe_finish(self) -> list[Effect]:
        others = [a for r in self._roles.values() if not r.driver for a in r.actors]
        return self._stop_actors(others, 1.0, "done") + super()._maybe_finish()


class _EndsBeforeAllHaveEnded(Supervision):
    def _alive(self) -> list[Any]:
        return super()._alive()[1:]


class _FailsWithoutACode(Supervision):
    def _note(self, role: Any, actor: Any, report: Message, asked: bool, killed: bool) -> bool:
        noted = super()._note(role, actor, report, asked, killed)
        self._failures = [_harmless(failure) for failure in self._failures]
        return noted


def _harmless(failure: Failure) -> Failure:
    failure.code = failure.signal = 0
    return failure


class _ForgetsStopsInDumps(Supervision):
    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        for role in self._roles.values():
            role.restarting = False


_SUPERVISIONS: dict[str, type[Supervision]] = {
    "forgets the budget": _ForgetsTheBudget,
    "forgets how often one was restarted": _CountsInTheRoleOnly,
    "restarts a gang before all have ended": _DoesNotWaitForTheGang,
    "restarts a gang without those that are done": _RestartsPartOfTheGang,
    "takes a stopped worker for the first failure": _ForgetsWhoWasAsked,
    "takes a consequence for the first failure": _NamesConsequences,
    "starts after the end": _StartsAfterTheEnd,
    "starts what it was restarting though the job was stopped": _RestartsThoughStopped,
    "starts on lost hosts": _StartsOnLostHosts,
    "ignores lost hosts": _IgnoresLostHosts,
    "stops everything with the first driver": _StopsWithTheFirstDriver,
    "ends the job before all have ended": _EndsBeforeAllHaveEnded,
    "gives no code to a failure": _FailsWithoutACode,
    "forgets a restart when it is read back": _ForgetsStopsInDumps,
}

MUTANTS: dict[str, Kit] = {
    "membership takes older incarnations": _with(
        "membership", lambda: _NoIncarnationCheck(heartbeat_timeout=HEARTBEAT_TIMEOUT)
    ),
    "membership does not give up a host": _with(
        "membership", lambda: _NeverExpires(heartbeat_timeout=HEARTBEAT_TIMEOUT)
    ),
    "membership expires too early": _with(
        "membership", lambda: Membership(heartbeat_timeout=HEARTBEAT_TIMEOUT / 2)
    ),
    "membership forgets who resolves when it is read back": _with(
        "membership", lambda: _ForgetsResolvers(heartbeat_timeout=HEARTBEAT_TIMEOUT)
    ),
    "barrier counts who withdrew": _with("barrier", _BarrierKeepsWithdrawn),
    "barrier counts the dead": _with("barrier", _BarrierKeepsTheDead),
    "barrier counts calls instead of members": _with("barrier", _BarrierCountsCalls),
    "barrier waits for those who are gone for good": _with("barrier", _BarrierNeverBreaks),
    "barrier loses its waits when it is read back": _with("barrier", _BarrierLosesWaitsInDumps),
    "kv ignores conditions": _with("kv", _KvIgnoresConditions),
    "kv uses a version twice": _with("kv", _KvCountsByKey),
    "kv keeps what has expired": _with("kv", _KvKeepsExpired),
    "kv tells one watcher only": _with("kv", _KvForgetsWatchers),
    "rendezvous lets a guest begin a round": _with("rendezvous", _RendezvousGuestsBegin),
    "rendezvous counts who withdrew": _with("rendezvous", _RendezvousKeepsWithdrawn),
    "rendezvous skips a round": _with("rendezvous", _RendezvousForgetsPlaces),
    "directory keeps names of the dead": _with("directory", _DirectoryKeepsTheDead),
    "directory gives a name away": _with("directory", _DirectoryIsTaken),
    "plane forgets answers": Kit(plane=_PlaneForgetsAnswers),
    "plane does not fence the dead": Kit(plane=_PlaneNeverFences),
    "plane tells no machine of the dead": Kit(plane=_PlaneTellsNobody),
}
MUTANTS |= {f"supervision {name}": supervised(machine) for name, machine in _SUPERVISIONS.items()}
