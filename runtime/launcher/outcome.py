"""What the end of a job means for the box and the exit code, and how that travels.

The first agent makes an `Outcome` of the directive that ends the job, with the last lines of workers that failed
on other hosts, which the agents there add. It keeps it in the job's log folder for who asks later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from typing import Any

from runtime.launcher.records import Ended
from runtime.launcher.report import TIMED_OUT, End, ErrorFile, Outcome, WorkerFailure, exit_code

_STOP = 143
FILE = "outcome.json"
_STOPPED: Mapping[int, End] = {
    129: "hangup", 130: "interrupted", 131: "quit", 143: "terminated",
}  # fmt: skip


def failures_of(end: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of the directive "end", the first failure and those after it."""
    return [end["first"], *end["others"]] if end.get("first") else []


def outcome_of(
    end: Mapping[str, Any], base: Outcome, added: Iterable[Mapping[str, Any]] = ()
) -> Outcome:
    """The directive "end" as an outcome. `base` says what is known of the job beside it, `added` are failures
    with what other hosts know of them."""
    known = {(failure["name"], failure["incarnation"]): failure for failure in added}
    told = tuple(
        _failure(known.get((failure["name"], failure["incarnation"]), failure))
        for failure in failures_of(end)
    )
    code, reason = end["code"], end["reason"]
    if code == 0:
        return base
    if told:
        return replace(base, end="failed", failures=told, detail=reason)
    if code == _STOP and reason != "stopped by SIGTERM":  # which the launcher got
        return replace(base, end="stopped", detail=reason)
    if code in _STOPPED:
        return replace(base, end=_STOPPED[code])
    if code == TIMED_OUT:
        return replace(base, end="timeout")
    return replace(base, end="host_lost", detail=reason)


def _failure(failure: Mapping[str, Any]) -> WorkerFailure:
    lines = failure.get("lines") or {}
    error = failure["error"] or None
    number = failure["signal"] or None
    _, oom, evidence = failure["cause"].partition(" (")
    when = datetime.fromtimestamp(failure["at"]).strftime("%H:%M:%S.%f")[:-3]
    return WorkerFailure(
        role=failure["role"],
        rank=failure["rank"],
        host=failure["host"],
        pid=failure["pid"] or None,
        when=when if failure["at"] else "",  # of a lost host nobody knows it
        code=None if number else failure["code"],
        signal=number,
        reason="" if failure["pid"] else failure["cause"],
        evidence=(evidence.rstrip(")"),) if oom and failure["pid"] else (),
        restart_count=failure["incarnation"],
        error=error and ErrorFile(error["message"], error["traceback"], error["type"]),
        last_lines=tuple(lines.get("stderr") or lines.get("stdout") or ()),
        log_dir=failure.get("folder") or "",
    )


def to_plain(outcome: Outcome) -> dict[str, Any]:
    """As plain data, with the job's exit code beside it."""
    return {"code": exit_code(outcome), **asdict(outcome)}


def from_plain(state: Mapping[str, Any]) -> Outcome:
    """The outcome that `to_plain` wrote down."""
    values = {name: value for name, value in state.items() if name != "code"}
    failures = tuple(
        WorkerFailure(
            **{
                **failure,
                "evidence": tuple(failure["evidence"]),
                "last_lines": tuple(failure["last_lines"]),
                "error": failure["error"] and ErrorFile(**failure["error"]),
            }
        )
        for failure in state["failures"]
    )
    return Outcome(**{**values, "failures": failures})


def keep(outcome: Outcome, peer: str, folder: str = "") -> None:
    """Write it into the job's log folder, or that `folder`. `peer`: the first agent, which tells this job from an
    earlier one of its id. Raises `OSError`."""
    path = os.path.join(folder or outcome.log_dir, FILE)
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump({"peer": peer, **to_plain(outcome)}, file, indent=1)
    os.replace(path + ".new", path)


def read_kept(folder: str, peer: str) -> Ended | None:
    """What `keep` wrote there for the job of that first agent, and when. None where there is nothing that can be
    read."""
    path = os.path.join(folder, FILE)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
            at = os.fstat(file.fileno()).st_mtime
        return Ended(from_plain(record), at) if record.pop("peer") == peer else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
