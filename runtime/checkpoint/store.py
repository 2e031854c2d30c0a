"""Files that appear whole or not at all: a folder on a local (or mounted) file system.

A file is written under a temporary name beside its place, synced, renamed, and the folder synced, so
that whatever dies, and whenever, there is the old file or the new one. The writer holds a lock (flock)
on its temporary file for as long as it lives: that is how a leftover of a dead writer is told from the
file of a living one, on this host or on another. Changes that belong together are made under a lock on
the folder itself. Where a file system has no locks, both are left out: nothing can be torn by that, only
leftovers stay and two writers of one step might need a second save.

`Folder` is this for one folder, in plain calls that block. `LocalBackend` is the public, async form.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

from runtime.checkpoint.compress import pieces
from runtime.checkpoint.files import Files, SystemFiles
from runtime.errors import CheckpointError, MisuseError

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOCK_LIMIT_S = 60.0
"""How long another writer's commit is waited for: it takes milliseconds unless that process is stopped."""

_LOCK_POLL_S = 0.005
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_HELD = {errno.EWOULDBLOCK, errno.EACCES}
_CREATE_ATTEMPTS = 8


class Staged(NamedTuple):
    """Bytes that are durable under a temporary name."""

    path: str
    digest: str
    size: int


class Stat(NamedTuple):
    """Size in bytes; `modified_s` in seconds since 1970."""

    size: int
    modified_s: float


class Folder:
    """One folder of whole files; `path` is absolute. Blocking; every method raises `OSError` for what the
    system says."""

    def __init__(self, path: str | os.PathLike[str], files: Files | None = None) -> None:
        self.path = os.fspath(path)
        self._files: Files = files or SystemFiles()

    def names(self) -> list[str]:
        """Every file in the folder but our temporary ones; empty when there is no such folder."""
        try:
            with os.scandir(self.path) as entries:
                files = [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            return []
        return sorted(name for name in files if not _TEMPORARY.fullmatch(name))

    def read(self, name: str) -> bytes:
        return self._files.read(self._at(name))

    def stat(self, name: str) -> os.stat_result:
        return os.stat(self._at(name))

    def create(self) -> None:
        """Make the folder, and those above it, durably."""
        missing = []
        path = self.path
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            os.makedirs(path, exist_ok=True)
            self._files.sync_directory(os.path.dirname(path))

    @contextmanager
    def staged(self, name: str, parts: Iterable[bytes | memoryview]) -> Iterator[Staged]:
        """Write `parts` durably under a temporary name; gone at the end unless it was published."""
        fd, path = self._create_temporary(name)
        try:
            digest, size = self._write(fd, parts)
            yield Staged(path, digest, size)
        finally:
            try:
                self._files.unlink(path)
            except OSError:
                # Published (its name is another now), or beyond our power: then a later sweep takes it.
                pass
            finally:
                os.close(fd)

    def publish(self, staged: Staged, name: str) -> None:
        """Give the bytes their name, durably, in place of what had it."""
        self._files.rename(staged.path, self._at(name))
        self.sync()

    def put(self, name: str, data: bytes) -> None:
        """Write and publish a small file."""
        with self.staged(name, [data]) as staged:
            self.publish(staged, name)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""
        try:
            self._files.unlink(self._at(name))
        except FileNotFoundError:
            pass

    def sync(self) -> None:
        self._files.sync_directory(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all who change names in this folder. `CheckpointError` after a minute of waiting."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._wait_for_lock(fd)
            yield
        finally:
            os.close(fd)

    def sweep(self) -> list[str]:
        """Remove what dead writers left under temporary names; the names removed."""
        return [
            name
            for name in os.listdir(self.path)
            if _TEMPORARY.fullmatch(name) and self._remove_if_abandoned(self._at(name))
        ]

    def _at(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _create_temporary(self, name: str) -> tuple[int, str]:
        for _ in range(_CREATE_ATTEMPTS):
            path = self._at(f".{name}.{secrets.token_hex(6)}.tmp")
            fd = self._files.create(path)
            # Until the lock is ours a sweeper may take the file for abandoned: then it has no name now.
            if _try_lock(fd) is not False and os.fstat(fd).st_nlink > 0:
                return fd, path
            os.close(fd)
        raise OSError(errno.EAGAIN, "temporary files are swept away as they are made", self.path)

    def _write(self, fd: int, parts: Iterable[bytes | memoryview]) -> tuple[str, int]:
        digest = hashlib.sha256()
        offset = 0
        for part in parts:
            digest.update(part)
            left = memoryview(part)
            while left:
                written = self._files.pwrite(fd, left, offset)
                offset += written
                left = left[written:]
        self._files.fsync(fd)
        return digest.hexdigest(), offset

    def _wait_for_lock(self, fd: int) -> None:
        give_up = time.monotonic() + LOCK_LIMIT_S
        while _try_lock(fd) is False:
            if time.monotonic() > give_up:
                raise CheckpointError(
                    f"{self.path}: another process has held this folder's lock for {LOCK_LIMIT_S:g} s; "
                    "it may be stopped, or hang in the file system"
                )
            time.sleep(_LOCK_POLL_S)

    def _remove_if_abandoned(self, path: str) -> bool:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False  # finished in the meantime, or not ours to open
        try:
            if _try_lock(fd) is not True:
                return False
            self._files.unlink(path)
            return True
        except FileNotFoundError:
            return False  # its writer published it while we looked
        except OSError as error:
            log.warning("cannot remove the leftover %s: %s", path, error)
            return False
        finally:
            os.close(fd)


def _try_lock(fd: int) -> bool | None:
    """True: the lock is ours; False: another has it; None: there are no locks on this file system."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


class StorageBackend(Protocol):
    """Where bytes are kept by name. Names are relative paths with `/`; all raise `CheckpointError`
    for what the storage says, `FileNotFoundError` for a name that is not there."""

    async def read(self, name: str) -> bytes: ...

    async def write(self, name: str, data: bytes) -> None: ...

    async def exists(self, name: str) -> bool: ...

    async def delete(self, name: str) -> None: ...

    async def list(self, prefix: str = "") -> list[str]: ...

    async def stat(self, name: str) -> Stat: ...


class LocalBackend:
    """Bytes by name below one directory. A `write` is atomic and durable when it returns.

    The calls run in threads of the running loop's pool. Errors: `MisuseError` for names that lead out of
    the directory, `FileNotFoundError`, `CheckpointError` for what the file system says.
    """

    def __init__(self, directory: str | os.PathLike[str], files: Files | None = None) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        self._files = files

    async def read(self, name: str) -> bytes:
        folder, last = self._place(name)
        return await asyncio.to_thread(_translated, folder.read, last)

    async def write(self, name: str, data: bytes) -> None:
        """Returns when the bytes are durable under their name."""
        folder, last = self._place(name)
        await asyncio.to_thread(_translated, self._write, folder, last, data)

    async def exists(self, name: str) -> bool:
        folder, last = self._place(name)
        return await asyncio.to_thread(os.path.isfile, os.path.join(folder.path, last))

    async def delete(self, name: str) -> None:
        folder, last = self._place(name)
        await asyncio.to_thread(_translated, self._delete, folder, last)

    async def list(self, prefix: str = "") -> list[str]:
        """The names that begin with `prefix`, sorted."""
        return await asyncio.to_thread(_names_below, self.directory, prefix)

    async def stat(self, name: str) -> Stat:
        folder, last = self._place(name)
        found = await asyncio.to_thread(_translated, folder.stat, last)
        return Stat(found.st_size, found.st_mtime)

    def _place(self, name: str) -> tuple[Folder, str]:
        parts = name.split("/")
        if (
            not all(parts)
            or {".", ".."} & set(parts)
            or "\0" in name
            or _TEMPORARY.fullmatch(parts[-1])
        ):
            raise MisuseError(
                f"{name!r} is no name in {self.directory}: allowed are relative paths such as "
                "'run-1/checkpoint-5.ckpt', without '.' and '..'"
            )
        return Folder(os.path.join(self.directory, *parts[:-1]), self._files), parts[-1]

    def _write(self, folder: Folder, name: str, data: bytes) -> None:
        folder.create()
        folder.sweep()
        with folder.staged(name, pieces(memoryview(data).cast("B"), None)) as staged:
            folder.publish(staged, name)

    def _delete(self, folder: Folder, name: str) -> None:
        folder.stat(name)
        folder.remove(name)
        folder.sync()


def _names_below(directory: str, prefix: str) -> list[str]:
    found = []
    for path, _, names in os.walk(directory):
        below = os.path.relpath(path, directory).replace(os.sep, "/") + "/"
        below = "" if below == "./" else below
        found += [below + name for name in names if not _TEMPORARY.fullmatch(name)]
    return sorted(name for name in found if name.startswith(prefix))


def _translated(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call, and tell what the file system says as an error of ours."""
    try:
        return function(*args, **kwargs)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or 'storage'}: {error.strerror or error}"
        ) from error
