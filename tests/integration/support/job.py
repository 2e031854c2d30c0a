"""One job started as a user starts it, `python -m runtime.launch …`, and watched from outside.

Nothing here imports the package: what the tests assert is what a user sees, exit code, text, files and what
is left of it. Every wait is bounded, and says at its end what it waited for and what the job had printed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.integration.support import processes
from tests.integration.support.processes import Process

ROOT = Path(__file__).resolve().parents[3]
MARKER = "RUNTIME_TEST_JOB"
FRAME_OF_OURS = re.compile(rf'File "{re.escape(str(ROOT / "runtime"))}/')


class Stream:
    """What came out of one pipe or terminal so far. A thread reads it to its end and owns the descriptor.

    It never sits in `read`: a thread that did would keep a terminal open that is to be hung up.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._data = bytearray()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="job-output", daemon=True)
        self._thread.start()

    def _pump(self) -> None:
        poller = select.poll()  # `select` would know numbers below 1,024 only
        poller.register(self._fd, select.POLLIN)
        try:
            while not self._stop.is_set():
                if not poller.poll(50):
                    continue
                chunk = os.read(self._fd, 1 << 16)
                if not chunk:
                    return
                self._data += chunk
        except OSError:
            return  # a terminal whose other side is gone says EIO, not end of file
        finally:
            os.close(self._fd)

    @property
    def bytes(self) -> bytes:
        return bytes(self._data)

    @property
    def text(self) -> str:
        return self._data.decode(errors="replace")

    def wait_for_end(self, timeout: float) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5.0)


class Job:
    """A launcher process of its own session, with its output, its processes and its directories.

    `options` are the arguments after `-m runtime.launch` (or another `program`). `terminal=True` gives it a controlling terminal
    as its standard streams (`out` then holds both); with `read_output=False` the test reads `popen.stdout`
    and `popen.stderr` itself; `out_file` takes stdout instead of a pipe. The runtime directory and TMPDIR
    are this job's own, so that what is left in them is known to be its.
    """

    def __init__(
        self,
        options: Sequence[str | Path],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
        read_output: bool = True,
        out_file: Path | None = None,
        program: str = "runtime.launch",
    ) -> None:
        self.cwd, self.logs = cwd, cwd / "logs"
        self.marker = f"{MARKER}={uuid.uuid4().hex}"
        self._base = Path(tempfile.mkdtemp(prefix="rtj-", dir="/tmp"))
        self.runtime_dir, self.temp_dir = self._base / "run", self._base / "tmp"
        self.runtime_dir.mkdir(mode=0o700)
        self.temp_dir.mkdir(mode=0o700)
        self.home = self._base / "home"
        self.home.mkdir()
        self._memory = processes.shared_memory()
        self._seen: dict[tuple[int, int], Process] = {}
        self._master = -1
        self.argv = [sys.executable, "-m", program, "--log-dir", str(self.logs)]
        self.argv += [str(option) for option in options]
        self.started = time.monotonic()
        self.popen = self._start(self._environment(env or {}), terminal, out_file)
        self._streams = self._collect(terminal) if read_output else []

    def _environment(self, env: Mapping[str, str]) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RUNTIME_", "PET_"))}
        name, _, value = self.marker.partition("=")
        ours = {
            name: value,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{self.cwd}",
            "XDG_RUNTIME_DIR": str(self.runtime_dir),
            "TMPDIR": str(self.temp_dir),
            "HOME": str(self.home),
        }
        return inherited | ours | dict(env)

    def _start(
        self, env: dict[str, str], terminal: bool, out_file: Path | None
    ) -> subprocess.Popen[bytes]:
        if not terminal:
            with open(out_file or os.devnull, "wb") as file:
                return subprocess.Popen(
                    self.argv,
                    cwd=self.cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=file if out_file else subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
        self._master, slave = os.openpty()
        try:
            return subprocess.Popen(
                self.argv,
                cwd=self.cwd,
                env=env,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )
        finally:
            os.close(slave)

    def _collect(self, terminal: bool) -> list[Stream]:
        if terminal:
            return [Stream(os.dup(self._master))]
        pipes = [pipe for pipe in (self.popen.stdout, self.popen.stderr) if pipe is not None]
        streams = [Stream(os.dup(pipe.fileno())) for pipe in pipes]
        for pipe in pipes:
            pipe.close()
        return streams

    @property
    def pid(self) -> int:
        """The launcher's process id."""
        return self.popen.pid

    @property
    def out(self) -> str:
        return self._streams[0].text

    @property
    def out_bytes(self) -> bytes:
        return self._streams[0].bytes

    @property
    def err(self) -> str:
        return self._streams[-1].text

    def describe(self) -> str:
        """Everything a failed assertion needs to be understood."""
        alive = "\n".join(str(p) for p in self.processes()) or "none"
        streams = "" if not self._streams else f"\n-- out --\n{self.out}\n-- err --\n{self.err}"
        shown = streams if len(streams) < 20_000 else f"{streams[:8000]}\n[…]\n{streams[-8000:]}"
        code = self.popen.poll()
        return f"\n{' '.join(self.argv)}\nexit code {code}{shown}\n-- processes --\n{alive}"

    # -- waiting ---------------------------------------------------------------------------------

    def wait(self, timeout: float = 45.0) -> int:
        """The launcher's exit code, once it has ended and its output was read to the end."""
        try:
            code = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the job did not end in {timeout} s{self.describe()}") from None
        self.seconds = time.monotonic() - self.started
        for stream in self._streams:
            assert stream.wait_for_end(5.0), f"somebody still holds its output{self.describe()}"
        return code

    def wait_until(self, condition: Callable[[], object], what: str, timeout: float = 30.0) -> None:
        """Wait until `condition()` is true; an ended launcher ends the wait early."""
        until = time.monotonic() + timeout
        while not condition():
            ended = self.popen.poll() is not None
            if time.monotonic() > until or (ended and not condition()):
                how = "ended" if ended else f"waited {timeout} s"
                raise AssertionError(f"{how} before {what}{self.describe()}")
            time.sleep(0.02)

    def wait_for_text(self, text: str, count: int = 1, timeout: float = 30.0) -> None:
        """Wait until `text` was printed `count` times, on either stream."""

        def seen() -> bool:
            return sum(stream.text.count(text) for stream in self._streams) >= count

        self.wait_until(seen, f"{text!r} was printed {count} times", timeout)

    def wait_for_files(self, *names: str, timeout: float = 30.0) -> None:
        """Wait until the workers have written these files in the working directory."""

        def there() -> bool:
            return all((self.cwd / name).exists() for name in names)

        self.wait_until(there, f"the files {names} were written", timeout)

    # -- its processes ---------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Every living process of this job, oldest first, also those that changed their environment."""
        for process in processes.with_marker(self.marker):
            self._seen[process.pid, process.started] = process
        alive = []
        for (pid, started), _ in sorted(self._seen.items(), key=lambda item: item[0][1]):
            now = processes.look_at(pid)
            if now is not None and now.started == started:
                alive.append(now)
        return alive

    def agent(self) -> Process:
        """The agent: the launcher's child."""
        return self._oldest_child(self.pid, "agent")

    def agents(self) -> list[Process]:
        """All agents, in the order of their hosts."""
        return [p for p in self.processes() if p.parent == self.pid]

    def zygote(self) -> Process:
        """The fork server: the agent's first child, older than all that it forks."""
        return self._oldest_child(self.agent().pid, "fork server")

    def _oldest_child(self, parent: int, what: str) -> Process:
        for process in self.processes():
            if process.parent == parent:
                return process
        raise AssertionError(f"the job has no {what}{self.describe()}")

    def worker_pid(self, rank: int, attempt: int = 0, timeout: float = 30.0) -> int:
        """The pid that the worker of `rank` wrote at its `attempt`-th start (`programs.WRITE_PID`)."""
        name = f"pid.{rank}.{attempt}"
        self.wait_for_files(name, timeout=timeout)
        self.processes()
        return int((self.cwd / name).read_text())

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the launcher, as `kill` does."""
        self.popen.send_signal(number)

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def hang_up(self) -> None:
        """Close the terminal."""
        for stream in self._streams:
            stream.close()
        os.close(self._master)
        self._master = -1

    # -- after it --------------------------------------------------------------------------------

    def assert_nothing_left(self, within: float = 5.0) -> None:
        """No process, socket, runtime or temporary directory and no shared memory of this job."""
        until = time.monotonic() + within
        while left := self._left():
            if time.monotonic() > until:
                raise AssertionError(f"left after {within} s: {left}{self.describe()}")
            time.sleep(0.05)

    def _left(self) -> dict[str, list[str]]:
        found = {
            "processes": [str(p) for p in self.processes()],
            "runtime directory": sorted(str(p) for p in self.runtime_dir.rglob("*")),
            "sockets": processes.unix_sockets(str(self._base)),
            "temporary files": sorted(str(p) for p in self.temp_dir.rglob("*")),
            "shared memory": sorted(processes.orphaned_shared_memory(since=self._memory)),
        }
        return {what: names for what, names in found.items() if names}

    def close(self) -> None:
        """End whatever is left, by pid, and remove this job's directories."""
        until = time.monotonic() + 10.0
        while (alive := self.processes()) and time.monotonic() < until:
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            self.popen.poll()
            time.sleep(0.02)
        self.popen.wait(10.0)
        if self._master >= 0:
            os.close(self._master)
        for stream in self._streams:
            stream.close()
        for pipe in (self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self._base, ignore_errors=True)
