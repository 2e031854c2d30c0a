"""What must hold whatever happens: models that are simpler than the machines, checked at every step.

Each machine of a simulated plane is wrapped in a `Watched`, which tells the `Referee` what went in and what
came out. The referee never forgets anything, so it sees what a bounded machine may get wrong: an answer
given twice, a command run twice, somebody released who had left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import BarrierBroken, PeerLostError, RuntimeFault, VersionConflict
from runtime.machine import Call, Effect, Emit, Fail, Machine, Message, Reply

HEARTBEAT_TIMEOUT = 3.0


class Violation(AssertionError):
    """Something happened that must never happen."""


def demand(good: bool, *story: object) -> None:
    if not good:
        raise Violation(" ".join(str(part) for part in story))


class Watched:
    """A machine, and a referee who sees all that it is told and answers."""

    def __init__(self, name: str, machine: Machine, referee: Referee) -> None:
        self.name, self.machine, self._referee = name, machine, referee

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        self._referee.before(self.name, message, call)
        before = self.machine.dump() if self._referee.doubtful() else None
        try:
            effects = self.machine.handle(message, call, now)
        except RuntimeFault as error:
            if before is not None:
                demand(self.machine.dump() == before, self.name, "changed, then refused", message)
            self._referee.refused(self.name, message, call, error, now)
            raise
        self._referee.handled(self.name, message, call, effects, now)
        return effects

    def tick(self, now: float) -> list[Effect]:
        effects = self.machine.tick(now)
        due = self.machine.deadline()
        demand(due is None or due > now, self.name, "is due", due, "after its tick at", now)
        self._referee.ticked(self.name, effects, now)
        return effects

    def deadline(self) -> float | None:
        return self.machine.deadline()

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._referee.waiting.pop(call, None)
        effects = self.machine.cancelled(call, now)
        self._referee.ticked(self.name, effects, now)
        return effects

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        self._referee.lost(self.name, peer)
        effects = self.machine.lost(peer, cause, now)
        self._referee.ticked(self.name, effects, now)
        return effects

    def why(self, call: Call) -> str | None:
        return self.machine.why(call)

    def dump(self) -> dict[str, Any]:
        return self.machine.dump()

    def load(self, state: dict[str, Any]) -> None:
        self.machine.load(state)


@dataclass
class Actor:
    """What has been said of one actor, and was not refused."""

    role: str
    incarnation: int = -1
    peer: str = ""
    agent: str = ""
    running: bool = False
    ended: bool = False
    final: bool = False

    @property
    def live(self) -> bool:
        return self.incarnation >= 0 and not self.ended


@dataclass
class Rounds:
    """What has been said of one role's rendezvous."""

    low: int
    high: int
    requested: int = 0
    places: dict[int, dict[str, Any]] = field(default_factory=dict)


class Referee:
    """Sees the machines of one plane, in log order."""

    def __init__(self, doubtful: Callable[[], bool]) -> None:
        self.doubtful = doubtful
        """Whether to look closer this time (some checks are dear)."""
        self.executed: set[Call] = set()
        self.waiting: dict[Call, tuple[str, Message]] = {}
        self.gone: set[str] = set()
        self.actors: dict[str, Actor] = {}
        self.beats: dict[str, float] = {}
        self.keys: dict[str, tuple[Any, int, float | None]] = {}
        self.version = 0
        self.names: dict[str, tuple[str, Any]] = {}
        self.rounds: dict[str, Rounds] = {}
        self.releases = 0
        self.ears: dict[str, Callable[[Message], None]] = {}
        """By machine: somebody else who is told what it took."""
        self._joining: set[Any] = set()
        self._deleted = False

    # -- what goes in -------------------------------------------------------------------------

    def before(self, machine: str, message: Message, call: Call | None) -> None:
        if call is None:
            return
        demand(call not in self.executed, call, "is run a second time:", message)
        demand(call.client not in self.gone, call, "of a lost process is heard:", message)
        self.executed.add(call)
        self.waiting[call] = (machine, message)

    def refused(
        self, machine: str, message: Message, call: Call | None, error: RuntimeFault, now: float
    ) -> None:
        if call is not None:
            self.waiting.pop(call)
        if machine == "kv":
            demand(isinstance(error, VersionConflict), "kv refused", message, error)
            found = self._kept(message["key"], now)[1]
            demand(message["if_version"] != found, "kv refused a true condition", message, found)

    def handled(
        self, machine: str, message: Message, call: Call | None, effects: list[Effect], now: float
    ) -> None:
        check = getattr(self, f"_{machine}", None)
        if check is not None:
            check(message, call, now)
        if machine in self.ears:
            self.ears[machine](message)
        self._effects(machine, effects, now)

    def ticked(self, machine: str, effects: list[Effect], now: float) -> None:
        self._effects(machine, effects, now)

    def lost(self, machine: str, peer: str) -> None:
        self.waiting = {call: asked for call, asked in self.waiting.items() if call.client != peer}
        self.gone.add(peer)
        self.names = {name: item for name, item in self.names.items() if item[0] != peer}
        for actor in self.actors.values():
            if peer in (actor.peer, actor.agent) and actor.live:
                actor.ended = True

    # -- what comes out -----------------------------------------------------------------------

    def _effects(self, machine: str, effects: list[Effect], now: float) -> None:
        released: list[tuple[Call, Message]] = []
        self._joining = {m.get("node") for name, m in self.waiting.values() if name == "rendezvous"}
        for effect in effects:
            if isinstance(effect, Emit):
                self._emitted(effect.event, now)
            if not isinstance(effect, Reply | Fail):
                continue
            asked = self.waiting.pop(effect.call, None)
            demand(asked is not None, effect, "answers what was answered, withdrawn or lost")
            assert asked is not None
            demand(asked[0] == machine, effect, "answers a call of", asked[0])
            if machine == "barrier" and isinstance(effect, Reply):
                released.append((effect.call, asked[1]))
            check = getattr(self, f"_{machine}_answer", None)
            if check is not None:
                check(asked[1], effect, now)
        if released:
            self._barrier_released(released)

    def at_rest(self, now: float) -> None:
        """After a whole entry: nobody waits for what is there."""
        for call, (machine, message) in self.waiting.items():
            demand(call.client not in self.gone, call, "of a lost process still waits")
            if machine == "kv":
                kept = self._kept(message["key"], now)[1]
                demand(kept == message.get("since", 0), "watch", message, "waits at version", kept)
            if machine == "directory":
                demand(
                    message["name"] not in self.names, "lookup", message, "waits for a known name"
                )
            if machine == "membership" and message["op"] == "resolve":
                actor = self.actors[message["name"]]
                settled = (actor.live and actor.running) or actor.final
                demand(not settled, "resolve", message, "waits for", actor)
        there: dict[tuple[str, str], set[str]] = {}
        for call, message in self._arrivals():
            there.setdefault(_barrier_key(self, call, message), set()).add(self._actor_of(call))
        for key, names in there.items():
            scope = self._scope(key[0])
            demand(names != set(scope), "barrier", key, "is complete and waits")
            gone = [name for name in scope if self.actors[name].final]
            demand(not gone, "barrier", key, "waits for", gone)

    # -- membership ---------------------------------------------------------------------------

    def _membership(self, message: Message, call: Call | None, now: float) -> None:
        op = message["op"]
        if op == "declare":
            for item in message["actors"]:
                self.actors.setdefault(item["name"], Actor(item["role"]))
        elif op == "heartbeat":
            self.beats[call.client if call else message["agent"]] = now
        elif op in ("starting", "join"):
            actor, incarnation = self.actors[message["name"]], message["incarnation"]
            demand(incarnation >= actor.incarnation, op, "of an older incarnation:", message)
            if incarnation > actor.incarnation:
                actor.incarnation, actor.peer = incarnation, message["peer"]
                actor.running = actor.ended = actor.final = False
                actor.agent = ""
            demand(actor.peer == message["peer"], op, "of another process:", message, actor)
            if op == "starting" and call is not None:
                actor.agent = actor.agent or call.client
                self.beats.setdefault(call.client, now)
            actor.running = actor.running or op == "join"
            demand(not (op == "join" and actor.ended), "a dead process joined:", message)
        elif op in ("exited", "leave"):
            actor, incarnation = self.actors[message["name"]], message["incarnation"]
            if op == "exited" and incarnation > actor.incarnation:
                actor.incarnation, actor.peer, actor.final = incarnation, message["peer"], False
            if incarnation == actor.incarnation:
                actor.ended = True
                actor.final = actor.final or (op == "exited" and message["final"])

    def _membership_answer(self, message: Message, effect: Reply | Fail, now: float) -> None:
        if message["op"] != "resolve":
            return
        actor = self.actors[message["name"]]
        if isinstance(effect, Fail):
            demand(isinstance(effect.error, PeerLostError), effect)
            demand(not actor.live, "resolve failed for", actor, effect)
        else:
            demand(effect.value["peer"] == actor.peer, "resolve gave", effect, "for", actor)
            demand(actor.live and actor.running, "resolve gave a process that is gone:", actor)

    def _emitted(self, event: Message, now: float) -> None:
        if event["kind"] == "lost" and event["cause"] == "host unreachable":
            peer = event["peer"]
            owner = next((a.agent for a in self.actors.values() if a.peer == peer), peer)
            silent = now - self.beats.get(owner, now)
            demand(silent > HEARTBEAT_TIMEOUT - 1e-6, owner, "was given up after", silent, "s")
            if owner != peer:
                actor = next(a for a in self.actors.values() if a.peer == peer)
                actor.ended = actor.final = True

    # -- barrier ------------------------------------------------------------------------------

    def _arrivals(self) -> list[tuple[Call, Message]]:
        return [
            (call, message) for call, (name, message) in self.waiting.items() if name == "barrier"
        ]

    def _actor_of(self, call: Call) -> str:
        return call.client.rpartition(".")[0]

    def _scope(self, role: str) -> list[str]:
        return [name for name, actor in self.actors.items() if role in ("*", actor.role)]

    def _barrier_released(self, released: list[tuple[Call, Message]]) -> None:
        self.releases += 1
        keys = {_barrier_key(self, call, message) for call, message in released}
        demand(len(keys) == 1, "released together:", keys)
        (key,) = keys
        there = set()
        for call, _ in released:
            name = self._actor_of(call)
            actor = self.actors[name]
            demand(
                actor.peer == call.client and actor.live, key, "counted", call, "but it is", actor
            )
            there.add(name)
        missing = set(self._scope(key[0])) - there
        demand(not missing, key, "was released without", missing)
        left = [
            call for call, message in self._arrivals() if _barrier_key(self, call, message) == key
        ]
        demand(not left, key, "was released and left behind", left)

    def _barrier_answer(self, message: Message, effect: Reply | Fail, now: float) -> None:
        if isinstance(effect, Fail):
            demand(isinstance(effect.error, BarrierBroken), effect.error)
            for name in effect.error.missing:  # type: ignore[attr-defined]
                demand(not self.actors[name].live, "broken by", name, "which lives")

    # -- rendezvous ---------------------------------------------------------------------------

    def _rendezvous(self, message: Message, call: Call | None, now: float) -> None:
        if message["op"] == "open":
            rounds = self.rounds.setdefault(message["role"], Rounds(message["min"], message["max"]))
            rounds.low, rounds.high = message["min"], message["max"]
        rounds = self.rounds[message["role"]]
        rounds.requested = max(rounds.requested, message.get("round", 0))

    def _rendezvous_answer(self, message: Message, effect: Reply | Fail, now: float) -> None:
        if message["op"] != "join" or isinstance(effect, Fail):
            return
        place, rounds = effect.value, self.rounds[message["role"]]
        number, nodes = place["round"], place["nodes"]
        demand(number <= rounds.requested, "round", number, "was begun by nobody")
        demand(rounds.low <= len(nodes) <= rounds.high, "a round of", nodes, rounds)
        demand(nodes == sorted(nodes) and len({*nodes}) == len(nodes), "ranks of", nodes)
        demand(place["group_world_size"] == len(nodes), place)
        demand(nodes[place["group_rank"]] == message["node"], place, "for", message)
        known = rounds.places.setdefault(number, {})
        absent = set() if known else set(nodes) - self._joining
        demand(not absent, "a round with", absent, "who did not wait for it")
        for other, seen in known.items():
            same = ("nodes", "world_size", "master_addr", "master_port")
            demand(all(seen[k] == place[k] for k in same), "two truths:", seen, place)
            if other != message["node"]:
                span = range(seen["first_rank"], seen["first_rank"] + seen["slots"])
                demand(place["first_rank"] not in span, "ranks overlap", seen, place)
            else:
                demand(seen["first_rank"] == place["first_rank"], "a place moved", seen, place)
        known[message["node"]] = {**place, "slots": message["slots"]}
        if len(known) == len(nodes):
            ends = sorted((p["first_rank"], p["first_rank"] + p["slots"]) for p in known.values())
            joints = zip(ends, [*ends[1:], (place["world_size"], 0)], strict=True)
            demand(all(a[1] == b[0] for a, b in joints), "ranks have holes:", known)
            demand(ends[0][0] == 0, "ranks do not begin at 0:", known)

    # -- kv -----------------------------------------------------------------------------------

    def _kept(self, key: str, now: float) -> tuple[Any, int]:
        value, version, expires = self.keys.get(key, (None, 0, None))
        return (None, 0) if expires is not None and expires <= now else (value, version)

    def _kv(self, message: Message, call: Call | None, now: float) -> None:
        key = message["key"]
        wanted = message.get("if_version")
        if wanted is not None:
            found = self._kept(key, now)[1]
            demand(wanted == found, "kv took a false condition", message, found)
        if message["op"] == "put":
            self.version += 1
            ttl_s = message.get("ttl_s")
            self.keys[key] = (
                message["value"],
                self.version,
                None if ttl_s is None else now + ttl_s,
            )
        elif message["op"] == "delete":
            self._deleted = self._kept(key, now)[1] > 0
            self.keys.pop(key, None)

    def _kv_answer(self, message: Message, effect: Reply | Fail, now: float) -> None:
        assert isinstance(effect, Reply)
        value, version = self._kept(message["key"], now)
        if message["op"] == "delete":
            demand(effect.value == {"deleted": self._deleted}, effect, self._deleted)
        elif message["op"] == "put":
            demand(effect.value == {"version": self.version}, effect, self.version)
        else:
            found = (effect.value["value"], effect.value["version"])
            demand(found == (value, version), message, "gave", found, "not", (value, version))
            if message["op"] == "watch":
                demand(version != message["since"], message, "is no news")

    # -- directory ----------------------------------------------------------------------------

    def _directory(self, message: Message, call: Call | None, now: float) -> None:
        if message["op"] == "register":
            assert call is not None
            owner = self.names.get(message["name"], (call.client,))[0]
            demand(owner == call.client, message, "taken from", owner)
            self.names[message["name"]] = (call.client, message["value"])

    def _directory_answer(self, message: Message, effect: Reply | Fail, now: float) -> None:
        if message["op"] == "lookup":
            assert isinstance(effect, Reply)
            found = (effect.value["owner"], effect.value["value"])
            demand(found == self.names.get(message["name"]), message, "gave", found)


def _barrier_key(referee: Referee, call: Call, message: Message) -> tuple[str, str]:
    own = referee.actors[call.client.rpartition(".")[0]].role
    return message.get("role", own), message["name"]
