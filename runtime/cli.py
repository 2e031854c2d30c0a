"""`python -m runtime`: look at the jobs that this user has launched from here, read what they print, end them.

A job is found through its private file (`launcher/jobs.py`) and asked through its agents (`cluster/client.py`).
Of one that has ended, its files tell, here or on its hosts (`launcher/afar.py`). ZeroMQ is imported only to ask a
job that runs.

Exit codes: 0 done, 1 no such job, or it cannot be reached (a line says which), 2 usage, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from runtime import aio
from runtime.errors import RuntimeFault
from runtime.launcher import jobs, logfiles, report, screens, spawn
from runtime.launcher.records import Ended, JobEndpoint, JobStatus, Missing

if TYPE_CHECKING:
    from runtime.cluster.client import JobClient

_WATCH_S = 1.0
_TOLD_EVERY_S = 2.0
_REASON = "stopped by `python -m runtime stop`"
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
    stop.add_argument("--force", action="store_true", help="kill it, and agents that hang")
    command("list", _list, "jobs that run, and those that ended lately")
    return parser


def _lines(text: str) -> int | None:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines, nor all")
    return None if text == "all" else int(text)


# Commands


def _status(arguments: argparse.Namespace) -> int:
    job = jobs.find(arguments.job)

    def show(status: JobStatus | Ended | Missing) -> None:
        if isinstance(status, JobStatus):
            text = screens.status_text(status, _now(), _width(), colour=_colour())
        else:
            text = screens.ended_text(job, status, _now(), _width(), colour=_colour())
            status = screens.ended_status(job, status)
        if arguments.json:
            return _print(json.dumps(screens.plain(status)))
        if arguments.watch and sys.stdout.isatty():
            _print("\x1b[H\x1b[2J", end="")
        _print(text, end="")

    async def work(client: JobClient) -> None:
        show(await client.status())
        while arguments.watch and not await client.wait_for_end(_WATCH_S):
            show(await client.status())

    if _ask(job, work) is _ENDED or arguments.watch:
        end = _end_of(job)
        show(end)
        return int(isinstance(end, Missing))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from runtime.launcher.logprint import LogPrinter

    job = jobs.find(arguments.job)
    streams = (arguments.stream,) if arguments.stream else logfiles.STREAMS
    query = logfiles.Query(arguments.role, arguments.rank, streams, arguments.lines)
    printer = LogPrinter(
        _write, several_hosts=len(job.hosts) > 1, colour=_colour(), as_json=arguments.json
    )
    silent: list[str] = []

    async def show(source: AsyncGenerator[tuple[str, logfiles.Piece | RuntimeFault], None]) -> None:
        async with (
            aio.background(printer.show_unfinished(), "unfinished lines"),
            aclosing(source) as found,
        ):
            async for host, item in found:
                if isinstance(item, RuntimeFault):
                    _tell(f"no (more) output of {host}: {item}")
                    silent.append(host)
                else:
                    printer.show(host, item)

    if _ask(job, lambda client: show(client.logs(query, follow=arguments.follow))) is _ENDED:
        from runtime.launcher import afar

        asyncio.run(show(afar.logs(job, query)))
    if not printer.end() and not silent:
        _tell(f"job {job.job_id} has printed nothing of that kind")
    return int(len(silent) == len(job.hosts))


def _stop(arguments: argparse.Namespace) -> int:
    job, force = jobs.find(arguments.job), bool(arguments.force)
    try:
        found: Any = _ask(job, lambda client: _stopped(job, client, force))
    except RuntimeFault as error:
        if not force:
            raise RuntimeFault(f"{error}; `stop --force` kills it") from None
        _tell(str(error))
        found = dict.fromkeys(job.names, error)
    if found is _ENDED:
        end = _end_of(job)
        if isinstance(end, Ended) or not force:
            status = screens.ended_status(job, end)
            ended = "has ended before" if isinstance(end, Ended) else f"is {end.stage}"
            _tell(f"job {job.job_id} {ended}: {status.reason or status.stage}")
            return int(isinstance(end, Missing))
        found = _killed(job, dict.fromkeys(job.names, RuntimeFault(end.reason)))
    elif force:
        found = _killed(job, found)
        if isinstance(found[job.names[0]], list):  # who would have said how it ended is gone, too
            how = report.Outcome("stopped", job.job_id, job.name, detail=_REASON)
            jobs.remember(job, how)
    left = _in_words(found)
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
    runs = {job.job_id for job in jobs.running(endpoints)}
    listed, ended, unknown = [], 0, 0
    for job in endpoints:
        if job.job_id in runs:
            listed.append(screens.Listed(job, "running"))
        elif arguments.json or (ended := ended + 1) <= _SHOWN_ENDED:
            end = jobs.outcome(job)
            stage = end.stage if end else "lost" if jobs.is_here(job, job.hosts[0]) else "unknown"
            unknown += stage == "unknown"
            listed.append(screens.Listed(job, stage, end))
    for reason in refused:
        _tell(reason)
    if arguments.json:
        _print(json.dumps([_listed_json(item) for item in listed]))
    elif listed:
        _print(screens.list_text(listed, now, _width(), colour=_colour()), end="")
    else:
        _tell("no job was launched from here by this user in the last two weeks")
    if unknown:
        _tell("unknown: how they ended is not known here; `status JOB` asks its hosts")
    return 0


def _listed_json(item: screens.Listed) -> dict[str, Any]:
    job = item.job
    end = {"exit_code": item.end.code, "ended": item.end.at} if item.end else {}
    return {
        "job_id": job.job_id, "name": job.name, "started": job.started, "hosts": job.names,
        "stage": item.stage, "log_dir": job.log_dir, "detached": job.detached, **end,
    }  # fmt: skip


# Asking


_ENDED = object()
"""In place of an answer: the job does not run (any more), as far as can be seen from here."""


def _ask(job: JobEndpoint, work: Callable[[JobClient], Coroutine[Any, Any, Any]]) -> Any:
    """What `work` gives, with a client of `job`. `_ENDED` if the job has ended, also in the midst of it."""
    if not jobs.running([job]):
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
        if not jobs.running([job]):
            return _ENDED
        raise


def _end_of(job: JobEndpoint) -> Ended | Missing:
    """How a job ended that does not answer. What its hosts say is remembered here."""
    if (known := jobs.outcome(job)) is not None:
        return known
    from runtime.launcher import afar

    end = asyncio.run(afar.how_it_ended(job))
    if isinstance(end, Ended):
        jobs.remember(job, *end)
    return end


# To stop


_Left = dict[str, list[str] | RuntimeFault]
"""By host, in words, what is left of a job there, or why that is not known."""


async def _stopped(job: JobEndpoint, client: JobClient, force: bool) -> _Left:
    """Stop the job, or kill it, and wait for its end."""
    from runtime.launcher import afar

    limit = (0.0 if force else job.shutdown_timeout_s) + _STOP_MARGIN_S
    before = await client.stop(_REASON, force=force)
    here = _local_processes(job, before)
    _tell(f"{'killing' if force else 'stopping'} job {job.job_id}, for at most {limit:g} s")
    hung = [host.host for host in before.hosts if host.problem] if force else []
    async with aio.background(_tell_who_is_left(client), "who is left"):
        ends, killed = await asyncio.gather(client.ended(limit), afar.end(job, hung))
    left: _Left = {
        host: end
        if isinstance(end, RuntimeFault)
        else [f"process {pid} ({name}) does not die" for pid, name, _ in end["left"]]
        for host, end in ends.items()
    }
    for info in await asyncio.to_thread(afar.outliving, here, _GONE_S):
        if isinstance(words := left[job.names[0]], list):
            words.append(f"process {info.pid} ({info.name}) is still there")
    left |= killed
    return left


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


def _local_processes(job: JobEndpoint, status: JobStatus) -> list[spawn.ProcessInfo]:
    """The job's processes on this machine, if it is the first host: the agent and its workers."""
    if not jobs.is_here(job, job.hosts[0]):
        return []
    first = status.hosts[0]
    workers = [w.pid for role in status.roles.values() for w in role if w.host == first.host]
    return [info for pid in (first.pid, *workers) if pid and (info := spawn.look_at(pid))]


def _killed(job: JobEndpoint, found: _Left) -> _Left:
    """Where it is not known, kill what is left, without the help of the job's agents."""
    unknown = [host for host, left in found.items() if isinstance(left, RuntimeFault)]
    if not unknown:
        return found
    from runtime.launcher import afar

    killed: _Left = asyncio.run(afar.end(job, unknown))
    return found | killed


def _in_words(found: _Left) -> dict[str, list[str]]:
    return {
        host: [f"{left}; what is left there is not known"]
        if isinstance(left, RuntimeFault)
        else left
        for host, left in found.items()
    }


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
