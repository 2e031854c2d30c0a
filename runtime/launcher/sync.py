"""Copies a directory's changed files to the same place on other hosts, before anything is dialled.

By `rsync` where both ends have it. Where that fails, the interpreter there says what it has, and gets the files
of another size or time as a tar archive. Nothing is deleted. Each host's failure is one line. A transfer takes as
long as it takes, but a line that is dead ends it (ssh's keep-alives).
"""

from __future__ import annotations

import inspect
import json
import os
import secrets
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from runtime.errors import ConfigError
from runtime.launcher import spawn, ssh
from runtime.launcher.dial import carried
from runtime.launcher.link import HostsFailed
from runtime.launcher.plan import Host
from runtime.launcher.ssh import DialSettings, Failure, LastWords

_OF_SSH = frozenset((126, 127, ssh.LOST))


def copy_to(hosts: Sequence[Host], directory: str, settings: DialSettings) -> None:
    """Copy `directory` to each of `hosts` that is not this machine; blocks.

    Raises `ConfigError` when there is no such directory here, `HostsFailed` for all hosts that do not get it.
    """
    if not os.path.isdir(directory):
        raise ConfigError(f"--sync {directory}: no such directory")
    folder = os.path.abspath(directory)
    remote = [host for host in hosts if not host.local]
    with ThreadPoolExecutor(settings.at_once, thread_name_prefix="sync") as pool:
        ended = list(pool.map(lambda host: _copy(host, folder, settings), remote))
    if failures := [failure for failure in ended if failure is not None]:
        raise HostsFailed.of(failures)


def _copy(host: Host, folder: str, settings: DialSettings) -> Failure | None:
    done = _by_rsync(host, folder, settings)
    # Without rsync over there, or where a login shell prints into its protocol; and it does not always say what
    # was wrong.
    if done is None or done.returncode not in (0, ssh.LOST):
        try:
            done = _by_tar(host, folder, settings)
        except OSError as error:
            return Failure(host.name, f"cannot copy {folder} there: {error}")
    return _why(host, folder, done, settings) if done.returncode else None


_Done = subprocess.CompletedProcess[bytes]


def _by_rsync(host: Host, folder: str, settings: DialSettings) -> _Done | None:
    if settings.carrier != "ssh" or shutil.which("rsync") is None:
        return None
    argv = rsync_argv(host, folder, settings)
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True)


def rsync_argv(host: Host, folder: str, settings: DialSettings) -> list[str]:
    """The command that makes `folder` on the host have what it has here."""
    words = ssh.ssh_words(host, settings, settings.timeout_s)
    name = host.addr or host.name
    target = f"[{name}]" if ":" in name else name
    there = f"mkdir -p {shlex.quote(folder)} && rsync"
    return [
        "rsync", "-a", "-s", "-e", shlex.join(words), "--rsync-path", there,
        "--", f"{folder}/", f"{target}:{folder}/",
    ]  # fmt: skip


def _by_tar(host: Host, folder: str, settings: DialSettings) -> _Done:
    source = inspect.getsource(stamps)
    code = f"exec({source!r}); import json; print(json.dumps(stamps({folder!r})))"
    listed = _there(host, code, settings)
    if listed.returncode:
        return listed
    try:
        there = json.loads(listed.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise OSError("what its login shell prints hides what is there") from None
    if not (changed := changed_files(stamps(folder), there)):
        return listed
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in changed:
                tar.add(os.path.join(folder, name), name)
        archive.seek(0)
        code = f'import tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|").extractall({folder!r})'
        return _there(host, code, settings, archive)


def stamps(folder: str) -> dict[str, list[int]]:
    """Size and time (whole seconds) of each file and link below `folder`, which is made if it is not there.

    Its text runs on other hosts, too: it may need nothing of this module.
    """
    import os  # over there, too

    os.makedirs(folder, exist_ok=True)
    found = {}
    for where, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(where, name))]
        for name in files + links:
            path = os.path.join(where, name)
            if not (os.path.islink(path) or os.path.isfile(path)):
                continue  # a socket or a pipe
            stat = os.lstat(path)
            found[os.path.relpath(path, folder)] = [stat.st_size, int(stat.st_mtime)]
    return found


def changed_files(
    here: Mapping[str, Sequence[int]], there: Mapping[str, Sequence[int]]
) -> list[str]:
    """The files that are not there as they are here."""
    return sorted(name for name, stamp in here.items() if there.get(name) != stamp)


def _there(host: Host, code: str, settings: DialSettings, stdin: IO[bytes] | None = None) -> _Done:
    """Run Python code on the host, by its interpreter."""
    command = ssh.remote_command(host.python or settings.python, code, secrets.token_hex(8))
    argv = carried(host, settings, command, settings.timeout_s)
    return subprocess.run(argv, stdin=stdin or subprocess.DEVNULL, capture_output=True)


def _why(host: Host, folder: str, done: _Done, settings: DialSettings) -> Failure:
    lines = [line.strip() for line in done.stderr.decode(errors="replace").splitlines()]
    if done.returncode in _OF_SSH:
        of_ssh = tuple(line for line in lines if not line.startswith("rsync"))
        python = host.python or settings.python
        return ssh.why(host.name, LastWords(done.returncode, "", of_ssh), python, spawn.ROOT)
    last = next((line for line in reversed(lines) if line), f"exit {done.returncode}")
    return Failure(host.name, f"cannot copy {folder} there: {last}")
