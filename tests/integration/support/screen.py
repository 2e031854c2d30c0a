"""What stands on the screen at the end of a failed job: reading the launcher's own words.

The launcher prints user output with a `[role rank host]` prefix and its own words, the failure box last,
to stderr. These helpers find the box and state what must be true of every one.
"""

from __future__ import annotations

import re

from tests.integration.support.job import FRAME_OF_OURS, Job

PREFIX = re.compile(r"^\[(?P<role>[\w.-]+?) (?P<rank>\d+)(?: (?P<host>[^\]]+))?\] ?")
"""How a line of a worker begins on the console."""

NOISE = (
    "Exception ignored",
    "Task was destroyed",
    "Task exception was never retrieved",
    "never awaited",
    "leaked semaphore",
    "resource_tracker",
    "BrokenPipeError",
    "ConnectionResetError",
    "ProcessLookupError",
    "ResourceWarning",
    "Fatal Python error: _enter_buffered_busy",
)
"""Words that only ever tell of a consequence of the failure, never of the failure."""


def own_lines(err: str) -> list[str]:
    """The launcher's own lines: those without a worker's prefix."""
    return [line for line in err.splitlines() if not PREFIX.match(line)]


def said(job: Job) -> str:
    """Everything that the launcher itself said."""
    return "\n".join(own_lines(job.err))


def box(job: Job) -> str:
    """The failure box: the last that the launcher says, from its double rule on."""
    text = said(job)
    start = text.find("══ job")
    assert start >= 0, f"there is no failure box{job.describe()}"
    return text[start:]


def assert_first_failure(
    job: Job, *, role: str, rank: int, words: tuple[str, ...] = (), dumped: bool = False
) -> str:
    """The box names this role and rank first, and says `words`; nothing else is on the screen.

    `dumped`: the interpreter itself printed all frames of all threads as it died, ours among them.
    """
    text = box(job)
    named = re.findall(rf"\b({re.escape(role)})\b\W{{0,3}}(?:rank\W{{0,2}})?(\d+)\b", text)
    assert named, f"the failure box names no worker of {role}:\n{text}{job.describe()}"
    assert named[0] == (role, str(rank)), f"named first: {named[0]}, expected rank {rank}\n{text}"
    assert "SIGTERM" not in text, f"stopping the others is a consequence, not a failure:\n{text}"
    for word in words:
        assert word in text, f"{word!r} is missing in the failure box:\n{text}{job.describe()}"
    assert_no_noise(job, dumped=dumped)
    return text


def assert_no_noise(job: Job, *, dumped: bool = False) -> None:
    """No traceback with frames of the package, and no words about mere consequences."""
    err = job.err
    ours = None if dumped else FRAME_OF_OURS.search(err)
    assert not ours, f"a traceback shows the package's own frames\n{err}"
    for words in NOISE:
        assert words not in err, f"{words!r} on the screen\n{err}"
