"""What users call: `barrier`, `kv`, `members`, `master`, each plain and as `…_async`.

They find the control client of this process in `peer.context`. The plain ones are for training loops and
may be called on any thread but the runtime's own loop; the async ones work on any loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from runtime.errors import Closed, MisuseError
from runtime.machine import Message
from runtime.peer.context import current
from runtime.wire.codec import decode, encode

if TYPE_CHECKING:
    from runtime.control.client import ControlClient

T = TypeVar("T")

_VALUE_LIMIT = 1 << 20
"""Bytes of one value in `kv`."""


class Member(NamedTuple):
    """One actor of the job, as the membership sees it. `id` is its name, `address` that of its newest
    process. `state`: expected, starting, running, restarting, exited, failed."""

    id: str
    role: str
    rank: int
    host: str
    address: str
    incarnation: int
    state: str
    metadata: dict[str, Any]
    step: int | None = None
    epoch: int | None = None


class Entry(NamedTuple):
    """A key's value, its version (0: there is no such key), and the seconds until it expires (None:
    never)."""

    value: Any
    version: int
    lease: float | None = None


def _client() -> ControlClient:
    client: ControlClient | None = current().control
    if client is None:
        raise MisuseError("this process has no control plane: it was not started as part of a job")
    return client


def _blocking(work: Callable[[ControlClient], Coroutine[Any, Any, T]], twin: str) -> T:
    """Run `work` on the node's loop while this thread waits."""
    loop = current().loop
    if _running_loop() is loop:
        raise MisuseError(f"this would block the runtime's own loop: use `await {twin}(...)` here")
    future = asyncio.run_coroutine_threadsafe(work(_client()), loop)
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        raise Closed("the runtime of this process was closed meanwhile") from None
    finally:
        future.cancel()  # Only where the wait was interrupted (Ctrl-C): then nobody waits any more.


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


async def _awaited(work: Callable[[ControlClient], Coroutine[Any, Any, T]]) -> T:
    """Run `work` on the node's loop, from whichever loop this is."""
    loop = current().loop
    if asyncio.get_running_loop() is loop:
        return await work(_client())
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(_client()), loop))


def _arrive(name: str, role: str | None, timeout: float | None) -> Callable[..., Any]:
    message = {"op": "arrive", "name": name} | ({} if role is None else {"role": role})
    return lambda client: client.ask("barrier", message, timeout)


def barrier(name: str, role: str | None = None, timeout: float | None = None) -> None:
    """Wait until every actor of a role has called this with the same name.

    `role`: None is the caller's own role, "*" every actor of the job; a role that the caller is no
    member of is a `MisuseError`. Members count by identity: arriving twice is once. A name can be used
    again at once. Raises `Timeout` after `timeout` seconds (None: no limit; the arrival is withdrawn),
    `BarrierBroken` naming the members that are gone for good; one that is restarted is waited for.
    """
    _blocking(_arrive(name, role, timeout), "barrier_async")


async def barrier_async(name: str, role: str | None = None, timeout: float | None = None) -> None:
    """As `barrier`. Cancelling withdraws the arrival."""
    await _awaited(_arrive(name, role, timeout))


def members(timeout: float | None = None) -> list[Member]:
    """Every actor of the job, in plan order, running or not."""
    return _blocking(lambda client: client.members(timeout), "members_async")


async def members_async(timeout: float | None = None) -> list[Member]:
    """As `members`."""
    return await _awaited(lambda client: client.members(timeout))


def master() -> Member:
    """The agent that holds the control plane at the moment."""
    return _client().master()


async def master_async() -> Member:
    """As `master`."""
    return _client().master()


class KeyValue:
    """Small facts that the whole job sees, by key: `kv`.

    Values are anything that can be sent, up to 1 MiB each. Every change of a key gives it a version
    that no key has had before. All methods raise `Timeout` after `timeout` seconds (None: no limit).
    """

    def get(self, key: str, default: Any = None, *, timeout: float | None = None) -> Any:
        """The value of a key, `default` where there is none."""
        return _blocking(lambda client: _get(client, key, default, timeout), "kv.get_async")

    async def get_async(
        self, key: str, default: Any = None, *, timeout: float | None = None
    ) -> Any:
        """As `get`."""
        return await _awaited(lambda client: _get(client, key, default, timeout))

    def get_entry(self, key: str, *, timeout: float | None = None) -> Entry:
        """Value, version and lease of a key; value None and version 0 where there is none."""
        return _blocking(lambda client: _entry(client, key, timeout), "kv.get_entry_async")

    async def get_entry_async(self, key: str, *, timeout: float | None = None) -> Entry:
        """As `get_entry`."""
        return await _awaited(lambda client: _entry(client, key, timeout))

    def put(
        self,
        key: str,
        value: Any,
        *,
        if_version: int | None = None,
        ttl_s: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """Set a key and return its new version.

        `if_version`: only if the key has this version (0: only if there is no such key), else
        `VersionConflict`. `ttl_s`: the key vanishes that many seconds after its last `put`.
        """
        message = _put_message(key, value, if_version, ttl_s)
        return _blocking(lambda client: _put(client, message, timeout), "kv.put_async")

    async def put_async(
        self,
        key: str,
        value: Any,
        *,
        if_version: int | None = None,
        ttl_s: float | None = None,
        timeout: float | None = None,
    ) -> int:
        """As `put`."""
        message = _put_message(key, value, if_version, ttl_s)
        return await _awaited(lambda client: _put(client, message, timeout))

    def delete(
        self, key: str, *, if_version: int | None = None, timeout: float | None = None
    ) -> bool:
        """Take a key away; whether there was one. `if_version` as in `put`."""
        return _blocking(lambda c: _delete(c, key, if_version, timeout), "kv.delete_async")

    async def delete_async(
        self, key: str, *, if_version: int | None = None, timeout: float | None = None
    ) -> bool:
        """As `delete`."""
        return await _awaited(lambda client: _delete(client, key, if_version, timeout))

    def watch(self, key: str, *, timeout: float | None = None) -> Iterator[Entry]:
        """The key's entry now (if there is one), then each time it has changed; version 0: deleted.

        A slow reader sees the newest state, not each one in between. `timeout` bounds each wait.
        """
        seen = 0
        while True:
            wait = _watch_from(key, seen, timeout)
            entry = _blocking(wait, "kv.watch_async")
            seen = entry.version
            yield entry

    async def watch_async(self, key: str, *, timeout: float | None = None) -> AsyncIterator[Entry]:
        """As `watch`."""
        seen = 0
        while True:
            entry = await _awaited(_watch_from(key, seen, timeout))
            seen = entry.version
            yield entry


kv = KeyValue()
"""The job's keys and values."""


async def _entry(client: ControlClient, key: str, timeout: float | None) -> Entry:
    return _read(await client.ask("kv", {"op": "get", "key": key}, timeout))


async def _get(client: ControlClient, key: str, default: Any, timeout: float | None) -> Any:
    entry = await _entry(client, key, timeout)
    return entry.value if entry.version else default


async def _put(client: ControlClient, message: Message, timeout: float | None) -> int:
    return int((await client.ask("kv", message, timeout))["version"])


async def _delete(
    client: ControlClient, key: str, if_version: int | None, timeout: float | None
) -> bool:
    message = {"op": "delete", "key": key, "if_version": if_version}
    return bool((await client.ask("kv", message, timeout))["deleted"])


def _watch_from(
    key: str, seen: int, timeout: float | None
) -> Callable[[ControlClient], Coroutine[Any, Any, Entry]]:
    async def wait(client: ControlClient) -> Entry:
        message = {"op": "watch", "key": key, "since": seen}
        return _read(await client.ask("kv", message, timeout))

    return wait


def _put_message(
    key: str, value: Any, if_version: int | None, ttl_s: float | None
) -> dict[str, Any]:
    encoded = encode(value)
    parts = [bytes(encoded.body), *(bytes(part) for part in encoded.buffers)]
    size = sum(map(len, parts))
    if size > _VALUE_LIMIT:
        raise MisuseError(
            f"the value of key {key!r} has {size} bytes; {_VALUE_LIMIT} are allowed: kv is for small "
            "facts, larger things go by RPC or into a checkpoint"
        )
    return {"op": "put", "key": key, "value": parts, "if_version": if_version, "ttl_s": ttl_s}


def _read(facts: dict[str, Any]) -> Entry:
    if facts["version"] == 0:
        return Entry(None, 0)
    body, *buffers = facts["value"]
    return Entry(decode(body, buffers), facts["version"], facts["lease"])
