"""What a worker process does: identity, stop requests, running the entry, leaving with the right code.

`main(spec)` is called once in a process that was forked or started for one worker, on its main
thread, with streams, environment and directory in place; it returns the exit code. What a normal
interpreter exit does for a program (threads joined, exit handlers run, files flushed) has happened by
then, so the caller may end the process at once.

How entries are found, called and told about is `entrypoint.py`'s; the process group `process_group.py`'s;
the node `node.py`'s and, on its own thread, `blocking.py`'s.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import signal
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime import entrypoint, process_group
from runtime.errors import Closed, MisuseError
from runtime.job import ActorInfo, JobInfo
from runtime.peer import context, method

if TYPE_CHECKING:
    import asyncio

    from runtime.blocking import BlockingNode
    from runtime.launcher.plan import WorkerSpec
    from runtime.launcher.progress import StepFile
    from runtime.peer.threads import ThreadRunner

logger = logging.getLogger(__name__)

_STOPPED = 128 + signal.SIGTERM
_STUCK_S = 0.3
_NODE_CLOSE_S = 3.0
_ALL_DECLARED_S = 5.0


# -- identity ---------------------------------------------------------------------------------


class Progress(NamedTuple):
    """What `Worker.report` was last told. `at`: `time.monotonic()` of that moment."""

    step: int | None
    metrics: dict[str, Any]
    at: float


class Worker:
    """This process's place in its job. `current_worker()` gives it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._stop = _StopRequest(spec.shutdown_timeout_s)
        self._job_info: JobInfo | None = None
        self._progress: Progress | None = None
        self._steps: StepFile | None = None

    @property
    def job_info(self) -> JobInfo:
        """`name`, `job_id`, `user_config`, `accelerator_type` ("CPU" or "GPU")."""
        if self._job_info is None:
            job = self._spec.job
            # A config may hold objects of the user's own classes: nobody but the worker opens it.
            config: Any = job.config
            if isinstance(config, bytes):
                config = pickle.loads(config)
            self._job_info = JobInfo(job.name, self._spec.job_id, config, job.device_type)
        return self._job_info

    @property
    def actor_info(self) -> ActorInfo:
        """`name`, `role`, `rank`, `node_rank`, `local_rank`, `world_size`, `local_world_size`, `host`,
        `restart_count`, `spec`."""
        return self._spec.info

    @property
    def should_stop(self) -> bool:
        """Whether this worker was asked to stop (SIGTERM, preemption). A worker that looks at this, or
        at `stop_event`, ends by itself; one that never does gets `SystemExit(143)`."""
        self._stop.watched = True
        return self._stop.requested

    @property
    def stop_event(self) -> threading.Event:
        """Set when `should_stop` becomes true."""
        self._stop.watched = True
        return self._stop.event

    @property
    def stop_deadline(self) -> float | None:
        """`time.monotonic()` at which this process is killed, once it was asked to stop."""
        return self._stop.deadline

    @property
    def progress(self) -> Progress | None:
        """What was last reported here."""
        return self._progress

    def report(self, step: int | None = None, **metrics: Any) -> None:
        """Say how far this worker is: `step` (not negative) and any numbers. Cheap: call it each step.

        Others see the step in `members()` and `python -m runtime status`, within a heartbeat. Raises
        `MisuseError` for a step that is no whole number, or negative.
        """
        if step is not None:
            if isinstance(step, bool) or not hasattr(step, "__index__") or step < 0:
                raise MisuseError(f"report(step={step!r}): expected a whole number from 0 on")
            self._show(int(step))
        elif self._progress is not None:
            step = self._progress.step
        self._progress = Progress(step, metrics, time.monotonic())

    def _show(self, step: int) -> None:
        if self._progress is None or self._progress.step is None:
            from runtime.launcher.progress import StepFile  # a script need not report

            try:
                self._steps = StepFile(self._spec)
            except OSError as error:
                logger.warning("nobody else sees what this worker reports: %s", error)
        if self._steps is not None:
            self._steps.write(step)

    def __str__(self) -> str:
        me = self._spec.info
        return (
            f"{me.name} (rank {me.rank} of {me.world_size}, local rank {me.local_rank} of "
            f"{me.local_world_size} on {me.host}, restart {me.restart_count}) "
            f"of job {self._spec.job.name!r} ({self._spec.job_id})"
        )

    def __repr__(self) -> str:
        return f"<Worker {self}>"


class _Slot:
    worker: Worker | None = None


_slot = _Slot()


def current_worker() -> Worker:
    """This process's worker. Raises `MisuseError` outside of a job."""
    if _slot.worker is None:
        raise MisuseError(
            "this process is not a worker of a job: start it with "
            "`python -m runtime.launch script.py`"
        )
    return _slot.worker


# -- stop requests ----------------------------------------------------------------------------


class _StopRequest:
    """SIGTERM, as the program sees it.

    Nobody looks at `should_stop`: the main thread gets `SystemExit(143)`; if it is stuck in code that
    does not return to the interpreter, a helper thread ends the process instead. Somebody does look:
    they decide, until the agent's patience ends.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._seen = False
        self.event = threading.Event()
        self.requested = False
        self.deadline: float | None = None
        self.watched = False
        self._instead: Callable[[], None] | None = None

    def leave_to(self, instead: Callable[[], None]) -> None:
        """From now on `instead` is called, in the signal handler: the main thread serves calls, or is
        leaving already, and must not be interrupted."""
        self._instead = instead
        if self.requested:
            instead()

    def install(self) -> None:
        """Take over SIGTERM. On the main thread only."""
        wake, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        # In a process that the program forks, its signals are its own business.
        os.register_at_fork(after_in_child=self.give_back)
        threading.Thread(
            target=self._watch, args=(wake,), name="runtime-signals", daemon=True
        ).start()

    def give_back(self) -> None:
        """SIGTERM ends the process again, as it does by default."""
        if self._is_ours():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)

    def _is_ours(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self._on_signal

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self._seen = not self._seen, True
        self._request()
        if self._instead is not None:
            self._instead()
        elif first and not self.watched:
            raise SystemExit(_STOPPED)

    def _request(self) -> None:
        if self.requested:
            return
        self.requested = True
        self.deadline = time.monotonic() + self._grace_s
        # Not from here: a handler may have interrupted the main thread inside of this very lock.
        start_new_thread(self.event.set, ())

    def _watch(self, wake: int) -> None:
        while True:
            try:
                numbers = os.read(wake, 64)
            except OSError:  # the program closed all descriptors that it did not know
                return
            if not numbers:
                return
            if signal.SIGTERM in numbers and self._is_ours():
                self._end_if_stuck()

    def _end_if_stuck(self) -> None:
        limit = time.monotonic() + _STUCK_S
        while not self._seen:
            if time.monotonic() > limit:
                break
            time.sleep(0.01)
        else:
            return
        self._request()
        if not self.watched and self._instead is None:
            entrypoint.end_now(_STOPPED)


# -- the run ----------------------------------------------------------------------------------


def main(spec: WorkerSpec) -> int:
    """Do what `spec` says and give the exit code. Once in a process, on its main thread."""
    _slot.worker = worker = Worker(spec)
    # What multiprocessing's tracker removes after a worker that was killed is no news of its own.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    return _Run(spec, worker, worker._stop).to_the_end()


class _HandlerRunner:
    """Runs plain RPC handlers: on the main thread where that serves, else on a thread of its own.

    Which of the two is known when the entry has been loaded; calls that come before that wait.
    """

    def __init__(self, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: ThreadRunner | None = None

    def submit(self, work: Callable[[], None]) -> None:
        with self._lock:
            if self._thread is not None:
                self._thread.submit(work)
            else:
                self._queue.put(work)

    def use_thread(self) -> None:
        """Run handlers beside the main thread, those that wait already first."""
        from runtime.peer.threads import ThreadRunner

        with self._lock:
            if self._thread is None:
                self._thread = ThreadRunner("runtime-handlers", prepare=self._prepare)
                while not self._queue.empty():
                    if (work := self._queue.get()) is not None:
                        self._thread.submit(work)

    def serve(self) -> None:
        """Run handlers on this thread until `stop`; those that wait then are run first."""
        while (work := self._queue.get()) is not None:
            try:
                work()
            except SystemExit as error:
                logger.error("a handler asked to exit (%s): its caller was told so", error.code)
            except Exception:
                logger.exception("a handler failed after it was answered")

    def stop(self) -> None:
        """End `serve`. Safe in a signal handler."""
        self._queue.put(None)


class _UserLoop:
    """Runs what `async def` entries return, all of one entry in one loop."""

    def __init__(self) -> None:
        self._runner: asyncio.Runner | None = None

    def finish(self, result: Any) -> Any:
        """`result`, or what comes of it if it is a coroutine."""
        if not inspect.iscoroutine(result):
            return result
        import asyncio

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(result)

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


class _Run:
    """One worker's way from its entry to its exit code."""

    def __init__(self, spec: WorkerSpec, worker: Worker, stop: _StopRequest) -> None:
        self._spec, self._worker, self._stop = spec, worker, stop
        self._pid = os.getpid()
        self._reported: BaseException | None = None
        self._use_device = partial(process_group.use_device, spec)
        self._handlers = _HandlerRunner(self._use_device)
        self._peer: BlockingNode | None = None
        self._to_declare: set[str] = set()
        self._user_loop = _UserLoop()
        self._starting = threading.RLock()
        self._grace = spec.shutdown_timeout_s

    def to_the_end(self) -> int:
        error: BaseException | None = None
        try:
            self._stop.install()
            if self._spec.entry.form == "object":
                self._run_object()
            else:
                self._run_program()
        except BaseException as raised:  # noqa: BLE001 - the user's program ends here, however it does
            error = raised
        return self._leave(error)

    # -- scripts and modules ------------------------------------------------------------------

    def _run_program(self) -> None:
        entry = self._spec.entry
        prepare = entrypoint.prepare_script if entry.form == "script" else entrypoint.prepare_module
        program = prepare(entry)
        self._to_declare = set(program.rpc_names)
        self._handlers.use_thread()
        context.hold(self._spec)
        context.on_first_use(self._start_for_program)
        if not program.own_node:
            method.listen(self._declared)
        with process_group.opened(self._spec):
            entrypoint.run_program(program)

    def join_from_program(self, rpc_names: frozenset[str]) -> None:
        """Of a program that runs already: connect, and let others know when it is fit to be called."""
        self._to_declare = set(rpc_names)
        self._handlers.use_thread()
        on_main = threading.current_thread() is threading.main_thread()
        if on_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._stop.install()
        self._start_for_program()

    def quit_from_program(self, *, leave: bool) -> None:
        """End what `join_from_program` began. Not `leave`: others hear of the process's end from the agent."""
        if self._peer is None or os.getpid() != self._pid:
            return
        self._stop.give_back()
        if leave and self._peer.running:
            self._peer.run(self._peer.node.control.leave(final=True))
        self._peer.stop(_NODE_CLOSE_S, leave=False)

    def _start_for_program(self) -> None:
        with self._starting:
            if context.installed() is not None:
                return
            peer = self._begin_node()
            peer.start(self._spec.start_timeout_s)
            method.listen(self._declared)
            self._join_when_declared()
            if not peer.node.joined:
                # A decorator around @rpc may hide a function from us: others must not wait for ever.
                peer.call_soon(peer.node.join_later, _ALL_DECLARED_S)

    def _declared(self, function: Callable[..., Any]) -> None:
        """The program has defined an `@rpc` function of its own; with the last one it can be found."""
        if self._peer is None or not self._peer.running:
            self._start_for_program()  # which comes back here, for each function defined so far
            return
        self._peer.node.endpoint.export_function(function)
        self._to_declare.discard(function.__name__)
        self._join_when_declared()

    def _join_when_declared(self) -> None:
        if not self._to_declare and self._peer is not None:
            self._peer.run(self._peer.node.join())

    def _begin_node(self) -> BlockingNode:
        if self._peer is None:
            from runtime.blocking import BlockingNode
            from runtime.node import Node

            make = partial(
                Node.from_spec, self._spec, runner=self._handlers, prepare=self._use_device
            )
            self._peer = BlockingNode(make, on_failure=self._handlers.stop)
        self._peer.begin()
        return self._peer

    # -- objects ------------------------------------------------------------------------------

    def _run_object(self) -> None:
        spec, target = self._spec, self._spec.entry.target
        peer = self._begin_node()
        context.on_first_use(lambda: peer.start(spec.start_timeout_s))
        loaded = entrypoint.load_target(spec.entry)
        is_class = inspect.isclass(loaded.callable)
        if is_class:
            entrypoint.check_constructor(loaded.callable, target)
        else:
            arguments = entrypoint.arguments_for(loaded.callable, self._config, target)
        peer.start(spec.start_timeout_s)
        endpoint = peer.node.endpoint
        for function in method.rpc_functions(loaded.module):
            endpoint.export_function(function)
        with process_group.opened(spec):
            if is_class:
                self._run_instance(loaded.callable(), peer)
                return
            self._handlers.use_thread()
            peer.run(peer.node.join())
            self._user_loop.finish(loaded.callable(*arguments))

    def _run_instance(self, instance: Any, peer: BlockingNode) -> None:
        serves, exports = not hasattr(instance, "run"), bool(method.rpc_methods(type(instance)))
        if serves and not exports:
            raise MisuseError(
                f"entry {self._spec.entry.target!r} has neither run() nor an @rpc method: nothing to do"
            )
        if exports:
            peer.node.endpoint.export_instance(None, instance)
        if not serves:
            self._handlers.use_thread()
        try:
            self._call_if_there(instance, "setup")
            # Known to others only now: calls that come before the set-up is done wait at the caller.
            peer.run(peer.node.join())
            if serves:
                self._serve(peer)
            else:
                self._user_loop.finish(instance.run())
        except BaseException as error:
            self._report(error)  # before a teardown that may hang
            with entrypoint.bounded("teardown()", self._grace, entrypoint.exit_code(error)):
                self._tear_down_after(instance)
            raise
        limit = self._grace if self._stop.requested else self._spec.start_timeout_s
        with entrypoint.bounded("teardown()", limit, 1):
            self._call_if_there(instance, "teardown")

    def _serve(self, peer: BlockingNode) -> None:
        self._stop.leave_to(self._handlers.stop)
        self._handlers.serve()
        if not self._stop.requested:
            raise Closed("this worker cannot serve calls any more: its node failed") from peer.error

    def _call_if_there(self, instance: Any, name: str) -> None:
        function = getattr(instance, name, None)
        if function is not None:
            self._user_loop.finish(function())

    def _tear_down_after(self, instance: Any) -> None:
        try:
            self._call_if_there(instance, "teardown")
        except (Exception, SystemExit):
            logger.exception("teardown() failed as well")

    def _config(self) -> Any:
        return self._worker.job_info.user_config

    # -- leaving ------------------------------------------------------------------------------

    def _report(self, error: BaseException | None) -> None:
        if error is None or error is self._reported or not entrypoint.is_failure(error):
            return
        self._reported = error
        progress = self._worker.progress
        # In a child that the program forked, the error file is not ours to write.
        path = self._spec.error_file if os.getpid() == self._pid else ""
        entrypoint.report_error(error, path, progress.step if progress else None)

    def _leave(self, error: BaseException | None) -> int:
        """What a normal interpreter exit does, then the end of the node."""
        self._stop.leave_to(lambda: None)
        code = entrypoint.exit_code(error)
        self._report(error)
        limit = self._grace if code or self._stop.requested else None
        with entrypoint.bounded("what the program left running", limit, code):
            entrypoint.finish_program(self._user_loop.close)
        if self._peer is not None and os.getpid() == self._pid:
            self._peer.stop(_NODE_CLOSE_S, leave=code == 0)
        return code


# -- in somebody else's job -------------------------------------------------------------------


class Guest:
    """The worker that a program has become which torchrun, srun or mpirun has started (`embedding.py`).

    The program's end stays its own: nothing is said to the job then, its agent sees how it ends.
    """

    def __init__(self, spec: WorkerSpec, rpc_names: frozenset[str]) -> None:
        """Join the job; others find this process once all `rpc_names` are declared. SIGTERM becomes a stop request
        where nobody handles it."""
        _slot.worker = self.worker = Worker(spec)
        self._run = _Run(spec, self.worker, self.worker._stop)
        self._run.join_from_program(rpc_names)

    def close(self, *, leave: bool) -> None:
        """End the connections. `leave`: the process goes on without the job, which others are told."""
        self._run.quit_from_program(leave=leave)
