"""What a new worker process does between its birth and the worker's `main`.

A worker is born by fork from a zygote or by exec of a fresh interpreter; from here on both are the same:
a session of its own, its agent as the parent whose death is its death, default signals, its own standard
streams, environment and directory; then the preloaded modules, fresh random seeds and the thread count
its environment asks for. The function to run is named by the agent ("runtime.worker:main"), since the
launcher's layer knows nothing of workers.

This module is imported by every worker before anything else: it must stay light.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import io
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from runtime.launcher import spawn

_ADOPTION_S = 10.0


class Order(NamedTuple):
    """What the agent tells a new process. Plain values; `argument` is opened by the process alone."""

    function: str
    """ "module:function"; it is called with the unpickled `argument` and returns the exit code."""
    argument: bytes
    env: dict[str, str]
    workdir: str
    agent_pid: int
    preload: tuple[str, ...] = ()
    title: str = ""
    """Shown as the process's name (at most 15 bytes of it)."""


def pack_order(order: Order) -> int:
    """The order as an anonymous file, to be handed over as a descriptor. The caller closes it."""
    fd = os.memfd_create("order")
    with open(fd, "wb", closefd=False) as file:
        pickle.dump(tuple(order), file, protocol=5)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def open_order(fd: int) -> Order:
    """Read and close what `pack_order` made."""
    with open(fd, "rb") as file:
        return Order(*pickle.load(file))


def command(python: str, order_fd: int) -> list[str]:
    """The command line of a worker that is exec'd."""
    return [python, "-c", spawn.bootstrap("runtime.launcher.child", order_fd)]


def restore_path() -> None:
    """Undo what `spawn.bootstrap` did to `sys.path`: the program's own directory is to be put first.

    Where the package is not installed its root stays, behind everything else.
    """
    root = sys.path.pop(0)
    if root not in sys.path:
        sys.path.append(root)


def main(order_fd: int) -> None:
    """Of an exec'd worker: the standard streams are in place, we are our session's leader."""
    restore_path()
    order = open_order(order_fd)
    if not spawn.die_with_parent(order.agent_pid):
        os._exit(1)
    end(become(order))


def end(code: int) -> NoReturn:
    """End this process as `sys.exit` would, but without taking the interpreter apart.

    Non-daemon threads are joined, `atexit` functions run and streams are flushed. What is left out
    would write to nearly every page that a forked worker shares with its zygote: most of a second of
    a core with torch loaded. `multiprocessing` ends its children in this way, too.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined,unused-ignore]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except OSError:  # nobody reads our output any more
        pass
    os._exit(code & 0xFF)


def settle_forked(agent_pid: int, streams: Sequence[int]) -> None:
    """Of a forked worker: cut what ties it to the zygote. `streams`: new stdin, stdout, stderr."""
    os.setsid()
    _wait_for_adoption(agent_pid)
    for target, fd in enumerate(streams):
        os.dup2(fd, target, inheritable=True)
    for fd in streams:
        if fd > 2:
            os.close(fd)


def _wait_for_adoption(agent_pid: int) -> None:
    # The process between the zygote and us ends at once; then the agent, as subreaper, is our parent.
    # Only from then on does the parent-death signal mean the agent's death.
    limit = time.monotonic() + _ADOPTION_S
    while os.getppid() != agent_pid:
        if time.monotonic() > limit:
            os._exit(1)
        time.sleep(0.0005)
    if not spawn.die_with_parent(agent_pid):
        os._exit(1)


def become(order: Order) -> int:
    """Take on environment, directory, streams and seeds; run the function; give its exit code."""
    _default_signals()
    spawn.offer_to_oom_killer()
    _name_process(order.title)
    take_environment(order.env)
    try:
        os.chdir(order.workdir)
    except OSError as error:
        os.write(2, f"cannot change to the working directory: {error}\n".encode())
        return 126
    _fresh_streams()
    if problem := _start_logging():
        sys.stderr.write(f"runtime: {problem}\n")
        return 2
    faulthandler.disable()  # its handlers were taken away with the zygote's others
    faulthandler.enable()
    for name in order.preload:
        import_quietly(name)
    _fresh_seeds()
    _thread_count()
    module, _, name = order.function.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
        return int(function(pickle.loads(order.argument)) or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - the outermost frame of a process, as the interpreter's own
        sys.excepthook(*sys.exc_info())
        return 1


def exec_program(argv: Sequence[str]) -> int:
    """Become another program (`--no-python`). Gives 127 where it is not found, 126 where it cannot be
    executed, after saying so: the codes a shell would give."""
    try:
        os.execvp(argv[0], list(argv))
    except FileNotFoundError:
        reason, code = "no such program", 127
    except OSError as error:
        reason, code = os.strerror(error.errno or 0), 126
    sys.stderr.write(f"cannot execute {argv[0]!r}: {reason}\n")
    return code


def import_quietly(name: str) -> None:
    """Import a module of the preload list; one that fails is left to the program, which shows why."""
    gc.disable()  # it would take a seventh of torch's time, and find nothing
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001 - a module's own code may raise anything
        sys.stderr.write(f"runtime: cannot preload {name!r}: {type(error).__name__}: {error}\n")
    finally:
        gc.enable()


def _default_signals() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as the interpreter itself has it
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _name_process(title: str) -> None:
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(title[:15])
    except OSError:  # cosmetic
        pass


def take_environment(env: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in env]:
        del os.environ[name]
    os.environ.update(env)


def _fresh_streams() -> None:
    # Unbuffered, as `python -u`: what was printed before a crash has left the process.
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _stream(1, "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, "backslashreplace")  # type: ignore[misc]


def _stream(fd: int, errors: str) -> io.TextIOWrapper:
    raw: Any = io.FileIO(fd, "wb", closefd=False)
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0] or "utf-8"
    return io.TextIOWrapper(raw, encoding=encoding, errors=errors, newline="\n", write_through=True)


def _start_logging() -> str:
    """Our own records, at the levels of RUNTIME_LOG, on stderr; what is wrong with that variable."""
    from runtime.config import parse_log_spec
    from runtime.errors import ConfigError
    from runtime.observe.logs import configure_logging

    try:
        configure_logging(parse_log_spec(os.environ.get("RUNTIME_LOG", "")), sys.stderr)
    except ConfigError as error:  # a role's own environment may say it: nobody has checked that
        return error.reason
    return ""


def _fresh_seeds() -> None:
    # `random` reseeds itself after a fork; these two do not. Other generators belong to the program.
    if numpy_random := sys.modules.get("numpy.random"):
        numpy_random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()


def _thread_count() -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if (torch := sys.modules.get("torch")) and threads.isdigit() and int(threads) > 0:
        torch.set_num_threads(int(threads))
