"""The launcher's own standard output and error: whole blocks of lines, in order, from one thread.

Writing may block for as long as a terminal is stopped or a pager is read; a thread does it, so that the
launcher goes on hearing signals. What waits to be written is bounded: `drain` makes the sender wait.
A stream whose reader is gone is given up; the job goes on, and its log files have everything.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections import deque
from typing import Literal

from runtime import aio

_LIMIT = 4 * 1024 * 1024


class Console:
    """Writes to two descriptors. `write` never blocks. Used on one event loop."""

    def __init__(self, stdout: int = 1, stderr: int = 2) -> None:
        self._fds = {"stdout": stdout, "stderr": stderr}
        self._loop = asyncio.get_running_loop()
        self._blocks: deque[tuple[int, bytes]] = deque()
        self._waiting_bytes = 0
        self._wake = threading.Condition()
        self._closed = False
        self._gone: set[int] = set()
        self._room = asyncio.Event()
        self._room.set()
        self._done = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)
        self._thread.start()

    def write(self, stream: Literal["stdout", "stderr"], data: bytes) -> None:
        """Queue whole lines."""
        with self._wake:
            self._blocks.append((self._fds[stream], data))
            self._waiting_bytes += len(data)
            if self._waiting_bytes > _LIMIT:
                self._room.clear()
            self._wake.notify()

    async def drain(self) -> None:
        """Return when little waits to be written."""
        await self._room.wait()

    async def close(self, hurry: asyncio.Event, grace_s: float = 1.0) -> None:
        """Return when everything is written: a reader may take its time. When `hurry` is set, what a
        reader does not take within `grace_s` seconds is dropped."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        async with aio.background(self._give_up(hurry, grace_s), "console"):
            await self._done.wait()

    async def _give_up(self, hurry: asyncio.Event, grace_s: float) -> None:
        await hurry.wait()
        await asyncio.sleep(grace_s)
        self._done.set()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._blocks and not self._closed:
                    self._wake.wait()
                if not self._blocks:
                    self._loop.call_soon_threadsafe(self._done.set)
                    return
                fd, data = self._blocks.popleft()
            self._write(fd, data)
            with self._wake:
                self._waiting_bytes -= len(data)
                low = self._waiting_bytes <= _LIMIT // 2
            if low and not self._room.is_set():
                self._loop.call_soon_threadsafe(self._room.set)

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view and fd not in self._gone:
            try:
                view = view[os.write(fd, view) :]
            except BlockingIOError:  # somebody who shares it made it non-blocking
                select.select([], [fd], [])
            except OSError:
                self._gone.add(fd)
