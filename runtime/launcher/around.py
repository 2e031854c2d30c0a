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

_SIOCGIFCONF = 0x8912
_IFREQ = "16sH2x4s16x"
_LOOPBACK_NET, _SCOPE_HOST, _SCOPE_LINK = 127, "10", "20"


def look_around(options: LaunchOptions) -> Facts:
    """What this machine and its environment are."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    files = {path: _read(path, path == options.hostfile) for path in needed_files(options)}
    named = " ".join((options.hosts or "", files.get(options.hostfile or "", "")))
    return Facts(
        job_id=f"{stamp}-{os.urandom(2).hex()}",
        cwd=os.getcwd(),
        python=sys.executable,
        own_names=own_names(named),
        cpu_count=len(os.sched_getaffinity(0)),
        gpu_count=gpu_count(),
        env=dict(os.environ),
        files=files,
    )


def gpu_count() -> int:
    """As many as CUDA would show, without asking CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        found = len(os.listdir("/proc/driver/nvidia/gpus"))
    except OSError:
        found = 0
    if visible is None:
        return found
    return min(found, len([word for word in visible.split(",") if word.strip() not in ("", "-1")]))


def _read(path: str, of_hosts: bool) -> str:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read()
    except OSError as error:
        hint = "; hosts themselves go after --hosts" if of_hosts and {",", ":"} & set(path) else ""
        raise ConfigError(f"cannot read {path}: {error.strerror}{hint}") from error
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
    return (
        name,
        *((socket.getfqdn(),) if meant else ()),
        *(address for _, address in interfaces()),
    )


def interfaces() -> list[tuple[str, str]]:
    """(interface, address) of each that another host might reach: no loopback, link-local ones with scope."""
    import array
    import fcntl
    import struct  # only several hosts want this

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        records = array.array("B", bytes(struct.calcsize(_IFREQ) * 1024))
        where, length = records.buffer_info()
        filled = fcntl.ioctl(asked, _SIOCGIFCONF, struct.pack("iP", length, where))
        (used,) = struct.unpack_from("i", filled)
        for name, family, address in struct.iter_unpack(_IFREQ, records[:used].tobytes()):
            if family == socket.AF_INET and address[0] != _LOOPBACK_NET:
                found.append((name.rstrip(b"\0").decode(), socket.inet_ntop(family, address)))
    try:
        with open("/proc/net/if_inet6") as file:
            lines = file.read().splitlines()
    except OSError:  # a kernel without IPv6
        lines = []
    for line in lines:
        text, _, _, scope, _, name = line.split()
        address6 = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(text))
        if scope != _SCOPE_HOST:
            found.append((name, f"{address6}%{name}" if scope == _SCOPE_LINK else address6))
    return found
