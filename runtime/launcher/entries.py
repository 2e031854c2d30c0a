"""What can be told about an entry from its source, without importing anything.

Two questions are answered here: does the entry exist and can it be called (`check_entry`), and is it
worth importing torch once before the workers are forked (`find_preload`). Both read source text as a
syntax tree. Where the text cannot tell (a C module, `__getattr__`, a star import), the entry is let
through and the worker finds out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from runtime.errors import nearest
from runtime.job import Entry, RoleSpec

MAX_FILES = 64
"""So many local modules are looked at for an import of torch; beyond it the answer is no."""


class Module(NamedTuple):
    """A module that was found. `source` is None where there is none to read (C, namespace packages)."""

    name: str
    source: str | None
    local: bool
    """Part of the user's own tree, not installed."""
    package: bool = False
    requires_torch: bool = False
    """Its distribution says that it needs torch."""


class Sources(Protocol):
    """Looks modules and scripts up as Python would, importing nothing."""

    def at(self, directory: str) -> Sources:
        """The same, as seen by a worker that starts in `directory`."""
        ...

    def has_directory(self) -> bool:
        """Whether the directory that they start in exists."""
        ...

    def module(self, name: str) -> Module | None:
        """The module of that dotted name, or None if there is none."""
        ...

    def script(self, path: str) -> Module | None:
        """The script at `path` (its folder goes on the path), or None if there is no such file."""
        ...

    def beside(self, path: str) -> Sources:
        """The same, with the folder of the script `path` in front."""
        ...


# Does it exist?


def check_entry(entry: Entry, sources: Sources) -> list[str]:
    """What is certainly wrong with the entry: no such script, module or attribute, or no callable."""
    if entry.form == "program":
        return []
    if entry.form == "script":
        found = sources.script(entry.target)
        return [] if found else [f"script {entry.target}: no such file"]
    name, _, attribute = entry.target.partition(":")
    module, problem = _find(name, sources)
    if module is None or entry.form == "module":
        if module is not None and module.package and sources.module(f"{name}.__main__") is None:
            return [f"module {name}: a package without __main__ cannot be run with -m"]
        return [problem] if module is None else []
    if module.source is None:
        return []
    return _check_attribute(entry, module, attribute, sources)


def _find(name: str, sources: Sources) -> tuple[Module | None, str]:
    """The module, or the first part of its name that there is none of."""
    parts = name.split(".")
    found: Module | None = None
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        parent, found = found, sources.module(part)
        if found is not None:
            continue
        if parent is not None and not parent.package and "sys.modules" in (parent.source or ""):
            return Module(name, None, parent.local), ""  # as os.path: it may have been put there
        return None, f"module {part}: no module of that name is found (for {name!r})"
    return found, ""


def _check_attribute(entry: Entry, module: Module, path: str, sources: Sources) -> list[str]:
    tree = _parsed(module.source)
    if tree is None:
        return []  # A syntax error is the worker's to show, with the line.
    names, certain = _top_level(tree)
    first, _, rest = path.partition(".")
    if first not in names:
        if not certain or sources.module(f"{module.name}.{first}") is not None:
            return []
        return [f"entry {entry.target}: {module.name} has no {first!r}{nearest(first, names)}"]
    node = names[first]
    # What a class inherits cannot be told from its text, so attributes of attributes go through.
    return [] if rest else _check_callable(entry, node)


def _check_callable(entry: Entry, node: ast.stmt | ast.expr | None) -> list[str]:
    """Whether what the name is bound to can be called as an entry is."""
    allowed = "an entry is a function without arguments or with one (the config), or a class"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        # A decorator may change what the function takes.
        positional, named = (0, []) if node.decorator_list else _needed(node.args)
        if named:
            return [f"entry {entry.target}: needs {', '.join(named)} by name; {allowed}"]
        if positional > 1:
            return [f"entry {entry.target}: needs {positional} arguments; {allowed}"]
        return []
    if isinstance(node, ast.ClassDef):
        init = _constructor(node)
        positional, named = _needed(init.args) if init is not None else (0, [])
        needed = max(0, positional - 1) + len(named)
        if needed:
            return [
                f"entry {entry.target}: its constructor needs {needed} "
                f"argument{'s' if needed > 1 else ''}, but is called without; {allowed}"
            ]
        return []
    if isinstance(node, ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr):
        return [
            f"entry {entry.target}: is {ast.unparse(node)[:40]}, which cannot be called; {allowed}"
        ]
    return []


def _constructor(node: ast.ClassDef) -> ast.FunctionDef | None:
    """The class's own `__init__`, where nothing can have put another in its place."""
    if node.decorator_list or node.keywords:
        return None
    own = (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    init = next(own, None)
    return None if init is None or init.decorator_list else init


def _needed(args: ast.arguments) -> tuple[int, list[str]]:
    """What a call must give: how many by position, and which by name."""
    positional = len(args.posonlyargs) + len(args.args) - len(args.defaults)
    pairs = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return positional, [arg.arg for arg, default in pairs if default is None]


def _parsed(source: str | None) -> ast.Module | None:
    try:
        return ast.parse(source or "")
    except (SyntaxError, ValueError, RecursionError):
        return None


def _top_level(tree: ast.Module) -> tuple[dict[str, ast.stmt | ast.expr | None], bool]:
    """The names that the module binds, with what to (None: cannot be told); and whether these are
    all that it can have."""
    names: dict[str, ast.stmt | ast.expr | None] = {}
    for node, plain in _statements(tree.body, True):
        for name, value in _bound(node):
            # Bound twice, or on some condition: only that it exists is known.
            names[name] = value if plain and name not in names else None
    certain = not names.keys() & {"*", "__getattr__"}
    return names, certain and not any(map(_meddles, ast.walk(tree)))


def _meddles(node: ast.AST) -> bool:
    """Whether this may bind a name of the module in a way that cannot be followed."""
    if isinstance(node, ast.Name):
        return node.id in ("globals", "exec")
    return isinstance(node, ast.Global) or (
        isinstance(node, ast.Attribute) and node.attr == "modules"
    )


def _statements(body: list[ast.stmt], plain: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """The statements that run on import; not `plain` are those in an if, try, for or with."""
    for node in body:
        yield node, plain
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                break
            for child in getattr(node, field, []):
                inner = (
                    child.body if isinstance(child, ast.ExceptHandler | ast.match_case) else [child]
                )
                yield from _statements(inner, False)


def _bound(node: ast.stmt) -> Iterator[tuple[str, ast.stmt | ast.expr | None]]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name, node
        case ast.Import() | ast.ImportFrom():
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], None
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.AnnAssign(target=ast.Name(id=name), value=value):
            if value is not None:
                yield name, value
        case _:
            # Tuples, loops, with-items, walrus: the name exists, what it is cannot be told.
            for child in ast.walk(node):
                if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                    yield child.id, None


# What to preload


def find_preload(role: RoleSpec, sources: Sources) -> tuple[str, ...]:
    """("torch",) when the role's own source imports torch, or a package that needs it, or when the
    role sets up a process group; else nothing."""
    if role.entry.form == "program" or role.python is not None or role.start_method == "spawn":
        return ()
    if role.sets_up_process_group or role.checks_node:
        return ("torch",)
    return ("torch",) if _imports_torch(role.entry, sources) else ()


def _imports_torch(entry: Entry, sources: Sources) -> bool:
    if entry.form == "script":
        first = sources.script(entry.target)
        sources = sources.beside(entry.target)
    else:
        first, _ = _find(entry.target.partition(":")[0], sources)
        if first is not None and first.package and entry.form == "module":
            first = sources.module(f"{first.name}.__main__")
    waiting = [first] if first is not None else []
    seen = {module.name for module in waiting}
    files = 0
    while waiting and files < MAX_FILES:
        module = waiting.pop(0)
        files += 1
        # In the entry itself an import within a function will run; in others it may never.
        for name in _imported(module, anywhere=module is first):
            top = name.partition(".")[0]
            if top == "torch":
                return True
            if name in seen or top in sys.stdlib_module_names or top == "runtime":
                continue
            seen.add(name)
            found = sources.module(name)
            if found is not None and found.requires_torch:
                return True
            if found is not None and found.local:
                waiting.append(found)
    return False


def _imported(module: Module, *, anywhere: bool) -> Iterator[str]:
    """The names of modules that `module` imports; packages on the way included."""
    tree = _parsed(module.source)
    if tree is None:
        return
    hidden = {id(n) for node in ast.walk(tree) if _type_checking(node) for n in ast.walk(node)}
    nodes = ast.walk(tree) if anywhere else (node for node, _ in _statements(tree.body, True))
    for node in nodes:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module)
            yield from _with_parents(base)
            for alias in node.names:
                if base and alias.name != "*":
                    yield f"{base}.{alias.name}"


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".") if name else []
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _absolute(node: ast.ImportFrom, module: Module) -> str:
    """The module that `from … import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    keep = len(parts) - node.level + (1 if module.package else 0)
    return ".".join([*parts[: max(0, keep)], *([node.module] if node.module else [])])
