"""The keys of a job, and whom they let in. `sockets.mint` draws keys, `sockets.Authenticator` asks at every handshake."""

from __future__ import annotations

from typing import NamedTuple


class Security(NamedTuple):
    """The CURVE keys of a process. All processes of a job have the same ones: who has them belongs to it.

    `public` and `secret` are raw keys of 32 bytes, `allowed` the public keys of those who may connect. Travels to agents
    over their standard input and to workers with their spec; never in argv, the environment or a file that others can
    read. Its text shows no secret."""

    public: bytes
    secret: bytes
    allowed: frozenset[bytes]

    def __repr__(self) -> str:
        return f"Security(public={self.public.hex()}, {len(self.allowed)} allowed)"

    def admits(self, mechanism: bytes, key: bytes) -> bool:
        """Is that one of us? `key`: the public one whose secret it has proved to know."""
        return mechanism == b"CURVE" and key in self.allowed
