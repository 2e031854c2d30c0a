"""Machines with one thing wrong each. A simulator that does not find them is worth nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.control.barrier import Barrier
from runtime.control.directory import NameDirectory
from runtime.control.kv import Kv
from runtime.control.membership import Membership
from runtime.control.messages import text, whole
from runtime.control.plane import Plane, standard_machines
from runtime.control.rendezvous import Rendezvous
from runtime.machine import Call, Effect, Machine, Message, Reply
from tests.sim.referee import HEARTBEAT_TIMEOUT
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
