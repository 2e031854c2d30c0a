"""The fork server: a process that has imported the heavy modules once and is forked for each worker.

It runs one thread and no event loop. Its agent tells it over a unix socket pair what to import and then,
again and again, to fork workers; descriptors (the worker's order, stdout, stderr) travel beside the
message. Workers are forked by a process in between, which ends at once, so that they become children of
the agent. All workers of one request are forked by the same one: a fork of a process that has torch in
it costs some milliseconds. A worker begins only when the agent has its pid (a byte in a pipe says so): if
the zygote is killed half way, none of a request's workers runs, and it can be made again.

A fork copies one thread only. What must not be in the process when it is forked (a team of OpenMP
threads, CUDA, a zmq context, a connection, any thread at all) is looked for after the imports; if it is
there, the zygote says so and ends, and workers are exec'd.

The end of the socket is the end of the zygote. Its own death is no worker's concern.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import stat
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runtime.launcher import child, spawn
from runtime.launcher.tunables import tunables

_MESSAGE_BYTES = 64 * 1024
WARM = ("runtime.worker", "runtime.node", "runtime.transport.sockets")
"""What every worker of ours imports. It reads no variable of a role, so a zygote can begin with it."""
FDS_PER_WORKER = 3
WORKERS_AT_ONCE = 64
"""Of one request: the kernel passes at most 253 descriptors with a message."""


class Started(NamedTuple):
    """A zygote's process, and the descriptor of the agent's end of its socket. `guard`: where an agent that is
    guarded tells its job's folder (`guard.py`)."""

    pid: int
    control_fd: int
    guard: int | None = None


def start(env: Mapping[str, str]) -> Started:
    """Start a zygote as a child of this process, with `env`. Raises `OSError`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = spawn.start(
                [sys.executable, "-c", spawn.bootstrap(__name__, theirs.fileno())],
                env=env,
                streams=spawn.Streams(stdout=2, stderr=2),  # imports' prints are no worker's output
                pass_fds=[theirs.fileno()],
            )
        except OSError:
            ours.close()
            raise
    ours.send(json.dumps({"agent_pid": os.getpid()}).encode())
    return Started(pid, ours.detach())


def start_first() -> Started:
    """The zygote that an agent starts before its own imports, on the chance that it fits its job."""
    return start(first_env())


def first_env() -> dict[str, str]:
    """What that zygote is started with: what workers will have, as far as it can be known by then."""
    return {**os.environ, **tunables(os.environ)}


def main(control_fd: int) -> None:
    """Serve until the agent closes its end. In a forked worker this never returns."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the launcher's business; workers get theirs back
    child.restore_path()
    control = socket.socket(fileno=control_fd)
    hello = json.loads(socket.recv_fds(control, _MESSAGE_BYTES, 0)[0])
    if not spawn.die_with_parent(hello["agent_pid"]):
        return
    for name in WARM:
        child.import_quietly(name)
    order = _Zygote(control).serve()
    if order is not None:
        child.end(child.become(order))


class _Zygote:
    """The serving loop. `serve` returns None at the end, and in each forked worker its order."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._agent_pid = os.getppid()

    def serve(self) -> child.Order | None:
        while True:
            message, fds, _, _ = socket.recv_fds(
                self._control, _MESSAGE_BYTES, FDS_PER_WORKER * WORKERS_AT_ONCE + 1
            )
            if not message:
                return None
            request = json.loads(message)
            if request["op"] == "preload":
                self._preload(child.open_order(fds[0]))
            elif (order := self._spawn(fds)) is not None:
                return order

    def _preload(self, order: child.Order) -> None:
        child.take_environment(order.env)
        for name in order.preload:
            child.import_quietly(name)
        reason = unsafe_to_fork({self._control.fileno()})
        gc.collect()
        gc.freeze()
        self._reply({"ready": reason is None, "reason": reason})

    def _spawn(self, fds: Sequence[int]) -> child.Order | None:
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:
            os.close(read_end)
            return self._between(fds, write_end)
        for fd in (*fds, write_end):
            os.close(fd)
        with open(read_end) as pids:
            found = [int(word) for word in pids.read().split()]
        os.waitpid(between, 0)
        self._reply({"pids": found})
        return None

    def _between(self, fds: Sequence[int], report: int) -> child.Order | None:
        """In the process between: fork the workers, tell their pids, end. In a worker: its order."""
        pids = []
        for first in range(0, len(fds) - 1, FDS_PER_WORKER):
            try:
                pid = os.fork()
            except OSError:  # no process to be had: those not reported are started by other means
                break
            if pid == 0:
                os.close(report)
                return self._worker(fds, first)
            pids.append(pid)
        os.write(report, " ".join(map(str, pids)).encode())
        os._exit(0)

    def _worker(self, fds: Sequence[int], first: int) -> child.Order:
        order_fd, stdout, stderr = fds[first : first + FDS_PER_WORKER]
        begin = fds[-1]
        for fd in set(fds) - {order_fd, stdout, stderr, begin}:
            os.close(fd)
        self._control.close()
        child.settle_forked(self._agent_pid, (os.open(os.devnull, os.O_RDONLY), stdout, stderr))
        if not os.read(begin, 1):
            os._exit(1)
        os.close(begin)
        return child.open_order(order_fd)._replace(preload=())

    def _reply(self, answer: dict[str, Any]) -> None:
        self._control.sendall(json.dumps(answer).encode())


def unsafe_to_fork(own_fds: set[int]) -> str | None:
    """Why this process must not be forked any more, in words; None when it may be.

    A trial fork comes first: libraries that stop their threads before a fork (OpenBLAS does, which
    numpy starts when it is imported) have done so then, and those that do not are what is looked for.
    """
    if names := [t.name for t in threading.enumerate() if t is not threading.main_thread()]:
        return f"a Python thread is running: {', '.join(names)}"
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
        return "CUDA is initialized"
    if reason := _zmq_context():
        return reason
    with warnings.catch_warnings():
        # Of forking beside native threads: that is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        trial = os.fork()
    if trial == 0:
        os._exit(0)
    os.waitpid(trial, 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return (
            f"{threads - 1} native threads are running (a parallel operation was executed; "
            "OpenMP threads do not survive a fork)"
        )
    return _foreign_descriptor(own_fds)


def _zmq_context() -> str | None:
    zmq = sys.modules.get("zmq")
    if zmq is None:
        return None
    context = zmq.Context
    # Not isinstance: that asks objects which pretend to be others, and some warn about it.
    if any(issubclass(type(o), context) and not o.closed for o in gc.get_objects()):
        return "a zmq context is open"
    return None


def _foreign_descriptor(own_fds: set[int]) -> str | None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and fd not in own_fds and stat.S_ISSOCK(os.fstat(fd).st_mode):
                return f"a socket is open (descriptor {fd})"
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the directory's own descriptor
            continue
        if target.startswith("/dev/nvidia"):
            return f"{target} is open"
    return None
