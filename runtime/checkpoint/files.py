"""The system calls that change a checkpoint folder: one small object, so that tests can make any fail.

Nothing here decides anything; `store.py` does.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP}
"""What file systems answer that have no such thing as syncing a directory."""


class Files(Protocol):
    """A file system as the store uses it. All raise `OSError`."""

    def create(self, path: str) -> int:
        """A new file, open for writing; `FileExistsError` if there is one."""
        ...

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        """Write (a part of) `data`; how many bytes were written."""
        ...

    def fsync(self, fd: int) -> None: ...

    def rename(self, source: str, target: str) -> None:
        """Give `source` the name `target`, at once, replacing what has it."""
        ...

    def unlink(self, path: str) -> None: ...

    def sync_directory(self, path: str) -> None:
        """Make the names in `path` durable."""
        ...

    def read(self, path: str) -> bytes: ...


class SystemFiles:
    """The true one. Its large reads and writes leave the interpreter to other threads."""

    def create(self, path: str) -> int:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def sync_directory(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
        finally:
            os.close(fd)

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()
