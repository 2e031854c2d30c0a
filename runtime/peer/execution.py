"""Running handlers: async ones on the loop, plain ones on their thread, streams item by item.

    taken ─┬─ async ── (its lane, with `concurrency`) ── first step ── Task
           └─ plain ── the plain lane ── handler thread ── back to the loop

*Over* and *ended* are two things: a call that is over gets no answer any more, while its handler may
still run (a plain one cannot be stopped) and holds its place in the lane until it has ended. Who is
answered, and when a call is over, is decided in `handlers`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol

from runtime.errors import ArgumentError, Closed, MisuseError, RuntimeFault, WireError
from runtime.peer import streams
from runtime.peer.calls import OVER, QUEUED, RUNNING, Incoming, Lane, Owner
from runtime.peer.future import current_waiter
from runtime.peer.mailbox import Mailbox
from runtime.peer.method import Exported, misfit
from runtime.peer.running import Running
from runtime.peer.threads import PlainRunner, ThreadRunner
from runtime.wire import codec

logger = logging.getLogger(__name__)

LARGE_BYTES = 64 * 1024
"""A call of that size is told to be running while it still runs on a handler thread."""


class Later:
    """What a plain handler on the loop gives whose answer comes later: by `tell`, there, once."""

    __slots__ = ("tell",)
    tell: Callable[[Any, BaseException | None], None]


class Watch(Protocol):
    """Whom `Execution` tells what happens to calls."""

    def answer(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        """The handler of `call` gave `value`, or raised."""

    def release(self, call: Incoming) -> None:
        """`call` runs, or is dropped: it waits here no longer."""

    def give_up(self, call: Incoming) -> None:
        """`call` is past its deadline."""

    def queued(self) -> None:
        """A call has come to the plain lane."""

    def blocked(self, call: Incoming) -> None:
        """The handler of `call` begins to wait."""


class Execution:
    """Starts calls in their lanes. Everything is called on the loop's thread, except what says otherwise."""

    def __init__(
        self,
        owner: Owner,
        mailbox: Mailbox,
        runner: PlainRunner,
        prepare: Callable[[], None] | None,
        watch: Watch,
    ) -> None:
        self._owner = owner
        self._mailbox = mailbox
        self._loop = mailbox.loop
        self._runner = runner
        self._prepare = prepare
        self._watch = watch
        self.plain = Lane(1)
        self._lanes: dict[str, Lane] = {}
        self._pools: dict[str, ThreadRunner] = {}
        self._suspended: dict[Running, None] = {}
        self._closed = False

    def take(self, call: Incoming) -> None:
        """Run `call`, in its turn."""
        exported: Exported = call.exported
        if not exported.is_async and exported.thread:
            self._queue_plain(call)
        elif exported.concurrency is None:
            self._step(call)
        else:
            lane = self._lanes.get(exported.name)
            if lane is None:
                lane = self._lanes[exported.name] = Lane(exported.concurrency)
            lane.queue(call)
            self._advance(lane)

    def stop(self, call: Incoming) -> None:
        """`call` is over: if it queues it never starts, if it runs and is async it is cancelled."""
        started = call.lane is None or not call.lane.claim(call)
        stream: streams.Stream | None = call.stream
        if stream is not None and stream.generator is not None and (stream.idle or not started):
            self._close_generator(call)
        elif started and isinstance(call.task, Running):
            call.task.cancel()

    def used(self, call: Incoming, total: int) -> None:
        """The consumer of a stream has used up so many items."""
        stream: streams.Stream = call.stream
        stream.used(total)
        if stream.idle and stream.open:
            stream.idle = False
            self._queue_plain(call)

    def queued(self) -> int:
        """Calls that wait for their turn."""
        return len(self.plain) + sum(map(len, self._lanes.values()))

    async def close(self) -> None:
        """Return once the async handlers have ended."""
        self._closed = True
        for pool in self._pools.values():
            pool.stop()
        for running in list(self._suspended):
            running.cancel()
        tasks = [running.task for running in self._suspended if running.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    # -- on the loop --------------------------------------------------------------------------

    def _advance(self, lane: Lane) -> None:
        while not self._closed and (call := lane.next()) is not None:
            if lane.start(call):
                self._step(call)

    def _step(self, call: Incoming) -> None:
        if asyncio.current_task(self._loop) is not None:
            # Another handler's task ends here and makes room for this one: that is its step, not ours.
            self._loop.call_soon(self._step, call)
        elif call.state == OVER:
            self._ended(call)
        else:
            call.state = RUNNING
            # A context of its own, as a task has: what a handler sets must not leak into the next.
            context = copy_context()
            context.run(self._first_step, call, context)

    def _first_step(self, call: Incoming, context: Context) -> None:
        running = call.task = Running(call, self._loop, self._watch.blocked)
        current_waiter.set(running)
        try:
            args, kwargs = _arguments(self._owner, call)
            work = _enter(self._owner, call.exported, args, kwargs)
            if call.stream is not None:
                work = streams.run(call.stream, work, partial(encode, self._owner, call))
            elif not call.exported.is_async:
                if type(work) is Later:
                    work.tell = partial(self._finish, call)
                    self._watch.release(call)
                else:
                    self._finish(call, work, None)
                return
            done, value = running.step(work)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises is the caller's
            self._finish(call, None, error)
            return
        if done:
            self._finish(call, value, None)
            return
        if call.size:
            self._watch.release(call)
        self._suspended[running] = None
        running.task = asyncio.Task(
            self._rest(running, work, value),
            loop=self._loop,
            name=running.get_name(),
            context=context,
        )

    async def _rest(self, running: Running, work: Coroutine[Any, Any, Any], first: Any) -> None:
        call = running.call
        try:
            value = await running.rest(work, first)
        except BaseException as error:  # noqa: BLE001 - as above; our own cancel ends here, too
            self._watch.answer(call, None, error)
        else:
            self._watch.answer(call, value, None)
        del self._suspended[running]
        self._ended(call)

    def _finish(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        self._watch.answer(call, value, error)
        self._ended(call)

    def _ended(self, call: Incoming) -> None:
        """The handler of an async `call` does not run any more: the next in its lane may."""
        call.task = None
        if call.lane is not None:
            call.lane.finish(call)
            self._advance(call.lane)

    # -- on handler threads -------------------------------------------------------------------

    def _queue_plain(self, call: Incoming) -> None:
        exported: Exported = call.exported
        lane, runner = self._plain_lane(exported)
        if call.state == OVER:
            return
        call.state = QUEUED
        lane.queue(call)
        runner.submit(partial(self._run_plain, lane, call))
        if lane is self.plain:
            self._watch.queued()

    def _plain_lane(self, exported: Exported) -> tuple[Lane, PlainRunner]:
        name, count = exported.name, exported.concurrency
        if count is None or count == 1:
            return self.plain, self._runner
        if name not in self._pools:
            self._lanes[name] = Lane(count)
            self._pools[name] = ThreadRunner(f"rpc-{name}", threads=count, prepare=self._prepare)
        return self._lanes[name], self._pools[name]

    def _run_plain(self, lane: Lane, call: Incoming) -> None:
        """On a handler thread: run one call (of a stream: to the next item), unless it was removed
        from the queue."""
        if not lane.start(call):
            return
        value, error, done = None, None, self._plain_done
        try:
            if call.deadline is None or call.deadline > self._loop.time():
                if call.size >= LARGE_BYTES:
                    self._mailbox.post(self._watch.release, call)
                value = self._context(call).run(self._execute, call)
            else:
                done = self._too_late  # the loop had no time to take it out of the queue
        except BaseException as raised:  # noqa: BLE001 - whatever user code raises is the caller's
            error = raised
        lane.finish(call)
        try:
            self._mailbox.post(done, call, value, error)
        except Closed:
            logger.debug("%s ended after its process's node", label(self._owner, call))
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise error  # answered; but the thread (the main one, perhaps) is to hear of it, too

    def _context(self, call: Incoming) -> Context:
        stream: streams.Stream | None = call.stream
        if stream is None:
            return copy_context()
        if stream.context is None:
            stream.context = copy_context()
        return stream.context

    def _execute(self, call: Incoming) -> Any:
        into = partial(encode, self._owner, call)
        if call.stream is not None:
            return streams.step(call.stream, partial(self._begin, call), into)
        return into(self._begin(call))

    def _begin(self, call: Incoming) -> Any:
        running = call.task = Running(call, self._loop, self._blocked_thread)
        current_waiter.set(running)
        args, kwargs = _arguments(self._owner, call)
        return _enter(self._owner, call.exported, args, kwargs)

    def _plain_done(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        stream: streams.Stream | None = call.stream
        if stream is None or error is not None or value is streams.END:
            call.task = None
            self._watch.answer(call, None if value is streams.END else value, error)
            return
        stream.send(value)
        if call.state == OVER:
            self._close_generator(call)
        elif stream.open:
            self._queue_plain(call)
        else:
            stream.idle = True

    def _too_late(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        self._watch.give_up(call)

    def _close_generator(self, call: Incoming) -> None:
        stream: streams.Stream = call.stream
        stream.idle, call.task = False, None
        _, runner = self._plain_lane(call.exported)
        runner.submit(partial(_close_generator, stream, label(self._owner, call)))

    def _blocked_thread(self, call: Incoming) -> None:
        """On a handler thread: the plain handler of `call` begins to wait."""
        self._mailbox.post(self._watch.blocked, call)


def _close_generator(stream: streams.Stream, name: str) -> None:
    """On a handler thread."""
    assert stream.generator is not None
    assert stream.context is not None
    try:
        stream.context.run(stream.generator.close)
    except Exception:  # user code; there is nobody left to be told
        logger.exception("closing the generator of %s failed", name)


def _arguments(owner: Owner, call: Incoming) -> tuple[Sequence[Any], dict[str, Any]]:
    body, buffers = call.parcel
    call.parcel = None
    if call.exported.raw:
        return (codec.Encoded(body, buffers),), {}
    try:
        return codec.decode_arguments(body, buffers, pickle=call.exported.pickle)
    except WireError as error:
        wrong = f"{label(owner, call)}(): its arguments cannot be read there: {error}"
        raise Refused(ArgumentError(wrong)) from error


def _enter(owner: Owner, exported: Exported, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return exported.function(*args, **kwargs)
    except TypeError as error:
        # Arguments that do not fit are found by calling: binding them first would cost every
        # call. When nothing of the function ran, the traceback ends here.
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise
        wrong = misfit(owner.name, exported, args, kwargs)
        if wrong is None:
            raise
        raise Refused(wrong) from None


def encode(owner: Owner, call: Incoming, value: Any) -> codec.Encoded:
    """What a handler gave, ready to be sent. Raises `Refused` for what cannot be."""
    if call.exported.raw and type(value) is codec.Encoded:
        return value
    try:
        return codec.encode(value, pickle=call.exported.pickle, what="its result")
    except MisuseError as error:
        raise Refused(MisuseError(f"{label(owner, call)}(): {error}")) from error


def label(owner: Owner, call: Incoming) -> str:
    """The name of a handler in texts."""
    return f"{owner.name}.{call.exported.name}"


class Refused(RuntimeFault):
    """The call failed by a fault of ours to tell, not by what a handler raised."""

    def __init__(self, fault: RuntimeFault) -> None:
        super().__init__(str(fault))
        self.fault = fault
