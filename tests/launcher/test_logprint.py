"""Pieces of log files become whole lines again."""

from __future__ import annotations

import json

from runtime.launcher.logfiles import Piece
from runtime.launcher.logprint import LogPrinter


def piece(data: bytes, rank: int = 0, attempt: int = 0, stream: str = "stdout") -> Piece:
    return Piece("t", rank, attempt, stream, data)


def test_lines_are_whole_whatever_the_pieces_are() -> None:
    out: list[bytes] = []
    printer = LogPrinter(out.append)
    printer.show("h1", piece(b"one\ntw"))
    printer.show("h1", piece(b"other\n", rank=1))
    printer.show("h1", piece(b"o\n"))
    printer.show("h1", piece(b"rest"))
    printer.end()
    assert b"".join(out) == b"[t 0] one\n[t 1] other\n[t 0] two\n[t 0] rest\n"


def test_a_line_without_an_end_stands_before_the_next_attempt() -> None:
    out: list[bytes] = []
    printer = LogPrinter(out.append, several_hosts=True)
    printer.show("h1", piece(b"broken off"))
    printer.show("h1", piece(b"again\n", attempt=1))
    assert b"".join(out) == b"[t 0 h1] broken off\n[t 0 h1] again\n"


def test_roles_differ_in_colour() -> None:
    out: list[bytes] = []
    printer = LogPrinter(out.append, colour=True)
    printer.show("", piece(b"a\n"))
    printer.show("", piece(b"b\n")._replace(role="e"))
    assert out == [b"\x1b[36m[t 0] \x1b[0ma\n", b"\x1b[35m[e 0] \x1b[0mb\n"]


def test_as_json_each_line_is_a_document() -> None:
    out: list[bytes] = []
    printer = LogPrinter(out.append, as_json=True)
    printer.show("h1", piece(b"a\n\xff\nhalf", attempt=2, stream="stderr"))
    printer.end()
    lines = [json.loads(line) for line in out]
    assert [line.pop("line") for line in lines] == ["a", "\\xff", "half"]
    assert lines[0] == {"host": "h1", "role": "t", "rank": 0, "attempt": 2, "stream": "stderr"}
