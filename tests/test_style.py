"""Style as a test: sizes, nesting, parameters, docstrings, and tests that mirror the package.

The numbers are those of `docs/design.md`. A function is counted without its docstring, a parameter without `self`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_NESTING, MAX_PARAMETERS = 600, 300, 60, 4, 6
MAX_MEDIAN_FUNCTION = 8

PACKAGE = sorted((ROOT / "runtime").rglob("*.py"))
AROUND = sorted(
    path for folder in ("tests", "examples", "bench") for path in (ROOT / folder).rglob("*.py")
)

Function = ast.FunctionDef | ast.AsyncFunctionDef
_BLOCKS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.With,
    ast.AsyncWith,
    ast.Try,
    ast.TryStar,
    ast.Match,
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> Iterator[tuple[Function, bool]]:
    """Every function of a file, and whether it is a method with a `self` or `cls`."""
    methods = {
        id(node)
        for owner in ast.walk(tree(path))
        if isinstance(owner, ast.ClassDef)
        for node in owner.body
        if isinstance(node, Function) and not has_decorator(node, "staticmethod")
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            yield node, id(node) in methods


def has_decorator(node: Function, name: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == name for d in node.decorator_list)


def length(node: Function | ast.ClassDef) -> int:
    """Lines of a function or class, without its docstring and decorators."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def nesting(node: ast.AST) -> int:
    """How deep blocks lie in each other; an elif lies no deeper than its if, functions start anew."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(
                child, Function | ast.ClassDef | ast.Lambda
            ):
                continue
            elif_ = isinstance(node, ast.If) and field == "orelse" and len(node.orelse) == 1
            deeper = isinstance(child, _BLOCKS) and not (elif_ and isinstance(child, ast.If))
            deepest = max(deepest, nesting(child) + deeper)
    return deepest


def parameters(node: Function, method: bool) -> int:
    args = node.args
    return len(args.posonlyargs) + len(args.args) + len(args.kwonlyargs) - method


def body(source: str) -> Function:
    (node,) = ast.parse(source).body
    assert isinstance(node, Function)
    return node


def test_the_measures_measure() -> None:
    deep = "def f(a, /, b, *args, c, **kw):\n  '''d'''\n  if a:\n    pass\n  elif b:\n    for x in c:\n      with x: pass"
    assert (nesting(body(deep)), length(body(deep)), parameters(body(deep), False)) == (3, 6, 3)
    assert nesting(body("def f():\n  def g():\n    if x: pass\n  return [y for y in x]")) == 0
    assert nesting(body("def f():\n  if a: pass\n  else:\n    if b: pass\n    c()")) == 2


def test_no_file_class_or_function_is_too_large() -> None:
    large = []
    for path in PACKAGE + AROUND:
        lines = len(path.read_text().splitlines())
        large += [f"{name(path)}: {lines} lines"] if lines > MAX_FILE else []
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef | Function):
                cap = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
                lines = length(node)
                large += [f"{name(path)}: {node.name}: {lines} lines"] if lines > cap else []
    assert large == [], "\n".join(large)


def test_no_function_of_the_package_is_nested_too_deep() -> None:
    depths = {f"{name(p)}: {f.name}": nesting(f) for p in PACKAGE for f, _ in functions(p)}
    assert {key: depth for key, depth in depths.items() if depth > MAX_NESTING} == {}


def test_no_function_of_the_package_takes_too_many_parameters() -> None:
    counts = {
        f"{name(path)}:{function.lineno} {function.name}": parameters(function, method)
        for path in PACKAGE
        for function, method in functions(path)
    }
    assert {key: count for key, count in counts.items() if count > MAX_PARAMETERS} == {}


def test_functions_are_short_in_the_median() -> None:
    assert median(length(f) for path in PACKAGE for f, _ in functions(path)) <= MAX_MEDIAN_FUNCTION


def test_every_file_says_what_it_is_for() -> None:
    silent = [
        name(path)
        for path in PACKAGE + AROUND
        if ast.get_docstring(tree(path)) is None and path.read_text().strip()
    ]
    assert silent == [], "\n".join(silent)


_UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")


def test_nothing_is_marked_as_unfinished() -> None:
    marked = [
        f"{name(path)}:{number}"
        for path in PACKAGE + AROUND
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _UNFINISHED.search(line)
    ]
    assert marked == [], "\n".join(marked)


_OUTSIDE_THE_MIRROR = {"integration", "contracts", "sim", "examples", "bench", "cases"}
_OF_A_WHOLE_FOLDER = {
    "test_contract.py",
    "test_cases.py",
    "test_fuzz.py",
    "test_deadlines.py",
    "test_histories.py",
}


def test_unit_tests_mirror_the_package() -> None:
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")]
    mirrored = [
        path for path in tests if path.parts[0] not in _OUTSIDE_THE_MIRROR and len(path.parts) > 1
    ]
    assert mirrored, "no test is found"
    lonely = [
        str(path)
        for path in mirrored
        if path.name not in _OF_A_WHOLE_FOLDER
        and not (ROOT / "runtime" / path.parent / path.name.removeprefix("test_")).exists()
    ]
    assert lonely == [], "\n".join(lonely)


_TESTED_WITH_ANOTHER = {
    "runtime/job_toml.py": "test_job.py",
    "runtime/machine.py": "test_driver.py",
    "runtime/launcher/flags.py": "launcher/test_options.py",
    "runtime/launcher/place.py": "launcher/test_plan.py",
    "runtime/launcher/prepare.py": "launcher/test_plan.py",
    "runtime/launcher/records.py": "launcher/test_screens.py",
}


def pure_modules() -> list[str]:
    text = (ROOT / ".importlinter").read_text()
    listed = text.partition("[importlinter:contract:pure]")[2].partition("forbidden_modules")[0]
    return [
        line.strip().replace(".", "/") + ".py"
        for line in listed.splitlines()
        if line.strip().startswith("runtime.")
    ]


def test_every_pure_module_has_its_unit_test() -> None:
    modules = pure_modules()
    assert "runtime/launcher/plan.py" in modules
    missing = []
    for module in modules:
        inner = Path(module).relative_to("runtime")
        mirror = _TESTED_WITH_ANOTHER.get(module, str(inner.with_name(f"test_{inner.name}")))
        missing += [] if (ROOT / "tests" / mirror).exists() else [f"{module}: tests/{mirror}"]
    assert missing == [], "\n".join(missing)
