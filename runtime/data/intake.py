"""How items come into a queue: what there is room for, who waits for room, and who was promised some.

A put is admitted item by item, a group all at once or not at all. Waiting puts take turns by producer.

*Credit*: the answer to a put may promise its producer room for some items more, which the others do not get for
a moment (`RESERVED_S`), unless a get waits for more than there is. A producer that uses it in time (`CREDIT_S`) may take its next put as done as soon as
the bytes have left it: such an *eager* put is admitted whatever happened since, be it that the
queue was closed or that its producer died.
"""

from __future__ import annotations

from typing import Any

from runtime.control.messages import call_from, call_state, flag, seconds, whole
from runtime.data.alarms import Alarms, earlier
from runtime.data.pieces import Piece, Shelf
from runtime.errors import Closed, MisuseError
from runtime.machine import Call, Effect, Fail, Message, Reply

HANDLE_BITS = 32
"""A call's id is the number of the asking object, shifted by this, plus a counter."""
CREDIT_S = 0.1
"""How long after it was sent an answered put's credit may be used."""
RESERVED_S = 0.25
"""How long the owner keeps that room free."""

_CREDIT_ITEMS = 4096
_CREDIT_BYTES = 16 << 20
_LEAST_CREDIT = 8
_PARTIAL_KEPT = 64
_FORGET_S = 600.0
"""Who has put nothing for so long is forgotten: only a put that is repeated after that would come twice."""
_NOTHING = Piece(0, [])


class Bounds:
    """How much a queue holds: `items`, and `bytes` (None: no bound)."""

    __slots__ = ("bytes", "items", "name")

    def __init__(self, name: str, items: int, size: int | None) -> None:
        self.name, self.items, self.bytes = name, items, size

    def check(self, piece: Piece) -> None:
        """Raises `MisuseError` for what never fits."""
        if piece.whole and len(piece) > self.items:
            raise MisuseError(
                f"a group of {len(piece)} items never fits into queue {self.name!r}, whose size "
                f"is {self.items}"
            )
        if self.bytes is None or piece.size() <= self.bytes:
            return
        largest = piece.size() if piece.whole else max(piece.sizes())
        if largest > self.bytes:
            what = "a group" if piece.whole else "an item"
            raise MisuseError(
                f"{what} of {largest} bytes never fits into queue {self.name!r}, whose max_bytes "
                f"is {self.bytes}"
            )


class _Put:
    """A put, and what of it is not in yet."""

    __slots__ = ("call", "credit", "deadline", "eager", "piece", "producer", "total")

    def __init__(
        self, call: Call, piece: Piece, deadline: float | None, eager: bool, credit: bool
    ) -> None:
        self.call, self.piece, self.deadline = call, piece, deadline
        self.eager, self.credit = eager, credit
        self.producer = producer_of(call)
        self.total = len(piece)

    @property
    def taken(self) -> int:
        return self.total - len(self.piece)


class _Producer:
    """Its newest put and when that came, those that wait, what of others went in, and what is reserved for it."""

    __slots__ = ("bytes", "items", "last", "partial", "puts", "seen")

    def __init__(self) -> None:
        self.last, self.seen = -1, 0.0
        self.puts: dict[Call, _Put] = {}
        self.partial: dict[int, int] = {}
        self.items = self.bytes = 0


def producer_of(call: Call) -> str:
    """Whose put this is: one object of one process."""
    return f"{call.client}/{call.id >> HANDLE_BITS}"


class Intake:
    """Puts, on their way to the shelf. Ids of one producer's puts only grow, so one that comes again is
    known, and is not admitted twice."""

    def __init__(self, bounds: Bounds, shelf: Shelf) -> None:
        self.closed = False
        self.wanted = False
        """A get waits for more than there is: promises to others keep nobody back."""
        self.admitted = 0
        self.waiting: dict[Call, _Put] = {}
        self._bounds, self._shelf = bounds, shelf
        self._producers: dict[str, _Producer] = {}
        self._turns: dict[str, None] = {}
        self._alarms: Alarms[Call] = Alarms()
        self._reserved = self._reserved_bytes = 0
        self._reserved_until = self._forgets_at = 0.0

    def put(self, message: Message, call: Call, now: float) -> list[Effect]:
        """A put comes in. Raises `MisuseError` for one that never fits, `Closed`."""
        piece = _read_piece(message)
        timeout = message.get("timeout")
        if timeout:
            seconds(message, "timeout")
        eager, credit = _flag(message, "eager"), _flag(message, "credit")
        name = producer_of(call)
        producer = self._producers.get(name)
        if producer is not None and call.id <= producer.last:
            taken = producer.partial.get(call.id, len(piece))
            return [] if call in self.waiting else [Reply(call, {"taken": taken})]
        self._bounds.check(piece)
        if self.closed and not eager:
            raise Closed(f"queue {self._bounds.name!r} is closed")
        if producer is None:
            self._forget_idle(now)
            producer = self._producers[name] = _Producer()
        producer.last, producer.seen = call.id, now
        put = _Put(call, piece, None if timeout is None else now + timeout, eager, credit)
        if eager and self._reserved:
            self._use_credit(producer, put.total, piece.size())
        if not producer.puts and self._admit(put, now):
            return [self._answer(put, now)]
        if timeout == 0 and not eager:
            return [self._refuse(put, now)]
        self.waiting[call] = producer.puts[call] = put
        self._turns[name] = None
        self._alarms.set(put.deadline, call)
        return []

    def admit_waiting(self, now: float, effects: list[Effect]) -> bool:
        """Let in, by turns, what there is room for; answers go to `effects`. Whether anything went in."""
        admitted, passed = False, 0
        while passed < len(self._turns):
            name = next(iter(self._turns))
            del self._turns[name]
            self._turns[name] = None  # to the end
            put = next(iter(self._producers[name].puts.values()))
            before = len(put.piece)
            if self._admit(put, now):
                self._forget(put)
                effects.append(self._answer(put, now))
            if len(put.piece) < before:
                admitted, passed = True, 0
            else:
                passed += 1
        return admitted

    def tick(self, now: float) -> list[Effect]:
        """Answer puts whose time is up."""
        if self._reserved_until <= now:
            self._forget_credit()
        effects: list[Effect] = []
        for call in self._alarms.due(now):
            put = self.waiting[call]
            self._forget(put)
            effects.append(self._refuse(put, now))
        return effects

    def deadline(self, *, drained: bool) -> float | None:
        """When `tick` has something to do. `drained`: somebody waits for promises to end."""
        due = self._alarms.next()
        if self._reserved and (drained or self.waiting):
            due = earlier(due, self._reserved_until)
        return due

    def cancelled(self, call: Call) -> None:
        """Forget a waiting put; what went in stays."""
        put = self.waiting[call]
        self._forget(put)
        self._note_partial(put)

    def lost(self, peer: str) -> None:
        """Forget the waiting puts of a process; not those that it was told are in."""
        for put in [p for p in self.waiting.values() if p.call.client == peer and not p.eager]:
            self._forget(put)

    def close(self) -> list[Effect]:
        """No put is taken from now on, but the eager ones."""
        self.closed = True
        effects: list[Effect] = []
        for put in [put for put in self.waiting.values() if not put.eager]:
            self._forget(put)
            went = f"; {put.taken} of {put.total} items went in" if put.taken else ""
            error = Closed(f"queue {self._bounds.name!r} was closed{went}")
            effects.append(Fail(put.call, error))
        return effects

    def dry(self, now: float) -> bool:
        """Will nothing come in any more?"""
        promised = self._reserved > 0 and self._reserved_until > now
        return self.closed and not self.waiting and not promised

    def why(self, call: Call) -> str:
        """What a waiting put waits for."""
        return self._why(self.waiting[call])

    def _why(self, put: _Put) -> str:
        bounds, shelf = self._bounds, self._shelf
        size = "" if bounds.bytes is None else f", {shelf.bytes} of {bounds.bytes} bytes"
        full = f"{shelf.depth} of {bounds.items} items{size}"
        return f"queue {bounds.name!r} has no room: {full}; {put.taken} of {put.total} went in"

    # -- admission ----------------------------------------------------------------------------

    def _admit(self, put: _Put, now: float, *, ignoring_credit: bool = False) -> bool:
        """Let in as much of `put` as there is room for. Whether all of it is in now."""
        count = self._room(put, now, ignoring_credit)
        if count:
            all_of_it = count == len(put.piece)
            piece = put.piece.cut(count)
            if all_of_it:
                put.piece = _NOTHING
            piece.number = self.admitted
            self.admitted += count
            self._shelf.add(put.producer, piece)
        return not len(put.piece)

    def _room(self, put: _Put, now: float, ignoring_credit: bool) -> int:
        items, size = self._reserved, self._reserved_bytes
        if items:
            if ignoring_credit or put.eager or self.wanted or self._reserved_until <= now:
                items = size = 0
            else:
                own = self._producers[put.producer]
                items, size = items - own.items, size - own.bytes
        piece, bounds, shelf = put.piece, self._bounds, self._shelf
        count = max(0, min(len(piece), bounds.items - shelf.depth - items))
        if bounds.bytes is not None and count:
            room = bounds.bytes - shelf.bytes - size
            if piece.size(count) > room:
                count = piece.fitting(count, room)
        return 0 if piece.whole and count < len(piece) else count

    def _refuse(self, put: _Put, now: float) -> Reply:
        """Its time is up: say how much of it is in. Promises to others do not count then."""
        self._admit(put, now, ignoring_credit=True)
        if not len(put.piece):
            return self._answer(put, now)
        self._note_partial(put)
        return Reply(put.call, {"taken": put.taken, "why": self._why(put)})

    def _answer(self, put: _Put, now: float) -> Reply:
        answer: dict[str, Any] = {"taken": put.total}
        if put.credit:
            self._grant(self._producers[put.producer], answer, now)
        return Reply(put.call, answer)

    def _forget(self, put: _Put) -> None:
        del self.waiting[put.call]
        self._alarms.call_off(put.call)
        puts = self._producers[put.producer].puts
        del puts[put.call]
        if not puts:
            del self._turns[put.producer]

    def _forget_idle(self, now: float) -> None:
        if now < self._forgets_at:
            return
        self._forgets_at = now + _FORGET_S / 2
        idle = [
            name
            for name, producer in self._producers.items()
            if now - producer.seen > _FORGET_S and not producer.puts
        ]
        for name in idle:
            self._use_credit(self._producers[name], self._bounds.items, _CREDIT_BYTES)
            del self._producers[name]

    def _note_partial(self, put: _Put) -> None:
        partial = self._producers[put.producer].partial
        partial[put.call.id] = put.taken
        if len(partial) > _PARTIAL_KEPT:
            del partial[next(iter(partial))]

    # -- credit -------------------------------------------------------------------------------

    def _grant(self, producer: _Producer, answer: dict[str, Any], now: float) -> None:
        if self.waiting:
            return  # room is theirs first
        if self._reserved_until <= now:
            self._forget_credit()
        count, shelf = len(self._producers), self._shelf
        # The last quarter is nobody's before it is used.
        spare = self._bounds.items * 3 // 4 - shelf.depth - (self._reserved - producer.items)
        items, size = min(_CREDIT_ITEMS, spare // count), _CREDIT_BYTES
        if self._bounds.bytes is not None:
            free = self._bounds.bytes * 3 // 4 - shelf.bytes
            size = min(size, (free - (self._reserved_bytes - producer.bytes)) // count)
        if items < _LEAST_CREDIT or size <= 0 or self.closed:
            return
        self._reserved += max(0, items - producer.items)
        self._reserved_bytes += max(0, size - producer.bytes)
        producer.items, producer.bytes = max(producer.items, items), max(producer.bytes, size)
        self._reserved_until = now + RESERVED_S
        answer["credit"] = [items, size]

    def _use_credit(self, producer: _Producer, items: int, size: int) -> None:
        items, size = min(items, producer.items), min(size, producer.bytes)
        producer.items -= items
        producer.bytes -= size
        self._reserved -= items
        self._reserved_bytes -= size

    def _forget_credit(self) -> None:
        if self._reserved or self._reserved_bytes:
            self._reserved = self._reserved_bytes = 0
            for producer in self._producers.values():
                producer.items = producer.bytes = 0

    # -- state --------------------------------------------------------------------------------

    def dump(self) -> dict[str, Any]:
        return {
            "closed": self.closed,
            "admitted": self.admitted,
            "producers": [
                [name, p.last, p.seen, list(p.partial.items()), p.items, p.bytes]
                for name, p in self._producers.items()
            ],
            "waiting": [
                [call_state(p.call), p.piece.state(), p.deadline, p.eager, p.credit, p.total]
                for p in self.waiting.values()
            ],
            "turns": list(self._turns),
            "until": [self._reserved_until, self._forgets_at],
        }

    def load(self, state: dict[str, Any]) -> None:
        self.closed, self.admitted = state["closed"], state["admitted"]
        for name, last, seen, partial, items, size in state["producers"]:
            producer = self._producers[name] = _Producer()
            producer.last, producer.seen, producer.partial = last, seen, dict(partial)
            producer.items, producer.bytes = items, size
            self._reserved += items
            self._reserved_bytes += size
        for call, piece, deadline, eager, credit, total in state["waiting"]:
            put = _Put(call_from(call), Piece(*piece), deadline, eager, credit)
            put.total = total
            self.waiting[put.call] = self._producers[put.producer].puts[put.call] = put
            self._alarms.set(deadline, put.call)
        self._turns = dict.fromkeys(state["turns"])
        self._reserved_until, self._forgets_at = state["until"]


def _read_piece(message: Message) -> Piece:
    bodies, buffers = message.get("bodies"), message.get("buffers")
    if type(bodies) is not list or not bodies or not {bytes}.issuperset(map(type, bodies)):
        raise MisuseError("'put' needs 'bodies', a list of bytes that is not empty")
    if buffers is not None and (type(buffers) is not list or len(buffers) != len(bodies)):
        raise MisuseError("'put' needs as many 'buffers' as bodies, or none")
    version = message.get("version")
    if version is not None:
        whole(message, "version")
    return Piece(0, bodies, buffers, version, _flag(message, "whole"), _flag(message, "plain"))


def _flag(message: Message, name: str) -> bool:
    """Most are not there."""
    return name in message and flag(message, name, False)
