"""Jobs as they can be found again: a private file each, and how each one ended.

`~/.runtime/jobs/<job id>/endpoint.json` (folder 0700, file 0600) says where a job's control plane listens and
holds the job's keys; the launcher writes it, `python -m runtime status|logs|stop|list` reads it. A file that
is not ours, or that others may read, is not believed: whoever wrote it could have our commands sent
anywhere. How a job ended stands in `outcome.json`: in its log folder, from its first agent, or beside the
endpoint, from a launcher that was there to the end. What is asked over the network is asked elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from runtime.errors import ConfigError, MisuseError
from runtime.launcher.outcome import FILE as OUTCOME
from runtime.launcher.outcome import keep, read_kept
from runtime.launcher.records import Ended, JobEndpoint, JobHost, Way
from runtime.launcher.report import Outcome

_FILE = "endpoint.json"
_CONNECT_S = 1.0
_AT_ONCE = 32
_ENDED_KEPT_S = 14 * 86400.0
_LARGEST = 16 * 1024 * 1024


# Files


def folder(job_id: str = "") -> str:
    """Where a job's file is; without an id, the folder of them all."""
    return os.path.join(os.path.expanduser("~/.runtime/jobs"), job_id)


def register(endpoint: JobEndpoint) -> None:
    """Write a job's file. Raises `ConfigError` naming it when that cannot be done."""
    record = endpoint._asdict() | {"hosts": [host._asdict() for host in endpoint.hosts]}
    if endpoint.security is not None:
        public, secret, _ = endpoint.security
        record["security"] = [public.hex(), secret.hex()]
    try:
        where = _made(endpoint.job_id)
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(where, OUTCOME))  # of an earlier job of that id
        _write(os.path.join(where, _FILE), record)
    except OSError as error:
        where = folder(endpoint.job_id)
        raise ConfigError(f"cannot write {where}/{_FILE}: {error.strerror}") from error


def open_log(job_id: str) -> int:
    """A descriptor of a new file in the job's folder, for what has no better place. Raises `ConfigError`."""
    try:
        return os.open(
            os.path.join(_made(job_id), "agent.log"),
            os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
        )
    except OSError as error:
        raise ConfigError(f"cannot write in {folder(job_id)}: {error.strerror}") from error


def forget(job_id: str) -> None:
    """Remove a job's file; its logs stay."""
    shutil.rmtree(folder(job_id), ignore_errors=True)


def read(job_id: str) -> JobEndpoint:
    """Read a job's file. Raises `ConfigError` saying why it is not believed, or what is wrong with it."""
    path = os.path.join(folder(job_id), _FILE)
    try:
        _refuse_strangers(os.lstat(os.path.dirname(path)), os.path.dirname(path), stat.S_ISDIR)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    with open(fd, "rb") as file:
        _refuse_strangers(os.fstat(fd), path, stat.S_ISREG)
        text = file.read(_LARGEST)
    try:
        record = json.loads(text)
        keys = record.pop("security")
        if keys is not None:
            public, secret = (bytes.fromhex(key) for key in keys)
            keys = public, secret, frozenset((public,))
        hosts = tuple(map(_host, record.pop("hosts")))
        endpoint = JobEndpoint(**record, hosts=hosts, security=keys)
        float(endpoint.started)
        if endpoint.job_id != job_id:
            raise ValueError(f"it is of job {endpoint.job_id!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is no endpoint file: {error!r}") from error
    return endpoint


def known() -> tuple[list[JobEndpoint], list[str]]:
    """Every job that has a file, the newest first; and for each file that is not believed the reason."""
    endpoints, refused = [], []
    for job_id in _names():
        try:
            endpoints.append(read(job_id))
        except ConfigError as error:
            refused.append(str(error))
    return sorted(endpoints, key=lambda e: e.started, reverse=True), refused


def find(which: str | None) -> JobEndpoint:
    """The job of that id, the only one whose id begins so, or the newest of that name that runs (or else the
    newest). None: the newest that runs, or else the newest. Raises `MisuseError` when there is none, or
    when several running ones are meant, and `ConfigError` for a file that is not believed."""
    if which is not None and which in _names():
        return read(which)
    endpoints, refused = known()
    meant = [e for e in endpoints if which is None or which == e.name]
    if which is not None and not meant:
        meant = [e for e in endpoints if e.job_id.startswith(which)]
        if len(meant) > 1:
            raise MisuseError(_several(which, meant))
    if not meant:
        what = f"no job {which!r}" if which is not None else "no job"
        raise MisuseError("\n".join((f"{what} was launched from here by this user", *refused)))
    runs = running(meant)
    if which is not None and len(runs) > 1:
        raise MisuseError(_several(which, runs))
    return (runs or meant)[0]


def detached_text(endpoint: JobEndpoint) -> str:
    """What a user is to know of a job that goes on by itself."""
    job, command = endpoint.job_id, "python -m runtime"
    lines = [
        f"runtime: job {job} runs on {', '.join(endpoint.names)} by itself",
        f"  logs    {endpoint.log_dir}{' on each host' if len(endpoint.hosts) > 1 else ''}",
        f"  see it  {command} status {job}",
        f"          {command} logs -f {job}",
        f"  end it  {command} stop {job}",
    ]
    return "\n".join(lines) + "\n"


def is_here(endpoint: JobEndpoint, host: JobHost) -> bool:
    """Whether this machine is that host of the job."""
    return host.local and endpoint.machine in ("", socket.gethostname())


def running(endpoints: Sequence[JobEndpoint]) -> list[JobEndpoint]:
    """Those of which nobody knows here that they have ended, and whose control plane answers. Takes as long as
    the slowest of them: a second an address."""
    open = [endpoint for endpoint in endpoints if outcome(endpoint) is None]
    with ThreadPoolExecutor(_AT_ONCE, "look") as pool:
        return [e for e, found in zip(open, pool.map(answers, open), strict=True) if found]


def answers(endpoint: JobEndpoint) -> bool:
    """Does anybody listen where the job's control plane did? Waits for at most a second an address."""
    for text in re.split(r" +(?=[a-z]+://)", endpoint.address):
        scheme, _, target = text.partition("://")
        if scheme == "ipc" and not is_here(endpoint, endpoint.hosts[0]):
            continue  # a path of another machine
        try:
            _connect(scheme, target)
            return True
        except OSError:
            continue
    return False


def clean(now: float) -> None:
    """Forget jobs that began two weeks before `now` or earlier and do not run any more."""
    old = [endpoint for endpoint in known()[0] if endpoint.started < now - _ENDED_KEPT_S]
    for endpoint in set(old).difference(running(old)):
        forget(endpoint.job_id)


def outcome(endpoint: JobEndpoint) -> Ended | None:
    """How a job ended; None while it runs, and when nobody was left to say."""
    for where in (endpoint.log_dir, folder(endpoint.job_id)):
        if (kept := read_kept(where, endpoint.peer)) is not None:
            return kept
    return None


def remember(endpoint: JobEndpoint, how: Outcome, at: float | None = None) -> None:
    """Write down here how a job ended, where its first agent could not, or on another machine; `at`: when, if that
    is not now. On a disk that takes nothing it is not remembered."""
    if outcome(endpoint) is None:
        where = folder(endpoint.job_id)
        with suppress(OSError):
            keep(how, endpoint.peer, where)
            os.utime(os.path.join(where, OUTCOME), (at, at) if at else None)


# Inside


def _connect(scheme: str, target: str) -> None:
    if scheme == "ipc":
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_S)
            probe.connect(target)
    else:
        host, _, port = target.partition("?")[0].rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def _host(record: dict[str, Any]) -> JobHost:
    way, ranks = record.pop("way"), tuple((role, rank) for role, rank in record.pop("ranks"))
    pid, started = record.pop("process")
    found = None if way is None else Way(way[0], tuple(way[1]))
    return JobHost(**record, process=(pid, started), ranks=ranks, way=found)


def _made(job_id: str) -> str:
    where = folder(job_id)
    os.makedirs(folder(), mode=0o700, exist_ok=True)
    os.makedirs(where, mode=0o700, exist_ok=True)
    os.chmod(where, 0o700)
    return where


def _names() -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder()) if entry.is_dir()]
    except OSError:
        return []


def _several(which: str, endpoints: list[JobEndpoint]) -> str:
    lines = [f"  {e.job_id}  {e.name}" for e in endpoints]
    return "\n".join((f"{which!r} means several jobs; which of them?", *lines))


def _refuse_strangers(found: os.stat_result, path: str, kind: Any) -> None:
    if not kind(found.st_mode):
        raise ConfigError(f"{path} is not believed: it is no regular file or folder")
    if found.st_uid != os.getuid():
        raise ConfigError(f"{path} is not believed: it belongs to user {found.st_uid}")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(
            f"{path} is not believed: its mode is {mode:04o}, others may have read or written it"
        )


def _write(path: str, record: Mapping[str, Any]) -> None:
    """All of it or nothing, readable by us alone."""
    new = f"{path}.{os.getpid()}"
    with open(new, "w", opener=partial(os.open, mode=0o600)) as file:
        json.dump(record, file)
    os.replace(new, path)
