"""The one door for starting and ending processes.

Every process of ours gets a session of its own, standard streams that were chosen for it and no other
descriptor. An agent is the *subreaper* of what it starts: whatever a worker forks and forgets becomes
the agent's child, so it can be found and ended; `descendants` lists nothing but our own. How a process
ended is seen in `watch.py`.

The launcher imports this first of all: no asyncio here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder that the package lies in."""
_PR_SET_PDEATHSIG = 1
_TRACKER = b"from multiprocessing.resource_tracker import main"
_TRACKER_S = 1.0
_PR_SET_CHILD_SUBREAPER = 36
_WORKER_OOM_SCORE = 500


class Exit(NamedTuple):
    """How a process ended: `code` for an exit, `signal` (a number) for a death by signal."""

    code: int = 0
    signal: int = 0

    @property
    def cause(self) -> str:
        """In words: "exit 3", "SIGKILL"."""
        from runtime.launcher.report import signal_name  # late: nothing goes before the agent

        return signal_name(self.signal) if self.signal else f"exit {self.code}"

    @property
    def shell_code(self) -> int:
        """As a shell would give it: 128 + signal for a death by signal."""
        return 128 + self.signal if self.signal else self.code

    @classmethod
    def from_status(cls, status: int) -> Exit:
        """From what `waitpid` gave."""
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.WEXITSTATUS(status))


class Streams(NamedTuple):
    """Descriptors that become standard input, output and error; None: /dev/null, ours, ours."""

    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None


INHERIT = Streams()


def _prctl(option: int, value: int) -> None:
    import ctypes  # late: the launcher starts its agent before it needs this

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")


def become_subreaper() -> None:
    """Orphans among our descendants become our children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> bool:
    """SIGKILL for us when our parent dies. False when `parent` is not (or no longer) our parent."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def offer_to_oom_killer() -> None:
    """Raise our own `oom_score_adj`, so that a worker is taken before its agent."""
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            if int(file.read()) < _WORKER_OOM_SCORE:
                file.seek(0)
                file.write(str(_WORKER_OOM_SCORE))
    except OSError:  # no /proc, or not allowed: only a preference is lost
        pass


def bootstrap(module: str, *arguments: int, first: str | None = None) -> str:
    """Code for `python -c` that calls `module.main(*arguments)`, wherever the package is installed.

    `first` ("module:function") is called before `module` is imported; what it gives goes to `main`, too.
    The garbage collector is off meanwhile: it would take a tenth of the time, and find nothing.
    """
    code = f"import gc, sys; gc.disable(); sys.path[0] = {ROOT!r}; "
    given = [str(argument) for argument in arguments]
    if first is not None:
        where, _, name = first.partition(":")
        code += f"from {where} import {name}; first = {name}(); "
        given.append("first")
    return f"{code}from {module} import main; gc.freeze(); gc.enable(); main({', '.join(given)})"


def start(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    streams: Streams = INHERIT,
    pass_fds: Sequence[int] = (),
    tied: bool = False,
) -> int:
    """Start a program in a session of its own and give its pid, which the caller must wait for. `tied`: it is killed
    when the calling thread ends.

    Raises `OSError` (with the program's or the directory's name) when it cannot be started.
    """
    parent = os.getpid()

    def tie() -> None:
        if not die_with_parent(parent):
            os._exit(1)

    process = subprocess.Popen(
        argv,
        preexec_fn=tie if tied else None,
        env=None if env is None else dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL if streams.stdin is None else streams.stdin,
        stdout=streams.stdout,
        stderr=streams.stderr,
        pass_fds=pass_fds,
        close_fds=True,
        start_new_session=True,
    )
    process.returncode = 0  # ours to wait for from here on: Popen must neither poll nor warn
    return process.pid


# Its fork server starts before it has imported anything itself.
AGENT = bootstrap("runtime.agent", 0, first="runtime.launcher.zygote:start_first")
"""The code that an interpreter runs as an agent."""
ADOPTING_AGENT = bootstrap("runtime.agent")
"""The same for an agent of workers that somebody else has started: it needs no fork server."""


def guarded_agent(patience_s: int = 0) -> str:
    """The same where no launcher cleans up after it; it waits so many seconds for its job (0: for ever)."""
    return bootstrap("runtime.agent", patience_s, first="runtime.launcher.guard:start_guarded")


class LocalAgent(NamedTuple):
    """A started agent: its process and our ends of its pipes."""

    pid: int
    read_fd: int
    write_fd: int


def start_agent(code: str = AGENT, stderr: int | None = None) -> LocalAgent:
    """Start an agent on this host, which reads frames from its standard input, the first of them its
    assignment, and writes frames to its standard output. `stderr`: for it and its fork servers; None: ours.
    Raises `OSError`."""
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    try:
        pid = start([sys.executable, "-c", code], streams=Streams(down_read, up_write, stderr))
    except OSError:
        os.close(down_write)
        os.close(up_read)
        raise
    finally:
        os.close(down_read)
        os.close(up_write)
    return LocalAgent(pid, up_read, down_write)


def send_signal(pid: int, number: int) -> None:
    """Signal a process; one that is gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


class ProcessInfo(NamedTuple):
    """What /proc says of one process. `state`: "R", "S", "Z" ...; `started`: ticks since the host did, which
    tell it from a later process of that pid."""

    pid: int
    name: str
    state: str
    parent: int
    session: int
    started: int


def look_at(pid: int) -> ProcessInfo | None:
    """A process's line in /proc; None when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    name = head.partition("(")[2]
    return ProcessInfo(pid, name, fields[0], int(fields[1]), int(fields[3]), int(fields[19]))


def own_process() -> tuple[int, int]:
    """Our pid, and `ProcessInfo.started`."""
    found = look_at(os.getpid())
    assert found is not None
    return found.pid, found.started


def children(pid: int) -> list[int]:
    """Direct children, zombies included."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                found.extend(int(word) for word in file.read().split())
    except FileNotFoundError:
        if os.path.exists(f"/proc/{pid}"):  # a kernel without that file: look at everybody
            return [info.pid for info in _everybody() if info.parent == pid]
    except ProcessLookupError:
        pass
    return found


def _everybody() -> Iterable[ProcessInfo]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (info := look_at(int(name))) is not None:
            yield info


def descendants(pid: int | None = None, *, without: Iterable[int] = ()) -> list[ProcessInfo]:
    """All living processes below `pid` (default: us), except `without` and what is below those."""
    skip = set(without)
    found: list[ProcessInfo] = []
    queue = [os.getpid() if pid is None else pid]
    while queue:
        for child in children(queue.pop()):
            if child in skip:
                continue
            skip.add(child)
            queue.append(child)
            info = look_at(child)
            if info is not None and info.state not in "ZX":
                found.append(info)
    return found


def reap_orphans(known: Iterable[int] = ()) -> None:
    """Collect ended children that nobody watches (orphans that became ours)."""
    watched = set(known)
    for pid in children(os.getpid()):
        if pid in watched:
            continue
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass


def kill_session(session: int) -> None:
    """SIGKILL for every descendant of ours that belongs to `session`, but for resource trackers."""
    for info in descendants():
        if info.session == session and not _is_tracker(info.pid):
            send_signal(info.pid, signal.SIGKILL)


def _is_tracker(pid: int) -> bool:
    """Whether this is the process that removes the shared memory and the semaphores of a Python program
    once all who used them are gone (`multiprocessing`). It ends by itself then; killed, it removes none.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return _TRACKER in file.read()
    except OSError:
        return False


def kill_descendants(timeout: float = 3.0, *, without: Iterable[int] = ()) -> list[ProcessInfo]:
    """SIGKILL for everything below us until nothing is left, for at most `timeout` seconds (blocking).

    Gives what is still there: processes in an uninterruptible wait, for the log.
    """
    skip = list(without)
    start = time.monotonic()
    while left := descendants(without=skip):
        waited = time.monotonic() - start
        for info in left:
            if waited > _TRACKER_S or not _is_tracker(info.pid):
                send_signal(info.pid, signal.SIGKILL)
        reap_orphans(skip)
        if waited > timeout:
            return left
        time.sleep(0.002)
    reap_orphans(skip)
    return []
