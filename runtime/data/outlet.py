"""How items leave a queue: who waits for them, what was handed over, what is on lease, what comes back.

What a get was given stays here, *handed over*, until its client says that it has it (`took`); before that, its
cancellation or death brings the items back, first and in order. Leased items stay until `ack`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from runtime.control.messages import call_from, call_state, flag, seconds, whole
from runtime.data.alarms import Alarms, earlier
from runtime.data.pieces import Piece, Shelf
from runtime.errors import Closed, LeaseLost, MisuseError
from runtime.machine import Call, Effect, Fail, Message, Reply

_SETTLED_KEPT = 4096


class _Get(NamedTuple):
    call: Call
    most: int
    least: int
    lease: bool
    lease_s: float | None
    min_version: int | None
    deadline: float | None


class _Handed(NamedTuple):
    """What a get was given, until its client has it. `first`: the first of its leases."""

    pieces: list[Piece]
    first: int | None


class _Lease(NamedTuple):
    holder: str
    piece: Piece
    until: float | None


class Outlet:
    """Gets, and what they were given. `lease_s`: how long a lease lasts where its get does not say."""

    def __init__(self, name: str, size: int, lease_s: float | None, shelf: Shelf) -> None:
        self.given = self.dropped = self.came_back = 0
        self.waiting: dict[Call, _Get] = {}
        self.handed: dict[Call, _Handed] = {}
        self.leases: dict[int, _Lease] = {}
        self._name, self._size, self._lease_s, self._shelf = name, size, lease_s, shelf
        self._settled: dict[int, tuple[str, str]] = {}
        self._next_lease = 0
        self._gets_due: Alarms[Call] = Alarms()
        self._leases_due: Alarms[int] = Alarms()

    # -- gets ---------------------------------------------------------------------------------

    def get(self, message: Message, call: Call, now: float) -> list[Effect]:
        """A get comes in; it waits until `serve`."""
        get = self._read(message, call, now)
        if call in self.handed:
            return [self._answer(call)]
        if call not in self.waiting:
            self.waiting[call] = get
            self._gets_due.set(get.deadline, call)
        return []

    def _read(self, message: Message, call: Call, now: float) -> _Get:
        most, least = whole(message, "most"), whole(message, "least")
        if not 1 <= least <= most:
            raise MisuseError(f"'get' needs 1 <= least <= most, found least={least}, most={most}")
        if least > self._size:
            raise MisuseError(
                f"min_size={least}: queue {self._name!r} never has more than {self._size} items"
            )
        version, timeout = message.get("min_version"), message.get("timeout")
        if version is not None:
            whole(message, "min_version")
        if timeout:
            seconds(message, "timeout")
        lease = "lease" in message and flag(message, "lease", False)
        lease_s = (seconds(message, "lease_s") or self._lease_s) if lease else None
        deadline = None if timeout is None else now + timeout
        return _Get(call, most, least, lease, lease_s, version, deadline)

    def serve(self, now: float, effects: list[Effect], *, dry: bool) -> bool:
        """Give waiting gets what there is, in the order they came; one that wants more than there is lets
        others pass. `dry`: nothing will come, so less than wanted must do. Whether any was served."""
        shelf, served = self._shelf, False
        for get in list(self.waiting.values()):
            if get.min_version is not None:
                self.dropped += shelf.drop_older(get.min_version)
            if not shelf.depth:
                break
            if shelf.depth >= get.least or dry:
                self._hand_over(get, shelf.take(get.most, get.least), now)
                effects.append(self._answer(get.call))
                served = True
        return served

    def _hand_over(self, get: _Get, pieces: list[Piece], now: float) -> None:
        del self.waiting[get.call]
        if get.deadline is not None:
            self._gets_due.call_off(get.call)
        self.given += sum(map(len, pieces))
        first = self._lease(get, pieces, now) if get.lease else None
        self.handed[get.call] = _Handed(pieces, first)

    def _answer(self, call: Call) -> Reply:
        pieces, first = self.handed[call]
        runs = [[p.number, len(p), p.version, p.whole, p.plain] for p in pieces]
        bodies, buffers = pieces[0].bodies, pieces[0].buffers
        if len(pieces) > 1:
            bodies = [body for piece in pieces for body in piece.bodies]
            if any(piece.buffers is not None for piece in pieces):
                buffers = []
                for piece in pieces:
                    buffers += piece.buffers or [()] * len(piece)
        return Reply(call, {"bodies": bodies, "buffers": buffers, "lease": first, "runs": runs})

    def took(self, call: Call) -> None:
        """The client has what `call` was answered with."""
        self.handed.pop(call, None)

    def give_back(self, message: Message) -> None:
        """Items that a client had taken have reached nobody after all."""
        bodies, buffers, runs = message.get("bodies"), message.get("buffers"), message.get("runs")
        if type(bodies) is not list or type(runs) is not list:
            raise MisuseError("'back' needs 'bodies' and 'runs', both lists")
        pieces, at = [], 0
        for number, count, *what in runs:
            end = at + count
            parts = None if buffers is None else buffers[at:end]
            pieces.append(Piece(number, bodies[at:end], parts, *what))
            at = end
        self._shelf.give_back(pieces)
        self.came_back += at

    def end(self, name: str) -> list[Effect]:
        """Nothing will come any more: say so to those who wait. What others hold may still come back; what
        a consumer itself holds on lease is its own affair."""
        if self.handed:
            return []
        holders = {lease.holder for lease in self.leases.values()}
        over = [call for call in self.waiting if holders <= {call.client}]
        for call in over:
            self._forget(call)
        return [Fail(call, Closed(f"queue {name!r} is closed and empty")) for call in over]

    # -- leases -------------------------------------------------------------------------------

    def _lease(self, get: _Get, pieces: list[Piece], now: float) -> int:
        first = self._next_lease
        until = None if get.lease_s is None else now + get.lease_s
        for piece in pieces:
            for item in piece.items():
                self.leases[self._next_lease] = _Lease(get.call.client, item, until)
                self._leases_due.set(until, self._next_lease)
                self._next_lease += 1
        return first

    def settle(self, message: Message, call: Call) -> None:
        """`ack` leases, or `nack` them: their items come back. The same once more is fine: the answer to the
        first may have got lost. Raises `LeaseLost`."""
        leases = message.get("leases")
        if type(leases) is not list or not {int}.issuperset(map(type, leases)):
            raise MisuseError(f"{message.get('op')!r} needs 'leases', a list of integers")
        op = str(message["op"])
        again = (call.client, op)
        open_ones = [number for number in leases if self._settled.get(number) != again]
        for number in open_ones:
            held = self.leases.get(number)
            if held is None or held.holder != call.client:
                raise LeaseLost(
                    f"queue {self._name!r}: the lease had expired or was given back; its item goes "
                    "(or went) to another consumer"
                )
        for number in open_ones:
            self._settled[number] = again
            if len(self._settled) > _SETTLED_KEPT:
                del self._settled[next(iter(self._settled))]
            if op == "ack":
                del self.leases[number]
                self._leases_due.call_off(number)
        if op == "nack":
            self._bring_back_leases(open_ones)

    def _bring_back_leases(self, leases: Sequence[int]) -> None:
        pieces = [self.leases.pop(number).piece for number in leases]
        for number in leases:
            self._leases_due.call_off(number)
        self._shelf.give_back(pieces)
        self.came_back += len(pieces)

    def _bring_back(self, call: Call) -> None:
        """What `call` was answered with has not reached anybody."""
        pieces, first = self.handed.pop(call)
        count = sum(map(len, pieces))
        if first is not None:
            self._bring_back_leases([n for n in range(first, first + count) if n in self.leases])
        else:
            self._shelf.give_back(pieces)
            self.came_back += count

    # -- time and loss ------------------------------------------------------------------------

    def tick(self, now: float) -> list[Effect]:
        """Bring back what is overdue, and answer the gets whose time is up."""
        self._bring_back_leases(list(self._leases_due.due(now)))
        return [self.expire(call) for call in list(self._gets_due.due(now))]

    def expire(self, call: Call) -> Reply:
        """The time of a waiting get is up."""
        why = self.why(call)
        self._forget(call)
        return Reply(call, {"bodies": [], "buffers": None, "lease": None, "why": why})

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return earlier(self._gets_due.next(), self._leases_due.next())

    def cancelled(self, call: Call) -> bool:
        """Nobody waits for `call`. Whether that changed anything."""
        if call in self.waiting:
            self._forget(call)
        elif call in self.handed:
            self._bring_back(call)
        else:
            return False
        return True

    def lost(self, peer: str) -> None:
        """All that a process was given and has not taken for good comes back."""
        for call in [call for call in self.waiting if call.client == peer]:
            self._forget(call)
        for call in [call for call in self.handed if call.client == peer]:
            self._bring_back(call)
        self._bring_back_leases(
            [number for number, lease in self.leases.items() if lease.holder == peer]
        )

    def _forget(self, call: Call) -> None:
        del self.waiting[call]
        self._gets_due.call_off(call)

    def why(self, call: Call) -> str:
        """What a waiting get waits for."""
        get = self.waiting[call]
        versions = "" if get.min_version is None else f" of version {get.min_version} or newer"
        more = f", {len(self.leases)} on lease" if self.leases else ""
        wanted = f"{get.least} item{'s' * (get.least > 1)}{versions}"
        return f"queue {self._name!r}: waiting for {wanted}; {self._shelf.depth} there{more}"

    # -- state --------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        return {
            "waiting": [[call_state(get.call), *get[1:]] for get in self.waiting.values()],
            "handed": [
                [call_state(call), [piece.state() for piece in handed.pieces], handed.first]
                for call, handed in self.handed.items()
            ],
            "leases": [
                [number, lease.holder, lease.piece.state(), lease.until]
                for number, lease in self.leases.items()
            ],
            "settled": [[number, *how] for number, how in self._settled.items()],
            "next_lease": self._next_lease,
            "counts": [self.given, self.dropped, self.came_back],
        }

    def load(self, state: dict[str, Any]) -> None:
        for call, *rest in state["waiting"]:
            get = _Get(call_from(call), *rest)
            self.waiting[get.call] = get
            self._gets_due.set(get.deadline, get.call)
        for call, pieces, first in state["handed"]:
            self.handed[call_from(call)] = _Handed([Piece(*piece) for piece in pieces], first)
        for number, holder, piece, until in state["leases"]:
            self.leases[number] = _Lease(holder, Piece(*piece), until)
            self._leases_due.set(until, number)
        self._settled = {number: (holder, op) for number, holder, op in state["settled"]}
        self._next_lease = state["next_lease"]
        self.given, self.dropped, self.came_back = state["counts"]
