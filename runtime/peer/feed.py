"""What arrives little by little: the items of streaming calls, for a thread or any loop.

A `Feed` collects, on the peer loop, what its sources deliver; a `Stream` is the user's end of it. The
two are apart so that a stream that nobody holds any more can be noticed: it closes its feed, and that
gives up the calls behind it, which closes the generators over there.

A source grants credit for what the user has taken, not for what has arrived: a slow consumer slows the
generator down. Waiting for an item is waiting for a `Future`, with all that one knows of threads, loops
and cycles.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from runtime.errors import Closed, MisuseError, RuntimeFault
from runtime.peer import gather
from runtime.peer.calls import Outgoing
from runtime.peer.endpoint import Endpoint
from runtime.peer.future import Future

T = TypeVar("T")

GRANT_EVERY = 8
"""Items that are granted at once, where more wait to be taken."""


class Feed(Generic[T]):
    """What `sources` deliver, until the last has ended. `failure` makes one error of theirs, by place.

    The calls behind it are made by `open`, and given up by `close`; `calls` are those of somebody else,
    which are only waited for.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        method: str,
        target: str,
        sources: int,
        failure: Callable[[dict[int, Exception]], Exception],
        calls: list[Outgoing] | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._calls = [] if calls is None else calls
        self._own = calls is None
        self._left = sources
        self._failure = failure
        self._errors: dict[int, Exception] = {}
        self._items: deque[tuple[T, Source | None]] = deque()
        self._lock = threading.RLock()  # a stream may be collected, so closed, in the midst of it
        self._arrival: Future[None] | None = None
        self._closed = False
        self.describe = gather.waits_for(endpoint, method, target, self._calls)

    # -- on the loop --------------------------------------------------------------------------

    def open(self, requests: Iterable[tuple[str, Source, gather.Request]]) -> None:
        """Make the streaming calls, of each target for its source. From any thread."""
        self._endpoint.mailbox.run(self._open, list(requests))

    def _open(self, requests: list[tuple[str, Source, gather.Request]]) -> None:
        caller = self._endpoint.caller
        for target, source, (method, parcel, options) in requests:
            try:
                self._calls.append(caller.stream(target, method, parcel, source, options))
            except RuntimeFault as error:
                source.end(error)

    def put(self, item: T, source: Source | None = None) -> None:
        """An item has arrived. Also from threads."""
        with self._lock:
            if self._closed:
                return
            self._items.append((item, source))
            if source is not None:
                source.queued += 1
            arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(None)

    def end(self, place: int, error: Exception | None = None) -> None:
        """The source of that place has nothing more."""
        with self._lock:
            self._left -= 1
            if error is not None:
                self._errors[place] = error
            arrival = None
            if not self._left:
                arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(None)

    # -- on the thread of the consumer --------------------------------------------------------

    def take(self) -> tuple[T] | Future[None]:
        """The next item; else what to wait for before asking again. Raises `StopIteration` after the
        last, or what the sources failed with."""
        with self._lock:
            if self._closed:
                raise StopIteration
            if not self._items:
                if not self._left:
                    errors, self._errors = self._errors, {}
                    raise self._failure(errors) if errors else StopIteration
                if self._arrival is None or self._arrival.done():
                    self._arrival = Future(
                        self._endpoint.mailbox, self._calls, self.describe, lambda _: None
                    )
                return self._arrival
            item, source = self._items.popleft()
            due = source.taken() if source is not None else 0
        if source is not None and due:
            with contextlib.suppress(Closed):  # what has arrived can still be taken
                more = self._endpoint.caller.more
                self._endpoint.mailbox.run(more, source.call, due)
        return (item,)

    def close(self) -> None:
        """Take no more: give up the calls that have not ended."""
        with self._lock:
            self._closed = True
            self._items.clear()
            arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.set_result(None)
        if self._left and self._own:
            # Posted even on the loop's thread: a stream is collected in the midst of anything, and
            # behind calls that another thread may have posted.
            with contextlib.suppress(Closed):  # and so are the calls
                self._endpoint.mailbox.post(self._abandon)

    def blocks_loop(self) -> bool:
        """Would a blocking wait here stop the peer loop?"""
        return self._endpoint.mailbox.on_loop_thread()

    def _abandon(self) -> None:
        for call in self._calls:
            self._endpoint.caller.abandon(call)


class Source:
    """One streaming call of a feed. `wrap` makes the item that is fed of one that arrived; with
    `errors_too` the call's failure is fed as one."""

    def __init__(
        self,
        feed: Feed[Any],
        place: int,
        wrap: Callable[[Any], Any] = lambda item: item,
        errors_too: bool = False,
    ) -> None:
        self._feed = feed
        self._place = place
        self._wrap = wrap
        self._errors_too = errors_too
        self.queued = self._taken = 0
        self.call: Outgoing | None = None

    def item(self, call: Outgoing, value: Any) -> None:
        """On the loop: an item arrived."""
        self.call = call
        self._feed.put(self._wrap(value), self)

    def answered(self, call: Outgoing, value: Any) -> None:
        """On the loop: the generator has ended."""
        self.end(None)

    def failed(self, call: Outgoing, error: Exception) -> None:
        """On the loop: the call failed."""
        self.end(error)

    def end(self, error: Exception | None) -> None:
        """Nothing more will come."""
        if error is not None and self._errors_too:
            self._feed.put(self._wrap(error))
            error = None
        self._feed.end(self._place, error)

    def taken(self) -> int:
        """The consumer has one more item of the `queued`. How many to grant now: none, while others of ours wait to be
        taken, so that grants are few; never does the callee wait for one that is held back."""
        self.queued -= 1
        self._taken += 1
        if self.queued and self._taken < GRANT_EVERY:
            return 0
        due, self._taken = self._taken, 0
        return due


class Stream(Generic[T]):
    """Items as they arrive: `for item in stream` in a thread, `async for` on the peer loop or any other.

    `close()`, or dropping the stream, gives up what has not arrived. Raises, after the items that had
    arrived, what the calls behind it failed with.
    """

    def __init__(self, feed: Feed[T]) -> None:
        self._feed = feed

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            found = self._feed.take()
            if isinstance(found, tuple):
                return found[0]
            if self._feed.blocks_loop():
                raise MisuseError(
                    f"{self._feed.describe()}: `for` would block the peer loop's own thread; use "
                    "`async for` there"
                )
            found.result()

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        while True:
            try:
                found = self._feed.take()
            except StopIteration:
                raise StopAsyncIteration from None
            if isinstance(found, tuple):
                return found[0]
            await found

    def close(self) -> None:
        """Give up what has not arrived. Again: nothing."""
        self._feed.close()

    def __del__(self) -> None:
        self._feed.close()
