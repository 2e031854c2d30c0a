"""Checkpoints of bytes: the public `CheckpointManager`.

Everything that one manager does with the disk runs beside the caller, in the order in which it was asked
for (`lane.py`): so a `load` sees the saves before it, and the training loop waits for no disk. What a save ran into
in the background is logged at once and raised by the next `wait`. What is written, and how it stays
whole, is `series.py`'s and `store.py`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, ParamSpec, TypeVar

from runtime import config
from runtime.checkpoint import compress
from runtime.checkpoint.files import Files, SystemFiles
from runtime.checkpoint.lane import Lane
from runtime.checkpoint.layout import is_series_name
from runtime.checkpoint.series import Series
from runtime.checkpoint.store import Folder
from runtime.errors import CheckpointError, MisuseError, Timeout
from runtime.peer import context

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Bytes = bytes | bytearray | memoryview

_IN_FLIGHT = 2
"""Saves that are written or wait to be: one more waits in `save_async`, or memory would fill up."""

_SAY_AFTER_S = 10.0


@dataclass(frozen=True)
class CheckpointStatistics:
    """What a manager has done so far. Times in seconds, sizes in bytes.

    `stored_bytes` is what went to disk (less than `saved_bytes` with compression, or where rank 0 had
    the same bytes); `last_save_s` is how long the last save took in the background.
    """

    saves: int = 0
    failed: int = 0
    in_flight: int = 0
    saved_bytes: int = 0
    stored_bytes: int = 0
    last_step: int | None = None
    last_save_s: float = 0.0
    loads: int = 0
    expired: int = 0


class CheckpointManager:
    """Saves bytes by step below `storage_path`, loads them again, keeps the last `keep_last_n`.

    `name` keeps several series on one path (each in a folder of its own); `compression` is "none",
    "gzip", "zstd" or "lz4" (the last two need the packages zstandard and lz4); `keep_last_n=None` keeps
    everything. Left out, both are what `[checkpoint]` of the config file says: 5 and "none" by default.
    `rank` is this process's own (the environment's `RANK`) unless given. Any number of managers, in
    any number of processes, may use one path. Nothing is touched before the first save.

    Every `await`ed method has a plain twin, `…_sync`, for code without an event loop. Errors:
    `MisuseError` for arguments, `ConfigError` for a missing package, `FileNotFoundError` for a step
    that is not there, `CheckpointCorrupt` for bytes that are not those written, `CheckpointError` for
    what the file system says.
    """

    _files: ClassVar[Files] = SystemFiles()

    def __init__(
        self,
        storage_path: str | os.PathLike[str],
        backend: str = "local",
        *,
        name: str | None = None,
        keep_last_n: int | Literal["config"] | None = "config",
        compression: str | None = None,
        rank: int | None = None,
    ) -> None:
        settings = config.read_config().checkpoint
        if keep_last_n == "config":
            keep_last_n = settings.keep_last_n
        if compression is None:
            compression = settings.compression
        compression = None if compression == "none" else compression
        compress.check(compression)
        self._path = _checked_path(storage_path, backend, name)
        self._series = Series(
            Folder(self._path, self._files),
            rank=_checked_rank(rank),
            compression=compression,
            keep_last_n=_checked_keep(keep_last_n),
        )
        self._lane = Lane(f"checkpoints in {self._path}")
        self._lock = threading.Lock()
        self._saves: list[tuple[int, Future[None]]] = []
        self._errors: list[Exception] = []
        self._counted = CheckpointStatistics()

    def __repr__(self) -> str:
        return f"CheckpointManager({self._path!r})"

    async def save_async(self, data: Bytes, step: int) -> None:
        """Save `data` as `step`. Returns once the bytes are safe to change; they are durable soon after.

        Saves are written in the order of the calls; with two still to be written this waits for the
        first of them. A step that exists is replaced. What goes wrong later, `wait` raises.
        """
        payload, step = _checked_data(data), _checked_step(step)
        while (first := self._first_of_too_many()) is not None:
            await self._until(first, None, f"the save before step {step}")
        self._submit(payload, step)

    def save_sync(self, data: Bytes, step: int) -> None:
        """`save_async` for plain code: returns once the bytes are safe to change."""
        self._refuse_on_loop("save_async")
        payload, step = _checked_data(data), _checked_step(step)
        while (first := self._first_of_too_many()) is not None:
            wait_for_futures([first])
        self._submit(payload, step)

    async def load(self, step: int | None = None) -> bytes:
        """The bytes of `step`; None: of the latest good one, as `load_latest`."""
        return await self._run(self._load_call(step))

    def load_sync(self, step: int | None = None) -> bytes:
        return self._run_sync("load", self._load_call(step))

    async def load_latest(self) -> bytes:
        """The bytes of the newest step that is whole; damaged ones are passed over and logged."""
        return await self._run(self._load_latest)

    def load_latest_sync(self) -> bytes:
        return self._run_sync("load_latest", self._load_latest)

    async def list_checkpoints(self) -> list[int]:
        """The complete steps, ascending, also those of earlier processes."""
        return await self._run(self._series.steps)

    def list_checkpoints_sync(self) -> list[int]:
        return self._run_sync("list_checkpoints", self._series.steps)

    async def delete(self, step: int) -> None:
        """Remove `step`: rank 0 for all ranks, another rank its own file only."""
        await self._run(self._series.delete, _checked_step(step))

    def delete_sync(self, step: int) -> None:
        self._run_sync("delete", self._series.delete, _checked_step(step))

    async def verify(self, step: int) -> bool:
        """Read all files of `step` and compare them with their digests: True when they agree (else
        `CheckpointCorrupt`), False when one was put there by hand and has none."""
        return await self._run(self._series.verify, _checked_step(step))

    def verify_sync(self, step: int) -> bool:
        return self._run_sync("verify", self._series.verify, _checked_step(step))

    async def wait(self, timeout: float | None = None) -> None:
        """Return when all saves so far are durable. Raises what went wrong with any of them, once;
        `Timeout` after `timeout` seconds."""
        await self._until(self._lane.submit(_nothing), timeout, "saves to be written")
        self._raise_errors()

    def wait_sync(self, timeout: float | None = None) -> None:
        self._refuse_on_loop("wait")
        done, _ = wait_for_futures([self._lane.submit(_nothing)], timeout)
        if not done:
            raise self._timeout(timeout)
        self._raise_errors()

    def statistics(self) -> CheckpointStatistics:
        with self._lock:
            in_flight = sum(not future.done() for _, future in self._saves)
            return replace(self._counted, in_flight=in_flight)

    # Saving, in the thread

    def _submit(self, payload: Bytes, step: int) -> None:
        data = memoryview(payload if isinstance(payload, bytes) else bytes(payload))
        with self._lock:
            self._saves = [save for save in self._saves if not save[1].done()]
            self._saves.append((step, self._lane.submit(self._save, data, step)))

    def _first_of_too_many(self) -> Future[None] | None:
        with self._lock:
            unfinished = [future for _, future in self._saves if not future.done()]
        return unfinished[0] if len(unfinished) >= _IN_FLIGHT else None

    def _save(self, data: memoryview, step: int) -> None:
        begun = time.monotonic()
        try:
            committed = self._series.commit(step, data)
        except Exception as error:  # noqa: BLE001 - nobody awaits this thread: `wait` raises it
            log.error("checkpoint of step %d failed: %s", step, error)
            with self._lock:
                self._errors.append(error)
            self._count(failed=1)
            return
        self._count(
            saves=1,
            saved_bytes=len(data),
            stored_bytes=committed.stored_bytes,
            expired=len(committed.expired),
        )
        self._set(last_step=step, last_save_s=time.monotonic() - begun)

    def _raise_errors(self) -> None:
        with self._lock:
            errors, self._errors = self._errors, []
        if not errors:
            return
        for other in errors[1:]:
            errors[0].add_note(f"and then: {other}")
        raise errors[0]

    # Loading, in the thread

    def _load_call(self, step: int | None) -> Callable[[], bytes]:
        if step is None:
            return self._load_latest
        return partial(self._load, _checked_step(step))

    def _load(self, step: int) -> bytes:
        data = self._series.fetch(step)
        self._count(loads=1)
        return data

    def _load_latest(self) -> bytes:
        steps = self._series.steps()
        damaged: CheckpointError | None = None
        for step in reversed(steps):
            try:
                return self._load(step)
            except FileNotFoundError:
                continue  # another process let it go since it was listed
            except CheckpointError as error:
                log.warning("step %d is passed over: %s", step, error)
                damaged = damaged or error
        if damaged is not None:
            raise damaged
        raise FileNotFoundError(f"there is no checkpoint in {self._path}")

    # From any thread, with or without a loop

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.wrap_future(self._lane.submit(function, *args, **kwargs))

    def _run_sync(
        self, twin: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._refuse_on_loop(twin)
        return self._lane.submit(function, *args, **kwargs).result()

    async def _until(self, future: Future[None], timeout: float | None, what: str) -> None:
        """Wait for a future that never fails; a caller that gives up does not cancel it."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()
        future.add_done_callback(lambda _: _set_from_thread(done, loop))
        quiet = _SAY_AFTER_S if timeout is None else min(timeout, _SAY_AFTER_S)
        if await _is_set(done, quiet):
            return
        if timeout is None or timeout > quiet:
            log.info("%s: waiting for %s", self._path, what)
            if await _is_set(done, None if timeout is None else timeout - quiet):
                return
        raise self._timeout(timeout)

    def _timeout(self, timeout: float | None) -> Timeout:
        with self._lock:
            steps = [str(step) for step, future in self._saves if not future.done()]
        return Timeout(
            f"after {timeout:g} s, step {', '.join(steps) or '?'} is still being written to {self._path}",
            waited_s=timeout or 0.0,
        )

    def _refuse_on_loop(self, twin: str) -> None:
        node = context.installed()
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            return
        if node is not None and node.loop is running:
            raise MisuseError(
                f"this would block the runtime's own loop: use `await manager.{twin}(...)`"
            )

    def _count(self, **more: int) -> None:
        self._set(**{key: getattr(self._counted, key) + value for key, value in more.items()})

    def _set(self, **values: Any) -> None:
        with self._lock:
            self._counted = replace(self._counted, **values)


def _nothing() -> None:
    """What `wait` queues behind the saves."""


def _set_from_thread(event: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:
        pass  # the loop is closed: who waited there has given up


async def _is_set(event: asyncio.Event, limit: float | None) -> bool:
    try:
        async with asyncio.timeout(limit):
            await event.wait()
    except TimeoutError:
        return False
    return True


def _checked_path(path: str | os.PathLike[str], backend: str, name: str | None) -> str:
    if backend == "s3" or str(path).startswith("s3://"):
        raise MisuseError(f"checkpoints on S3 are not there yet ({path!r}); use backend='local'")
    if backend != "local":
        raise MisuseError(f"backend={backend!r}: allowed is 'local'")
    if name is not None and not is_series_name(name):
        raise MisuseError(
            f"name={name!r}: allowed are letters, digits, '.', '_' and '-', up to 100, "
            "the first a letter or a digit"
        )
    folder = os.path.abspath(os.path.join(os.fspath(path), name or ""))
    above = folder
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        raise MisuseError(f"storage_path: {above} is not a directory")
    return folder


def _checked_keep(keep_last_n: int | None) -> int | None:
    if keep_last_n is None or _is_whole(keep_last_n, least=1):
        return keep_last_n
    raise MisuseError(
        f"keep_last_n={keep_last_n!r}: allowed is a whole number from 1, or None for all"
    )


def _checked_rank(rank: int | None) -> int:
    if rank is None:
        return config.own_rank()
    if not _is_whole(rank, least=0):
        raise MisuseError(f"rank={rank!r}: allowed is a whole number from 0")
    return operator.index(rank)


def _checked_step(step: int) -> int:
    if not _is_whole(step, least=0):
        raise MisuseError(f"step={step!r}: a step is a whole number from 0")
    return operator.index(step)


def _is_whole(value: object, least: int) -> bool:
    """True for integers of any make (numpy's, a tensor of one), but not for True and False."""
    if isinstance(value, bool):
        return False
    try:
        return operator.index(value) >= least  # type: ignore[arg-type]
    except TypeError:
        return False


def _checked_data(data: Bytes) -> Bytes:
    if isinstance(data, bytes | bytearray | memoryview):
        return data
    raise MisuseError(
        f"a checkpoint is bytes, bytearray or memoryview, not {type(data).__name__}: "
        "turn it into bytes first, as with `torch.save(state, buffer)` and `buffer.getvalue()`"
    )
