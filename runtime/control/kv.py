"""Small facts by key, with versions, conditions, expiry and watching: a pure machine.

Versions come from one counter of the whole store, so a version is never used twice, not even for a key
that was deleted in between: a condition on a version cannot be met by accident. Version 0 means "there
is no such key". A key put with `ttl_s` expires that many seconds after the last put.

A watch is a long poll: it is answered when the key's version differs from the one the caller has seen
(`since`). A caller that is slow sees the newest state, not each one in between.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from runtime.control.messages import (
    Operation,
    asked,
    call_from,
    call_state,
    operation,
    seconds,
    text,
    whole,
)
from runtime.errors import MisuseError, VersionConflict
from runtime.machine import Call, Effect, Message, Reply


@dataclass(slots=True)
class _Entry:
    value: Any
    version: int
    ttl_s: float | None = None
    expires: float | None = None


class Kv:
    """The machine "kv".

    Operations: get{key} (alias entry) -> {"value", "version", "lease"} (version 0 when absent; lease:
    seconds left, or None), put{key, value, if_version?, ttl_s?} -> {"version"}, delete{key,
    if_version?} -> {"deleted"}, watch{key, since} -> as get, keys{prefix} -> [keys]. `value`: msgpack types.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._watches: dict[Call, tuple[str, int]] = {}
        self._version = 0
        self._operations: dict[str, Operation] = {
            "get": self._get,
            "entry": self._get,
            "put": self._put,
            "delete": self._delete,
            "watch": self._watch,
            "keys": self._keys,
        }

    # -- the machine --------------------------------------------------------------------------

    def handle(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return operation("kv", self._operations, message)(message, call, now)

    def tick(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        expired = [
            k for k, e in self._entries.items() if e.expires is not None and e.expires <= now
        ]
        for key in expired:
            del self._entries[key]
            effects += self._tell(key, now)
        return effects

    def deadline(self) -> float | None:
        return min(
            (e.expires for e in self._entries.values() if e.expires is not None), default=None
        )

    def cancelled(self, call: Call, now: float) -> list[Effect]:
        self._watches.pop(call, None)
        return []

    def lost(self, peer: str, cause: str, now: float) -> list[Effect]:
        for call in [call for call in self._watches if call.client == peer]:
            del self._watches[call]
        return []

    def why(self, call: Call) -> str | None:
        if call not in self._watches:
            return None
        key, since = self._watches[call]
        return (
            f"waiting for key {key!r} to change" if since else f"waiting for key {key!r} to appear"
        )

    def dump(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "entries": {key: asdict(entry) for key, entry in self._entries.items()},
            "watches": [[call_state(c), key, since] for c, (key, since) in self._watches.items()],
        }

    def load(self, state: dict[str, Any]) -> None:
        self._version = state["version"]
        self._entries = {key: _Entry(**entry) for key, entry in state["entries"].items()}
        self._watches = {call_from(call): (key, since) for call, key, since in state["watches"]}

    # -- operations ---------------------------------------------------------------------------

    def _get(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        return [Reply(asked(message, call), self._facts(_key(message), now))]

    def _put(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        key, ttl_s = _key(message), seconds(message, "ttl_s")
        self._check(message, key, now)
        self._version += 1
        expires = None if ttl_s is None else now + ttl_s
        self._entries[key] = _Entry(message.get("value"), self._version, ttl_s, expires)
        effects = self._tell(key, now)
        return effects if call is None else [Reply(call, {"version": self._version}), *effects]

    def _delete(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        key = _key(message)
        self._check(message, key, now)
        found = self._live(key, now) is not None
        if found:
            del self._entries[key]
        effects = self._tell(key, now) if found else []
        return effects if call is None else [Reply(call, {"deleted": found}), *effects]

    def _watch(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        call, key, since = asked(message, call), _key(message), whole(message, "since", 0)
        if self._version_of(key, now) != since:
            return [Reply(call, self._facts(key, now))]
        self._watches[call] = (key, since)
        return []

    def _keys(self, message: Message, call: Call | None, now: float) -> list[Effect]:
        prefix = text(message, "prefix", "")
        return [
            Reply(asked(message, call), sorted(k for k in self._entries if k.startswith(prefix)))
        ]

    # -- parts --------------------------------------------------------------------------------

    def _live(self, key: str, now: float) -> _Entry | None:
        """The entry of a key. What has expired is gone, even before a tick takes it away."""
        entry = self._entries.get(key)
        if entry is None or (entry.expires is not None and entry.expires <= now):
            return None
        return entry

    def _version_of(self, key: str, now: float) -> int:
        entry = self._live(key, now)
        return 0 if entry is None else entry.version

    def _check(self, message: Message, key: str, now: float) -> None:
        """`if_version`, where given, must be the version that the key has."""
        if message.get("if_version") is None:
            return
        expected, found = whole(message, "if_version"), self._version_of(key, now)
        if expected != found:
            has = f"has version {found}" if found else "does not exist"
            wanted = f"version {expected}" if expected else "that it does not exist"
            raise VersionConflict(
                f"key {key!r} {has}; the condition was {wanted}", key, expected, found
            )

    def _facts(self, key: str, now: float) -> dict[str, Any]:
        entry = self._live(key, now)
        if entry is None:
            return {"value": None, "version": 0, "lease": None}
        left = None if entry.expires is None else entry.expires - now
        return {"value": entry.value, "version": entry.version, "lease": left}

    def _tell(self, key: str, now: float) -> list[Effect]:
        """Answer those who watch a key that has just changed, if it is news to them."""
        version = self._version_of(key, now)
        calls = [
            c
            for c, (watched, since) in self._watches.items()
            if watched == key and since != version
        ]
        for call in calls:
            del self._watches[call]
        return [Reply(call, self._facts(key, now)) for call in calls]


def _key(message: Message) -> str:
    key = text(message, "key")
    if not key:
        raise MisuseError(f"{message.get('op')!r} needs a key that is not empty")
    return key
