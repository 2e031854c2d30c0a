"""What an entry's source tells: whether it exists and can be called, and whether torch is worth preloading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from runtime.job import Entry, RoleSpec, parse_entry
from runtime.launcher.entries import MAX_FILES, Module, check_entry, find_preload


@dataclass(frozen=True)
class Tree:
    """Sources from a dict: "pkg/" is a package, "t.py" a script, "=name" an installed module."""

    files: Mapping[str, str | None]
    installed: Mapping[str, bool] = field(default_factory=dict)

    def at(self, directory: str) -> Tree:
        return self

    def has_directory(self) -> bool:
        return True

    def beside(self, path: str) -> Tree:
        return self

    def script(self, path: str) -> Module | None:
        return Module("__main__", self.files[path], True) if path in self.files else None

    def module(self, name: str) -> Module | None:
        if name in self.installed:
            return Module(name, None, False, requires_torch=self.installed[name])
        for key, package in ((name, False), (f"{name}/", True)):
            if key in self.files:
                return Module(name, self.files[key], True, package)
        return None


MODULE = """
import os, json as js
from a import b
def good(): ...
def config(cfg, *, lr=1): ...
def two(a, b): ...
def keyword(*, a): ...
async def later(cfg): ...
@decorated
def wrapped(a, b): ...
class Plain: ...
class Ready:
    def __init__(self, n=1): ...
class Needy:
    def __init__(self, a, b): ...
class Made(metaclass=M):
    def __init__(self, a): ...
number = 3
text = "x"
items = [1, 2]
made = make()
other = good
annotated: int = 4
declared: int
left, right = 1, 2
if js:
    maybe = 3
try:
    import fast
except ImportError:
    fast = None
for loop in range(3): ...
"""


def check(entry: str, **files: str | None) -> list[str]:
    return check_entry(parse_entry(entry), Tree({"mod": MODULE, **files}))


@pytest.mark.parametrize(
    "name",
    ["good", "config", "later", "wrapped", "Plain", "Ready", "Made", "made", "other", "os", "js", "b",
     "left", "maybe", "fast", "loop", "Plain.create"],
)  # fmt: skip
def test_what_may_be_called_goes_through(name: str) -> None:
    assert check(f"mod:{name}") == []


ALLOWED = "an entry is a function without arguments or with one (the config), or a class"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("mod:gone", "entry mod:gone: mod has no 'gone'"),
        ("mod:god", "entry mod:god: mod has no 'god' (did you mean good?)"),
        ("mod:declared", "entry mod:declared: mod has no 'declared'"),
        ("mod:two", f"entry mod:two: needs 2 arguments; {ALLOWED}"),
        ("mod:keyword", f"entry mod:keyword: needs a by name; {ALLOWED}"),
        ("mod:Needy", f"entry mod:Needy: its constructor needs 2 arguments, but is called without; {ALLOWED}"),
        ("mod:number", f"entry mod:number: is 3, which cannot be called; {ALLOWED}"),
        ("mod:text", f"entry mod:text: is 'x', which cannot be called; {ALLOWED}"),
        ("mod:items", f"entry mod:items: is [1, 2], which cannot be called; {ALLOWED}"),
        ("mod:annotated", f"entry mod:annotated: is 4, which cannot be called; {ALLOWED}"),
        ("nomod:run", "module nomod: no module of that name is found (for 'nomod')"),
        ("mod.sub:run", "module mod.sub: no module of that name is found (for 'mod.sub')"),
        ("-m nomod", "module nomod: no module of that name is found (for 'nomod')"),
        ("t.py", "script t.py: no such file"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_found_before_anything_starts(entry: str, message: str) -> None:
    assert check(entry) == [message]


def test_what_the_text_cannot_tell_goes_through() -> None:
    assert check("c:run", c=None) == [], "a C module has no source"
    assert check("star:run", star="from x import *") == []
    assert check("lazy:run", lazy="def __getattr__(name): ...") == []
    assert check("magic:run", magic="globals()['run'] = print") == []
    assert check("magic:run", magic="exec('def run(): ...')") == []
    assert check("broken:run", broken="def run(:") == [], "the worker shows the syntax error"
    assert check("mod.path:join", mod="import sys; sys.modules['mod.path'] = x") == []
    assert check_entry(Entry("program", "a.out"), Tree({})) == []


def test_a_submodule_counts_as_an_attribute_and_a_package_is_run_by_its_main() -> None:
    tree = Tree({"pkg/": "", "pkg.sub": "", "app/": "", "app.__main__": ""})
    assert check_entry(Entry("object", "pkg:sub"), tree) == []
    assert check_entry(Entry("module", "app"), tree) == []
    assert check_entry(Entry("module", "pkg.sub"), tree) == []
    assert check_entry(Entry("module", "pkg"), tree) == [
        "module pkg: a package without __main__ cannot be run with -m"
    ]


# Preload


def preload(
    entry: str,
    files: Mapping[str, str | None],
    installed: Mapping[str, bool] | None = None,
    **fields: Any,
) -> tuple[str, ...]:
    role = RoleSpec("r", fields.pop("kind", "simple"), parse_entry(entry), **fields)
    return find_preload(role, Tree(files, installed or {}))


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch.utils.data import DataLoader",
        "import os, torch",
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "def main():\n    import torch",
        "with x:\n    import torch",
        "if True:\n    pass\nelse:\n    import torch",
    ],
)
def test_a_script_that_imports_torch_is_worth_it(source: str) -> None:
    assert preload("t.py", {"t.py": source}) == ("torch",)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "import os, numpy, torchlike",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        "import typing\nif typing.TYPE_CHECKING:\n    import torch",
        "'import torch'",
        "import torch x",
        "import runtime",
    ],
)
def test_a_script_without_torch_does_not_pay_for_it(source: str) -> None:
    assert preload("t.py", {"t.py": source}, {"runtime": True, "numpy": False}) == ()


def test_local_modules_are_followed_also_relative_and_in_packages() -> None:
    files = {
        "t.py": "import pkg.a",
        "pkg/": "",
        "pkg.a": "from . import b\nfrom .sub import c",
        "pkg.b": "",
        "pkg.sub/": "from ..deep import d",
        "pkg.sub.c": "",
        "pkg.deep/": "",
        "pkg.deep.d": "import torch",
    }
    assert preload("t.py", files) == ("torch",)
    assert preload("-m pkg.a", files) == ("torch",)
    assert preload("pkg.a:run", files) == ("torch",)
    assert preload("t.py", {**files, "pkg.deep.d": "import json"}) == ()


def test_the_parents_of_a_submodule_are_looked_at() -> None:
    files = {"t.py": "import pkg.a", "pkg/": "import torch", "pkg.a": ""}
    assert preload("t.py", files) == ("torch",)


def test_in_other_modules_an_import_within_a_function_may_never_run() -> None:
    files = {"t.py": "import helper", "helper": "def gpu():\n    import torch"}
    assert preload("t.py", files) == ()
    assert preload("helper:gpu", files) == ("torch",)


def test_a_package_that_needs_torch_counts_and_its_own_source_is_not_read() -> None:
    assert preload("t.py", {"t.py": "import peft"}, {"peft": True}) == ("torch",)
    assert preload("t.py", {"t.py": "import numpy"}, {"numpy": False}) == ()


def test_a_module_run_with_m_is_looked_at_in_its_main() -> None:
    assert preload("-m app", {"app/": "", "app.__main__": "import torch"}) == ("torch",)


def test_a_role_that_sets_up_a_process_group_or_checks_its_node_needs_torch() -> None:
    files = {"m": "def f(): ...", "t.py": ""}
    assert preload("m:f", files, kind="elastic") == ("torch",)
    off = {"comm_auto_setup_process_group": False, "comm_pre_check": False}
    assert preload("m:f", files, kind="elastic", **off) == ()
    assert preload("t.py", files, kind="elastic") == ()
    assert preload("t.py", files, kind="elastic", init_process_group=True) == ("torch",)


def test_nothing_is_preloaded_where_nothing_is_forked() -> None:
    files = {"t.py": "import torch"}
    assert preload("t.py", files, python="/other/python") == ()
    assert preload("t.py", files, start_method="spawn") == ()
    program = RoleSpec("r", "simple", Entry("program", "t.py"))
    assert find_preload(program, Tree(files)) == ()


def test_cycles_end_and_a_large_tree_is_given_up_on() -> None:
    assert preload("t.py", {"t.py": "import a", "a": "import b", "b": "import a"}) == ()
    chain: dict[str, str | None] = {f"m{n}": f"import m{n + 1}" for n in range(MAX_FILES + 5)}
    chain |= {"t.py": "import m0", f"m{MAX_FILES + 5}": "import torch"}
    assert preload("t.py", chain) == ()
    assert preload("t.py", {**chain, "m9": "import torch"}) == ("torch",)
