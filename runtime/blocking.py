"""The node on a thread of its own: what synchronous programs and notebooks use it through.

The *peer thread* runs one asyncio loop with one `Node` in it, beside the user's main thread. It is a
daemon: a program that ends does not wait for it, `stop` ends it in a bounded time. Nothing that user
code does to asyncio (policies, closing its own loop, `sys.exit` in a handler) ends it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from runtime.aio import background
from runtime.errors import Closed, MisuseError, Timeout
from runtime.peer import context
from runtime.peer.mailbox import VisitedLoop
from runtime.peer.threads import ThreadRunner

if TYPE_CHECKING:
    from runtime.node import Node

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = "runtime-peer"
_SWITCH_INTERVAL_S = 0.0005
_USUAL_GC = (700, 10, 10)
"""Python's own setting: nobody has chosen another one."""
_PEER_GC = (10_000, 10, 10)
_STARTED_S = 60.0
_POOL_THREADS = 16
_WIND_UP_S = 1.0
_NOT_RUNNING = "the node of this process is not running"
_FORKED = (
    "this process was forked from a worker (as DataLoader workers are) and has no connections of its "
    "own: call other workers from the worker itself"
)


class _DaemonThreads(concurrent.futures.ThreadPoolExecutor):
    """The executor of the peer loop. The usual one refuses to work once the interpreter has begun to
    exit, which is when the node is closed, and its threads would keep a process that is to end."""

    def __init__(self) -> None:
        super().__init__(1)
        self._runner = ThreadRunner("runtime-peer-pool", threads=_POOL_THREADS)

    def submit(
        self, fn: Callable[..., T], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[T]:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - it is the result
                future.set_exception(error)
            else:
                future.set_result(result)

        self._runner.submit(work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._runner.stop()


class BlockingNode:
    """A node on its own thread. `make` is called on that thread, within its loop; `on_failure` too,
    when the node ended without `stop`.

    `start` may be called from any thread, any number of times; the first one starts the node.
    """

    def __init__(
        self,
        make: Callable[[], Node],
        *,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._make, self._on_failure = make, on_failure
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._loop: VisitedLoop | None = None
        self._node: Node | None = None
        self._stopping: asyncio.Event | None = None
        self._stopped = False
        self._ready = threading.Event()
        self._error: BaseException | None = None

    @property
    def node(self) -> Node:
        """The running node. Raises `Closed` when there is none."""
        if self._node is None or not self.running:
            raise Closed(_NOT_RUNNING)
        return self._node

    @property
    def error(self) -> BaseException | None:
        """What the node failed of, if it did."""
        return self._error

    @property
    def running(self) -> bool:
        """Whether the node is up."""
        return self._node is not None and self._thread is not None and self._thread.is_alive()

    def begin(self) -> None:
        """Start the thread without waiting for the node. Raises `MisuseError` in a forked child."""
        with self._lock:
            if os.getpid() != self._pid:
                raise MisuseError(_FORKED)
            if self._thread is not None:
                return
            # A busy main thread keeps the interpreter for a whole interval whenever the loop has
            # something to do: with the default of 5 ms each call would take that long.
            sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
            # A call makes some ten objects that the collector counts: with its default it looks through
            # a thousand outstanding calls again and again, a fifth of what they take.
            if gc.get_threshold() == _USUAL_GC:
                gc.set_threshold(*_PEER_GC)
            os.register_at_fork(after_in_child=self._forget)
            self._thread = threading.Thread(target=self._main, name=_NAME, daemon=True)
            self._thread.start()

    def start(self, timeout: float = _STARTED_S) -> None:
        """Start the node, or wait for it to be up. Raises what kept it from starting; `Timeout` after
        `timeout` seconds."""
        self.begin()
        if not self._ready.wait(timeout):
            raise Timeout(f"the node of this process did not start within {timeout:g} s", timeout)
        if self._error is not None:
            raise self._error

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the peer loop and give its result; it is cancelled after `timeout`
        seconds (`Timeout`), or when this thread is interrupted.

        Raises `MisuseError` on the peer thread itself, `Closed` when the node does not run.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise MisuseError(
                "a blocking call on the peer loop would wait for itself: await the async form"
            )
        with self._lock:  # the loop does not end in between
            alive = self._thread is not None and self._thread.is_alive()
            loop = self._loop if alive else None
            future = asyncio.run_coroutine_threadsafe(work, loop) if loop is not None else None
        if future is None or loop is None:
            work.close()
            raise Closed(_NOT_RUNNING)
        try:
            return loop.outside(future.result, timeout)
        except concurrent.futures.TimeoutError:
            if future.done():
                raise
            future.cancel()
            raise Timeout(f"no result within {timeout:g} s", timeout or 0.0) from None
        except concurrent.futures.CancelledError:
            if self._loop is not None:
                raise
            raise Closed(_NOT_RUNNING) from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, function: Callable[..., object], *args: Any) -> None:
        """Run `function(*args)` on the loop. Raises `Closed` when the node does not run."""
        with self._lock:
            if self._loop is None or not self.running:
                raise Closed(_NOT_RUNNING)
            self._loop.call_soon_threadsafe(functools.partial(function, *args))

    def stop(self, timeout: float = 3.0, *, leave: bool = True) -> bool:
        """Close the node and end the thread, within `timeout` seconds. Whether it did end.

        `leave`: say goodbye to the job.
        """
        thread, loop = self._thread, self._loop
        if thread is None or os.getpid() != self._pid:
            return True
        self._stopped = True
        if self._node is not None:
            self._node.leaves = leave
        if loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                loop.call_soon_threadsafe(self._stopping.set)
        if loop is not None:
            loop.outside(thread.join, timeout)
        else:
            thread.join(timeout)
        if thread.is_alive():
            logger.warning("the peer thread did not end within %g s", timeout)
        return not thread.is_alive()

    # -- the thread ---------------------------------------------------------------------------

    def _main(self) -> None:
        # Not asyncio.run: handlers of the user run here, and a `sys.exit` in one of them comes out of
        # the loop. It ends that handler, not the node.
        loop = VisitedLoop()
        asyncio.set_event_loop(loop)
        loop.set_default_executor(_DaemonThreads())
        try:
            life = loop.create_task(self._live(loop), name=_NAME)
            while not life.done():
                try:
                    loop.run_until_complete(life)
                except (SystemExit, KeyboardInterrupt) as error:
                    logger.error("a handler on the peer loop raised %r; it goes on", error)
                except Exception as error:  # noqa: BLE001 - handed to whoever waits in start()
                    self._failed(error)
        finally:
            with self._lock:
                self._loop = None
            self._wind_up(loop)
            self._ready.set()
            if self._on_failure is not None and not self._stopped:
                self._on_failure()
            asyncio.set_event_loop(None)
            loop.close()

    async def _live(self, loop: VisitedLoop) -> None:
        self._stopping = asyncio.Event()
        self._loop = loop
        node = self._make()
        try:
            await node.start()
            self._node = node
            self._ready.set()
            if self._stopped:
                return
            async with background(node.wait(), "node"):
                await self._stopping.wait()
        finally:
            await node.close()

    @staticmethod
    def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
        """Cancel what was submitted to the loop after its node had ended: somebody waits for it."""

        async def cancel_all() -> None:
            await asyncio.sleep(0)  # now all of it are tasks
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_WIND_UP_S)

        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_until_complete(cancel_all())

    def _failed(self, error: Exception) -> None:
        if self._ready.is_set():
            logger.error("the node of this process failed: %s", error, exc_info=error)
        self._error = error

    def _forget(self) -> None:
        # In a forked child the thread does not exist; what it held stays referenced here, so that no
        # destructor of a socket runs in the wrong process.
        self._lock = threading.Lock()
        context.install(None)
        context.on_first_use(None, _FORKED)
