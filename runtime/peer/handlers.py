"""Executing the calls that come in: async handlers on the loop, plain ones on their thread.

    call comes in ─ looked up ─┬─ async ── (its lane, with `concurrency`) ── first step ── Task
                               └─ plain ── the plain lane ── handler thread ── back to the loop
    over when ── answered, cancelled by the caller, past its deadline, or the caller is lost

*Over* and *ended* are two things: a call that is over gets no answer any more, while its handler may
still run (a plain one cannot be stopped) and holds its place in the lane until it has ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from functools import partial
from typing import Any

from runtime.errors import (
    ArgumentError,
    Closed,
    MisuseError,
    NotExposedError,
    RuntimeFault,
    WireError,
)
from runtime.peer.calls import OVER, RUNNING, Incoming, Lane, Owner
from runtime.peer.cycles import CycleWatch
from runtime.peer.future import current_waiter
from runtime.peer.mailbox import Mailbox
from runtime.peer.method import Exported, Exports, misfit
from runtime.peer.running import Running
from runtime.peer.threads import PlainRunner, ThreadRunner
from runtime.peer.timers import Timers
from runtime.transport.base import Link
from runtime.wire import codec, messages

logger = logging.getLogger(__name__)


class Handlers:
    """The calls that run or queue in this process. Everything here is called on the loop's thread,
    except what says otherwise."""

    def __init__(
        self,
        owner: Owner,
        exports: Exports,
        mailbox: Mailbox,
        timers: Timers,
        runner: PlainRunner,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._owner = owner
        self._exports = exports
        self._mailbox = mailbox
        self._loop = mailbox.loop
        self._timers = timers
        self._runner = runner
        self._prepare = prepare
        self._calls: dict[Link, dict[int, Incoming]] = {}
        self._plain = Lane(1)
        self._lanes: dict[str, Lane] = {}
        self._pools: dict[str, ThreadRunner] = {}
        self._cycles = CycleWatch(owner, self._plain, mailbox.loop, self._fail_queued)
        self._suspended: dict[Running, None] = {}
        self._closed = False
        self.received = self.errors = 0

    # -- from the caller ----------------------------------------------------------------------

    def call(self, link: Link, message: messages.Call) -> None:
        """A call came in."""
        if self._closed:
            return  # its caller has been told
        self.received += 1
        try:
            exported = self._exports.find(message.method)
        except NotExposedError as error:
            self._refuse(link, message.id, error)
            return
        calls = self._calls.get(link)
        if calls is None:
            calls = self._calls[link] = {}
        elif message.id in calls:
            logger.warning("%s used the call id %d twice", link.peer, message.id)
            return
        call = Incoming(link, message.id, exported, (message.body, message.buffers))
        calls[message.id] = call
        if message.deadline_s is not None:
            call.deadline = self._loop.time() + message.deadline_s
            self._timers.add(call)
        self._take(call)

    def cast(self, link: Link, message: messages.Cast) -> None:
        """A one-way call came in. It runs even when its caller is gone by then."""
        if self._closed:
            return
        self.received += 1
        try:
            exported = self._exports.find(message.method)
        except NotExposedError as error:
            logger.warning("one-way call of %s: %s", link.peer, error)
            self.errors += 1
            return
        self._take(Incoming(link, 0, exported, (message.body, message.buffers)))

    def cancel(self, link: Link, message: messages.Cancel) -> None:
        """The caller gave up."""
        call = self._calls.get(link, {}).get(message.id)
        if call is not None:
            self.give_up(call)

    def lost(self, link: Link) -> None:
        """The caller is gone: nobody awaits its calls."""
        for call in list(self._calls.pop(link, {}).values()):
            self.give_up(call)

    def give_up(self, call: Incoming) -> None:
        """Nobody awaits `call` any more: a queued one never starts, an async handler is cancelled."""
        if call.state == OVER:
            return
        started = call.lane is None or not call.lane.claim(call)
        self._over(call)
        if started and isinstance(call.task, Running):
            call.task.cancel()

    def probe(self, link: Link, message: messages.Probe) -> None:
        """Another process asks what one of its calls waits for."""
        call = self._calls.get(link, {}).get(message.subject)
        if call is not None:
            self._cycles.asked(call, message)

    def running(self) -> int:
        """Calls that came in and are not over."""
        return sum(map(len, self._calls.values()))

    def queued(self) -> int:
        """Calls that wait for their turn."""
        return len(self._plain) + sum(map(len, self._lanes.values()))

    async def close(self) -> None:
        """Cancel what runs, and return once the async handlers have ended."""
        self._closed = True
        self._cycles.close()
        for link, calls in list(self._calls.items()):
            if calls:
                link.send(messages.encode_goodbye("it closed its endpoint"))
            self.lost(link)
        for pool in self._pools.values():
            pool.stop()
        for running in list(self._suspended):
            running.cancel()
        tasks = [running.task for running in self._suspended if running.task is not None]
        if tasks:
            await asyncio.wait(tasks)

    # -- starting -----------------------------------------------------------------------------

    def _take(self, call: Incoming) -> None:
        exported: Exported = call.exported
        if not exported.is_async:
            self._queue_plain(call, exported)
        elif exported.concurrency is None:
            self._step(call)
        else:
            lane = self._lanes.get(exported.name)
            if lane is None:
                lane = self._lanes[exported.name] = Lane(exported.concurrency)
            lane.queue(call)
            self._advance(lane)

    def _advance(self, lane: Lane) -> None:
        while not self._closed and (call := lane.next()) is not None:
            if lane.start(call):
                self._step(call)

    def _queue_plain(self, call: Incoming, exported: Exported) -> None:
        if exported.concurrency is None or exported.concurrency == 1:
            lane, runner = self._plain, self._runner
        else:
            lane, runner = self._own_threads(exported.name, exported.concurrency)
        lane.queue(call)
        runner.submit(partial(self._run_plain, lane, call))
        if lane is self._plain:
            self._cycles.queued()

    def _own_threads(self, name: str, count: int) -> tuple[Lane, PlainRunner]:
        if name not in self._pools:
            self._lanes[name] = Lane(count)
            self._pools[name] = ThreadRunner(f"rpc-{name}", threads=count, prepare=self._prepare)
        return self._lanes[name], self._pools[name]

    # -- async handlers -----------------------------------------------------------------------

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
        running = call.task = Running(call, self._loop, self._cycles.blocked)
        current_waiter.set(running)
        try:
            args, kwargs = _arguments(self._owner, call)
            work = _enter(self._owner, call.exported, args, kwargs)
            done, value = running.step(work)
        except BaseException as error:  # noqa: BLE001 - whatever user code raises is the caller's
            self._answer(call, None, error)
            self._ended(call)
            return
        if done:
            self._answer(call, value, None)
            self._ended(call)
            return
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
            self._answer(call, None, error)
        else:
            self._answer(call, value, None)
        del self._suspended[running]
        self._ended(call)

    # -- plain handlers -----------------------------------------------------------------------

    def _run_plain(self, lane: Lane, call: Incoming) -> None:
        """On a handler thread: run one call, unless it was removed from the queue."""
        if not lane.start(call):
            return
        value, error, done = None, None, self._plain_done
        try:
            if call.deadline is None or call.deadline > self._loop.time():
                value = copy_context().run(self._execute, call)
            else:
                done = self._too_late  # the loop had no time to take it out of the queue
        except BaseException as raised:  # noqa: BLE001 - whatever user code raises is the caller's
            error = raised
        lane.finish(call)
        try:
            self._mailbox.post(done, call, value, error)
        except Closed:
            logger.debug("%s ended after its process's node", _label(self._owner, call))
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise error  # answered; but the thread (the main one, perhaps) is to hear of it, too

    def _execute(self, call: Incoming) -> codec.Encoded:
        running = call.task = Running(call, self._loop, self._blocked_thread)
        current_waiter.set(running)
        args, kwargs = _arguments(self._owner, call)
        return _encode(self._owner, call, _enter(self._owner, call.exported, args, kwargs))

    def _plain_done(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        call.task = None
        self._answer(call, value, error)

    def _too_late(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        self.give_up(call)

    # -- both ---------------------------------------------------------------------------------

    def _answer(self, call: Incoming, value: Any, error: BaseException | None) -> None:
        if call.state == OVER:
            return
        link, id = call.link, call.id
        self._over(call)
        if error is None and id:
            try:
                parcel = (
                    value if type(value) is codec.Encoded else _encode(self._owner, call, value)
                )
            except _Refused as refused:
                error = refused
            else:
                link.send(messages.encode_result(id, parcel.body, parcel.buffers))
        if error is not None:
            self._fail(call, error)

    def _fail(self, call: Incoming, error: BaseException) -> None:
        self.errors += 1
        fault: BaseException = error.fault if isinstance(error, _Refused) else error
        if call.id:
            encoded = codec.encode_error(fault, own=fault is not error)
            call.link.send(messages.encode_error(call.id, *encoded))
        else:
            logger.warning(
                "one-way call of %s to %s failed",
                call.link.peer,
                _label(self._owner, call),
                exc_info=fault,
            )

    def _refuse(self, link: Link, id: int, error: RuntimeFault) -> None:
        self.errors += 1
        link.send(messages.encode_error(id, *codec.encode_error(error, own=True)))

    def _over(self, call: Incoming) -> None:
        """`call` needs no answer from now on."""
        call.state = OVER
        calls = self._calls.get(call.link)
        if calls is not None:
            calls.pop(call.id, None)
        if call.deadline is not None:
            self._timers.forget(call)
        if call.parked is not None:
            self._cycles.over(call)

    def _ended(self, call: Incoming) -> None:
        """The handler of an async `call` does not run any more: the next in its lane may."""
        call.task = None
        if call.lane is not None:
            call.lane.finish(call)
            self._advance(call.lane)

    def _blocked_thread(self, call: Incoming) -> None:
        """On a handler thread: the plain handler of `call` begins to wait."""
        self._mailbox.post(self._cycles.blocked, call)

    def _fail_queued(self, call: Incoming, error: MisuseError) -> None:
        if call.lane is not None and call.lane.claim(call):
            self._over(call)
            self._refuse(call.link, call.id, error)


def _arguments(owner: Owner, call: Incoming) -> tuple[list[Any], dict[str, Any]]:
    body, buffers = call.parcel
    call.parcel = None
    try:
        return codec.decode_arguments(body, buffers, pickle=call.exported.pickle)
    except WireError as error:
        wrong = f"{_label(owner, call)}(): its arguments cannot be read there: {error}"
        raise _Refused(ArgumentError(wrong)) from error


def _enter(owner: Owner, exported: Exported, args: list[Any], kwargs: dict[str, Any]) -> Any:
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
        raise _Refused(wrong) from None


def _encode(owner: Owner, call: Incoming, value: Any) -> codec.Encoded:
    try:
        return codec.encode(value, what="its result")
    except MisuseError as error:
        raise _Refused(MisuseError(f"{_label(owner, call)}(): {error}")) from error


def _label(owner: Owner, call: Incoming) -> str:
    return f"{owner.name}.{call.exported.name}"


class _Refused(RuntimeFault):
    """The call failed by a fault of ours to tell, not by what a handler raised."""

    def __init__(self, fault: RuntimeFault) -> None:
        super().__init__(str(fault))
        self.fault = fault
