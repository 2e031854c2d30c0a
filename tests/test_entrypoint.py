"""Finding entries, checking them before they are called, telling how they ended."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime import entrypoint
from runtime.errors import MisuseError
from runtime.job import Entry
from tests.worker_process import write


@pytest.fixture(autouse=True)
def _restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loading an entry changes the process: in a worker for good, here for one test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


# -- objects ----------------------------------------------------------------------------------


def test_an_object_is_found_in_the_working_directory_also_below_a_class(tmp_path: Path) -> None:
    write(tmp_path, "ep_app.py", "class Outer:\n    @staticmethod\n    def run(): return 5")
    loaded = entrypoint.load_target(Entry("object", "ep_app:Outer.run"))
    assert (loaded.callable(), loaded.module.__name__) == (5, "ep_app")
    assert sys.modules["__main__"].__dict__.keys() >= {"__name__"}


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("ep_gone:run", "no module named 'ep_gone'"),
        ("ep_app.deep:run", "no module named 'ep_app"),
        ("ep_app:rum", "module 'ep_app' has no 'rum'; did you mean 'run'?"),
        ("ep_app:Thing.x", "has no 'x'"),
        ("ep_app:LIMIT", "is 'int': expected a function or a class"),
        ("ep_app", 'expected "package.module:object"'),
        (":run", 'expected "package.module:object"'),
    ],
)
def test_an_entry_that_cannot_be_had_says_what_is_wrong(
    tmp_path: Path, target: str, text: str
) -> None:
    write(tmp_path, "ep_app.py", "LIMIT = 3\ndef run(): ...\nclass Thing: ...")
    with pytest.raises(MisuseError) as raised:
        entrypoint.load_target(Entry("object", target))
    assert text in str(raised.value)
    assert target in str(raised.value)


def test_an_import_error_inside_of_the_module_is_the_modules_own(tmp_path: Path) -> None:
    write(tmp_path, "ep_broken.py", "import ep_not_installed")
    with pytest.raises(ModuleNotFoundError, match="ep_not_installed"):
        entrypoint.load_target(Entry("object", "ep_broken:run"))


def _none() -> None: ...
def _one(config: Any) -> None: ...
def _maybe_one(config: Any = None) -> None: ...
def _optional(a: int = 1, b: int = 2) -> None: ...
def _one_and_more(config: Any, verbose: bool = False) -> None: ...
def _anything(*args: Any, **kwargs: Any) -> None: ...
def _two(a: int, b: int) -> None: ...
def _by_name(*, lr: float) -> None: ...


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (_none, []),
        (_one, ["config"]),
        (_maybe_one, ["config"]),
        (_optional, []),
        (_one_and_more, ["config"]),
        (_anything, []),
        (dict, []),
    ],
)
def test_a_function_gets_nothing_or_the_config(
    function: Callable[..., Any], expected: list[str]
) -> None:
    assert entrypoint.arguments_for(function, lambda: "config", "m:f") == expected


@pytest.mark.parametrize(("function", "names"), [(_two, "(a, b)"), (_by_name, "(lr)")])
def test_a_function_that_needs_more_is_refused_by_its_parameters(
    function: Callable[..., Any], names: str
) -> None:
    with pytest.raises(MisuseError) as raised:
        entrypoint.arguments_for(function, lambda: "config", "m:f")
    assert f"entry 'm:f' needs the arguments {names}" in str(raised.value)


class _Needs:
    def __init__(self, size: int) -> None: ...


class _Raises:
    def __init__(self) -> None:
        raise TypeError("of its own")


def test_a_constructor_with_arguments_is_refused_before_it_is_called() -> None:
    with pytest.raises(MisuseError, match="missing a required argument: 'size'"):
        entrypoint.check_constructor(_Needs, "m:Needs")
    entrypoint.check_constructor(_Raises, "m:Raises")


# -- programs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (b"@rpc\ndef f(): ...", {"f"}),
        (b"@rpc()\nasync def f(): ...", {"f"}),
        (b"import runtime\n@runtime.rpc('name')\ndef f(): ...\n@other\ndef g(): ...", {"f"}),
        (b"class A:\n    @rpc\n    def f(self): ...", set()),
        (b"def f(): ...\nx = 'rpc'", set()),
        (b"this is no python @rpc", set()),
    ],
)
def test_the_functions_that_a_script_will_declare_are_known_before_it_runs(
    source: bytes, names: set[str]
) -> None:
    assert entrypoint.top_level_rpc_names(source) == names


def test_a_script_that_makes_its_own_node_is_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "ep_own.py", "from runtime import Node\n# Node.from_env()")
    assert entrypoint.prepare_script(Entry("script", str(path))).own_node
    path = write(tmp_path, "ep_plain.py", "pass")
    assert not entrypoint.prepare_script(Entry("script", str(path))).own_node


def test_a_module_that_raises_while_its_package_is_imported_shows_that(tmp_path: Path) -> None:
    write(tmp_path, "ep_pack/__init__.py", "import ep_not_installed")
    write(tmp_path, "ep_pack/main.py", "")
    with pytest.raises(ModuleNotFoundError, match="ep_not_installed"):
        entrypoint.prepare_module(Entry("module", "ep_pack.main"))


# -- how it ended -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "failure"),
    [
        (None, 0, False),
        (SystemExit(), 0, False),
        (SystemExit(3), 3, False),
        (SystemExit(256), 0, False),
        (SystemExit("text"), 1, True),
        (ValueError(), 1, True),
        (KeyboardInterrupt(), 130, True),
    ],
)
def test_exit_codes_are_those_of_the_interpreter(
    error: BaseException | None, code: int, failure: bool
) -> None:
    assert entrypoint.exit_code(error) == code
    assert entrypoint.is_failure(error) is failure


def _names(error: BaseException) -> list[str]:
    frames, names = entrypoint.user_frames(error), []
    while frames is not None:
        names.append(frames.tb_frame.f_code.co_name)
        frames = frames.tb_next
    return names


def test_our_frames_before_the_programs_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "ep_raises.py", "def inner(): 1 / 0\ninner()")
    with pytest.raises(ZeroDivisionError) as raised:
        entrypoint.load_target(Entry("object", "ep_raises:x"))
    assert _names(raised.value)[-2:] == ["<module>", "inner"]
    error = raised.value.with_traceback(raised.value.__traceback__.tb_next)  # type: ignore[union-attr]
    assert _names(error) == ["<module>", "inner"]


def test_of_an_error_that_we_raise_only_the_programs_frames_are_shown() -> None:
    with pytest.raises(MisuseError) as raised:
        entrypoint.load_target(Entry("object", "x"))
    assert _names(raised.value) == [
        "test_of_an_error_that_we_raise_only_the_programs_frames_are_shown"
    ]
