"""Using a queue that another process owns: finding the owner, and asking it until it has answered.

The owner is looked up in the job's directory. When it dies, what it had not answered goes to the next owner
in the same order. Puts are *eager* where the owner has promised room: done once their bytes have left this
process, since they are read there even if this process dies.

A get's items are given to the caller after the owner was told that they have arrived (`took`); from then on they
are this process's alone. If the caller gave up in that very moment, they are sent back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, NamedTuple

from runtime.control.messages import error_from
from runtime.data.asking import Request
from runtime.data.intake import CREDIT_S, HANDLE_BITS
from runtime.data.letters import write_request
from runtime.errors import LeaseLost, PeerLostError, RuntimeFault, Timeout
from runtime.peer.calls import Outgoing
from runtime.peer.context import PeerAddress
from runtime.peer.endpoint import Endpoint
from runtime.transport.base import VisitedLink

logger = logging.getLogger(__name__)

GRACE_S = 2.0
"""How long after its timeout a request may still be answered by its owner, who knows how much was done."""
FIND_S = 2.0
"""How long a request that must not wait for anything else may take to find the owner."""

_LOOK_AGAIN_S = 0.05
_LASTING = frozenset({"put", "get", "close", "statistics"})
"""What makes sense to another owner, too."""

Lookup = Callable[[], Awaitable[PeerAddress]]
"""Finds the owner's process; waits until there is one."""


class _Errand:
    """A request on its way; the waiter of its RPC. `bytes`: of an eager put, whose room was promised."""

    __slots__ = (
        "bytes",
        "deadline",
        "items",
        "number",
        "request",
        "sent_at",
        "side",
        "timer",
        "watched",
        "withdrawn",
    )

    def __init__(self, side: RemoteSide, request: Request) -> None:
        self.side, self.request = side, request
        self.number: int = request.message["id"]
        self.items = len(request.message.get("bodies", ()))
        self.bytes: int | None = None
        self.deadline: float | None = None
        self.sent_at: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.watched = self.withdrawn = False

    def answered(self, call: Outgoing, value: Any) -> None:
        self.side._answered(self, value)

    def failed(self, call: Outgoing, error: Exception) -> None:
        self.side._failed(self, error)


class _Told(Request):
    """Something that nobody waits for the answer to."""

    def settle(self, value: Any, error: Exception | None = None) -> bool:
        return True


class _Credit(NamedTuple):
    items: int = 0
    bytes: int = 0
    until: float = 0.0
    enough: int = 0
    """With fewer items, or half of the time gone, more is asked for."""


class RemoteSide:
    """The owner is somewhere in the job. Implements `asking.Side`; what begins with `_` runs on the loop."""

    def __init__(self, endpoint: Endpoint, method: str, handle: int, lookup: Lookup) -> None:
        self.endpoint = endpoint
        self._method, self._lookup = method, lookup
        self._name = method.partition(":")[2]
        self._loop = endpoint.mailbox.loop
        self._ids = count(handle << HANDLE_BITS)
        self._owner: PeerAddress | None = None
        self._last: str | None = None
        self._finding: asyncio.Task[None] | None = None
        self._errands: dict[int, _Errand] = {}
        self._credit = _Credit()
        self._eager_items = self._eager_bytes = 0

    # -- from any thread ----------------------------------------------------------------------

    def ask(self, message: dict[str, Any], timeout: float | None = None) -> Request:
        request = Request(self, message, timeout)
        mailbox = self.endpoint.mailbox
        if mailbox.on_loop_thread():
            self._begin(request)
        elif not mailbox.visit(self._visit, request):
            mailbox.post(self._begin, request)
        return request

    def get(self, message: dict[str, Any], timeout: float | None) -> Request | dict[str, Any]:
        return self.ask(message, timeout)

    def took(self, request: Request) -> None:
        """The owner has been told before."""

    def withdraw(self, message: dict[str, Any], request: Request | None = None) -> None:
        self.endpoint.mailbox.run(self._withdraw, message, request)

    def why(self, message: dict[str, Any]) -> str:
        if self._owner is None:
            return f"queue {self._name!r} has no owner (is_master=True) yet, or none any more"
        what = {"put": "room", "get": "items"}.get(message["op"], "an answer")
        return f"queue {self._name!r} of {self._owner.peer}: waiting for {what}"

    # -- sending ------------------------------------------------------------------------------

    def _visit(self, request: Request) -> bool:
        """`_begin` on the caller's thread while the loop sleeps: two changes of thread less."""
        owner = self._owner
        link = self.endpoint.caller.enter(owner.peer) if owner is not None else None
        if link is None:
            return False
        try:
            self._begin(request)
        except BaseException:  # Ctrl-C: what is half done is mended by a new link
            self.endpoint.mailbox.post(self._interrupted, link, request)
            raise
        finally:
            link.leave()
        return True

    def _interrupted(self, link: VisitedLink, request: Request) -> None:
        link.interrupted()
        if "id" in request.message:
            self._withdraw(request.message, request)

    def _begin(self, request: Request) -> None:
        message, timeout = request.message, request.timeout
        message["id"] = next(self._ids)
        errand = self._errands[message["id"]] = _Errand(self, request)
        if timeout is not None:
            errand.deadline = self._loop.time() + timeout
        if self._owner is not None:
            self._send(errand)
        elif self._finding is None:
            self._finding = self.endpoint.spawn(self._find(), f"owner of queue {self._name}")
        if timeout is not None and not request.future.done():
            self.endpoint.mailbox.run(self._arm, errand)

    def _arm(self, errand: _Errand) -> None:
        # Asking without waiting still takes the way to the owner, and finding it.
        if errand.number in self._errands:
            timeout = errand.request.timeout
            errand.timer = self._loop.call_later(timeout or FIND_S, self._late, errand)

    def _tell(self, message: dict[str, Any]) -> None:
        """Something that nobody waits for the answer to."""
        self._begin(_Told(self, message))

    def _send(self, errand: _Errand) -> None:
        message, owner = errand.request.message, self._owner
        assert owner is not None
        now = errand.sent_at = self._loop.time()
        if errand.deadline is not None:
            message["timeout"] = max(0.0, errand.deadline - now)
        eager = message["op"] == "put" and self._use_credit(errand, now)
        letter = write_request(message)
        try:
            self.endpoint.caller.call(owner, self._method, letter, errand)
        except RuntimeFault as error:
            self._failed(errand, error)
            return
        if eager:
            self._complete_eager(errand)

    def _use_credit(self, errand: _Errand, now: float) -> bool:
        message = errand.request.message
        items, size, until, enough = self._credit
        if items < enough or until - now < CREDIT_S / 2:
            message["credit"] = True
        own = sum(map(len, message["bodies"]))
        for parts in message.get("buffers", ()):
            own += sum(map(len, parts))
        if until <= now or items < errand.items or size < own:
            return bool(message.get("eager"))
        self._credit = _Credit(items - errand.items, size - own, until, enough)
        errand.bytes = own
        self._eager_items += errand.items
        self._eager_bytes += own
        message["eager"] = True
        message.pop("timeout", None)
        return True

    def _complete_eager(self, errand: _Errand) -> None:
        owner = self._owner
        if owner is not None and not self.endpoint.unsent(owner.peer):
            errand.request.settle({})
        elif not errand.watched:
            errand.watched = True  # looked at once more; then its confirmation is awaited
            if self.endpoint.mailbox.on_loop_thread():
                self._loop.call_soon(self._complete_eager, errand)

    # -- finding the owner --------------------------------------------------------------------

    async def _find(self) -> None:
        if self._last is not None:
            # The directory may still name the one that we know to be dead.
            await asyncio.sleep(_LOOK_AGAIN_S)
        try:
            owner = await self._lookup()
        except RuntimeFault as error:
            self._finding = None
            for errand in list(self._errands.values()):
                self._drop(errand)
                errand.request.settle(None, error)
            return
        self._finding, self._owner, self._credit = None, owner, _Credit()
        for errand in sorted(self._errands.values(), key=lambda e: e.number):
            if errand.withdrawn:
                self._drop(errand)  # that it is, is on its way, too
            elif self._last in (None, owner.peer) or errand.request.op in _LASTING:
                self._send(errand)
            else:
                self._drop(errand)
                lost = f"queue {self._name!r} has lost its owner {self._last}, and what it held"
                errand.request.settle(None, LeaseLost(lost))
        self._last = owner.peer

    def _failed(self, errand: _Errand, error: Exception) -> None:
        if self._errands.get(errand.number) is not errand:
            return
        if errand.withdrawn or not isinstance(error, PeerLostError):
            self._drop(errand)
            errand.request.settle(None, error)
        if isinstance(error, PeerLostError) and self._finding is None:
            logger.info("queue %s: its owner is lost: %s", self._name, error)
            self._owner = None
            self._finding = self.endpoint.spawn(self._find(), f"owner of queue {self._name}")

    # -- answers ------------------------------------------------------------------------------

    def _answered(self, errand: _Errand, value: dict[str, Any]) -> None:
        request = errand.request
        if self._errands.get(errand.number) is not errand:
            return
        self._drop(errand)
        if errand.withdrawn:
            return  # the owner has been told, and has it back
        error = error_from(value["error"]) if "error" in value else None
        if "credit" in value:
            self._take_credit(errand, *value["credit"])
        if request.op == "get" and value.get("bodies"):
            self._tell({"op": "took", "about": errand.number})
            if self._owner is not None and self.endpoint.unsent(self._owner.peer):
                self._loop.call_soon(self._deliver, request, value)  # that has left by then
                return
        self._deliver(request, value, error)

    def _deliver(
        self, request: Request, value: dict[str, Any], error: Exception | None = None
    ) -> None:
        if not request.settle(value, error) and request.op == "get" and error is None:
            self._give_back(value)

    def _take_credit(self, errand: _Errand, items: int, size: int) -> None:
        assert errand.sent_at is not None
        left, until = items - self._eager_items, errand.sent_at + CREDIT_S
        self._credit = _Credit(left, size - self._eager_bytes, until, items // 2)

    def _give_back(self, value: dict[str, Any]) -> None:
        first = value["lease"]
        if first is not None:
            leases = list(range(first, first + len(value["bodies"])))
            self._tell({"op": "nack", "leases": leases})
        elif value["bodies"]:
            back = {key: value[key] for key in ("bodies", "buffers", "runs")}
            self._tell({"op": "back", **back})

    def _drop(self, errand: _Errand) -> None:
        del self._errands[errand.number]
        if errand.bytes is not None:
            self._eager_items -= errand.items
            self._eager_bytes -= errand.bytes
        message = errand.request.message  # whoever keeps the future keeps this
        message.pop("bodies", None)
        message.pop("buffers", None)
        if errand.timer is not None:
            errand.timer.cancel()

    # -- giving up ----------------------------------------------------------------------------

    def _withdraw(self, message: dict[str, Any], request: Request | None = None) -> None:
        errand = self._errands.get(message["id"])
        if errand is None:
            value = request.unclaimed() if request is not None else None
            if message["op"] == "get" and value is not None:
                self._give_back(value)
        elif errand.sent_at is None:
            self._drop(errand)
        elif not errand.withdrawn:
            errand.withdrawn = True
            self._tell({"op": "cancel", "about": errand.number})

    def _late(self, errand: _Errand) -> None:
        """The timeout has passed; the owner, who knows it, ought to have answered."""
        asked = errand.sent_at is not None and self._owner is not None
        if asked and errand.timer is not None:
            errand.timer = None
            self._loop.call_later(GRACE_S, self._late, errand)
            return
        request = errand.request
        if self._errands.get(errand.number) is errand and not request.future.done():
            waited = request.timeout or FIND_S
            request.settle(
                None, Timeout(f"nothing within {waited:g} s: {self.why(request.message)}", waited)
            )
            self._withdraw(request.message)
