"""Choosing a free TCP port for somebody else to listen on."""

from __future__ import annotations

import random
import socket

from runtime.errors import ResourceInsufficientError

_LOWEST = 15_000
_HIGHEST = 32_768


class PortChooser:
    """Gives ports that are free at this moment, each once.

    Without a range (lowest, highest) they lie below those that the kernel itself hands out to
    outgoing connections, so that none of these takes a port before its worker listens there.
    """

    def __init__(self, port_range: tuple[int, int] | None = None) -> None:
        self._range = port_range or (_LOWEST, _below_ephemeral() - 1)
        self._given: set[int] = set()

    def choose(self) -> int:
        """A free port. Raises `ResourceInsufficientError` naming the range when there is none."""
        low, high = self._range
        ports = list(range(low, high + 1))
        start = random.randrange(len(ports))
        for port in ports[start:] + ports[:start]:
            if port not in self._given and _is_free(port):
                self._given.add(port)
                return port
        if self._given:
            self._given.clear()  # those of earlier attempts may be free again
            return self.choose()
        raise ResourceInsufficientError(f"no free TCP port in {low}:{high} on this host")


def _below_ephemeral() -> int:
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            low = int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        low = _HIGHEST
    return low if low > _LOWEST + 1000 else _HIGHEST


def _is_free(port: int) -> bool:
    for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in (97, 99):  # no IPv6 on this host
                continue
            return False
    return True
