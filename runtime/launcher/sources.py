"""Finds the source of scripts and modules as an interpreter would, without importing any of them.

The shell of `entries.py`: it asks the import system's finders where a module would come from, and reads
that file. For a submodule they get the parent's own search path, so not even a package's `__init__`
runs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib.machinery import ModuleSpec, SourceFileLoader

from runtime.launcher.entries import Module

MAX_BYTES = 1 << 20
"""A longer source file is not read: it is data, not somebody's program."""

_NEEDS_TORCH = r"(?mi)^Requires-Dist: *torch\b(?![-_.\w])(?!.*\bextra\b)"


class FoundSources:
    """Modules as a worker sees them that starts in `directory`, with `extra` folders before its path."""

    def __init__(self, directory: str = ".", extra: Sequence[str] = ()) -> None:
        self._directory = os.path.abspath(directory)
        self._extra = tuple(extra)

    def at(self, directory: str) -> FoundSources:
        return FoundSources(os.path.join(self._directory, directory), self._extra)

    def has_directory(self) -> bool:
        return os.path.isdir(self._directory)

    def beside(self, path: str) -> FoundSources:
        folder = os.path.dirname(os.path.join(self._directory, path))
        return FoundSources(self._directory, (os.path.abspath(folder), *self._extra))

    def script(self, path: str) -> Module | None:
        full = os.path.join(self._directory, path)
        if os.path.isdir(full):
            inner = os.path.join(full, "__main__.py")
            return Module("__main__", _text(inner), True) if os.path.isfile(inner) else None
        return Module("__main__", _text(full), True) if os.path.isfile(full) else None

    def module(self, name: str) -> Module | None:
        spec = self._spec(name)
        if spec is None:
            return None
        package = spec.submodule_search_locations is not None
        where = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
        local = self._is_local(where)
        readable = isinstance(spec.loader, SourceFileLoader) and spec.origin is not None
        source = _text(spec.origin) if readable and spec.origin else None
        top = name.partition(".")[0]
        needs = not local and top not in sys.stdlib_module_names and _requires_torch(top, where)
        return Module(name, source, local, package, needs)

    @cached_property
    def _path(self) -> list[str]:
        own = [self._directory if entry == "" else entry for entry in sys.path]
        return list(dict.fromkeys([*self._extra, self._directory, *own]))

    def _spec(self, name: str) -> ModuleSpec | None:
        path: Sequence[str] | None = self._path
        parts = name.split(".")
        spec = None
        for count in range(1, len(parts) + 1):
            if path is None:
                return None  # The parent is a module, not a package.
            spec = _find_spec(".".join(parts[:count]), path, top=count == 1)
            if spec is None:
                return None
            found = spec.submodule_search_locations
            path = None if found is None else list(found)
        return spec

    def _is_local(self, path: str) -> bool:
        if "site-packages" in path or "dist-packages" in path:
            return False
        return any(
            path.startswith(root.rstrip("/") + "/") for root in (self._directory, *self._extra)
        )


def _find_spec(name: str, path: Sequence[str], *, top: bool) -> ModuleSpec | None:
    """Ask the finders in turn. For top-level names the path finder is asked with our path; the others
    (built-in, frozen, editable installs) with None, as `import` does."""
    from importlib.machinery import PathFinder

    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None:
            continue
        own_path = path if finder is PathFinder or not top else None
        # By its last part: for a dotted name without `__init__.py` the path finder looks its parent up
        # among the imported modules, and nothing is imported here.
        asked = name.rpartition(".")[2] if finder is PathFinder else name
        spec: ModuleSpec | None = find(asked, own_path, None)
        if spec is not None:
            return spec
    return None


def _text(path: str) -> str | None:
    """The source, or None where it cannot be read as such."""
    import tokenize

    try:
        if os.path.getsize(path) > MAX_BYTES:
            return None
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _requires_torch(top: str, where: str) -> bool:
    """Whether the distribution that `top` came from names torch among what it needs, not only as an
    extra. Looks at the metadata beside it; a distribution of another name is not found."""
    folder = where
    while folder and os.path.basename(folder) not in ("site-packages", "dist-packages"):
        parent = os.path.dirname(folder)
        if parent == folder:
            return False
        folder = parent
    wanted = _normal(top)
    try:
        names = [entry for entry in os.listdir(folder) if entry.endswith(".dist-info")]
    except OSError:
        return False
    for name in names:
        if _normal(name.partition("-")[0]) == wanted:
            metadata = _text(os.path.join(folder, name, "METADATA"))
            return metadata is not None and re.search(_NEEDS_TORCH, metadata) is not None
    return False


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
