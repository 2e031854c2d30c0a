"""`DataQueue`: a queue that the processes of a job share, by name.

What is promised stands at the class. The owner's decisions are made in `buffer`, in the process
that owns the queue; how requests reach it, in `asking` and `remote`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from runtime.data.asking import LocalSide, Request, Side
from runtime.data.buffer import QueueBuffer
from runtime.data.letters import decode_items, encode_items
from runtime.data.owner import QueueOwner
from runtime.data.remote import RemoteSide
from runtime.errors import Closed, Empty, MisuseError, RuntimeFault
from runtime.peer.context import Context, PeerAddress, current
from runtime.peer.future import Future
from runtime.peer.method import RESERVED
from runtime.wire import codec

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HANDLES = 1 << 30


class QueueStatistics(NamedTuple):
    """A queue at one moment. Rates are items per second over the last ten seconds."""

    depth: int
    """Items that can be got."""
    bytes: int
    """Their size."""
    leased: int
    """Items that consumers hold on lease."""
    waiting_producers: int
    """Puts that wait for room."""
    waiting_consumers: int
    """Gets that wait for items."""
    put_rate: float
    get_rate: float
    put_total: int
    """Items put since the queue began."""
    got_total: int
    """Items given to consumers; one that came back and was given again counts twice."""
    dropped: int
    """Items that were older than a `min_version`."""
    came_back: int
    """Items of leases that were given back, expired, or whose consumer died."""
    closed: bool


class Leased(Generic[T]):
    """An item that comes back unless it is acknowledged."""

    __slots__ = ("_lease", "_queue", "value")

    def __init__(self, queue: DataQueue[T], lease: int, value: T) -> None:
        self._queue, self._lease = queue, lease
        self.value = value

    def ack(self, timeout: float | None = None) -> None:
        """The item is dealt with: it is gone for good when this returns. Raises `LeaseLost` when it had come
        back before (the lease expired, or the queue has lost its owner)."""
        self._queue._blocking("ack_async", {"op": "ack", "leases": [self._lease]}, timeout)

    async def ack_async(self) -> None:
        """As `ack`."""
        await self._queue._side.ask({"op": "ack", "leases": [self._lease]}).future

    def nack(self, timeout: float | None = None) -> None:
        """Give the item back now: the next get has it, before all others. Raises as `ack` does."""
        self._queue._blocking("nack_async", {"op": "nack", "leases": [self._lease]}, timeout)

    async def nack_async(self) -> None:
        """As `nack`."""
        await self._queue._side.ask({"op": "nack", "leases": [self._lease]}).future

    def __repr__(self) -> str:
        return f"Leased({self.value!r})"


class DataQueue(Generic[T]):
    """A queue of the job, by name. One process owns it (`is_master=True`) and holds its items; any
    number of others put and get, and may be created before it: they wait for the name.

    - Items of one `DataQueue` object leave in the order in which it put them; objects that put take turns.
    - `put` returns when the items lie with the owner. Its process may die right after.
    - A plain `get` is at most once: items that were returned by it are never given to anybody again.
      Those of a get that was cancelled, timed out, or whose process died before it had them, come back first
      and in order. What a process had been given is lost with it.
    - Both rest on bytes that the kernel has taken over: they arrive although the process dies. Only where its connection
      breaks as well, just before it dies, an item can get lost on its way in, or come back.
    - A leased item is given again, first and in order, until somebody has acknowledged it.
    - When the owner dies its items are lost. Another process may then own the name; waiting puts and gets
      go on there, and what was on its way to the old owner is put again (an item may come twice
      then, if the old owner had just given it away).

    `size` bounds the items and `max_bytes` (None: no bound) their encoded bytes; both, and `lease_s`, the seconds
    that a lease lasts (None: as long as its consumer lives), are the owner's to say. What comes back may exceed
    the bounds for a while.

    Every blocking method takes `timeout` in seconds (None: no limit) and raises `Timeout`; on the peer loop it
    raises `MisuseError` naming the async form.
    """

    def __init__(
        self,
        name: str,
        is_master: bool = False,
        size: int = 1000,
        *,
        max_bytes: int | None = None,
        lease_s: float | None = None,
    ) -> None:
        """Raises `MisuseError` when a living process owns the name already."""
        _check_name(name)
        _check_count("size", size)
        if max_bytes is not None:
            _check_count("max_bytes", max_bytes)
        _check_seconds("lease_s", lease_s, positive=True)
        self._name, self._lease_s = name, lease_s
        self._context = current()
        self._refused: RuntimeFault | None = None
        endpoint, method = self._context.endpoint, f"{RESERVED}queue:{name}"
        handle = secrets.randbelow(_HANDLES)
        self._side: Side
        if is_master:
            buffer = QueueBuffer(name, size, max_bytes, lease_s)
            try:
                owner = QueueOwner(endpoint, method, buffer)
            except MisuseError:
                raise MisuseError(f"queue {name!r} is owned by this process already") from None
            self._side = LocalSide(endpoint, owner, handle)
            self._register()
        else:
            self._side = RemoteSide(endpoint, method, handle, self._lookup)

    @property
    def name(self) -> str:
        """The queue's name."""
        return self._name

    # -- putting ------------------------------------------------------------------------------

    def put(
        self,
        *objs: T,
        timeout: float | None = None,
        version: int | None = None,
        group: object = None,
    ) -> None:
        """Put items, one after the other as there is room. Returns when all are in.

        `version`: see `get`'s `min_version`. `group` (anything but None): these items are a group, which
        goes in whole or not at all, and comes out whole. Raises `Timeout` with `.taken` after `timeout` seconds: so many
        went in and stay in; `Closed`; `MisuseError` for what can never fit or cannot be sent.
        """
        self._not_on_loop("put_async")
        if objs:
            self._wait(self._put(objs, timeout, version, group))

    def put_async(
        self,
        *objs: T,
        timeout: float | None = None,
        version: int | None = None,
        group: object = None,
    ) -> Future[None]:
        """As `put`, at once: the future is done when all are in. Puts keep their order. Cancelling it
        takes back what has not gone in yet."""
        if not objs:
            raise MisuseError("put_async() needs at least one item")
        return self._put(objs, timeout, version, group).future

    def put_nowait(self, *objs: T, version: int | None = None, group: object = None) -> None:
        """Put what there is room for now. Raises `Full` with `.taken` when that was not all."""
        self._not_on_loop("put_async")
        if objs:
            self._wait(self._put(objs, 0, version, group))

    def _put(
        self, objs: tuple[T, ...], timeout: float | None, version: int | None, group: object
    ) -> Request:
        _check_seconds("timeout", timeout)
        message: dict[str, Any] = {"op": "put"}
        if version is not None:
            message["version"] = version
        if group is not None:
            message["whole"] = True
        message["bodies"], buffers, plain = encode_items(objs)
        if buffers is not None:
            stage = self._context.endpoint.stage
            message["buffers"] = [
                stage(codec.Encoded(b"", parts), "queue").buffers for parts in buffers
            ]
        elif plain:
            message["plain"] = True
        return self._ask(message, timeout)

    # -- getting ------------------------------------------------------------------------------

    def get(
        self,
        batch_size: int = 1,
        timeout: float | None = None,
        *,
        min_size: int = 1,
        lease: bool = False,
        min_version: int | None = None,
    ) -> list[Any]:
        """Wait until `min_size` items are there, then take up to `batch_size`.

        `lease`: gives `Leased` objects, whose items come back unless acknowledged. `min_version`: items put with
        an older version are dropped (for everybody) and counted; items without one are not. A group is
        never cut: it is left for the next get when it does not fit any more, or, where fewer than `min_size`
        are taken, makes this one larger. Raises `Timeout`; `Closed` once the queue is closed and empty (of
        what is left after closing, less than `min_size` is given).
        """
        self._not_on_loop("get_async")
        return self._waited(self._get(batch_size, timeout, min_size, lease, min_version))

    async def get_async(
        self,
        batch_size: int = 1,
        timeout: float | None = None,
        *,
        min_size: int = 1,
        lease: bool = False,
        min_version: int | None = None,
    ) -> list[Any]:
        """As `get`."""
        found = self._get(batch_size, timeout, min_size, lease, min_version)
        if not isinstance(found, Request):
            return self._given(found)
        try:
            value = await found.future
        except asyncio.CancelledError:
            self._side.withdraw(found.message, found)
            raise
        self._side.took(found)
        return self._given(value)

    def get_nowait(self, max_size: int = 1) -> list[T]:
        """What is there now, up to `max_size` items; [] when there is none. Raises `Empty` when the queue is
        closed and nothing will come any more."""
        self._not_on_loop("get_async(timeout=0)")
        try:
            return self._waited(self._get(max_size, 0, 1, False, None))
        except TimeoutError:
            return []
        except Closed as error:
            raise Empty(str(error)) from None

    def _get(
        self,
        batch_size: int,
        timeout: float | None,
        min_size: int,
        lease: bool,
        min_version: int | None,
    ) -> Request | dict[str, Any]:
        _check_count("batch_size", batch_size)
        _check_count("min_size", min_size)
        _check_seconds("timeout", timeout)
        if min_size > batch_size:
            raise MisuseError(f"min_size={min_size} is more than batch_size={batch_size}")
        message: dict[str, Any] = {"op": "get", "most": batch_size, "least": min_size}
        if lease:
            message["lease"], message["lease_s"] = True, self._lease_s
        if min_version is not None:
            message["min_version"] = min_version
        self._check()
        return self._side.get(message, timeout)

    def _waited(self, found: Request | dict[str, Any]) -> list[Any]:
        if not isinstance(found, Request):
            return self._given(found)
        value = self._wait(found)
        self._side.took(found)
        return self._given(value)

    def _given(self, value: dict[str, Any]) -> list[Any]:
        items = decode_items(value)
        first = value["lease"]
        if first is None:
            return items
        return [Leased(self, first + place, item) for place, item in enumerate(items)]

    def __iter__(self) -> Iterator[T]:
        """Items one by one until the queue is closed and empty."""
        while True:
            try:
                items = self.get()
            except Closed:
                return
            yield from items

    async def __aiter__(self) -> AsyncIterator[T]:
        """As `__iter__`."""
        while True:
            try:
                items = await self.get_async()
            except Closed:
                return
            for item in items:
                yield item

    # -- the rest -----------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """End the queue for everybody: puts raise `Closed` at once, gets give what is left, then `Closed`.
        Again: nothing."""
        self._blocking("close_async", {"op": "close"}, timeout)

    async def close_async(self) -> None:
        """As `close`."""
        await self._ask({"op": "close"}, None).future

    def qsize(self, timeout: float | None = None) -> int:
        """Items that can be got at this moment."""
        return int(self._blocking("qsize_async", {"op": "statistics"}, timeout)["depth"])

    async def qsize_async(self) -> int:
        """As `qsize`."""
        return (await self.statistics_async()).depth

    def statistics(self, timeout: float | None = None) -> QueueStatistics:
        """What is in the queue, who waits, and what goes through it."""
        return QueueStatistics(**self._blocking("statistics_async", {"op": "statistics"}, timeout))

    async def statistics_async(self) -> QueueStatistics:
        """As `statistics`."""
        return QueueStatistics(**await self._ask({"op": "statistics"}, None).future)

    def __repr__(self) -> str:
        return f"DataQueue({self._name!r})"

    def __reduce__(self) -> Any:
        """Where it arrives, it is that process's way to the queue."""
        return _joined, (type(self), self._name, self._lease_s)

    # -- asking -------------------------------------------------------------------------------

    def _ask(self, message: dict[str, Any], timeout: float | None) -> Request:
        self._check()
        return self._side.ask(message, timeout)

    def _check(self) -> None:
        if self._refused is not None:
            raise self._refused

    def _blocking(self, twin: str, message: dict[str, Any], timeout: float | None) -> Any:
        self._not_on_loop(twin)
        return self._wait(self._ask(message, None), timeout)

    def _wait(self, request: Request, timeout: float | None = None) -> Any:
        try:
            return request.future.result(timeout)
        except BaseException as error:
            if not request.future.done() or request.unclaimed() is not None:
                self._side.withdraw(request.message, request)  # interrupted, by Ctrl-C mostly
            if isinstance(error, Closed) and _is_left_over():
                raise SystemExit from None  # without a word
            raise

    def _not_on_loop(self, twin: str) -> None:
        if self._context.endpoint.mailbox.on_loop_thread():
            raise MisuseError(
                f"queue {self._name!r}: this would block the runtime's own loop: use "
                f"`await queue.{twin}` here"
            )

    # -- the name -----------------------------------------------------------------------------

    async def _lookup(self) -> PeerAddress:
        control = _control(self._context)
        found = await control.ask("directory", {"op": "lookup", "name": f"queue:{self._name}"})
        return PeerAddress(*found["value"])

    def _register(self) -> None:
        """Own the name: when this returns, but on the loop, where the first use finds a refusal."""
        endpoint = self._context.endpoint
        if endpoint.mailbox.on_loop_thread():
            endpoint.spawn(self._register_later(), f"name of queue {self._name}")
            return
        asyncio.run_coroutine_threadsafe(self._own_name(), self._context.loop).result()

    async def _register_later(self) -> None:
        try:
            await self._own_name()
        except RuntimeFault as error:  # of the queue, not of the endpoint that runs this
            logger.error("queue %r has no name: %s", self._name, error)
            self._refused = error

    async def _own_name(self) -> None:
        control, address = _control(self._context), self._context.endpoint.address
        message = {"op": "register", "name": f"queue:{self._name}", "value": list(address)}
        try:
            await control.ask("directory", message)
        except MisuseError:
            # Another process owns it. So that this one may when that is dead:
            self._context.endpoint.retract(f"{RESERVED}queue:{self._name}")
            raise


def _joined(kind: type[DataQueue[T]], name: str, lease_s: float | None) -> DataQueue[T]:
    return kind(name, lease_s=lease_s)


def _is_left_over() -> bool:
    """Is this a daemon thread of a program that is over?"""
    return threading.current_thread().daemon and not threading.main_thread().is_alive()


def _control(context: Context) -> Any:
    if context.control is None:
        raise MisuseError("this process has no control plane: it was not started as part of a job")
    return context.control


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= 200:
        raise MisuseError(f"a queue's name is a text of 1 to 200 characters, not {name!r:.300}")


def _check_count(what: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MisuseError(f"{what}={value!r}: allowed are whole numbers from 1 on")


def _check_seconds(what: str, value: object, *, positive: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value > 0 or (value == 0 and not positive)):  # type: ignore[operator]
        least = "above 0" if positive else "from 0 on"
        raise MisuseError(f"{what}={value!r}: allowed are seconds {least}, or None")
