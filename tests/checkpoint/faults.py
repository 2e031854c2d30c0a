"""A file system that fails, or dies, at a chosen call: `Files` for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from runtime.checkpoint.files import SystemFiles


class Died(BaseException):
    """The process was killed: nothing that it would still have done happens."""


class RecordingFiles(SystemFiles):
    """Remembers what was done, as (operation, name), in `done`."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self._names: dict[int, str] = {}

    def create(self, path: str) -> int:
        fd: int = self._do("create", path, lambda: super(RecordingFiles, self).create(path))
        self._names[fd] = path
        return fd

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        path = self._names[fd]
        written: int = self._do("pwrite", path, lambda: os.pwrite(fd, data, offset))
        return written

    def fsync(self, fd: int) -> None:
        self._do("fsync", self._names[fd], lambda: os.fsync(fd))

    def rename(self, source: str, target: str) -> None:
        self._do("rename", target, lambda: os.rename(source, target))

    def unlink(self, path: str) -> None:
        self._do("unlink", path, lambda: os.unlink(path))

    def sync_directory(self, path: str) -> None:
        self._do("sync_directory", path, lambda: None)

    def read(self, path: str) -> bytes:
        data: bytes = self._do("read", path, lambda: super(RecordingFiles, self).read(path))
        return data

    def _do(self, operation: str, path: str, call: Callable[[], Any]) -> Any:
        self.done.append((operation, os.path.basename(path)))
        return call()


class DyingFiles(RecordingFiles):
    """Dies just before the call number `last` that changes something, and stays dead."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self._left = last

    def _do(self, operation: str, path: str, call: Callable[[], Any]) -> Any:
        if operation != "read":
            self._left -= 1
        if self._left < 0:
            raise Died
        return super()._do(operation, path, call)


class FailingFiles(RecordingFiles):
    """Fails with `error` in `operation`, on paths that end in `suffix`, `times` times."""

    def __init__(self, operation: str, error: int, suffix: str = "", times: int = 1 << 30) -> None:
        super().__init__()
        self._operation, self._error, self._suffix = operation, error, suffix
        self.times = times

    def _do(self, operation: str, path: str, call: Callable[[], Any]) -> Any:
        if operation == self._operation and path.endswith(self._suffix) and self.times > 0:
            self.times -= 1
            raise OSError(self._error, os.strerror(self._error), path)
        return super()._do(operation, path, call)


class SlowDisk(RecordingFiles):
    """Writes a few bytes at a time, as a nearly full or busy disk may."""

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return super().pwrite(fd, memoryview(data)[:7], offset)
