"""The call table: which calls are outstanding, which run or queue here, and who waits for whom.

Pure bookkeeping with an explicit `now`; `outgoing` and `handlers` do what it says.

- `CallTable`: calls of ours that are not answered. An id is used once; an answer to an id that is
  not there any more (timed out, cancelled) is late, counted and dropped.
- `Deadlines`: one heap for everything that has a time limit.
- `Lane`: what bounds how many handlers run at once, and keeps their start in order.
- `Wait` cycles: plain handlers of a process run one at a time, so a call that queues behind one that
  waits for this very call would wait for ever. A handler that blocks while others queue behind it
  sends a *probe* along the calls that it waits for; each process passes it on to what the asked
  handler waits for in turn. A probe that comes back to a call queued behind its origin has found a
  cycle, and has the names of all on it. Where the next handler does not wait for anything yet, the
  probe is parked at its call and goes on when it blocks. Nothing is sent as long as nobody blocks.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple, Protocol

from runtime.wire.messages import Probe

MAX_PATH = 200
"""Handlers that a probe passes at most."""


class Owner(NamedTuple):
    """The process that the table belongs to: its id, and its name in texts ("evaluator-0")."""

    peer: str
    name: str


class CallOptions(NamedTuple):
    """How a call is made. `timeout` in seconds, None for no limit; it travels as the call's deadline.

    `retry`: how often an `idempotent` call is sent again, to the next start of an actor that died
    before it answered. `nested`: made from inside a handler, so that the callee's window, full of our
    own calls, must not hold it back (the handler may be what these wait for). `stream`: it is answered
    by items.
    """

    timeout: float | None = None
    retry: int = 0
    idempotent: bool = False
    nested: bool = False
    stream: bool = False


DEFAULT = CallOptions()


class Answered(Protocol):
    """Whoever waits for an outgoing call."""

    def answered(self, call: Outgoing, value: Any) -> None: ...

    def failed(self, call: Outgoing, error: Exception) -> None: ...


class _Nobody:
    """Whoever waited has been told."""

    def answered(self, call: Outgoing, value: Any) -> None: ...

    def failed(self, call: Outgoing, error: Exception) -> None: ...


_NOBODY = _Nobody()


class Limited(Protocol):
    """Something with a time limit; `deadline` None once it is over."""

    deadline: float | None


class Outgoing:
    """One call of ours. `channel` is None until its callee is found, `deadline` when it has none or is over.

    `parcel` is kept until the answer is here: the call may have to be sent again. `size` counts in the
    callee's window; 0 once it does not any more. `items` is set for streams. `retry`: how often it may
    yet be sent to a next start of the callee. `named`: its target is a name, not an address.
    """

    __slots__ = (
        "channel",
        "deadline",
        "id",
        "items",
        "method",
        "named",
        "parcel",
        "retry",
        "sent",
        "size",
        "started",
        "target",
        "timeout",
        "tries",
        "waiter",
    )

    channel: Any
    items: Any
    parcel: Any
    timeout: float | None
    deadline: float | None

    def __init__(self, id: int, target: str, method: str, waiter: Answered, started: float) -> None:
        self.id = id
        self.target = target
        self.method = method
        self.waiter = waiter
        self.started = started
        self.timeout = self.deadline = self.channel = self.parcel = self.items = None
        self.size = self.tries = self.retry = 0
        self.named = self.sent = False

    @property
    def link(self) -> Any:
        """What it was sent by; None before that, and while a lost link is made anew."""
        return self.channel.link if self.sent else None

    def settle(self) -> Answered:
        """Who is to be told the outcome, once: a settled call holds on to nobody."""
        waiter, self.waiter = self.waiter, _NOBODY
        self.parcel = None
        return waiter

    def __repr__(self) -> str:
        return f"{self.target}.{self.method}()"


class Deadlines:
    """What is due when. Whoever ends early says `forget`."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Limited]] = []
        self._order = count()
        self._over = 0

    def __len__(self) -> int:
        return len(self._heap) - self._over

    def add(self, item: Limited) -> None:
        """Take in `item`, whose `deadline` is set."""
        assert item.deadline is not None
        heapq.heappush(self._heap, (item.deadline, next(self._order), item))

    def forget(self, item: Limited) -> None:
        """`item` is over. Its place is cleared when half of all are such, so memory stays bounded by
        what is alive even where limits are long and calls quick."""
        if item.deadline is None:
            return
        item.deadline = None
        self._over += 1
        if self._over > 64 and self._over * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].deadline is not None]
            heapq.heapify(self._heap)
            self._over = 0

    def next(self) -> float | None:
        """When the earliest is due; None when nothing is."""
        heap = self._heap
        while heap and heap[0][2].deadline is None:
            heapq.heappop(heap)
            self._over -= 1
        return heap[0][0] if heap else None

    def due(self, now: float) -> list[Limited]:
        """Take out what is due at `now`, earliest first. Their `deadline` becomes None."""
        found = []
        while (when := self.next()) is not None and when <= now:
            item = heapq.heappop(self._heap)[2]
            item.deadline = None
            found.append(item)
        return found


class CallTable:
    """Our calls that are not answered yet. `late` counts answers that came too late."""

    def __init__(self) -> None:
        self._calls: dict[int, Outgoing] = {}
        self._load: defaultdict[str, int] = defaultdict(int)
        self._ids = count(1)
        self.late = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, call: Outgoing) -> bool:
        return call.id in self._calls

    def open(self, target: str, method: str, waiter: Answered, now: float) -> Outgoing:
        """A new call, outstanding from now on."""
        id = next(self._ids)
        call = self._calls[id] = Outgoing(id, target, method, waiter, now)
        self._load[target] += 1
        return call

    def load(self, target: str) -> int:
        """How many calls of `target` are outstanding."""
        return self._load.get(target, 0)

    def find(self, channel: Any, id: int) -> Outgoing | None:
        """The call `id`, if it went by `channel` and is not over."""
        call = self._calls.get(id)
        return call if call is not None and call.channel is channel else None

    def answer(self, channel: Any, id: int) -> Outgoing | None:
        """An answer to `id` came by `channel`: the call, which is over now. None: nobody waits for it
        (or it was sent elsewhere), drop the answer."""
        call = self._calls.get(id)
        if call is None or call.channel is not channel:
            self.late += 1
            return None
        del self._calls[id]
        self._load[call.target] -= 1
        return call

    def renew(self, call: Outgoing) -> None:
        """`call` is to be made once more, to another process: under a new id."""
        self._calls.pop(call.id, None)
        call.id = next(self._ids)
        call.channel, call.sent = None, False
        self._calls[call.id] = call

    def drop(self, call: Outgoing) -> bool:
        """`call` is over without an answer. False when it was over before."""
        if self._calls.pop(call.id, None) is None:
            return False
        self._load[call.target] -= 1
        return True

    def sent_by(self, channel: Any) -> list[Outgoing]:
        """The calls that wait for an answer by `channel`, in the order they were made."""
        return [call for call in self._calls.values() if call.sent and call.channel is channel]

    def all(self) -> list[Outgoing]:
        """Every outstanding call."""
        return list(self._calls.values())


QUEUED, RUNNING, OVER = range(3)


class Incoming:
    """One call that runs or queues here.

    `client` is the process that called. `timed`: its deadline is watched. `lane` is None for handlers that nothing bounds. `size` is what it counts in that process's
    window, 0 once it does not any more. `stream` drives its generator. `waits` are the calls that its handler waits for,
    by wait (each a sequence that fills as the calls are made). `parked` are probes that wait here, by the process they come from; `seen` is the
    last number of each that came by, so that a probe goes round a circle only once.
    """

    __slots__ = (
        "client",
        "deadline",
        "exported",
        "id",
        "lane",
        "parcel",
        "parked",
        "seen",
        "size",
        "state",
        "stream",
        "task",
        "timed",
        "waits",
    )

    stream: Any
    deadline: float | None
    """When the caller gives up, on the loop's clock; None for never."""
    lane: Lane | None
    task: Any
    parked: dict[str, Probe] | None
    seen: dict[str, int] | None

    def __init__(self, client: Any, id: int, exported: Any, parcel: Any, size: int = 0) -> None:
        self.client = client
        self.id = id
        self.exported = exported
        self.parcel = parcel
        self.size = size
        self.state = QUEUED
        self.timed = False
        self.waits: tuple[Sequence[Outgoing], ...] = ()
        self.stream = self.deadline = self.lane = self.task = self.parked = self.seen = None


class Lane:
    """At most `limit` handlers at a time, started in arrival order.

    The plain lane (limit 1) is worked off by a handler thread, the others by the loop. A call is
    claimed exactly once, by whoever starts or removes it: `claim` is one dict operation, atomic also
    between threads.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running: dict[Incoming, None] = {}
        self._queue: dict[Incoming, None] = {}

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def holder(self) -> Incoming | None:
        """The handler that runs on a lane of one."""
        if self.limit != 1:
            return None
        for call in self.running.copy():
            return call
        return None

    def queue(self, call: Incoming) -> None:
        """`call` waits for its turn."""
        call.lane = self
        self._queue[call] = None

    def claim(self, call: Incoming) -> bool:
        """Take `call` out of the queue. False: somebody else did."""
        return self._queue.pop(call, self) is None

    def start(self, call: Incoming) -> bool:
        """Claim `call` and count it as running. False when it was removed meanwhile."""
        # It stands among the running before it is gone from the queue: no look at the lane from
        # another thread may find it in neither.
        self.running[call] = None
        if self.claim(call):
            call.state = RUNNING
            return True
        self.running.pop(call, None)
        return False

    def finish(self, call: Incoming) -> None:
        """`call` does not run any more."""
        self.running.pop(call, None)

    def next(self) -> Incoming | None:
        """The call to start now, if there is one and room for it."""
        if len(self.running) >= self.limit:
            return None
        for call in self._queue:
            return call
        return None

    def queued(self) -> list[Incoming]:
        """Who waits, in order."""
        return list(self._queue)


class Forward(NamedTuple):
    """Send `probe` by `channel`."""

    channel: Any
    probe: Probe


class Cycle(NamedTuple):
    """`call` queues behind a handler that waits for it: fail it, naming `path`."""

    call: Incoming
    path: tuple[str, ...]


class WaitGraph:
    """Finds cycles of waits through the plain lane of this process."""

    def __init__(self, owner: Owner, plain: Lane) -> None:
        self._me, self._name = owner
        self._plain = plain
        self._number = self._first = 0
        self._asker: Incoming | None = None
        self._parked: dict[Incoming, None] = {}

    def stuck(self) -> Incoming | None:
        """The handler that blocks while others queue behind it, if so."""
        holder = self._plain.holder
        return holder if holder is not None and holder.waits and len(self._plain) else None

    def probe(self) -> list[Forward]:
        """Ask whether the plain handler that blocks waits for one that queues behind it. Called when
        it begins to block, and when a call queues behind it."""
        holder = self.stuck()
        if holder is None:
            return []
        self._number += 1
        if holder is not self._asker:
            self._asker, self._first = holder, self._number
        label = self._label(holder)
        return list(_follow(holder, self._me, self._number, (label,)))

    def blocked(self, handler: Incoming) -> list[Forward]:
        """`handler` began to wait: what was parked at it, or behind it, goes on."""
        found: list[Forward] = []
        if not handler.waits:
            return found  # it has what it waited for by now
        behind = self._plain.holder is handler
        for call in list(self._parked):
            if call is handler or (behind and call.state == QUEUED):
                parked, call.parked = call.parked, None
                del self._parked[call]
                for probe in (parked or {}).values():
                    found += self._pass_on(call, handler, probe)
        return found

    def asked(self, call: Incoming, probe: Probe) -> Cycle | list[Forward]:
        """A probe about `call` came in."""
        if probe.origin == self._me and call.state == QUEUED and call.lane is self._plain:
            if probe.number < self._first or self._plain.holder is not self._asker:
                return []  # its origin has gone on since
            return Cycle(call, (*probe.path, self._label(call)))
        seen = call.seen = call.seen or {}
        if seen.get(probe.origin, 0) >= probe.number:
            return []
        seen[probe.origin] = probe.number
        holder = call if call.state == RUNNING else call.lane.holder if call.lane else None
        if holder is None or not holder.waits:
            if call.parked is None:
                call.parked = {}
            call.parked[probe.origin] = probe
            self._parked[call] = None
            return []
        return self._pass_on(call, holder, probe)

    def over(self, call: Incoming) -> None:
        """`call` is answered or removed."""
        if call.parked is not None:
            call.parked = None
            self._parked.pop(call, None)

    def _pass_on(self, call: Incoming, holder: Incoming, probe: Probe) -> list[Forward]:
        label = self._label(call)
        if holder is not call:
            label += f" (queued behind {self._label(holder)})"
        if len(probe.path) >= MAX_PATH:
            return []
        return list(_follow(holder, probe.origin, probe.number, (*probe.path, label)))

    def _label(self, call: Incoming) -> str:
        return f"{self._name}.{call.exported.name}"[:200]


def _follow(
    handler: Incoming, origin: str, number: int, path: tuple[str, ...]
) -> Iterator[Forward]:
    for calls in handler.waits:
        for awaited in list(calls):
            if awaited.sent:
                yield Forward(awaited.channel, Probe(origin, path, number, awaited.id))
