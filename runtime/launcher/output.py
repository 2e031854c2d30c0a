"""What workers print: as it came into files, as whole lines with their rank onto the console.

Each worker has two pipes. What is read from one is written to its log file byte for byte, and cut into
lines for the launcher's console: a line never mixes with another, whatever its length and encoding.
Nothing is buffered without bound: while the console or the disk cannot take more, pipes are not read,
and at last the worker itself waits in its `print`.

A progress bar (states separated by carriage returns) is shown as one line per interval, its last state;
in the file it is as it was. Files are written by a thread, so that a stuck disk does not stop the agent.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from string import Template
from typing import IO, Literal, NamedTuple

from runtime import aio
from runtime.errors import ConfigError
from runtime.launcher.flags import Streams

logger = logging.getLogger(__name__)

Stream = Literal["stdout", "stderr"]
Sink = Callable[[Stream, bytes], Awaitable[None]]
"""Takes whole, prefixed lines for the console; returns when it can take more."""

_CHUNK = 256 * 1024
_TAIL_BYTES = 64 * 1024
_UNFINISHED_INTERVAL_S = 1.0
_LONGEST_PROMPT = 4096
LONGEST_LINE = 16 * 1024 * 1024
_CONTINUED = b" [line continues]\n"
_COLOURS = (36, 33, 35, 32, 34, 31)


@dataclass(frozen=True)
class OutputSettings:
    """Where output goes. `log_dir`: the job's own folder; None: no files.

    `console` says which streams of a local rank go there; an empty mapping means all. `prefix` is a template with ${role} ${rank} ${local_rank} ${host} ${pid}
    ${time}, as in torchrun's TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE.
    """

    log_dir: str | None = None
    console: Mapping[int, frozenset[Stream]] = field(default_factory=dict)
    prefix: str | None = None
    timestamp: bool = False
    colour: bool = False
    several_hosts: bool = False

    def shows(self, local_rank: int, stream: Stream) -> bool:
        """Whether a stream appears on the console."""
        return not self.console or stream in self.console.get(local_rank, frozenset())


def shown_streams(
    local_rank: int, redirects: Streams | None, tee: Streams | None, only: frozenset[int] | None
) -> frozenset[Stream]:
    """What a worker shows on the console, by torchrun's options: redirected streams go to files alone,
    unless they are tee'd; `only`: the local ranks that are shown at all."""
    if only is not None and local_rank not in only:
        return frozenset()
    hidden = (redirects.of(local_rank) if redirects else 0) & ~(tee.of(local_rank) if tee else 0)
    names: dict[int, Stream] = {1: "stdout", 2: "stderr"}
    return frozenset(name for bit, name in names.items() if not hidden & bit)


class Source(NamedTuple):
    """Whose output it is."""

    role: str
    rank: int
    local_rank: int
    host: str
    attempt: int
    colour: int = 0
    """Position of the role in the job: roles of a terminal's screen differ in colour."""


class Lines:
    """Bytes in, whole lines with a prefix out. Pure; one for each stream of a worker."""

    def __init__(self, prefix: Callable[[], bytes]) -> None:
        self._prefix = prefix
        self._partial = bytearray()
        self._bar: bytes | None = None
        """The last state of a progress bar that was not shown yet."""
        self._seen = self._shown = b""
        """Beginnings of a line: as it was when `unfinished` was last asked, as it was last shown."""

    def feed(self, data: bytes) -> bytes:
        """The lines that are complete with `data`, ready for the console."""
        end = data.rfind(b"\n") + 1
        whole = b""
        if end:
            whole = self._finished(bytes(self._partial) + data[:end])
            self._partial.clear()
            self._bar, self._seen, self._shown = None, b"", b""
        self._partial += data[end:]
        if b"\r" in self._partial:
            self._keep_bar()
        elif len(self._partial) >= LONGEST_LINE:
            whole += self._prefix() + bytes(self._partial) + _CONTINUED
            self._partial.clear()
        return whole

    def unfinished(self) -> bytes:
        """What stands on the line that has not ended yet, as a line, unless it was shown already: of a
        progress bar the last state, of other text if it has not grown since this was asked last."""
        if self._bar is not None:
            state, self._bar = self._bar, None
            return self._prefix() + state + b"\n"
        if not self._partial or b"\r" in self._partial or len(self._partial) > _LONGEST_PROMPT:
            return b""
        text, seen = bytes(self._partial), self._seen
        self._seen = text
        if text != seen or text == self._shown:
            return b""
        self._shown = text
        return self._prefix() + text + b"\n"

    def end(self) -> bytes:
        """What came after the last newline, as a line of its own."""
        rest = bytes(self._partial)
        self._partial.clear()
        if b"\r" in rest:
            return self.unfinished()
        return self._finished(rest + b"\n") if rest and rest != self._shown else b""

    def _keep_bar(self) -> None:
        states = bytes(self._partial).split(b"\r")
        current = states[-1]
        finished = [state for state in states[:-1] if state.strip()]
        if current.strip():
            self._bar = current  # it may be cut off here; the next interval shows the rest
        elif finished:
            self._bar = finished[-1]
            current = finished[-1] + b"\r"
        self._partial = bytearray(current if current.endswith(b"\r") else b"\r" + current)

    def _finished(self, block: bytes) -> bytes:
        if b"\r" in block:
            block = b"".join(_last_state(line) + b"\n" for line in block[:-1].split(b"\n"))
        prefix = self._prefix()
        return prefix + block[:-1].replace(b"\n", b"\n" + prefix) + b"\n"


def _last_state(line: bytes) -> bytes:
    """Of a line with carriage returns: what a terminal would show in the end."""
    states = [state for state in line.split(b"\r") if state.strip()]
    return states[-1] if states else b""


class Tail:
    """The last lines of a stream, for the failure box."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._size = 0

    def feed(self, data: bytes) -> None:
        self._chunks.append(data[-_TAIL_BYTES:])
        self._size += len(self._chunks[-1])
        while self._size - len(self._chunks[0]) >= _TAIL_BYTES:
            self._size -= len(self._chunks.popleft())

    def lines(self, count: int = 50) -> list[str]:
        """At most `count`, oldest first; undecodable bytes are shown as escapes."""
        text = b"".join(self._chunks).decode(errors="backslashreplace")
        lines = [line.rpartition("\r")[2] for line in text.rstrip().split("\n")]
        return [line for line in lines if line.strip()][-count:]


class Capture:
    """The output of one worker process, from its start to the end of its pipes."""

    def __init__(
        self, source: Source, settings: OutputSettings, sink: Sink, writer: ThreadPoolExecutor
    ) -> None:
        self._source, self._settings, self._sink, self._writer = source, settings, sink, writer
        self.pid = 0
        self.tails: dict[Stream, Tail] = {"stdout": Tail(), "stderr": Tail()}
        self._lines: dict[Stream, Lines] = {
            name: Lines(functools.partial(self._prefix, name)) for name in self.tails
        }
        self._ends: dict[Stream, int] = {}
        self._pumps: set[asyncio.Task[None]] = set()
        self._idle: set[Stream] = set()
        """Streams of which everything that the worker wrote has been read."""

    @property
    def folder(self) -> str | None:
        """Where its files are."""
        base, source = self._settings.log_dir, self._source
        if base is None:
            return None
        return os.path.join(base, f"attempt_{source.attempt}", source.role, str(source.rank))

    def open(self) -> tuple[int, int]:
        """Make the pipes; gives the ends that the worker writes to (they are the caller's)."""
        writes = []
        for name in self.tails:
            self._ends[name], write_end = os.pipe()
            writes.append(write_end)
        return writes[0], writes[1]

    def run(self, service: aio.Service) -> None:
        """Read the pipes in tasks of `service` until their ends."""
        for name, fd in self._ends.items():
            source = self._source
            task = service.spawn(self._pump(name, fd), f"{source.role}-{source.rank} {name}")
            self._pumps.add(task)

    async def wait(self, timeout: float) -> bool:
        """Wait for the ends of both pipes; False when somebody still holds one after `timeout` s."""
        if not self._pumps:
            return True
        _, pending = await asyncio.wait(self._pumps, timeout=timeout)
        return not pending

    async def show_unfinished(self) -> None:
        """Show progress bars and prompts as they stand."""
        for name in tuple(self._idle):
            text = self._lines[name].unfinished()
            if text and self._settings.shows(self._source.local_rank, name):
                await self._sink(name, text)

    async def _pump(self, name: Stream, fd: int) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=_CHUNK)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", 0)
        )
        file = self._open_file(name)
        shown = self._settings.shows(self._source.local_rank, name)
        lines, tail = self._lines[name], self.tails[name]
        try:
            while data := await self._read(name, reader):
                tail.feed(data)
                if file is not None:
                    file = await loop.run_in_executor(self._writer, self._write, file, data)
                if (text := lines.feed(data)) and shown:
                    await self._sink(name, text)
        finally:
            transport.close()
            if file is not None:
                file.close()
            if (text := lines.end()) and shown:
                await self._sink(name, text)

    async def _read(self, name: Stream, reader: asyncio.StreamReader) -> bytes:
        self._idle.add(name)
        try:
            return await reader.read(_CHUNK)
        finally:
            self._idle.discard(name)

    def _open_file(self, name: Stream) -> IO[bytes] | None:
        if self.folder is None:
            return None
        path = os.path.join(self.folder, f"{name}.log")
        try:
            os.makedirs(self.folder, exist_ok=True)
            return open(path, "ab", buffering=0)
        except OSError as error:
            logger.warning("no log file %s: %s", path, error.strerror)
            return None

    @staticmethod
    def _write(file: IO[bytes], data: bytes) -> IO[bytes] | None:
        view = memoryview(data)
        try:
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            logger.warning("%s gets no more of the output: %s", file.name, error.strerror)
            file.close()
            return None
        return file

    def _prefix(self, stream: Stream) -> bytes:
        source, settings = self._source, self._settings
        time = ""
        if settings.timestamp or (settings.prefix and "time" in settings.prefix):
            time = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
        if settings.prefix is not None:
            text = Template(settings.prefix).safe_substitute(
                role=source.role,
                role_name=source.role,
                rank=source.rank,
                local_rank=source.local_rank,
                host=source.host,
                pid=self.pid,
                time=time,
            )
        else:
            host = f" {source.host}" if settings.several_hosts else ""
            text = f"{time} " * settings.timestamp + f"[{source.role} {source.rank}{host}] "
        if settings.colour and text:
            text = f"\x1b[{_COLOURS[source.colour % len(_COLOURS)]}m{text}\x1b[0m"
        return text.encode()


class Outputs(aio.Service):
    """The captures of all workers of this host. Its tasks read the pipes; `close` bounds the reading."""

    def __init__(self, settings: OutputSettings, sink: Sink) -> None:
        super().__init__("output", close_timeout=1.0)
        self._settings, self._sink = settings, sink
        self._writer = ThreadPoolExecutor(4, thread_name_prefix="log-writer")
        self._captures: set[Capture] = set()

    def capture(self, source: Source) -> Capture:
        """A capture for a process that is to be started; `open` and `run` it."""
        capture = Capture(source, self._settings, self._sink, self._writer)
        self._captures.add(capture)
        return capture

    def forget(self, capture: Capture) -> None:
        """The process is gone and its pipes are read."""
        self._captures.discard(capture)

    async def drain(self, timeout: float) -> bool:
        """Wait for the ends of all pipes; False when some are still held after `timeout` seconds."""
        ends = [await capture.wait(timeout) for capture in tuple(self._captures)]
        return all(ends)

    async def _on_start(self) -> None:
        self.serve(self._show_unfinished(), "unfinished lines")

    async def _show_unfinished(self) -> None:
        while True:
            await asyncio.sleep(_UNFINISHED_INTERVAL_S)
            for capture in tuple(self._captures):
                await capture.show_unfinished()

    async def _on_close(self) -> None:
        self._writer.shutdown(wait=False)


def make_job_folder(log_dir: str, job_id: str) -> str:
    """The folder of a job's logs, and `latest` beside it. Raises `ConfigError` naming the folder."""
    folder = os.path.join(log_dir, job_id)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the log directory {folder}: {error.strerror}; choose another with --log-dir"
        ) from error
    link = os.path.join(log_dir, "latest")
    new = f"{link}.{os.getpid()}"
    try:
        os.symlink(job_id, new)
        os.replace(new, link)
    except OSError as error:  # a file system without links: the logs are there all the same
        logger.debug("no link %s: %s", link, error)
    return folder
