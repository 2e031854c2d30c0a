"""Log files on a screen: whole lines with the rank that wrote them, or a JSON document a line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial

from runtime.launcher.logfiles import Piece
from runtime.launcher.output import Lines

_UNFINISHED_INTERVAL_S = 1.0
_FIRST_COLOUR, _COLOURS = 36, 6


class LogPrinter:
    """Puts pieces of files together again. `write` takes bytes that end with a line feed."""

    def __init__(
        self,
        write: Callable[[bytes], None],
        *,
        several_hosts: bool = False,
        colour: bool = False,
        as_json: bool = False,
    ) -> None:
        self._write = write
        self._several_hosts, self._colour, self._as_json = several_hosts, colour, as_json
        self._streams: dict[tuple[str, str, int, str], tuple[Lines, int]] = {}
        """By host, role, rank and name of the stream; the attempt that it is of."""
        self._roles: list[str] = []

    def show(self, host: str, piece: Piece) -> None:
        """Print the lines that are complete with this piece."""
        key = host, piece.role, piece.rank, piece.stream
        lines, attempt = self._streams.get(key, (None, piece.attempt))
        if lines is not None and attempt != piece.attempt:
            self._out(key, attempt, lines.end())
            lines = None
        if lines is None:
            lines = Lines(partial(self._prefix, host, piece.role, piece.rank))
            self._streams[key] = lines, piece.attempt
        self._out(key, piece.attempt, lines.feed(piece.data))

    async def show_unfinished(self) -> None:
        """Print progress bars and prompts as they stand, each second."""
        while True:
            await asyncio.sleep(_UNFINISHED_INTERVAL_S)
            for key, (lines, attempt) in self._streams.items():
                self._out(key, attempt, lines.unfinished())

    def end(self) -> bool:
        """Nothing more will come: print what stands on lines that have no end. Whether there was anything."""
        for key, (lines, attempt) in self._streams.items():
            self._out(key, attempt, lines.end())
        return bool(self._streams)

    def _out(self, key: tuple[str, str, int, str], attempt: int, text: bytes) -> None:
        if not text:
            return
        if not self._as_json:
            self._write(text)
            return
        host, role, rank, stream = key
        record = {"host": host, "role": role, "rank": rank, "attempt": attempt, "stream": stream}
        for line in text.decode(errors="backslashreplace")[:-1].split("\n"):
            self._write(json.dumps({**record, "line": line}).encode() + b"\n")

    def _prefix(self, host: str, role: str, rank: int) -> bytes:
        if self._as_json:
            return b""
        text = f"[{role} {rank} {host}] " if self._several_hosts and host else f"[{role} {rank}] "
        if self._colour:
            if role not in self._roles:
                self._roles.append(role)
            number = _FIRST_COLOUR - self._roles.index(role) % _COLOURS
            text = f"\x1b[{number}m{text}\x1b[0m"
        return text.encode()
