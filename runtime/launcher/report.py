"""The last words of a launch: the failure box, progress in words, and the exit code.

Records of what happened go in, text comes out, no wider than the terminal. The box tells of the first
failure in full (when, which role and rank, where, how it ended and what speaks for it, traceback, last
lines, where the logs are); what failed only after it gets a line each, so that the cause is never
buried under its consequences.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MIN_WIDTH = 40
MAX_TRACEBACK_LINES = 60
MAX_LAST_LINES = 20
MAX_FOLLOW_ONS = 16
MAX_LINE = 2000

TIMED_OUT = 124


@dataclass(frozen=True)
class ErrorFile:
    """What a worker wrote about its own uncaught exception (torchelastic's `error.json`)."""

    message: str
    traceback: str = ""
    type_name: str = ""


@dataclass(frozen=True)
class WorkerFailure:
    """One failed worker. Exactly one of `code` and `signal` is set where the process ran.

    `when` is the time of day in words; `evidence` are facts beside the exit status ("cgroup oom_kill
    +1"); `reason` is for failures that are no exit: could not start, lost with its host.
    """

    role: str
    rank: int
    host: str = "localhost"
    pid: int | None = None
    when: str = ""
    code: int | None = None
    signal: int | None = None
    reason: str = ""
    evidence: tuple[str, ...] = ()
    restart_count: int = 0
    error: ErrorFile | None = None
    last_lines: tuple[str, ...] = ()
    log_dir: str = ""

    @property
    def name(self) -> str:
        return f"{self.role}-{self.rank}"


End = Literal[
    "finished",
    "failed",
    "usage",
    "host_lost",
    "timeout",
    "interrupted",
    "terminated",
    "hangup",
    "quit",
    "stopped",
]


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `failures`: the first, then what followed; `detail`: more about the end."""

    end: End
    job_id: str = ""
    job_name: str = ""
    failures: tuple[WorkerFailure, ...] = ()
    detail: str = ""
    log_dir: str = ""
    restarts: int = 0
    timeout_s: float | None = None


# Codes and words


_CODES: dict[End, int] = {
    "finished": 0,
    "usage": 2,
    "host_lost": 69,
    "timeout": TIMED_OUT,
    "interrupted": 128 + signal.SIGINT,
    "terminated": 128 + signal.SIGTERM,
    "hangup": 128 + signal.SIGHUP,
    "quit": 128 + signal.SIGQUIT,
    "stopped": 128 + signal.SIGTERM,
}


def exit_code(outcome: Outcome) -> int:
    """The launcher's exit code: 0, the first failing worker's own, 128 + its signal, or that of the
    job's end."""
    if outcome.end != "failed":
        return _CODES[outcome.end]
    first = outcome.failures[0] if outcome.failures else WorkerFailure("", 0)
    return 128 + first.signal if first.signal is not None else first.code or 1


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9; "signal 99" for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        start, end = int(signal.SIGRTMIN), int(signal.SIGRTMAX)
        return f"SIGRTMIN+{number - start}" if start <= number <= end else f"signal {number}"


def cause(failure: WorkerFailure) -> str:
    """In a few words how it ended: "exit code 3", "SIGKILL", "could not start: …"."""
    if failure.signal is not None:
        return signal_name(failure.signal)
    if failure.code is not None and not failure.reason:
        by_signal = 128 < failure.code < 128 + signal.NSIG
        return f"exit code {failure.code}" + (
            f" (128 + {signal_name(failure.code - 128)})" if by_signal else ""
        )
    return failure.reason or "lost"


_HINTS = {
    int(signal.SIGKILL): "killed from outside, or by the kernel for want of memory",
    int(signal.SIGSEGV): "invalid memory access in native code",
    int(signal.SIGBUS): "bus error: often /dev/shm or a mapped file is full",
    int(signal.SIGILL): "illegal instruction: a library built for another processor",
    int(signal.SIGFPE): "arithmetic error in native code",
    int(signal.SIGABRT): "native code gave up: see its last lines",
    int(signal.SIGTERM): "somebody asked it to stop",
    int(signal.SIGPIPE): "wrote to a pipe that nobody reads",
}


def waiting_for(names: Sequence[str], limit: int = 8) -> str:
    """ "waiting for 3 ranks: trainer-0, trainer-1, evaluator-0"; long lists are counted."""
    shown = ", ".join(names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"waiting for {len(names)} rank{'' if len(names) == 1 else 's'}: {shown}{more}"


def restarting(event: Mapping[str, Any]) -> str:
    """What the event "restarting" says, in words."""
    failure, names = event["failure"], event["names"]
    what = names[0] if len(names) == 1 else f"all {len(names)} of {event['role']}"
    return (
        f"{failure['name']} failed ({failure['cause']}): restarting {what}, "
        f"attempt {event['attempt']} of {event['max']}"
    )


# The box


def failure_box(outcome: Outcome, width: int = 80) -> str:
    """The text for the end of a job that did not finish; "" for one that did.

    No line is wider than `width` (at least 40) columns, but for a path that is to be copied.
    """
    if outcome.end == "finished":
        return ""
    width = max(MIN_WIDTH, width)
    lines = [_rule(f" job {_job_words(outcome)} {end_words(outcome)} ", width, "═")]
    if outcome.detail:
        lines += _wrapped(outcome.detail, width)
    if outcome.failures:
        lines += _first(outcome.failures[0], outcome, width)
    elif outcome.log_dir:
        lines += _logs(outcome.log_dir)
    lines += _follow_ons(outcome.failures[1:], width)
    lines += _field("exit code", str(exit_code(outcome)), width)
    lines.append("═" * width)
    return "\n".join(lines) + "\n"


def _job_words(outcome: Outcome) -> str:
    name, job_id = outcome.job_name, outcome.job_id
    if name and job_id and name != job_id:
        return f"{job_id} ({name})"
    return job_id or name or "?"


def end_words(outcome: Outcome) -> str:
    """How the job ended: "failed after 2 restarts", "stopped by Ctrl-C"."""
    if outcome.end == "failed" and outcome.restarts:
        return f"failed after {outcome.restarts} restart{'s' if outcome.restarts > 1 else ''}"
    if outcome.end == "timeout" and outcome.timeout_s is not None:
        return f"ran longer than --timeout {outcome.timeout_s:g} s"
    return _WORDS[outcome.end]


_WORDS: dict[End, str] = {
    "failed": "failed",
    "usage": "could not start",
    "host_lost": "lost a host",
    "timeout": "ran longer than --timeout",
    "interrupted": "stopped by Ctrl-C",
    "terminated": "stopped by SIGTERM",
    "hangup": "stopped: the terminal was closed",
    "quit": "stopped by SIGQUIT",
    "stopped": "was stopped",
}


def _first(failure: WorkerFailure, outcome: Outcome, width: int) -> list[str]:
    where = f"{failure.role} rank {failure.rank} on {failure.host}"
    if failure.pid is not None:
        where += f", pid {failure.pid}"
    if failure.when:
        where += f", at {failure.when}"
    if failure.restart_count:
        where += f", attempt {failure.restart_count}"
    lines = _field("first", where, width)
    lines += _field("cause", _cause_words(failure), width)
    if failure.error is not None and failure.error.traceback.strip():
        lines += _block("traceback", _tail(failure.error.traceback, MAX_TRACEBACK_LINES), width)
    elif failure.error is not None:
        lines += _field("error", _error_words(failure.error), width)
    if failure.last_lines and not _told(failure):
        lines += _block("last lines", _last(failure.last_lines, MAX_LAST_LINES), width)
    log_dir = failure.log_dir or outcome.log_dir
    return lines + (_logs(log_dir) if log_dir else [])


def _error_words(error: ErrorFile) -> str:
    known = error.type_name and not error.message.startswith(error.type_name)
    return f"{error.type_name}: {error.message}" if known else error.message


def _cause_words(failure: WorkerFailure) -> str:
    words = cause(failure)
    if failure.signal is not None:
        words = f"killed by {words} (signal {failure.signal})"
        if not failure.evidence and failure.signal in _HINTS:
            words += f": {_HINTS[failure.signal]}"
    return "; ".join((words, *failure.evidence))


def _told(failure: WorkerFailure) -> bool:
    """Whether the last lines are just the traceback that the box has already."""
    if failure.error is None or not failure.error.traceback.strip():
        return False
    import re

    trace = {line.strip() for line in failure.error.traceback.splitlines()}
    # torch puts the rank before each line of a traceback that it prints itself.
    said = (re.sub(r"^\[rank\d+\]: ?", "", line).strip() for line in failure.last_lines)
    return all(line in trace for line in said)


def _follow_ons(failures: Sequence[WorkerFailure], width: int) -> list[str]:
    if not failures:
        return []
    lines = [
        f"{failure.name} on {failure.host}: {cause(failure)}"
        + (f" at {failure.when}" if failure.when else "")
        for failure in failures[:MAX_FOLLOW_ONS]
    ]
    if len(failures) > MAX_FOLLOW_ONS:
        lines.append(f"… and {len(failures) - MAX_FOLLOW_ONS} more")
    # One line each, whatever the width: what is cut off stands in the logs.
    return ["after it", *(_clipped(f"  {line}", width) for line in lines)]


# Text within a width


def _rule(title: str, width: int, line: str) -> str:
    title = _clipped(_clean(title), width - 4)
    return line * 2 + title + line * (width - 2 - _columns(title))


def _logs(path: str) -> list[str]:
    return [f"{'logs':<10} {_clean(path)}"]


def _field(name: str, text: str, width: int) -> list[str]:
    lines = _wrapped(text, width - 11)
    return [f"{name if number == 0 else '':<10} {line}" for number, line in enumerate(lines)]


def _block(name: str, lines: Iterable[str], width: int) -> list[str]:
    shown = (
        line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} … {len(line) - MAX_LINE} more"
        for line in lines
    )  # fmt: skip
    return [name, *(f"  {part}" for line in shown for part in _wrapped(line, width - 2))]


def _tail(text: str, limit: int) -> list[str]:
    """The first few and the last lines of a traceback; a deep recursion is cut in its middle."""
    lines = text.rstrip().splitlines()
    if len(lines) <= limit:
        return lines
    head = limit // 4
    dropped = len(lines) - limit + 1
    return [*lines[:head], f"  … {dropped} lines more …", *lines[len(lines) - (limit - head - 1) :]]


def _last(lines: Sequence[str], limit: int) -> list[str]:
    if len(lines) <= limit:
        return list(lines)
    return [f"… {len(lines) - limit} lines more in the log", *lines[-limit:]]


def _clean(text: str) -> str:
    """Text without control characters, colours included: the box is also read from files."""
    import re

    text = re.sub(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])", "", text)
    text = text.expandtabs(4)
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _columns(text: str) -> int:
    """How wide a terminal shows `text`."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in text)


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns; broken after spaces where there are any."""
    lines: list[str] = []
    for line in _clean(text.rstrip()).split("\n"):
        rest = line.rstrip()
        while _columns(rest) > width:
            cut = _fitting(rest, width)
            space = rest.rfind(" ", width // 2, cut + 1)
            cut = space if space > 0 else cut
            lines.append(rest[:cut].rstrip())
            rest = rest[cut:].lstrip()
        lines.append(rest)
    return lines


def _fitting(text: str, width: int) -> int:
    """How many characters of `text` fit; at least one."""
    used = 0
    for number, character in enumerate(text):
        used += _columns(character)
        if used > width:
            return max(1, number)
    return len(text)


def _clipped(text: str, width: int) -> str:
    text = _clean(text).replace("\n", " ")
    return text if _columns(text) <= width else text[: _fitting(text, width - 1)] + "…"
