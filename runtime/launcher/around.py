"""What the launcher finds around it: the machine, its names and devices, the files that options name."""

from __future__ import annotations

import os
import re
import socket
import sys
from datetime import datetime

from runtime.errors import ConfigError
from runtime.launcher.options import LaunchOptions
from runtime.launcher.plan import Facts
from runtime.launcher.prepare import needed_files


def look_around(options: LaunchOptions) -> Facts:
    """What this machine and its environment are."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    files = {path: _read(path) for path in needed_files(options)}
    named = " ".join((options.hosts or "", files.get(options.hostfile or "", "")))
    return Facts(
        job_id=f"{stamp}-{os.urandom(2).hex()}",
        cwd=os.getcwd(),
        python=sys.executable,
        own_names=own_names(named),
        cpu_count=len(os.sched_getaffinity(0)),
        gpu_count=_gpu_count(),
        env=dict(os.environ),
        files=files,
    )


def _gpu_count() -> int:
    """As many as CUDA would show, without asking CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        found = len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        found = 0
    if visible is None:
        return found
    return min(found, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}: not UTF-8 text ({error.reason})") from error


def own_names(named: str = "") -> tuple[str, ...]:
    """This machine's host name and the addresses of its interfaces.

    Its name with a domain is asked for (which may take a resolver's while) only where `named`, the text
    that names hosts, can mean it.
    """
    name = socket.gethostname()
    short = re.escape(name.partition(".")[0])
    meant = re.search(rf"(?i)(?<![\w.-]){short}\.", named)
    return (name, *((socket.getfqdn(),) if meant else ()), *_addresses())


def _addresses() -> set[str]:
    found: set[str] = set()
    for line in _lines("/proc/net/if_inet6"):
        found.add(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(line.split()[0])))
    address = ""
    for line in _lines("/proc/net/fib_trie"):
        words = line.split()
        if words[:1] == ["|--"]:
            address = words[1]
        elif words[1:] == ["host", "LOCAL"]:
            found.add(address)
    return found


def _lines(path: str) -> list[str]:
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:  # a kernel without that protocol
        return []
