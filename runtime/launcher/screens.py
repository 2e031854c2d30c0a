"""What `python -m runtime` shows: jobs and their workers as text for a terminal, and as plain data for JSON.

Tables are as wide as the terminal lets them: what does not fit is cut off in the widest column, with an
ellipsis. Nothing here asks anybody or looks at a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from runtime.launcher import report
from runtime.launcher.records import Ended, HostStatus, JobEndpoint, JobStatus, Missing

_COLOURS = {
    "running": 32, "finished": 32, "exited": 32,
    "starting": 33, "restarting": 33, "stopping": 33,
    "failed": 31, "lost": 31, "unknown": 33,
}  # fmt: skip
_NARROWEST = 8
_WIDEST_BOX = 120
_LISTED = ("job", "name", "stage", "started", "hosts", "code")
_HOST = ("host", "agent", "heard of", "")
_WORKER = ("worker", "host", "pid", "state", "restarts", "step", "cause")


class Listed(NamedTuple):
    """One line of `list`. `stage`: as in `JobStatus`."""

    job: JobEndpoint
    stage: str
    end: Ended | None = None


def status_text(status: JobStatus, now: float, width: int = 80, *, colour: bool = False) -> str:
    """One job: its stage and since when, its hosts, a line for each worker. `now`: seconds since the epoch."""
    name = f" ({status.name})" if status.name and status.name != status.job_id else ""
    stage = _painted(status.stage, status.stage, colour)
    words = "{} ago" if status.stage in ("finished", "failed") else "for {}"
    since = " " + words.format(lasting(now - status.since)) if status.since else ""
    lines = [f"job {status.job_id}{name}: {stage}{since}"]
    facts = {
        "started": _when(status.started),
        "reason": status.reason,
        "exit code": _text(status.exit_code),
        "restarts": _text(status.restarts or None),
        "hosts": "" if status.roles else ", ".join(host.host for host in status.hosts),
        "logs": status.log_dir + (" on each host" if len(status.hosts) > 1 else ""),
    }
    lines += [f"{key:<10} {value}" for key, value in facts.items() if value]
    if status.roles:
        hosts = [
            (h.host, _text(h.pid), _text(h.last_heartbeat_s, ".0f", " s ago"), h.problem)
            for h in status.hosts
        ]
        lines += ["", *table(_HOST, hosts, width)]
        workers = [
            (
                w.name,
                w.host,
                _text(w.pid),
                w.state,
                _text(w.restart_count or None),
                _text(w.step),
                w.cause,
            )
            for role in status.roles.values()
            for w in role
        ]
        lines += ["", *table(_WORKER, workers, width, colour)]
    return "\n".join(lines) + "\n"


def list_text(
    listed: Sequence[Listed], now: float, width: int = 80, *, colour: bool = False
) -> str:
    """Jobs, a line each."""
    rows = [
        (
            item.job.job_id,
            item.job.name,
            item.stage,
            lasting(now - item.job.started) + " ago",
            item.job.names[0] + (f" +{more}" if (more := len(item.job.hosts) - 1) else ""),
            "" if item.end is None else str(item.end.code),
        )
        for item in listed
    ]
    return "\n".join(table(_LISTED, rows, width, colour)) + "\n"


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], width: int, colour: bool = False
) -> list[str]:
    """Columns as wide as they need to be, left out where they are empty, and no wider in all than `width` if that
    is enough for the first, which is never cut: it is what one types."""
    full = [tuple(titles), *map(tuple, rows)]
    kept = [i for i in range(len(titles)) if any(row[i] for row in full[1:]) or i == 0]
    lines = [[row[i] for i in kept] for row in full]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    rest = widths[1:]
    while sum(rest) + 2 * len(rest) + widths[0] > width and max(rest, default=0) > _NARROWEST:
        rest[rest.index(max(rest))] -= 1
    return [
        "  ".join(
            _painted(_fitted(cell, space), cell, colour)
            for cell, space in zip(line, [widths[0], *rest], strict=True)
        ).rstrip()
        for line in lines
    ]


def _fitted(cell: str, width: int) -> str:
    return cell.ljust(width) if len(cell) <= width else cell[: width - 1] + "…"


def _painted(text: str, state: str, colour: bool) -> str:
    return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if colour and state in _COLOURS else text


def _text(value: float | None, form: str = "", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else ""


def lasting(seconds: float) -> str:
    """A time in words: "12 s", "3 min 5 s", "2 h 10 min", "4 d 3 h"."""
    whole = max(0, int(seconds))
    for unit, size, part, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {part}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"


def ended_status(job: JobEndpoint, end: Ended | Missing) -> JobStatus:
    """What is known of a job that does not answer."""
    known = end if isinstance(end, Ended) else None
    return JobStatus(
        stage=end.stage,
        exit_code=known and known.code,
        restarts=known.outcome.restarts if known else 0,
        roles={},
        job_id=job.job_id,
        name=job.name,
        started=job.started,
        since=known.at if known else 0.0,
        hosts=tuple(HostStatus(name, None, None) for name in job.names),
        reason=end.reason if isinstance(end, Missing) else _why(end.outcome),
        log_dir=job.log_dir,
    )


def ended_text(
    job: JobEndpoint, end: Ended | Missing, now: float, width: int = 80, *, colour: bool = False
) -> str:
    """The same as text, with what an attached launcher would have said at last."""
    status, box = ended_status(job, end), ""
    if isinstance(end, Ended) and end.outcome.failures:
        status = status._replace(reason="", exit_code=None)  # both are in the box
        box = "\n" + report.failure_box(end.outcome, min(width, _WIDEST_BOX))
    return status_text(status, now, width, colour=colour) + box


def _why(outcome: report.Outcome) -> str:
    if outcome.failures:
        first = outcome.failures[0]
        return f"{first.name} on {first.host}: {report.cause(first)}"
    return outcome.detail or (report.end_words(outcome) if outcome.end != "finished" else "")


def plain(value: Any) -> Any:
    """A record as JSON can hold it."""
    if hasattr(value, "_asdict"):
        return {key: plain(part) for key, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value
