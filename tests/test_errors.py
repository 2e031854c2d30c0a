"""Errors cross processes unharmed, keep their place in the tree, and say in words what happened."""

from __future__ import annotations

import pickle

import pytest

from runtime import errors
from runtime.errors import (
    CallGroupError,
    Failure,
    PeerLostError,
    RemoteError,
    RuntimeFault,
    Timeout,
    WorkerFailureError,
    nearest,
)

KINDS = sorted(
    (
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, RuntimeFault)
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.MisuseError, ValueError),
        (errors.ArgumentError, TypeError),
        (errors.NotExposedError, AttributeError),
        (errors.PeerLostError, ConnectionError),
        (errors.Timeout, TimeoutError),
        (errors.WireError, ValueError),
        (errors.ConfigError, ValueError),
        (errors.CallGroupError, ExceptionGroup),
    ],
)
def test_who_catches_the_builtin_catches_ours(
    kind: type[RuntimeFault], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


def test_every_error_survives_pickling_with_its_reason_and_attributes() -> None:
    for kind in KINDS:
        error = kind("why", [ValueError("x")]) if kind is CallGroupError else kind("why")  # type: ignore[arg-type]
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert again.reason == error.reason
        assert vars(again).keys() == vars(error).keys()


def test_attributes_survive_pickling() -> None:
    lost = pickle.loads(pickle.dumps(PeerLostError("gone", "a-0.1", "a", 0, "h", "SIGKILL")))
    assert (lost.peer, lost.role, lost.rank, lost.host, lost.cause) == (
        "a-0.1",
        "a",
        0,
        "h",
        "SIGKILL",
    )
    late = pickle.loads(pickle.dumps(Timeout("late", waited_s=1.5, taken=2)))
    assert (late.waited_s, late.taken) == (1.5, 2)
    failed = WorkerFailureError("no", [Failure("a", 1, "h", "exit 3")], {0: "kept"})
    again = pickle.loads(pickle.dumps(failed))
    assert (again.failures, again.partial) == (failed.failures, {0: "kept"})


def test_a_remote_error_tells_what_was_raised_and_where() -> None:
    error = RemoteError("ValueError", "nan", "Traceback …\nValueError: nan", "a-1.2", "a", 1)
    assert error.reason == "ValueError: nan"
    assert str(error) == (
        "ValueError: nan (raised in a-1)\n\nRemote traceback:\nTraceback …\nValueError: nan"
    )
    assert str(RemoteError("KeyError", peer="p")) == "KeyError (raised in p)"


def test_a_group_of_failed_calls_can_be_split() -> None:
    first, second = ValueError("a"), KeyError("b")
    failures = [
        Failure("r", 0, "h", "raised", error=first),
        Failure("r", 1, "h", "raised", error=second),
    ]
    group = CallGroupError("two failed", [first, second], failures, {2: "ok"})
    found, rest = group.split(ValueError)
    assert isinstance(found, CallGroupError)
    assert found.failures == failures[:1]
    assert isinstance(rest, CallGroupError)
    assert rest.failures == failures[1:]
    assert rest.partial == {2: "ok"}


@pytest.mark.parametrize(
    ("name", "known", "words"),
    [
        ("totl", ["total", "kind"], " (did you mean total?)"),
        ("--nproc", ["--np", "--nproc-per-node"], " (did you mean --nproc-per-node?)"),
        ("--bogus", ["--verbose", "--hosts"], ""),
        ("zzz", ["total", "kind"], ""),
        ("x", [], ""),
    ],
)
def test_a_suggestion_is_near_or_absent(name: str, known: list[str], words: str) -> None:
    assert nearest(name, known) == words
