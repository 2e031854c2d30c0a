"""Addresses of peers: "ipc:///run/dir/peer.sock", "tcp://host:port", "mem://name". Reads and writes them, no more."""

from __future__ import annotations

from typing import NamedTuple

from runtime.errors import ConfigError

IPC_PATH_BYTES = 107
"""The longest path of a unix socket (one byte of the kernel's 108 ends it)."""


class Address(NamedTuple):
    """`target` is a path (ipc), a host (tcp) or a name (mem). `port` 0: any free one (tcp only)."""

    scheme: str
    target: str
    port: int = 0

    def __str__(self) -> str:
        if self.scheme != "tcp":
            return f"{self.scheme}://{self.target}"
        host = f"[{self.target}]" if ":" in self.target else self.target
        return f"tcp://{host}:{self.port}"


def parse(text: str) -> Address:
    """Raises `ConfigError` naming the address, what is wrong with it and what would be right."""
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _PARSERS:
        allowed = "ipc:///path, tcp://host:port or mem://name"
        raise ConfigError(f"not an address: {text!r}; allowed are {allowed}")
    return _PARSERS[scheme](text, rest)


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
    host, separator, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ConfigError(f"not an address: {text!r}; write an IPv6 host in brackets")
    if not separator or not host or not port.isascii() or not port.isdigit():
        raise ConfigError(f"not an address: {text!r}; tcp needs host:port")
    if int(port) > 65535:
        raise ConfigError(f"not an address: {text!r}; a port is 0 (any) to 65535")
    return Address("tcp", host, int(port))


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
