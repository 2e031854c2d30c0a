"""Starting workers: from a zygote where that can be, else by exec; the agent's side of both.

One zygote serves all workers with the same preload list and the same values of those variables that
libraries read while they are imported. A zygote that may not be forked, that crashes or hangs is given
up with one line in the log, and its workers are exec'd; one that is killed later is replaced at the next
start. The caller sees none of this: orders in, pids out, each pid a child of this process.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from runtime.errors import RuntimeFault
from runtime.job import IDENTITY_ENV
from runtime.launcher import child, spawn, zygote
from runtime.launcher.tunables import READ_AT_START
from runtime.launcher.watch import Watch

logger = logging.getLogger(__name__)

_SET_FOR_EACH = frozenset(("PYTHONUNBUFFERED", "PYTHONFAULTHANDLER"))
"""What these ask for every worker does by itself."""
_READ_AT_IMPORT = (
    *READ_AT_START,
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "ATEN_"),
    *("TORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_", "PYTORCH_", "TRITON_", "HF_", "TRANSFORMERS_"),
)


class NewWorker(NamedTuple):
    """A worker to be started: `stdout` and `stderr` become its own (we close them here)."""

    order: child.Order
    stdout: int
    stderr: int


class _ZygoteLost(RuntimeFault):
    """The zygote cannot be used (any more); the text says why."""


class _Recipe(NamedTuple):
    env: tuple[tuple[str, str], ...]
    preload: tuple[str, ...]


def _relevant(env: Mapping[str, str], prefixes: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = {k: v for k, v in env.items() if k.startswith(prefixes) and k not in _SET_FOR_EACH}
    return tuple(sorted(found.items()))


class _Zygote:
    """One fork server process and the socket to it. Requests are made one after the other."""

    def __init__(self, started: zygote.Started, env: Mapping[str, str]) -> None:
        self._start_env = _relevant(env, READ_AT_START)
        self._socket = socket.socket(fileno=started.control_fd)
        self._socket.setblocking(False)
        self._lock = asyncio.Lock()
        self.watch = Watch(started.pid, lambda watch, exit: None)

    @property
    def alive(self) -> bool:
        return self.watch.poll() is None

    def may_serve(self, env: Mapping[str, str]) -> bool:
        """Whether workers with `env` may come from this process, as far as its start decides that."""
        return _relevant(env, READ_AT_START) == self._start_env

    async def preload(self, order: child.Order, timeout: float) -> None:
        """Import the order's modules under its environment. Raises `_ZygoteLost`."""
        fd = child.pack_order(order)
        try:
            answer = await self._ask({"op": "preload"}, [fd], timeout, "importing")
        finally:
            os.close(fd)
        if not answer["ready"]:
            self.close()
            raise _ZygoteLost(answer["reason"])

    async def fork(self, workers: Sequence[NewWorker], timeout: float) -> list[int]:
        """Their pids: fewer than `workers` when no more processes could be had. Raises `_ZygoteLost`;
        none of them runs then."""
        begin, let_begin = os.pipe()
        fds: list[int] = []
        orders: list[int] = []
        try:
            for worker in workers:
                orders.append(child.pack_order(worker.order))
                fds += [orders[-1], worker.stdout, worker.stderr]
            answer = await self._ask({"op": "spawn"}, [*fds, begin], timeout, "forking")
            pids: list[int] = answer["pids"]
            os.write(let_begin, bytes(len(pids)))
        finally:
            for fd in (*orders, begin, let_begin):
                os.close(fd)
        return pids

    async def _ask(
        self, request: dict[str, Any], fds: Sequence[int], timeout: float, doing: str
    ) -> dict[str, Any]:
        data, reason = b"", f"it died while {doing}"
        async with self._lock:
            try:
                async with asyncio.timeout(timeout):
                    socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
                    data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            except TimeoutError:
                reason = f"{doing} took longer than {timeout:g} s"
            except OSError as error:
                reason = f"it is gone while {doing} ({error.strerror})"
            finally:
                if not data:  # when cancelled, too: a late answer would be taken for the next one
                    self.close()
        if not data:
            raise _ZygoteLost(reason)
        answer: dict[str, Any] = json.loads(data)
        return answer

    def close(self) -> None:
        """End the process; its workers live on."""
        self.watch.send_signal(signal.SIGKILL)
        if self._socket.fileno() >= 0:
            self._socket.close()


class Starter:
    """Starts workers on this host. Used on the event loop's thread; `close` ends its zygotes."""

    def __init__(self, *, preload_timeout_s: float = 120.0, fork_timeout_s: float = 30.0) -> None:
        self._preload_timeout_s, self._fork_timeout_s = preload_timeout_s, fork_timeout_s
        self._spare: _Zygote | None = None
        self._zygotes: dict[_Recipe, _Zygote] = {}
        self._locks: dict[_Recipe, asyncio.Lock] = {}
        self._unusable: set[_Recipe] = set()

    def adopt(self, started: zygote.Started) -> None:
        """Use a zygote that `start_first` made, if it fits a job's workers."""
        self._spare = _Zygote(started, zygote.first_env())

    @property
    def zygote_pids(self) -> list[int]:
        """Of the fork servers that run."""
        spare = [self._spare] if self._spare else []
        return [z.watch.pid for z in (*self._zygotes.values(), *spare) if z.alive]

    async def prepare(self, orders: Sequence[child.Order]) -> None:
        """Make the zygote for these workers ready, so that `fork` takes no time. Never raises: where
        there can be no zygote, `fork` will exec."""
        try:
            await self._zygote(orders)
        except _ZygoteLost as error:
            self._give_up(orders[0], error)

    async def fork(self, workers: Sequence[NewWorker]) -> list[int]:
        """Start workers of one role by forking, or by exec where that cannot be. Pids in that order.

        Their descriptors are closed in any case. Raises `OSError` when not even exec works.
        """
        pids: list[int] = []
        try:
            try:
                for first in range(0, len(workers), zygote.WORKERS_AT_ONCE):
                    pids += await self._fork_batch(workers[first : first + zygote.WORKERS_AT_ONCE])
            except _ZygoteLost as error:
                self._give_up(workers[0].order, error)
            return pids + [_exec(sys.executable, worker) for worker in workers[len(pids) :]]
        finally:
            close_streams(workers)

    async def _fork_batch(self, workers: Sequence[NewWorker]) -> list[int]:
        orders = [worker.order for worker in workers]
        parent = await self._zygote(orders)
        try:
            pids = await parent.fork(workers, self._fork_timeout_s)
        except _ZygoteLost:  # it was killed just now: another one does as well
            parent = await self._zygote(orders)
            pids = await parent.fork(workers, self._fork_timeout_s)
        if len(pids) < len(workers):
            pids += [_exec(sys.executable, worker) for worker in workers[len(pids) :]]
        return pids

    async def exec(self, python: str, workers: Sequence[NewWorker]) -> list[int]:
        """Start workers as fresh interpreters. Raises `OSError` when `python` cannot be executed."""
        try:
            return [_exec(python, worker) for worker in workers]
        finally:
            close_streams(workers)

    def close(self) -> None:
        """End the zygotes. Idempotent."""
        spare, self._spare = self._spare, None
        zygotes, self._zygotes = list(self._zygotes.values()), {}
        for one in (*zygotes, *([spare] if spare else [])):
            one.close()

    async def _zygote(self, orders: Sequence[child.Order]) -> _Zygote:
        recipe = _Recipe(_relevant(orders[0].env, _READ_AT_IMPORT), orders[0].preload)
        if recipe in self._unusable:
            raise _ZygoteLost("")
        async with self._locks.setdefault(recipe, asyncio.Lock()):
            known = self._zygotes.get(recipe)
            if known is not None:
                if known.alive:
                    return known
                known.close()
            common = _common_env(orders)
            found = self._take_spare(common) or _Zygote(zygote.start(common), common)
            self._zygotes[recipe] = found
            try:
                await found.preload(orders[0]._replace(env=common), self._preload_timeout_s)
            except _ZygoteLost:
                self._unusable.add(recipe)
                raise
            return found

    def _take_spare(self, env: Mapping[str, str]) -> _Zygote | None:
        spare = self._spare
        if spare is None or not spare.alive or not spare.may_serve(env):
            return None
        self._spare = None
        return spare

    def _give_up(self, order: child.Order, error: _ZygoteLost) -> None:
        if error.reason:  # else it was said already
            logger.warning(
                "workers are started by exec, not forked from one that has imported %s: %s",
                ", ".join(order.preload) or "nothing",
                error,
            )


def _common_env(orders: Sequence[child.Order]) -> dict[str, str]:
    """What all these workers have in their environments, except who they are."""
    common = set.intersection(*(set(order.env.items()) for order in orders))
    return {name: value for name, value in common if name not in IDENTITY_ENV}


def _exec(python: str, worker: NewWorker) -> int:
    fd = child.pack_order(worker.order)
    try:
        return spawn.start(
            child.command(python, fd),
            env=worker.order.env,
            streams=spawn.Streams(stdout=worker.stdout, stderr=worker.stderr),
            pass_fds=[fd],
        )
    finally:
        os.close(fd)


def close_streams(workers: Sequence[NewWorker]) -> None:
    """Of workers that are not to be started after all: `fork` and `exec` do it themselves."""
    for worker in workers:
        os.close(worker.stdout)
        os.close(worker.stderr)
