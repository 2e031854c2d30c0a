"""How arguments are cut into pieces, and dealt out one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from runtime.errors import MisuseError
from runtime.peer.batch import Whole, common_size, item, items_of, pieces, scattered


class Columns(dict[str, list[int]]):
    """As a `BatchedDataDict`: a dict that says how many rows it has and can be sliced."""

    @property
    def size(self) -> int:
        return len(next(iter(self.values())))

    def slice(self, start: int, stop: int) -> Columns:
        return Columns({name: column[start:stop] for name, column in self.items()})


class Point(NamedTuple):
    x: int
    y: int


def test_five_items_on_four_members_are_two_two_one_and_none() -> None:
    made = pieces(5, 4, [[10, 11, 12, 13, 14]], {})
    assert [(p.start, p.stop, p.args) for p in made] == [
        (0, 2, [[10, 11]]),
        (2, 4, [[12, 13]]),
        (4, 5, [[14]]),
    ]


@pytest.mark.parametrize(
    ("size", "members", "lengths"),
    [(0, 3, []), (1, 3, [1]), (3, 3, [1, 1, 1]), (7, 3, [3, 3, 1]), (9, 4, [3, 3, 3]), (4, 1, [4])],
)
def test_pieces_cover_a_batch_in_order(size: int, members: int, lengths: list[int]) -> None:
    made = pieces(size, members, [], {"rows": list(range(size))})
    assert [p.stop - p.start for p in made] == lengths
    assert [row for p in made for row in p.kwargs["rows"]] == list(range(size))


@pytest.mark.parametrize(
    "whole", ["abc", b"abc", bytearray(b"abc"), {"a": 1, "b": 2, "c": 3}, 7, None, 2.5, Point(1, 2)]
)
def test_what_is_no_sequence_of_items_goes_whole(whole: Any) -> None:
    made = pieces(3, 3, [[1, 2, 3], whole], {"same": whole})
    assert [p.args[1] for p in made] == [whole] * 3
    assert [p.kwargs["same"] for p in made] == [whole] * 3


def test_whole_keeps_a_sequence_together_whatever_its_length() -> None:
    made = pieces(2, 2, [[1, 2], Whole([7, 8, 9])], {"also": Whole((1,))})
    assert [p.args for p in made] == [[[1], [7, 8, 9]], [[2], [7, 8, 9]]]
    assert [p.kwargs for p in made] == [{"also": (1,)}] * 2


@pytest.mark.parametrize(
    "make", [lambda: torch.arange(10).reshape(5, 2), lambda: np.arange(10).reshape(5, 2)]
)
def test_tensors_and_arrays_are_cut_along_their_first_dimension_as_views(
    make: Callable[[], Any],
) -> None:
    whole = make()
    made = pieces(5, 2, [whole], {})
    assert [p.args[0].tolist() for p in made] == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    made[1].args[0][0, 0] = 99
    assert whole[3, 0] == 99


def test_a_scalar_tensor_has_nothing_to_cut() -> None:
    assert items_of(torch.tensor(3)) is None
    assert items_of(np.float32(3)) is None
    assert items_of(np.zeros((4, 2))) == 4


def test_tuples_ranges_and_batched_dicts_keep_their_kind() -> None:
    made = pieces(3, 2, [(1, 2, 3), range(3), Columns(a=[1, 2, 3], b=[4, 5, 6])], {})
    assert made[0].args == [(1, 2), range(2), {"a": [1, 2], "b": [4, 5]}]
    assert made[1].args == [(3,), range(2, 3), {"a": [3], "b": [6]}]
    assert type(made[1].args[2]) is Columns
    assert item([4, 5], 1) == 5
    assert item(Columns(a=[1, 2]), 1) == {"a": [2]}


def test_another_length_names_the_argument_and_both_lengths() -> None:
    with pytest.raises(MisuseError, match=r"argument 1 \(list\) has 2 items, the batch 3.*Whole"):
        pieces(3, 2, [[1, 2, 3], [1, 2]], {})
    with pytest.raises(MisuseError, match=r"argument 'mask' \(Tensor\) has 4 items, the batch 3"):
        pieces(3, 2, [[1, 2, 3]], {"mask": torch.zeros(4)})


@pytest.mark.parametrize("size", [-1, True, 2.0, "2", None])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(MisuseError, match="whole numbers from 0"):
        pieces(size, 2, [], {})


def test_the_common_size_is_that_of_what_can_be_cut() -> None:
    assert common_size([[1, 2], "text", 3], {"t": torch.zeros(2), "w": Whole([1])}) == 2
    with pytest.raises(MisuseError, match=r"argument 0: 2, argument 'b': 3"):
        common_size([[1, 2]], {"b": (1, 2, 3)})
    with pytest.raises(MisuseError, match="none can be cut"):
        common_size(["text"], {})


def test_scattered_lists_give_one_item_each() -> None:
    assert scattered(2, [["a", "b"]], {"n": (1, 2)}) == [(["a"], {"n": 1}), (["b"], {"n": 2})]
    assert scattered(2, [], {}) == [([], {}), ([], {})]


def test_what_cannot_be_scattered_is_named() -> None:
    with pytest.raises(MisuseError, match="argument 0 has 3 items; with _scatter it needs 2"):
        scattered(2, [[1, 2, 3]], {})
    with pytest.raises(
        MisuseError, match=r"argument 'x' is a str; with _scatter .* list of 2 items"
    ):
        scattered(2, [], {"x": "ab"})
