"""Addresses of peers: "ipc:///run/dir/peer.sock", "tcp://host:port?key=...", "mem://name". Reads and writes them, no
more. A process that is reached in several ways has several, with a space between them."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable
from typing import NamedTuple

from runtime.errors import ConfigError

IPC_PATH_BYTES = 107
"""The longest path of a unix socket (one byte of the kernel's 108 ends it)."""

_KEY = re.compile("key=[0-9a-f]{64}")
_BETWEEN = re.compile(r" +(?=[a-z]+://)")  # a path may have spaces, too


class Address(NamedTuple):
    """`target` is a path (ipc), a host (tcp) or a name (mem). `port` 0: any free one (tcp only). `key`: the public
    CURVE key of who listens there, 32 bytes (tcp only); none where nothing is encrypted."""

    scheme: str
    target: str
    port: int = 0
    key: bytes = b""

    @property
    def endpoint(self) -> str:
        """Without the key: as ZeroMQ writes it, and messages."""
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.target}"
        host = f"[{self.target}]" if ":" in self.target else self.target
        return f"tcp://{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.endpoint}?key={self.key.hex()}" if self.key else self.endpoint


def parse(text: str) -> Address:
    """Raises `ConfigError` naming the address, what is wrong with it and what would be right."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _PARSERS:
        allowed = "ipc:///path, tcp://host:port or mem://name"
        raise ConfigError(f"not an address: {text!r}; allowed are {allowed}")
    return _PARSERS[scheme](text, rest)


def parse_all(text: str) -> tuple[Address, ...]:
    """All addresses of a process, in their order; at least one. Raises as `parse`."""
    return tuple(map(parse, _BETWEEN.split(text.strip())))


def write_all(addresses: Iterable[Address]) -> str:
    """What `parse_all` reads."""
    return " ".join(map(str, addresses))


def nearest(addresses: Iterable[Address], folder: str | None) -> Address:
    """Which of a process's addresses to take: ipc in `folder` (our own: such folders are unique to a host), else the
    first of tcp, else the first."""
    some = list(addresses)
    here = (a for a in some if a.scheme == "ipc" and os.path.dirname(a.target) == folder)
    return next(here, next((a for a in some if a.scheme == "tcp"), some[0]))


def _ipc(text: str, path: str) -> Address:
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise ConfigError(f"not an address: {text!r}; ipc needs the absolute path of a file")
    size = len(path.encode("utf-8", "surrogateescape"))
    if size > IPC_PATH_BYTES:
        raise ConfigError(
            f"the path in {text!r} has {size} bytes, a unix socket's at most {IPC_PATH_BYTES}: "
            "use a shorter runtime directory (XDG_RUNTIME_DIR)"
        )
    return Address("ipc", path)


def _tcp(text: str, rest: str) -> Address:
    rest, question, key = rest.partition("?")
    host, separator, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"not an address: {text!r}; write an IPv6 host in brackets")
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise ConfigError(f"not an address: {text!r}; tcp needs host:port")
    if int(port) > 65535:
        raise ConfigError(f"not an address: {text!r}; a port is 0 (any) to 65535")
    if question and not _KEY.fullmatch(key):
        raise ConfigError(f"not an address: {text!r}; after a port comes ?key= with 64 hex digits")
    return Address("tcp", host, int(port), bytes.fromhex(key[len("key=") :]))


def _mem(text: str, name: str) -> Address:
    if not name:
        raise ConfigError(f"not an address: {text!r}; mem needs a name")
    return Address("mem", name)


def local_path(address: Address) -> str | None:
    """Where the process at an ipc address also listens for those of its host (see `transport.local`).
    None where it does not: for other schemes, and where the path would be too long."""
    path = address.target + ".u"
    fits = len(path.encode("utf-8", "surrogateescape")) <= IPC_PATH_BYTES
    return path if address.scheme == "ipc" and fits else None


_PARSERS = {"ipc": _ipc, "tcp": _tcp, "mem": _mem}
