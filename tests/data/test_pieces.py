"""Runs of items, and the order in which a shelf gives them out."""

from __future__ import annotations

from typing import Any

from runtime.data.pieces import Piece, Shelf


def _piece(number: int, text: str, **more: Any) -> Piece:
    return Piece(number, [letter.encode() for letter in text], **more)


def _text(pieces: list[Piece]) -> str:
    return b"".join(body for piece in pieces for body in piece.bodies).decode()


def test_cutting_keeps_bodies_buffers_and_numbers_together() -> None:
    piece = _piece(7, "abc", buffers=[[b"1"], [], [b"22"]])
    first = piece.cut(1)
    assert (first.number, first.bodies, first.buffers) == (7, [b"a"], [[b"1"]])
    assert (piece.number, len(piece), piece.size()) == (8, 2, 4)
    assert [item.number for item in piece.items()] == [8, 9]
    assert piece.sizes() == [1, 3]
    assert piece.fitting(2, 3) == 1


def test_what_came_back_goes_first_by_age() -> None:
    shelf = Shelf()
    shelf.add("p", _piece(5, "fg"))
    shelf.give_back([_piece(3, "d"), _piece(0, "ab")])
    assert _text(shelf.take(3, 1)) == "abd"
    assert _text(shelf.take(9, 1)) == "fg"
    assert (shelf.depth, shelf.bytes) == (0, 0)


def test_a_batch_takes_as_many_of_each_producer() -> None:
    shelf = Shelf()
    shelf.add("p", _piece(0, "abcdef"))
    shelf.add("q", _piece(6, "xyz"))
    assert sorted(_text(shelf.take(4, 1))) == ["a", "b", "x", "y"]
    assert sorted(_text(shelf.take(9, 1))) == ["c", "d", "e", "f", "z"]


def test_a_group_is_taken_whole_where_too_few_are_there_otherwise() -> None:
    shelf = Shelf()
    shelf.add("p", _piece(0, "a"))
    shelf.add("p", _piece(1, "xyz", whole=True))
    assert _text(shelf.take(2, 1)) == "a"
    shelf.give_back([_piece(0, "a")])
    assert _text(shelf.take(2, 2)) == "axyz"


def test_old_versions_go_and_what_has_none_stays() -> None:
    shelf = Shelf()
    shelf.add("p", _piece(0, "ab", version=1))
    shelf.add("p", _piece(2, "c"))
    shelf.add("q", _piece(3, "d", version=2))
    assert shelf.drop_older(1) == 0
    assert shelf.drop_older(2) == 2
    assert sorted(_text(shelf.take(9, 1))) == ["c", "d"]
