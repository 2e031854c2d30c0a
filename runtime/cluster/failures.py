"""Which of several failures was the first, and which only followed from it. Pure.

Times are wall clock, from the workers' own error reports where there are any: a worker that raised first
may well exit last. A death by signal is taken to be a moment earlier than it was seen, since the errors
that it causes can be reported before it is. An error that only tells of another worker's death
(`PeerLostError` and the like) is a consequence of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIGNAL_HEAD_START_S = 0.1
_CONSEQUENCES = ("PeerLostError", "BarrierBroken", "WorkerFailureError")


@dataclass(slots=True)
class Failure:
    """One failed process. Times are wall clock, from the reports of the agents."""

    name: str
    role: str
    rank: int
    host: str
    pid: int
    attempt: int
    incarnation: int
    code: int
    signal: int
    cause: str
    at: float
    error: dict[str, Any]
    step: int | None = None
    recovered: bool = False

    @property
    def exit_code(self) -> int:
        """As the job's exit code."""
        return 128 + self.signal if self.signal else self.code

    @property
    def happened(self) -> float:
        """When, for putting failures in order."""
        return self.at - (SIGNAL_HEAD_START_S if self.signal and not self.error else 0.0)

    def blames(self) -> str | None:
        """The text of an error that tells of somebody else's death; None when it is of its own."""
        if str(self.error.get("type", "")).rpartition(".")[2] in _CONSEQUENCES:
            return str(self.error.get("message", ""))
        return None


def first_of(failures: Sequence[Failure]) -> Failure | None:
    """The earliest that is no consequence; if all are, the earliest."""
    return min(failures, key=lambda f: (f.blames() is not None, f.happened), default=None)


def root_of(current: Sequence[Failure], known: Sequence[Failure]) -> Failure | None:
    """The first of `current`; where it only tells of another's death, that one if it is `known`; and
    so on, from consequence to cause."""
    first, passed = first_of(current), list[Failure]()
    while first is not None and (blamed := first.blames()) is not None:
        passed.append(first)
        causes = [f for f in known if f not in passed and _names(blamed, f.name)]
        if not causes:
            break
        # Of several deaths of that name, the last one before; clocks of hosts may differ.
        before = [f for f in causes if f.happened <= first.happened]
        first = before[-1] if before else causes[0]
    return first


def _names(sentence: str, name: str) -> bool:
    """Whether an error's text names an actor: "trainer-1" is not in "trainer-10 is gone"."""
    before, found, after = sentence.partition(name)
    if not found:
        return False
    whole_word = not (after[:1].isdigit() or before[-1:].isalnum() or before.endswith(("-", "_")))
    return whole_word or _names(after, name)
