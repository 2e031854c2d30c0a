"""How the nodes of an elastic role find together, round by round: a pure machine.

A role gathers MIN to MAX nodes (`open`). A round is complete at once when MAX have joined, or
`last_call_s` after MIN have: a node that is a moment late still comes in. Every node then gets its place:
ranks run through the nodes in node order, and the first node's address and port are the master's.

    gathering(n) ──complete──▶ complete(n) ──a join or open for n+1──▶ gathering(n+1)

A node that comes after a round has completed waits for the next one, and does not start it: the running
workers are not disturbed by a guest. Joining again is joining once (each call is answered); a join ends
when its caller gives up, its agent is lost, or its time is up (`RendezvousError`, naming who is missing).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.control.messages import (
    Operation,
    asked,
    call_from,
    call_state,
    listed,
    operation,
    seconds,
    text,
    whole,
)
from runtime.errors import MisuseError, RendezvousError
from runtime.machine import Call, Effect, Emit, Fail, Message, Reply

_LAST_CALL_S = 5.0


@dataclass(slots=True)
class _Seat:
    """One node's wish to take part."""

    slots: int
    addr: str
    port: int


@dataclass(slots=True)
class _Role:
    """The rendezvous of one role. `seats`: by node, of the round being gathered; while a round is
    complete, of guests that wait for the next."""

    low: int
    high: int
    last_call_s: float
    nodes: list[str]
    """Names of the nodes that are expected, where they are known."""
    round: int = 0
    complete: bool = False
    closed: str = ""
    seats: dict[str, _Seat] = field(default_factory=dict)
    call_until: float | None = None
    places: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By node, what the newest complete round has given it."""


@dataclass(slots=True)
class _Join:
    """One waiting call."""

    role: str
    node: str
    since: float
    until: float | None


class Rendezvous:
    """The machine "rendezvous".

    Operations: open{role, min, max, round?, last_call_s?, nodes?}, join{role, round, node, slots, addr,
    port, timeout_s?} -> {round, group_rank, group_world_size, first_rank, world_size, master_addr,
    master_port, restart_count, nodes}, close{role, reason?}, status{role}.
    """

    def __init__(self) -> None:
        self._roles: dict[str, _Role] = {}
        self._joins: dict[Call, _Join] = {}
        self._operations: dict[str, Operation] = {
            "open": self._open,
            "join": self._join,
            "close": self._close,
            "status": self._status,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return operation("rendezvous", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for name, role in self._roles.items():
            if role.call_until is not None and role.call_until <= now:
                effects += self._complete(name, role)
        late = [
            c for c, join in self._joins.items() if join.until is not None and join.until <= now
        ]
        for call in late:
            join = self._joins[call]
            reason = f"no rendezvous within {now - join.since:.0f} s: {self.why(call)}"
            effects.append(Fail(call, RendezvousError(reason, self._missing(join.role))))
        for call in late:
            self._withdraw(call, now)
        return effects

    def deadline(self) -> float | None:
        due = [role.call_until for role in self._roles.values() if role.call_until is not None]
        due += [join.until for join in self._joins.values() if join.until is not None]
        return min(due, default=None)

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._withdraw(call, now)
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        for call in [call for call in self._joins if call.client == peer]:
            self._withdraw(call, now)
        return []

    def why(self, call: Call) -> str | None:
        if call not in self._joins:
            return None
        name = self._joins[call].role
        role = self._roles[name]
        if role.complete:
            return f"round {role.round} of role {name!r} runs already; waiting for the next one"
        text = f"round {role.round} of role {name!r}: {len(role.seats)} of {_wanted(role)} nodes are here"
        if len(role.seats) >= role.low:
            return f"{text}; a last call for more is out"
        return f"{text}, waiting for {listed(self._missing(name))}"

    def dump(self) -> dict[str, Any]:
        return {
            "roles": {name: asdict(role) for name, role in self._roles.items()},
            "joins": [[call_state(call), asdict(join)] for call, join in self._joins.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._roles = {}
        for name, item in state["roles"].items():
            seats = {node: _Seat(**seat) for node, seat in item["seats"].items()}
            self._roles[name] = _Role(**{**item, "seats": seats})
        self._joins = {call_from(call): _Join(**join) for call, join in state["joins"]}

    # -- operations ---------------------------------------------------------------------------

    def _open(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        """Say what a role needs; again: change it, or (with a newer `round`) start the next round."""
        name, low, high = text(message, "role"), whole(message, "min"), whole(message, "max")
        number, nodes = whole(message, "round", 0), message.get("nodes", [])
        last_call_s = seconds(message, "last_call_s")
        if not 1 <= low <= high:
            raise MisuseError(f"role {name!r}: min={low} max={high}; allowed are 1 <= min <= max")
        if not isinstance(nodes, list | tuple):
            raise MisuseError(
                f"role {name!r}: 'nodes' must be a list of node names, found {nodes!r}"
            )
        wait = _LAST_CALL_S if last_call_s is None else last_call_s
        role = self._roles.get(name)
        if role is None or role.closed:
            self._roles[name] = role = _Role(low, high, wait, [], round=number)
        role.low, role.high, role.last_call_s = low, high, wait
        role.nodes = [str(node) for node in nodes]
        effects = [] if call is None else [Reply(call, {"round": max(number, role.round)})]
        if number > role.round:
            self._next_round(role, number)
        return effects + self._maybe_complete(name, role, now)

    def _join(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, name = asked(message, call), text(message, "role")
        number, node = whole(message, "round", 0), str(message.get("node", ""))
        seat = _Seat(whole(message, "slots"), text(message, "addr"), whole(message, "port"))
        timeout = seconds(message, "timeout_s")
        if not node or seat.slots < 1:
            raise MisuseError(
                f"join of role {name!r}: needs a node and slots >= 1, found {dict(message)}"
            )
        role = self._opened(name)
        if role.complete and number <= role.round and node in role.places:
            return [Reply(call, role.places[node])]
        if number > role.round:
            self._next_round(role, number)
        role.seats[node] = seat
        self._joins[call] = _Join(name, node, now, None if timeout is None else now + timeout)
        if role.complete:
            guests = sorted(role.seats, key=_node_order)
            return [Emit({"kind": "rendezvous guests", "role": name, "nodes": guests})]
        return self._maybe_complete(name, role, now)

    def _close(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        name = text(message, "role")
        reason = text(message, "reason", "") or "the role has ended"
        role = self._opened(name)
        role.closed, role.call_until = reason, None
        effects: list[Effect] = [] if call is None else [Reply(call, {})]
        for waiting in [c for c, join in self._joins.items() if join.role == name]:
            effects.append(Fail(waiting, _closed(name, role)))
            self._withdraw(waiting, now)
        return effects

    def _status(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        name = text(message, "role")
        role = self._opened(name)
        facts = {"round": role.round, "complete": role.complete, "nodes": [*role.seats]}
        return [Reply(asked(message, call), {**facts, "missing": self._missing(name)})]

    # -- parts --------------------------------------------------------------------------------

    def _opened(self, name: str) -> _Role:
        role = self._roles.get(name)
        if role is None:
            raise MisuseError(
                f"no rendezvous for role {name!r}; there are some for {listed(sorted(self._roles))}"
            )
        if role.closed:
            raise _closed(name, role)
        return role

    def _next_round(self, role: _Role, number: int) -> None:
        """Gather anew; guests are part of it from the start, who had joined an older one still is."""
        role.round, role.complete, role.call_until = number, False, None

    def _withdraw(self, call: Call, now: float) -> None:
        join = self._joins.pop(call, None)
        if join is None or any(
            (j.role, j.node) == (join.role, join.node) for j in self._joins.values()
        ):
            return
        role = self._roles[join.role]
        del role.seats[join.node]
        if len(role.seats) < role.low:
            role.call_until = None

    def _maybe_complete(self, name: str, role: _Role, now: float) -> list[Effect]:
        if role.complete or len(role.seats) < role.low:
            return []
        if len(role.seats) >= role.high:
            return self._complete(name, role)
        if role.call_until is None:
            role.call_until = now + role.last_call_s
        return []

    def _complete(self, name: str, role: _Role) -> list[Effect]:
        """Give the first `high` nodes their places and answer them; others wait for the next round."""
        nodes = sorted(role.seats, key=_node_order)[: role.high]
        first = role.seats[nodes[0]]
        role.places, rank = {}, 0
        for group_rank, node in enumerate(nodes):
            role.places[node] = {
                "round": role.round,
                "group_rank": group_rank,
                "group_world_size": len(nodes),
                "first_rank": rank,
                "world_size": sum(role.seats[n].slots for n in nodes),
                "master_addr": first.addr,
                "master_port": first.port,
                "restart_count": role.round,
                "nodes": nodes,
            }
            rank += role.seats[node].slots
        role.complete, role.call_until = True, None
        effects: list[Effect] = []
        for call, join in list(self._joins.items()):
            if join.role == name and join.node in role.places:
                del self._joins[call]
                effects.append(Reply(call, role.places[join.node]))
        role.seats = {node: seat for node, seat in role.seats.items() if node not in role.places}
        return [
            *effects,
            Emit({"kind": "rendezvous", "role": name, "round": role.round, "nodes": nodes}),
        ]

    def _missing(self, name: str) -> list[str]:
        """Who is awaited: by name as far as names are known, else in a count."""
        role = self._roles[name]
        named = [node for node in role.nodes if node not in role.seats]
        if role.nodes:
            return named
        lacking = role.low - len(role.seats)
        return [f"{lacking} more node" + "s" * (lacking != 1)] if lacking > 0 else []


def _wanted(role: _Role) -> str:
    return str(role.low) if role.low == role.high else f"{role.low} to {role.high}"


def _closed(name: str, role: _Role) -> RendezvousError:
    return RendezvousError(f"the rendezvous of role {name!r} is closed: {role.closed}")


def _node_order(node: str) -> tuple[tuple[int, int | str], ...]:
    """Node names in the order people expect: 2 before 10, agent-2 before agent-10."""
    parts = re.split(r"(\d+)", node)
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in parts if part)
