"""What a queue's owner decides: who gets which items, who must wait, what comes back. A pure machine.

Payloads are opaque to it. How items come in stands in `intake`, how they leave in `outlet`, in which order in
`pieces`; here the two are made to flow. `owner.py` runs this machine, `asking.py` and `remote.py` speak to it.
"""

from __future__ import annotations

from typing import Any

from runtime.control.messages import Operation, asked, operation, whole
from runtime.data.alarms import earlier
from runtime.data.intake import Bounds, Intake
from runtime.data.outlet import Outlet
from runtime.data.pieces import Shelf
from runtime.machine import Call, Effect, Message, Reply

_RATE_S = 10.0


class _Rate:
    """How fast a count grew over the last ten seconds."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def note(self, count: int, now: float) -> None:
        """Remember the count from time to time, before it grows."""
        if not self.marks or now - self.marks[-1][0] >= 1.0:
            self.marks = [mark for mark in self.marks if now - mark[0] <= _RATE_S]
            self.marks.append((now, count))

    def per_second(self, count: int, now: float) -> float:
        recent = [mark for mark in self.marks if now - mark[0] <= _RATE_S]
        return (count - recent[0][1]) / max(1.0, now - recent[0][0]) if recent else 0.0


class QueueBuffer:
    """The machine of one queue of `size` items and `max_bytes` bytes (None: no bound).

    `lease_s`: how long a lease lasts where its get does not say (None: as long as its holder lives).

    Operations:
    put{bodies, buffers?, plain?, version?, whole?, timeout?, eager?, credit?} -> {taken, credit?: [items, bytes], why?};
    get{most, least, timeout?, lease?, lease_s?, min_version?, direct?} -> {bodies, buffers, lease: first id, runs,
    why?}; `direct`: what it is given at once, it has taken;
    took{about} and back{runs, bodies, buffers?} -> {}; ack{leases} and nack{leases} -> {}, `LeaseLost`;
    close -> {}; statistics -> its figures. Bodies are a list of bytes (`plain`: the items
    themselves); buffers, where any item has some, a
    list of lists. Leases of one get have ids in a row. A timeout (seconds) is answered, with `why`.
    """

    def __init__(
        self, name: str, size: int, max_bytes: int | None = None, lease_s: float | None = None
    ) -> None:
        self._name = name
        self._shelf = Shelf()
        self._intake = Intake(Bounds(name, size, max_bytes), self._shelf)
        self._outlet = Outlet(name, size, lease_s, self._shelf)
        self._put_rate, self._get_rate = _Rate(), _Rate()
        self._operations: dict[str, Operation] = {
            "put": self._put,
            "get": self._get,
            "took": self._took,
            "back": self._back,
            "ack": self._settle,
            "nack": self._settle,
            "close": self._close,
            "statistics": self._statistics,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        found = self._operations.get(message.get("op", ""))
        if found is None:
            found = operation(f"queue {self._name!r}", self._operations, message)
        return found(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        return self._flow(now, self._intake.tick(now) + self._outlet.tick(now))

    def deadline(self) -> float | None:
        into = self._intake.deadline(drained=self._intake.closed and bool(self._outlet.waiting))
        out = self._outlet.deadline()
        return earlier(into, out)

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        if call in self._intake.waiting:
            self._intake.cancelled(call)
        elif not self._outlet.cancelled(call):
            return []
        return self._flow(now, [])

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        self._intake.lost(peer)
        self._outlet.lost(peer)
        return self._flow(now, [])

    def why(self, call: Call) -> str | None:
        if call in self._intake.waiting:
            return self._intake.why(call)
        return self._outlet.why(call) if call in self._outlet.waiting else None

    def dump(self) -> dict[str, Any]:
        return {
            "shelf": self._shelf.dump(),
            "intake": self._intake.dump(),
            "outlet": self._outlet.dump(),
            "rates": [self._put_rate.marks, self._get_rate.marks],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._shelf.load(state["shelf"])
        self._intake.load(state["intake"])
        self._outlet.load(state["outlet"])
        for rate, marks in zip((self._put_rate, self._get_rate), state["rates"], strict=True):
            rate.marks = [(when, count) for when, count in marks]

    # -- operations ---------------------------------------------------------------------------

    def _put(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        admitted = self._intake.admitted
        self._intake.wanted = bool(self._outlet.waiting)
        effects = self._intake.put(message, asked(message, call), now)
        self._put_rate.note(admitted, now)
        return self._flow(now, effects)

    def _get(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, given = asked(message, call), self._outlet.given
        effects = self._flow(now, self._outlet.get(message, call, now))
        self._get_rate.note(given, now)
        if message.get("direct"):
            self._outlet.took(call)
        if message.get("timeout") == 0 and call in self._outlet.waiting:
            effects.append(self._outlet.expire(call))
        return effects

    def _took(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call = asked(message, call)
        self._outlet.took(Call(call.client, whole(message, "about")))
        return self._flow(now, [Reply(call, {})])

    def _back(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        self._outlet.give_back(message)
        return self._flow(now, [Reply(asked(message, call), {})])

    def _settle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call = asked(message, call)
        self._outlet.settle(message, call)
        return self._flow(now, [Reply(call, {})])

    def _close(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return self._flow(now, [Reply(asked(message, call), {}), *self._intake.close()])

    def _flow(self, now: float, effects: list[Effect]) -> list[Effect]:
        """Serve gets and admit puts until neither goes on."""
        intake, outlet, shelf = self._intake, self._outlet, self._shelf
        moved = True
        while moved:
            moved = False
            if outlet.waiting and shelf.depth:
                moved = outlet.serve(now, effects, dry=intake.closed and intake.dry(now))
            if intake.waiting:
                intake.wanted = bool(outlet.waiting)
                moved = intake.admit_waiting(now, effects) or moved
        if intake.closed and outlet.waiting and not shelf.depth and intake.dry(now):
            effects += outlet.end(self._name)
        return effects

    def _statistics(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        intake, outlet = self._intake, self._outlet
        figures = {
            "depth": self._shelf.depth,
            "bytes": self._shelf.bytes,
            "leased": len(outlet.leases),
            "waiting_producers": len(intake.waiting),
            "waiting_consumers": len(outlet.waiting),
            "put_rate": self._put_rate.per_second(intake.admitted, now),
            "get_rate": self._get_rate.per_second(outlet.given, now),
            "put_total": intake.admitted,
            "got_total": outlet.given,
            "dropped": outlet.dropped,
            "came_back": outlet.came_back,
            "closed": intake.closed,
        }
        return [Reply(asked(message, call), figures)]
