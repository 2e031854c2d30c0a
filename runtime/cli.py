"""`python -m runtime`: look at the jobs that this user has launched from here, read what they print, end them.

A job is found through its private file (`launcher/jobs.py`) and asked through its agents (`cluster/client.py`).
Of one that has ended, its files tell. ZeroMQ is imported only to ask a job that runs.

Exit codes: 0 done, 1 no such job, or it cannot be reached (a line says which), 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from runtime import aio
from runtime.errors import MisuseError, RuntimeFault
from runtime.launcher import jobs, logfiles, report, screens, spawn
from runtime.launcher.records import JobEndpoint, JobStatus

if TYPE_CHECKING:
    from runtime.cluster.client import JobClient

_WATCH_S = 1.0
_TOLD_EVERY_S = 2.0
_STOP_MARGIN_S = 8.0
"""What a job may take to end beyond the time that its workers were given."""
_GONE_S = 5.0
_SHOWN_ENDED = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command with `argv` (default: the process's) and give the exit code."""
    arguments = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as `| head` does: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except RuntimeFault as error:
        _tell(f"error: {error}")
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime", description="See and end jobs of `python -m runtime.launch`."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        if name != "list":
            made.add_argument("job", nargs="?", metavar="JOB", help="its id or the beginning of it, or "
                              "its name (default: the newest one that runs)")  # fmt: skip
        made.add_argument("--json", action="store_true", help="as JSON")
        return made

    status = command("status", _status, "what a job does: its stage, hosts and workers")
    status.add_argument("--watch", action="store_true", help="again each second, until it ends")
    logs = command("logs", _logs, "what the workers of a job printed")
    logs.add_argument("-f", "--follow", action="store_true", help="and print, until it ends")
    logs.add_argument("-n", "--lines", type=_lines, default=10, metavar="LINES",
                      help="the last so many of each rank's streams (10), or all")  # fmt: skip
    logs.add_argument("--role", help="only of this role")
    logs.add_argument("--rank", type=int, help="only of this rank of each role")
    only = logs.add_mutually_exclusive_group()
    for stream in logfiles.STREAMS:
        only.add_argument(f"--{stream}", dest="stream", action="store_const", const=stream,
                          help=f"only {stream}")  # fmt: skip
    stop = command("stop", _stop, "end a job, and see that nothing of it is left")
    stop.add_argument("--force", action="store_true", help="kill it")
    command("list", _list, "jobs that run, and those that ended lately")
    return parser


def _lines(text: str) -> int | None:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines, nor all")
    return None if text == "all" else int(text)


# Commands


def _status(arguments: argparse.Namespace) -> int:
    job = jobs.find(arguments.job)

    def show(status: JobStatus) -> None:
        if arguments.json:
            return _print(json.dumps(screens.plain(status)))
        if arguments.watch and sys.stdout.isatty():
            _print("\x1b[H\x1b[2J", end="")
        _print(screens.status_text(status, _now(), _width(), colour=_colour()), end="")

    async def work(client: JobClient) -> None:
        show(await client.status())
        while arguments.watch and not await client.wait_for_end(_WATCH_S):
            show(await client.status())

    if _ask(job, work) is _ENDED or arguments.watch:
        status = screens.ended_status(job, jobs.outcome(job))
        show(status)
        return int(status.stage == "lost")
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from runtime.launcher.logprint import LogPrinter

    job = jobs.find(arguments.job)
    streams = (arguments.stream,) if arguments.stream else logfiles.STREAMS
    query = logfiles.Query(arguments.role, arguments.rank, streams, arguments.lines)
    printer = LogPrinter(
        _write, several_hosts=len(job.hosts) > 1, colour=_colour(), as_json=arguments.json
    )

    async def work(client: JobClient) -> None:
        async with (
            aio.background(printer.show_unfinished(), "unfinished lines"),
            aclosing(client.logs(query, follow=arguments.follow)) as found,
        ):
            async for host, item in found:
                if isinstance(item, RuntimeFault):
                    _tell(f"no (more) output of {host}: {item}")
                else:
                    printer.show(host, item)

    if _ask(job, work) is _ENDED:
        if not os.path.isdir(job.log_dir):
            raise MisuseError(
                f"job {job.job_id} has ended; its logs are in {job.log_dir} on {', '.join(job.hosts)}"
            )
        if len(job.hosts) > 1:
            _tell(
                f"of what it printed on {', '.join(job.hosts)}, only what is in {job.log_dir} here"
            )
        positions, more = None, True
        while more:
            pieces, positions, more = logfiles.read(job.log_dir, query, positions)
            for piece in pieces:
                printer.show("", piece)
    if not printer.end():
        _tell(f"job {job.job_id} has printed nothing of that kind")
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    job = jobs.find(arguments.job)
    limit = (0.0 if arguments.force else job.shutdown_timeout_s) + _STOP_MARGIN_S

    async def work(client: JobClient) -> tuple[dict[str, Any], list[int]]:
        before = await client.stop("stopped by `python -m runtime stop`", force=arguments.force)
        how = "killing" if arguments.force else "stopping"
        _tell(f"{how} job {job.job_id}, for at most {limit:g} s")
        async with aio.background(_tell_who_is_left(client), "who is left"):
            ends = await client.ended(limit)
        return ends, _local_pids(job, before)

    found = _ask(job, work)
    if found is _ENDED:
        status = screens.ended_status(job, jobs.outcome(job))
        _tell(f"job {job.job_id} has ended before: {status.reason or status.stage}")
        return int(status.stage == "lost")
    ends, pids = found
    left = _left(ends, _still_there(pids))
    if arguments.json:
        _print(json.dumps({"job_id": job.job_id, "left": left}))
    for host, words in left.items():
        for word in words:
            _tell(f"{host}: {word}")
    if any(left.values()):
        return 1
    if not arguments.json:
        _print(f"job {job.job_id} has ended: nothing of it is left on {', '.join(left)}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    now = _now()
    jobs.clean(now)
    endpoints, refused = jobs.known()
    listed, ended = [], 0
    for job in endpoints:
        end = jobs.outcome(job)
        if end is None and jobs.answers(job):
            listed.append(screens.Listed(job, "running"))
        elif arguments.json or (ended := ended + 1) <= _SHOWN_ENDED:
            end = jobs.outcome(job)  # perhaps it ended just now
            listed.append(screens.Listed(job, end.stage if end else "lost", end))
    for reason in refused:
        _tell(reason)
    if arguments.json:
        _print(json.dumps([_listed_json(item) for item in listed]))
    elif listed:
        _print(screens.list_text(listed, now, _width(), colour=_colour()), end="")
    else:
        _tell("no job was launched from here by this user in the last two weeks")
    return 0


def _listed_json(item: screens.Listed) -> dict[str, Any]:
    job = item.job
    found = {
        name: screens.plain(getattr(job, name)) for name in ("job_id", "name", "started", "hosts")
    }
    end = {"exit_code": item.end.code, "ended": item.end.at} if item.end else {}
    return {**found, "stage": item.stage, "log_dir": job.log_dir, "detached": job.detached, **end}


# Asking


_ENDED = object()
"""In place of an answer: the job does not run (any more)."""


def _ask(job: JobEndpoint, work: Callable[[JobClient], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` gives, with a client of `job`. `_ENDED` if the job has ended, also in the midst of it."""
    if jobs.outcome(job) is not None or not jobs.answers(job):
        return _ENDED
    from runtime.cluster.client import JobClient  # the first import of zmq

    async def ask() -> Any:
        async with JobClient(job) as client:
            try:
                return await work(client)
            finally:
                if client.outcome is not None:
                    await asyncio.to_thread(jobs.remember, job, client.outcome)

    try:
        return asyncio.run(ask())
    except RuntimeFault:  # whatever it was: if the job is over, it was that
        if jobs.outcome(job) is not None or not jobs.answers(job):
            return _ENDED
        raise


async def _tell_who_is_left(client: JobClient) -> None:
    while True:
        await asyncio.sleep(_TOLD_EVERY_S)
        try:
            status = await client.status()
        except RuntimeFault:  # it is ending
            continue
        names = [w.name for role in status.roles.values() for w in role if w.state == "running"]
        if names:
            _tell(report.waiting_for(sorted(names)))


# After a stop


def _local_pids(job: JobEndpoint, status: JobStatus) -> list[int]:
    """The job's processes on this machine: the agent that we reached through the file system, its workers."""
    if not job.address.startswith("ipc://") or not os.path.exists(job.address[6:].split(" ")[0]):
        return []
    first = status.hosts[0]
    workers = [w.pid for role in status.roles.values() for w in role if w.host == first.host]
    return [pid for pid in (first.pid, *workers) if pid is not None]


def _still_there(pids: Sequence[int]) -> list[str]:
    """What lives of these processes, which have a few seconds to end."""
    until = time.monotonic() + _GONE_S
    while True:
        found = [info for pid in pids if (info := spawn.look_at(pid)) and info.state not in "ZX"]
        if not found or time.monotonic() > until:
            return [f"process {info.pid} ({info.name}) is still there" for info in found]
        time.sleep(0.02)


def _left(ends: dict[str, Any], here: list[str]) -> dict[str, list[str]]:
    """By host, in words, what is left of the job there, or why that is not known."""
    left: dict[str, list[str]] = {}
    for host, end in ends.items():
        if isinstance(end, RuntimeFault):
            left[host] = [f"{end}; what is left there is not known"]
        else:
            left[host] = [f"process {pid} ({name}) does not die" for pid, name, _ in end["left"]]
    first = next(iter(left))
    left[first] += [text for text in here if text not in left[first]]
    return left


# The terminal


def _print(text: str, end: str = "\n") -> None:
    _write((text + end).encode(errors="replace"))


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _tell(text: str) -> None:
    """Our own words: to standard error."""
    for line in text.splitlines():
        sys.stderr.write(f"runtime: {line}\n")
    sys.stderr.flush()


def _now() -> float:
    return datetime.now(UTC).timestamp()


def _width() -> int:
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 160


def _colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
