"""Calls whose answer is a stream: generators that run as far as their consumer's credit goes.

An async generator runs on the loop, as one handler. A plain one runs where plain handlers do, each `next`
as a piece of work of its own: between two items, and while it has no credit, other plain handlers of the
process have their turn. Items leave in order, and before the end or the error that follows them. When
nobody wants more, the generator is closed where it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextvars import Context
from typing import Any

from runtime.peer.calls import OVER, Incoming
from runtime.peer.flow import ItemWindow, size_of
from runtime.wire import messages
from runtime.wire.codec import Encoded

END = object()
"""What `next` gives after the last item."""


class Stream:
    """The items of one call: what may be sent of them, and whoever waits until more may be."""

    __slots__ = ("_waiting", "_window", "call", "context", "generator", "idle")

    def __init__(self, call: Incoming) -> None:
        self.call = call
        self.generator: Generator[Any, Any, Any] | None = None
        self.context: Context | None = None
        self.idle = False
        """A plain generator that waits for credit."""
        self._window = ItemWindow()
        self._waiting: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        """May the next item be made?"""
        return self._window.open()

    def send(self, parcel: Encoded) -> None:
        """The next item. Nothing, when nobody wants it any more."""
        call = self.call
        self._window.sent(size_of(*parcel))
        if call.state != OVER and call.client.link is not None:
            call.client.link.send(messages.encode_item(call.id, *parcel))

    def used(self, total: int) -> None:
        """The consumer has used up so many items in all."""
        self._window.used(total)
        if self._waiting is not None and self.open and not self._waiting.done():
            self._waiting.set_result(None)

    async def room(self) -> None:
        """Return once the next item may be made."""
        while not self.open:
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None


async def run(
    stream: Stream,
    work: AsyncGenerator[Any, None] | Awaitable[Any],
    encode: Callable[[Any], Encoded],
) -> None:
    """Send the items of an async generator; of a coroutine its result, as the only item."""
    if not isinstance(work, AsyncGenerator):
        stream.send(encode(await work))
        return
    try:
        while True:
            await stream.room()
            try:
                item = await anext(work)
            except StopAsyncIteration:
                return
            stream.send(encode(item))
    finally:
        await work.aclose()


def step(stream: Stream, start: Callable[[], Any], encode: Callable[[Any], Encoded]) -> Any:
    """On a handler thread: the next item of a plain generator, encoded, or `END`; `start` makes the
    generator. A plain function's result is its only item."""
    if stream.generator is None:
        made = start()
        if not isinstance(made, Generator):
            stream.generator = _nothing()
            return encode(made)
        stream.generator = made
    item = next(stream.generator, END)
    return END if item is END else encode(item)


def _nothing() -> Generator[Any, Any, Any]:
    yield from ()
