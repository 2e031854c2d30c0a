"""The results of a batch, item by item, each there as soon as its piece is.

A piece is what one member was called with; all pieces but the last have the same length, so item i is
found by division. What the pieces are is decided in `batch`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast, overload

from runtime.errors import CallGroupError, MisuseError
from runtime.job import ActorInfo
from runtime.peer import batch
from runtime.peer.calls import Outgoing
from runtime.peer.endpoint import Endpoint
from runtime.peer.feed import Feed, Stream
from runtime.peer.future import Future
from runtime.peer.gather import group_error

T = TypeVar("T")


class Part(NamedTuple):
    """The result of one member: items `start` to `stop` of the whole."""

    start: int
    stop: int
    member: ActorInfo
    future: Future[Any]


class FutureSequence(Sequence[T]):
    """What `call_batch` gives: a sequence whose length is known at once.

    `[i]`, `[a:b]` (a list) and iteration block for the pieces that they touch, no others; `wait(timeout)`
    blocks for all. In async code `await` it, which gives the list of all items, or go through
    `as_completed()`. `[i]` raises what the piece of item i failed with; slices and waits raise one
    `CallGroupError` that names each failed member among those they touch.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        method: str,
        parts: list[Part],
        calls: list[Outgoing],
        return_exceptions: bool,
    ) -> None:
        self._endpoint = endpoint
        self._method = method
        self._parts = parts
        self._calls = calls
        self._return_exceptions = return_exceptions
        self._each = parts[0].stop if parts else 1

    def __len__(self) -> int:
        return self._parts[-1].stop if self._parts else 0

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return self._items(range(*index.indices(len(self))), None)
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"{self!r} has no item {index}")
        part = self._parts[place // self._each]
        self._block([part], None)
        error = self._error(part) if self._return_exceptions else None
        if error is not None:
            return cast(T, error)
        item: T = batch.item(part.future.result(), place - part.start)
        return item

    def __iter__(self) -> Iterator[T]:
        # Not that of `Sequence`, which takes an IndexError for the end: it may be a handler's.
        for index in range(len(self)):
            yield self[index]

    def wait(self, timeout: float | None = None) -> list[T]:
        """All items, once the last piece is there. `timeout` in seconds bounds the wait, not the calls:
        `Timeout`."""
        return self._items(range(len(self)), timeout)

    def __await__(self) -> Generator[Any, None, list[T]]:
        return self._all().__await__()

    def as_completed(self) -> Stream[tuple[int, T]]:
        """(index, item) of each item, as the pieces arrive: for `for` or `async for`. What pieces failed
        with is raised together after the items of all others."""
        feed = Feed[tuple[int, T]](
            self._endpoint, self._method, "a batch", len(self._parts), self._failure, self._calls
        )
        for place, part in enumerate(self._parts):

            def arrived(done: Future[Any], place: int = place, part: Part = part) -> None:
                error = self._error(part)
                if error is None or self._return_exceptions:
                    indices, error = range(part.start, part.stop), None
                    for pair in zip(indices, self._settled(indices, [place]), strict=True):
                        feed.put(pair)
                feed.end(place, error)

            part.future.add_done_callback(arrived)
        return Stream(feed)

    def done(self) -> bool:
        """Has every piece arrived, failed, or been cancelled?"""
        return all(part.future.done() for part in self._parts)

    def cancel(self) -> None:
        """Give up the pieces that have not arrived."""
        for part in self._parts:
            part.future.cancel()

    def __repr__(self) -> str:
        there = sum(part.future.done() for part in self._parts)
        return f"<{len(self)} items of {self._method}(): {there} of {len(self._parts)} pieces are done>"

    # -- inside -------------------------------------------------------------------------------

    def _items(self, indices: range, timeout: float | None) -> list[T]:
        touched = sorted({index // self._each for index in indices})
        parts = [self._parts[place] for place in touched]
        self._block(parts, timeout)
        return self._settled(indices, touched)

    def _block(self, parts: Iterable[Part], timeout: float | None) -> None:
        until = None if timeout is None else time.monotonic() + timeout
        for part in parts:
            if part.future.done():
                continue
            if self._endpoint.mailbox.on_loop_thread():
                raise MisuseError(
                    f"{self!r}: waiting for items would block the peer loop's own thread; `await` the "
                    "sequence there, or use `async for` over its as_completed()"
                )
            left = None if until is None else max(0.0, until - time.monotonic())
            with contextlib.suppress(concurrent.futures.CancelledError):  # told with its items
                part.future.exception(left)

    async def _all(self) -> list[T]:
        try:
            for part in self._parts:
                with contextlib.suppress(Exception):  # raised below, with those of the others
                    await part.future
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._settled(range(len(self)), range(len(self._parts)))

    def _settled(self, indices: range, touched: Iterable[int]) -> list[T]:
        errors = {place: self._error(self._parts[place]) for place in touched}
        failed = {place: error for place, error in errors.items() if error is not None}
        if failed and not self._return_exceptions:
            raise self._failure(failed)
        results = {
            place: self._parts[place].future.result() for place in errors if place not in failed
        }
        found: list[Any] = []
        for index in indices:
            place, inner = divmod(index, self._each)
            error = failed.get(place)
            found.append(batch.item(results[place], inner) if error is None else error)
        return found

    def _error(self, part: Part) -> Exception | None:
        try:
            error = part.future.exception()
        except concurrent.futures.CancelledError as cancelled:
            return cancelled
        assert error is None or isinstance(error, Exception)
        return error

    def _failure(self, errors: dict[int, Exception]) -> CallGroupError:
        partial = {
            place: part.future.result()
            for place, part in enumerate(self._parts)
            if part.future.done() and self._error(part) is None
        }
        return group_error(self._method, [part.member for part in self._parts], errors, partial)


def piece_check(method: str, member: ActorInfo, piece: batch.Piece) -> Callable[[Any], Any]:
    """Refuses a result that is not one item for each of `piece`."""
    wanted = piece.stop - piece.start

    def check(result: Any) -> Any:
        found = batch.items_of(result)
        if found == wanted:
            return result
        what = type(result).__name__ + ("" if found is None else f" of {found}")
        raise MisuseError(
            f"{member.name}.{method}() returned a {what} for items {piece.start} to {piece.stop - 1} of "
            f"the batch; what is called by call_batch returns a sequence of as many items: {wanted}"
        )

    return check
