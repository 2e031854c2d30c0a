"""One copy of a large payload for each remote host: who sends it, who holds it, who takes it from there.

    caller ── HOLD, the bytes ──▶ holder, one of the host's members ── stages them in its host's arena
    caller ── a call by reference ──▶ each member of the host ── takes them from the holder ──▶ runs

A call by reference is a call like any other (`messages.Held`), except that its arguments are not with it. Until they
are here, what the same caller sent after it waits, too (`Waiting`). Whatever keeps them from coming, the callee says
MISSING before the handler has run, and the caller answers with the bytes (WHOLE).

The call of HOLD is the lease: it lasts until each member has taken the payload, or its caller gives it up, as it does
when nobody waits for the calls any more, or when nothing has moved for a while (`PATIENCE_S`): a holder may be frozen, or
busy with what was sent to it before. A caller that dies gives up all it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runtime.errors import Closed, MisuseError, RuntimeFault
from runtime.job import ActorInfo
from runtime.peer.calls import OVER, CallOptions, Incoming, Outgoing
from runtime.peer.context import PeerAddress
from runtime.peer.flow import nbytes
from runtime.peer.future import Future
from runtime.peer.method import RESERVED
from runtime.peer.outgoing import CallFuture
from runtime.transport.base import Buffer, Record
from runtime.wire import messages
from runtime.wire.codec import Encoded, encode_arguments
from runtime.wire.values import APART_BYTES

if TYPE_CHECKING:
    from runtime.peer.endpoint import Endpoint

logger = logging.getLogger(__name__)

HELD_BYTES = 1024**2
"""Smaller payloads go to each member directly."""
PATIENCE_S = 5.0
"""Without any progress for so long (a second more for each `_BYTES_A_SECOND`, at most a quarter of the calls' time),
who still waits for a holder gets the bytes directly."""
_BYTES_A_SECOND = 256 * 1024**2
_OVER_KEPT = 1024

_HOLD = RESERVED + "hold"
_TAKE = RESERVED + "take"
_Parcel = tuple[Buffer, Sequence[Buffer]]


# the caller's side


class Held(Encoded):
    """The arguments of one call, as a reference. Its body is empty, as that of no others is; its buffers only count in
    the callee's window, as if they came with it."""

    shipment: Shipment

    def record(self, id: int, method: str, deadline_s: float | None) -> Record:
        """The call as it leaves now: with the bytes, where nobody holds them (yet)."""
        hold, shipment = self.shipment.hold, self.shipment
        if hold is None or hold.channel is None:
            return messages.encode_call(id, method, *shipment.whole, deadline_s)
        holder: PeerAddress = hold.channel.address
        where = holder.peer, holder.address, shipment.id
        return messages.encode_held(id, method, deadline_s, where)


class Shipment:
    """One payload on its way to the members of one host. Waits for the answer to its HOLD."""

    def __init__(
        self, endpoint: Endpoint, members: Sequence[str], whole: Encoded, options: CallOptions
    ) -> None:
        self.whole = whole
        self.id = secrets.token_bytes(16)
        self.hold: Outgoing | None = None
        self._endpoint = endpoint
        self._members = members
        self._options = options._replace(retry=0)
        self._timer: asyncio.TimerHandle | None = None
        patience_s = PATIENCE_S + sum(map(nbytes, whole.buffers)) / _BYTES_A_SECOND
        self._patience_s = min(patience_s, (options.timeout or math.inf) / 4)

    def parcel(self) -> Held:
        """What a member is called with. We do not keep it: a circle would keep the bytes."""
        made = Held(b"", self.whole.buffers)
        made.shipment = self
        return made

    def start(self) -> None:
        """On the loop, before the calls: send the payload."""
        body, buffers = self.whole
        views = [memoryview(b).cast("B") if nbytes(b) else b"" for b in buffers]
        request = encode_arguments([self.id, len(self._members), body, views], pickle=False)
        caller = self._endpoint.caller
        holder = next((name for name in self._members if caller.found(name)), self._members[0])
        with contextlib.suppress(RuntimeFault):  # the calls themselves fail of it, too
            self.hold = caller.call(holder, _HOLD, request, self, self._options)
            self._watch(self.hold, math.inf)

    def _watch(self, hold: Outgoing, before: float) -> None:
        """Look again and again whether fewer bytes than `before` are still to leave for the holder. Nobody waits for
        one that has not been found."""
        left = hold.channel.queued_bytes() if hold.channel is not None else math.inf
        if left < before or left == math.inf:
            loop = self._endpoint.mailbox.loop
            self._timer = loop.call_later(self._patience_s, self._watch, hold, left)
        else:
            logger.info("%s does not pass on a broadcast: it goes to each directly", hold.target)
            self._over()
            self._ask_us()

    def over(self, future: Future[Any]) -> None:
        """Nobody waits for the calls any more."""
        with contextlib.suppress(Closed):
            self._endpoint.mailbox.post(self._over)

    def _over(self) -> None:
        if self.hold is not None:
            self._endpoint.caller.abandon(self.hold)
            self._forget()

    def answered(self, call: Outgoing, value: Any) -> None:
        """Every member has taken it. A call that is made again, elsewhere, has the bytes with it."""
        self._forget()

    def failed(self, call: Outgoing, error: Exception) -> None:
        """Nobody holds it (any more)."""
        self._forget()
        self._ask_us()

    def _forget(self) -> None:
        self.hold = None
        if self._timer is not None:
            self._timer.cancel()

    def _ask_us(self) -> None:
        """Whoever waits for it is told to ask us."""
        for made in self._endpoint.caller.table.all():
            if getattr(made.parcel, "shipment", None) is self and made.link is not None:
                made.link.send(messages.encode_missing(made.id), False)


def shipments(
    endpoint: Endpoint, infos: Sequence[ActorInfo], parcel: Encoded, options: CallOptions
) -> tuple[list[Shipment], list[Encoded]]:
    """For a call of `infos` with `parcel`: one shipment for each host, other than ours, that has several of them, and
    what each is to be called with."""
    parcels = [parcel] * len(infos)
    if endpoint.directory is None or sum(map(nbytes, parcel.buffers)) < HELD_BYTES:
        return [], parcels
    same_role = endpoint.directory.roles().get(endpoint.role, [])
    here = next((info.host for info in same_role if info.rank == endpoint.rank), None)
    places = defaultdict[str, list[int]](list)
    for place, info in enumerate(infos):
        places[info.host].append(place)
    found = []
    for host, some in places.items():
        if here not in (None, host) and len(some) > 1:
            names = [infos[place].name for place in some]
            found.append(Shipment(endpoint, names, parcel, options))
            for place in some:
                parcels[place] = found[-1].parcel()
    return found, parcels


# the holder's side


class _Payload:
    """One payload that is here, or awaited here. `staged` is None where others cannot have it; `own` are the bytes as
    they came, for the call of this process, so that nobody else sees what its handler does to them."""

    def __init__(self) -> None:
        self.body = b""
        self.staged: list[Buffer] | None = None
        self.own: list[Buffer] | None = None
        self.ready, self.taken = asyncio.Event(), asyncio.Event()
        self.left = self.awaited = 0
        self.came = False


class Holder:
    """The payloads that this process holds for the members of its host, and its way to those of others."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._payloads: dict[bytes, _Payload] = {}
        self._over: deque[bytes] = deque(maxlen=_OVER_KEPT)
        endpoint.export(_HOLD, self._hold, pickle=False)
        endpoint.export(_TAKE, self._take, pickle=False)

    def fetch(self, message: messages.Held) -> asyncio.Task[_Parcel | None]:
        """What a reference stands for; None where that cannot be had."""
        return self._endpoint.spawn(self._fetch(message), f"payload of {message.call.method}")

    async def _fetch(self, message: messages.Held) -> _Parcel | None:
        try:
            if message.peer == self._endpoint.peer:
                body, buffers = await self._give(message.payload, own=True)
            else:
                answer, caller = CallFuture(), self._endpoint.caller
                answer.caller, target = caller, PeerAddress(message.peer, message.address)
                request, options = encode_arguments([message.payload]), CallOptions(nested=True)
                answer.call = caller.call(target, _TAKE, request, answer, options)
                body, buffers = await answer
        except (RuntimeFault, TypeError, ValueError):  # the latter: not an answer of ours
            return None
        return body, buffers

    async def _hold(self, id: bytes, count: int, body: bytes, buffers: list[Buffer]) -> None:
        payload = self._payload(id)
        if payload.came:
            raise MisuseError("this payload is held already")
        payload.came, payload.left, payload.body = True, count, body
        try:
            payload.staged = await asyncio.to_thread(self._staged, Encoded(body, buffers))
            if payload.staged is None:
                payload.left = 1  # our own call has its bytes, the others are refused
            payload.own = buffers
            del buffers
            payload.ready.set()
            await payload.taken.wait()
        finally:
            self._over.append(id)
            del self._payloads[id]
            payload.ready.set()

    async def _take(self, id: bytes) -> tuple[bytes, list[Buffer]]:
        return await self._give(id, own=False)

    async def _give(self, id: bytes, own: bool) -> tuple[bytes, list[Buffer]]:
        payload = self._payload(id)
        payload.awaited += 1
        try:
            await payload.ready.wait()
        finally:
            payload.awaited -= 1
            if not payload.came and not payload.awaited:
                del self._payloads[id]
        given = payload.own if own else payload.staged
        if given is None:
            raise MisuseError("there is no such payload here, or no room for it")
        if own:
            payload.own = None
        payload.left -= 1
        if payload.left <= 0:
            payload.taken.set()
        return payload.body, given

    def _payload(self, id: bytes) -> _Payload:
        if id in self._over:
            raise MisuseError("this payload is not here any more")
        return self._payloads.setdefault(id, _Payload())

    def _staged(self, parcel: Encoded) -> list[Buffer] | None:
        """On a thread of its own: it may be gigabytes. None: the arena is off, or has no room for all."""
        buffers = self._endpoint.stage(parcel).buffers
        for before, after in zip(parcel.buffers, buffers, strict=True):
            if nbytes(before) >= APART_BYTES and memoryview(after).obj is memoryview(before).obj:
                return None
        return buffers


# the callee's side


class Waiting:
    """Calls whose arguments are not here yet, and what their callers sent after them. `take` is where every call goes
    that may run: mostly `run` itself."""

    def __init__(self, run: Callable[[Incoming], None]) -> None:
        self.take = self._run = run
        self._lines: dict[Any, deque[Incoming]] = {}
        self._asks: dict[Incoming, asyncio.Task[Any] | None] = {}
        """Who fetches the arguments of a call; None: its caller has been told to send them."""

    def open(self, client: Any) -> None:
        """The next call of `client` is one by reference."""
        self._lines.setdefault(client, deque())
        self.take = self._behind

    def ask(self, call: Incoming, task: asyncio.Task[_Parcel | None]) -> None:
        """That is `call`; `task` fetches its arguments."""
        self._asks[call] = task
        task.add_done_callback(partial(self._fetched, call))

    def came(self, call: Incoming, parcel: _Parcel) -> None:
        """The arguments of `call`. Nothing, where it does not wait for them (any more)."""
        if call in self._asks:
            call.parcel = parcel
            self.over(call)

    def missing(self, call: Incoming) -> None:
        """They do not come from the holder: its caller must send them."""
        task = self._asks.get(call)
        if task is not None and call.client.link is not None:  # else it will be back, see `again`
            self._asks[call] = None
            task.cancel()
            call.client.link.send(messages.encode_missing(call.id), False)

    def again(self, client: Any) -> None:
        """A caller is back by a new link: what was told by the old one may be lost."""
        for call, task in self._asks.items():
            if call.client is client and task is None:
                client.link.send(messages.encode_missing(call.id), False)
            elif call.client is client:
                self.missing(call)

    def over(self, call: Incoming) -> None:
        """`call` does not wait (any more): run what may run now, in order."""
        if call not in self._asks:
            return
        task = self._asks.pop(call)
        if task is not None:
            task.cancel()
        self.advance(call.client)

    def advance(self, client: Any) -> None:
        """Run what waits for nothing any more, in order."""
        line = self._lines.get(client, ())
        while line and line[0] not in self._asks:
            call = line.popleft()
            if call.state != OVER:
                self._run(call)
        if not line:
            self._lines.pop(client, None)
            self.take = self._behind if self._lines else self._run

    def close(self) -> None:
        """What waits never runs."""
        self._lines.clear()

    def _fetched(self, call: Incoming, task: asyncio.Task[_Parcel | None]) -> None:
        # Not in the task: what runs in one is started a little later than what comes in meanwhile.
        found = None if task.cancelled() else task.result()
        if found is not None:
            self.came(call, found)
        elif self._asks.get(call) is task:
            self.missing(call)

    def _behind(self, call: Incoming) -> None:
        line = self._lines.get(call.client)
        if line is None:
            self._run(call)
        else:
            line.append(call)
