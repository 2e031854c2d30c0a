"""Errors across process borders (wire.remote)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import pickle as pickling
import threading
from json import JSONDecodeError

import pytest

from runtime import errors
from runtime.errors import RemoteError, WireError
from runtime.wire import codec


class Picky(Exception):
    """Cannot be rebuilt by calling it with its args."""

    def __init__(self, first: int, *, second: int) -> None:
        super().__init__(f"{first}/{second}")
        self.second = second


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Shadowing(Exception):
    peer = property(lambda self: "mine")
    reason = property(lambda self: "mine, too")


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def _through(error: BaseException, **options: bool) -> Exception:
    encoded = codec.encode_error(_raised(error), **options)
    pickle = options.get("pickle", True)
    return codec.decode_error(*encoded, peer="b-0.1", role="b", rank=0, pickle=pickle)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        Picky(1, second=2),
        FileNotFoundError(2, "none", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        JSONDecodeError("bad", "doc", 1),
        SyntaxError("bad", ("f.py", 3, 4, "text")),
        ImportError("none", name="m"),
        Frozen(3),
        Shadowing("x"),
        errors.Timeout("slow", 2.0),
        errors.PeerLostError("gone", peer="other"),
        ZeroDivisionError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_is_both_remote_and_what_it_was(error: Exception) -> None:
    got = _through(error)
    assert isinstance(got, RemoteError)
    assert isinstance(got, type(error))
    assert got.args == error.args
    assert (got.peer, got.role, got.rank) == ("b-0.1", "b", 0) or isinstance(error, Shadowing)
    assert type(error).__name__ in got.type_name
    assert "in _raised" in got.remote_traceback
    copy = pickling.loads(pickling.dumps(got))
    assert type(copy) is type(got)
    assert (copy.args, str(copy), vars(copy)) == (got.args, str(got), vars(got))
    again = _through(got)
    assert type(again) is type(got)
    assert again.type_name == got.type_name


class Several(ExceptionGroup[Exception]):
    def __new__(cls, code: int, members: list[Exception]) -> Several:
        made = super().__new__(cls, f"code {code}", members)
        made.code = code
        return made

    code: int


def test_groups_arrive_with_their_members() -> None:
    inner = ExceptionGroup("inner", [Picky(1, second=2), StopIteration()])
    group = _through(Several(7, [_raised(KeyError("k")), inner]))
    assert isinstance(group, RemoteError)
    assert isinstance(group, Several)
    assert group.code == 7
    seen: list[Exception] = []
    try:
        raise pickling.loads(pickling.dumps(_through(group)))
    except* KeyError as keys:
        seen += keys.exceptions
    except* Picky as found:
        seen += found.exceptions[0].exceptions
    except* RemoteError as rest:
        seen += rest.exceptions[0].exceptions
    assert [str(error).partition(" (raised")[0] for error in seen] == [
        "KeyError: 'k'",
        f"{__name__}.Picky: 1/2",
        "StopIteration",
    ]
    assert all(isinstance(e, RemoteError) and (e.role, e.rank) == ("b", 0) for e in seen)
    assert "in _raised" in seen[0].remote_traceback


def test_the_results_of_a_group_call_stay_with_its_caller() -> None:
    failed = errors.CallGroupError("f() failed", [KeyError("k")], partial={1: "result"})
    got = _through(failed)
    assert isinstance(got, ExceptionGroup)
    assert isinstance(got.exceptions[0], KeyError)
    assert got.type_name == "runtime.errors.CallGroupError"
    assert not hasattr(got, "partial")


def test_attributes_come_along() -> None:
    assert _through(Picky(1, second=2)).second == 2
    got = _through(FileNotFoundError(2, "none", "/x"))
    assert (got.errno, got.filename) == (2, "/x")
    assert _through(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")).object == b"\xff"
    assert _through(Frozen(3)).code == 3


def test_except_clauses_work_as_if_it_were_local() -> None:
    with pytest.raises(KeyError) as caught:
        raise _through(KeyError("k"))
    text = str(caught.value)
    assert text.startswith("KeyError: 'k' (raised in b-0)")
    assert "Remote traceback:" in text


@pytest.mark.parametrize(
    "error",
    [
        StopIteration(1),
        StopAsyncIteration(),
        GeneratorExit(),
        KeyboardInterrupt(),
        SystemExit(3),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
        BaseExceptionGroup("g", [KeyboardInterrupt()]),
    ],
    ids=lambda e: type(e).__name__,
)
def test_some_types_are_never_made_again(error: BaseException) -> None:
    got = _through(error)
    assert type(got) is RemoteError
    assert type(error).__name__ in got.type_name


def test_local_classes_and_odd_attributes_still_arrive_in_words() -> None:
    class Local(Exception):
        pass

    got = _through(Local("text"))
    assert type(got) is RemoteError
    assert "Local" in got.type_name
    assert got.message == "text"
    held = ValueError("held")
    held.lock = threading.Lock()  # type: ignore[attr-defined]
    got = _through(held)
    assert isinstance(got, ValueError)
    assert got.message == "held"
    got = _through(Mute())
    assert isinstance(got, Mute)
    assert "RuntimeError" in got.message


def test_long_texts_are_cut_in_the_middle() -> None:
    got = _through(ValueError("a" * 100_000 + "end\ud800"))
    assert "characters left out" in got.message
    assert len(got.message) < 40_000
    assert "end" in got.message


def test_without_pickle_only_words_travel_and_nothing_is_opened() -> None:
    got = _through(KeyError("k"), pickle=False)
    assert type(got) is RemoteError
    assert got.type_name == "KeyError"
    encoded = codec.encode_error(KeyError("k"))
    got = codec.decode_error(*encoded, pickle=False)
    assert type(got) is RemoteError


@pytest.mark.parametrize("pickle", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        errors.PeerLostError("gone", peer="b-0.1", role="b", rank=0, host="h", cause="SIGKILL"),
        errors.BarrierBroken("broken", "name", ["a-0"]),
        errors.Timeout("waited", 2.5, 3),
        errors.MisuseError("wrong"),
        errors.NotExposedError("no such method", ["a", "b"]),
        errors.ConfigError("bad"),
        errors.VersionConflict("other", "k", 1, 2),
        errors.WireError("truncated", "3 bytes"),
        errors.RemoteError("KeyError", "'k'", "text", "p", "r", 1),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_of_our_own_arrive_as_themselves(error: errors.RuntimeFault, pickle: bool) -> None:
    encoded = codec.encode_error(error, own=True, pickle=pickle)
    got = codec.decode_error(*encoded, peer="x", role="y", rank=9, pickle=pickle)
    assert type(got) is type(error)
    assert (got.args, vars(got), str(got)) == (error.args, vars(error), str(error))


def test_an_error_of_our_own_loses_what_cannot_travel_but_not_its_words() -> None:
    error = errors.MisuseError("words")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    got = codec.decode_error(*codec.encode_error(error, own=True))
    assert type(got) is errors.MisuseError
    assert str(got) == "words"


@pytest.mark.parametrize(
    "value",
    [None, [], [1], [True, "NoSuch", [], {}], [True, "Sequence", [], {}], [True, "Timeout", 1, {}],
     [True, "Timeout", ["x"], 5], [False, 1, "m", "t", None], [False, "n", "m", "t"], {"a": 1}],
    ids=repr,
)  # fmt: skip
def test_what_is_no_error_is_refused(value: object) -> None:
    with pytest.raises(WireError):
        codec.decode_error(codec.encode(value).body)


def test_a_broken_original_still_gives_a_remote_error() -> None:
    body = codec.encode([False, "Name", "message", "trace", [b"\xc1", []]]).body
    got = codec.decode_error(body, peer="p")
    assert type(got) is RemoteError
    assert (got.type_name, got.message, got.peer) == ("Name", "message", "p")
