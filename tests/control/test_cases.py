"""Plays the golden scripts of `tests/cases`; see the README there. REWRITE=1 writes them anew."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from runtime.control.barrier import Barrier
from runtime.control.directory import NameDirectory
from runtime.control.kv import Kv
from runtime.control.membership import Membership
from runtime.control.rendezvous import Rendezvous
from runtime.errors import RuntimeFault
from runtime.machine import Call, Effect, Emit, Fail, Machine, Reply, Send

_CASES = Path(__file__).parent.parent / "cases"
_MACHINES: dict[str, Callable[[], Machine]] = {
    "barrier": Barrier,
    "directory": NameDirectory,
    "kv": Kv,
    "membership": Membership,
    "rendezvous": Rendezvous,
}


_SHOWN = ("name", "state", "incarnation", "peer", "cause")
"""What is shown of a member's event; the rest would bury it."""


class _Stage:
    """One machine, the time, and the words for what it does."""

    def __init__(self, name: str) -> None:
        self._make = _MACHINES[name]
        self._machine = self._make()
        self._now = 0.0

    def play(self, line: str) -> list[str]:
        command, *words = shlex.split(line)
        return list(getattr(self, f"_{command}")(*words))

    def _at(self, seconds: str) -> list[str]:
        self._now = float(seconds)
        return []

    def _ask(self, client: str, number: str, op: str, *fields: str) -> list[str]:
        return self._handle(op, fields, Call(client, int(number)))

    def _tell(self, op: str, *fields: str) -> list[str]:
        return self._handle(op, fields, None)

    def _handle(self, op: str, fields: tuple[str, ...], call: Call | None) -> list[str]:
        message = {"op": op} | dict(_field(field) for field in fields)
        try:
            return _written(self._machine.handle(message, call, self._now))
        except RuntimeFault as error:
            return [f"refused {type(error).__name__}: {error}"]

    def _tick(self) -> list[str]:
        return _written(self._machine.tick(self._now))

    def _cancel(self, client: str, number: str) -> list[str]:
        return _written(self._machine.cancelled(Call(client, int(number)), self._now))

    def _lost(self, peer: str, cause: str) -> list[str]:
        return _written(self._machine.lost(peer, cause, self._now))

    def _why(self, client: str, number: str) -> list[str]:
        return [self._machine.why(Call(client, int(number))) or "it does not wait"]

    def _deadline(self) -> list[str]:
        due = self._machine.deadline()
        return ["never" if due is None else f"{due:g}"]

    def _reload(self) -> list[str]:
        state = msgpack.unpackb(msgpack.packb(self._machine.dump()), strict_map_key=False)
        self._machine = self._make()
        self._machine.load(state)
        return []


def _field(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _written(effects: list[Effect]) -> list[str]:
    return [_one(effect) for effect in effects]


def _one(effect: Effect) -> str:
    match effect:
        case Reply(call, value):
            return f"reply {call.client} {call.id} {json.dumps(value)}"
        case Fail(call, error):
            return f"fail {call.client} {call.id} {type(error).__name__}: {error}"
        case Send(to, message):
            return f"send {to} {json.dumps(message)}"
        case Emit(event) if event["kind"] == "member":
            return " ".join(["emit member", *(str(event[key]) for key in _SHOWN)]).rstrip()
        case Emit(event):
            return f"emit {json.dumps(event)}"


def _played(text: str) -> str:
    """The script with what comes out of its commands today."""
    stage: _Stage | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("machine "):
            stage = _Stage(line.split()[1])
        elif line == "----" or line.startswith("  "):
            continue
        elif line and not line.startswith("#"):
            assert stage is not None, "the first line names the machine"
            outcome = stage.play(line)
            lines += [line, *(["----"] if outcome else []), *(f"  {said}" for said in outcome)]
            continue
        lines.append(line)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", sorted(_CASES.glob("*.txt")), ids=lambda path: path.stem)
def test_the_script_still_reads_the_same(path: Path) -> None:
    text = path.read_text()
    played = _played(text)
    if os.environ.get("REWRITE"):
        path.write_text(played)
    else:
        assert played == text
