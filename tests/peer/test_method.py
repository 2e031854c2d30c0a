"""What `@rpc` records, and what the table of exposed methods refuses."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from runtime.errors import ArgumentError, MisuseError, NotExposedError
from runtime.peer import method as methods
from runtime.peer.method import Exports, misfit, rpc, rpc_functions, rpc_methods, rpc_name


@pytest.fixture
def heard() -> Iterator[list[Any]]:
    before = list(methods._declared.functions)
    functions: list[Any] = []
    methods.listen(functions.append)
    functions.clear()
    yield functions
    methods.listen(None)
    methods._declared.functions[:] = before


def test_every_form_of_rpc_records_what_was_said() -> None:
    @rpc
    def bare() -> None: ...

    @rpc()
    def called() -> None: ...

    @rpc("other")
    def named() -> None: ...

    @rpc(concurrency=8, pickle=False)
    def bounded() -> None: ...

    @rpc(thread=False)
    def quick() -> None: ...

    found = [methods.method_of(f) for f in (bare, called, named, bounded, quick)]
    assert found == [
        ("bare", False, None, True, True),
        ("called", False, None, True, True),
        ("other", False, None, True, True),
        ("bounded", False, 8, False, True),
        ("quick", False, None, True, False),
    ]


def test_what_cannot_run_on_the_loop_is_refused() -> None:
    def items() -> Iterator[int]:
        yield 1

    with pytest.raises(MisuseError, match=r"generator .*items.*async def"):
        rpc(thread=False)(items)
    with pytest.raises(MisuseError, match="one runs at a time"):
        rpc(thread=False, concurrency=2)(print)


@pytest.mark.parametrize("concurrency", [0, -1, True, 1.5, "2"])
def test_a_concurrency_that_is_no_number_from_one_is_refused(concurrency: Any) -> None:
    with pytest.raises(MisuseError, match=r"concurrency=.*whole numbers from 1"):
        rpc(concurrency=concurrency)


def test_an_empty_name_and_a_class_are_refused() -> None:
    with pytest.raises(MisuseError, match="text that is not empty"):
        rpc("")
    with pytest.raises(MisuseError, match="belongs on the methods"):
        rpc(dict)  # type: ignore[type-var]


def test_a_declared_function_is_heard_of_whenever_it_was_declared(heard: list[Any]) -> None:
    @rpc(export=True)
    def early() -> None: ...

    later: list[Any] = []
    methods.listen(later.append)
    assert later[-1] is early

    @rpc("late", export=True)
    def late() -> None: ...

    assert later[-1] is late
    assert heard == [early]


class Base:
    @rpc
    def kept(self) -> None: ...

    @rpc("renamed")
    async def original(self) -> None: ...

    @rpc
    @staticmethod
    def still() -> None: ...

    def private(self) -> None: ...


class Child(Base):
    def kept(self) -> None: ...

    still = None  # type: ignore[assignment]


def test_methods_are_found_with_their_names_and_overrides_stay_marked() -> None:
    assert {k: m.name for k, m in rpc_methods(Base).items()} == {
        "kept": "kept",
        "original": "renamed",
        "still": "still",
    }
    assert sorted(rpc_methods(Child)) == ["kept", "original"]


@rpc
def of_this_module() -> None: ...


def not_marked() -> None: ...


def test_the_functions_of_a_module_are_its_own_marked_ones() -> None:
    assert rpc_functions(sys.modules[__name__]) == [of_this_module]


def test_a_method_is_named_by_text_or_function() -> None:
    assert rpc_name("x.y") == "x.y"
    assert rpc_name(Base.original) == "renamed"
    assert rpc_name(Base().original) == "renamed"
    assert rpc_name(not_marked) == "not_marked"
    with pytest.raises(MisuseError, match="empty text"):
        rpc_name("")
    with pytest.raises(MisuseError, match="neither a method's name"):
        rpc_name(object())  # type: ignore[arg-type]


def test_the_same_function_twice_is_once_and_another_is_refused() -> None:
    exports = Exports("a-0")
    thing = Base()
    first = exports.add("f", thing.kept)
    assert exports.add("f", thing.kept) is first
    with pytest.raises(
        MisuseError, match=r"a-0 exposes 'f' already, as .*Base\.kept; .*not_marked"
    ):
        exports.add("f", not_marked)
    with pytest.raises(MisuseError, match=r"already"):
        exports.add("f", Base().kept)


def test_options_of_export_beat_those_of_rpc() -> None:
    @rpc(concurrency=2, pickle=False)
    async def f() -> None: ...

    exports = Exports("a-0")
    assert exports.add("f", f)[2:5] == (True, 2, False)
    assert exports.add("g", f, concurrency=5, pickle=True)[2:5] == (True, 5, True)


def test_what_cannot_be_exported_is_refused() -> None:
    with pytest.raises(MisuseError, match="not callable"):
        Exports("a-0").add("f", 3)  # type: ignore[arg-type]
    for name in ("", 3, None):
        with pytest.raises(MisuseError, match=f"{name!r} is no name to export by"):
            Exports("a-0").add(name, not_marked)  # type: ignore[arg-type]


def test_generators_are_known_as_such_and_where_they_run() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def numbers_async() -> AsyncIterator[int]:
        yield 1

    @rpc(thread=False)
    def quick() -> None: ...

    exports = Exports("a-0")
    kinds = [exports.add(f.__name__, f) for f in (numbers, numbers_async, quick, not_marked)]
    assert [(e.stream, e.is_async, e.thread) for e in kinds] == [
        (True, False, True),
        (True, True, True),
        (False, False, False),
        (False, False, True),
    ]


def test_an_object_with_an_async_call_is_async() -> None:
    class Asynchronous:
        async def __call__(self) -> None: ...

    assert Exports("a-0").add("f", Asynchronous()).is_async


def test_an_unknown_method_lists_what_there_is_and_suggests_the_nearest() -> None:
    exports = Exports("eval-0")
    for name in ("evaluate", "load", "runtime.ping", "control.told"):
        exports.add(name, not_marked)
    with pytest.raises(NotExposedError) as caught:
        exports.find("evaluat")
    assert caught.value.exposed == ["evaluate", "load"]
    assert str(caught.value) == (
        "eval-0 exposes no method 'evaluat' (did you mean 'evaluate'?); it exposes evaluate, load"
    )
    with pytest.raises(NotExposedError, match="nothing yet"):
        Exports("b-0").find("x")


def test_a_long_list_of_methods_is_cut() -> None:
    exports = Exports("a-0")
    for number in range(50):
        exports.add(f"m{number:02}", not_marked)
    with pytest.raises(NotExposedError, match=r"m39 and 10 more$") as caught:
        exports.find("zzz")
    assert len(caught.value.exposed) == 50


def test_arguments_that_do_not_fit_are_told_with_the_signature() -> None:
    def f(x: int, *, y: int = 1) -> None: ...

    exported = Exports("a-0").add("f", f)
    error = misfit("a-0", exported, (), {"z": 1})
    assert isinstance(error, ArgumentError)
    assert isinstance(error, TypeError)
    assert "a-0.f(): missing a required argument: 'x'" in str(error)
    assert "f(x: 'int', *, y: 'int' = 1)" in str(error)
    assert misfit("a-0", exported, (1,), {"y": 2}) is None


def test_a_builtin_without_signature_speaks_for_itself() -> None:
    assert misfit("a-0", Exports("a-0").add("g", type), (), {}) is None
