"""What `@rpc` records, and the table of methods that a process exposes.

`@rpc` runs when a module is imported, long before there is a node, so it only writes down what was
said (`Method`). `Exports` is the table that calls are looked up in; its refusals name what exists,
what was probably meant, and the signature that arguments did not fit. Who runs the methods, and
where, is decided in `handlers`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, overload

from runtime.errors import ArgumentError, MisuseError, NotExposedError, nearest

F = TypeVar("F", bound=Callable[..., Any])

RESERVED = "runtime."
"""Prefix of the methods that every endpoint has."""

_HIDDEN = (RESERVED, "control.")
"""What is not listed to users: our own methods."""

_MARK = "__rpc__"
_LISTED = 40


class Method(NamedTuple):
    """What was said to `@rpc`. `concurrency` None: the default of its kind (see `rpc`)."""

    name: str
    export: bool = False
    concurrency: int | None = None
    pickle: bool = True
    thread: bool = True


class Named:
    """Base of stubs (see `stub`): `function` has the name and the signature of what providers are to
    export."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class _Declared:
    """Functions that are exported by themselves: declared with `@rpc(export=True)`, or at the top
    level of the script that this process runs. And who wants to hear of further ones.

    They are declared at import, when no node exists yet; a node that starts takes them all over.
    """

    functions: list[Callable[..., Any]] = []  # noqa: RUF012 - one list for the process, see above
    listener: Callable[[Callable[..., Any]], None] | None = None


_declared = _Declared()


def listen(listener: Callable[[Callable[..., Any]], None] | None) -> None:
    """Tell `listener` of every function that is exported by itself (declared with `export=True`, or
    at the top level of the script that runs), past and future; None: nobody."""
    _declared.listener = listener
    if listener is not None:
        for function in _declared.functions:
            listener(function)


@overload
def rpc(
    name: str | Named | None = None,
    /,
    *,
    export: bool = False,
    concurrency: int | None = None,
    pickle: bool = True,
    thread: bool = True,
) -> Callable[[F], F]: ...


@overload
def rpc(function: F, /) -> F: ...


def rpc(
    name: Any = None,
    /,
    *,
    export: bool = False,
    concurrency: int | None = None,
    pickle: bool = True,
    thread: bool = True,
) -> Any:
    """Mark a function or method as callable by other processes of the job.

    `@rpc`, `@rpc()`, `@rpc("name")`, `@rpc(export=True)` and so on. `@rpc(stub)` takes the name of a
    stub (see `remote`), and checks the signature against it. Methods of the entry class, and
    functions of the entry module, are exported by themselves; elsewhere a top-level function says
    `export=True`.

    `async def` handlers run on the peer loop, side by side; `concurrency` bounds how many at once.
    Plain functions run one at a time, in arrival order; `concurrency=n` gives the method n threads
    of its own; `thread=False` runs a quick one, that never waits, on the peer loop. Generators (both
    kinds) are called with `stream`. `pickle=False` refuses arguments that only pickle can carry.
    Calls of one caller start in the order they were made, among plain functions and among async ones.

    Raises `MisuseError` for options that make no sense, and for a signature that is not the stub's.
    """
    stub = name if isinstance(name, Named) else None
    if stub is None and callable(name):
        return _mark(name, Method(_own_name(name)))
    if stub is None and name is not None and (not isinstance(name, str) or not name):
        raise MisuseError(f"@rpc({name!r}): the name must be a text that is not empty")
    if concurrency is not None and (
        isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1
    ):
        raise MisuseError(f"@rpc(concurrency={concurrency!r}): allowed are whole numbers from 1")

    def decorate(function: F) -> F:
        if stub is not None:
            _check_like(stub, function)
        if not thread:
            _check_quick(function, concurrency)
        called = _own_name(function) if name is None else rpc_name(name)
        return _mark(function, Method(called, export, concurrency, pickle, thread))

    return decorate


def _check_quick(function: Any, concurrency: int | None) -> None:
    inner = getattr(function, "__func__", function)
    if concurrency is not None:
        raise MisuseError("@rpc(thread=False, concurrency=...): on the loop one runs at a time")
    if inspect.isgeneratorfunction(inner):
        raise MisuseError(
            f"@rpc(thread=False) on the generator {_where(inner)}: make it an `async def` one"
        )


def _check_like(stub: Named, function: Any) -> None:
    """Every call that fits the stub must fit `function`, and mean the same."""
    inner = getattr(function, "__func__", function)
    wanted, found = inspect.signature(stub.function), inspect.signature(inner)
    own = list(found.parameters.values())
    if own and own[0].name in ("self", "cls"):
        found = found.replace(parameters=own[1:])
    if not _takes_all(found, list(wanted.parameters.values())):
        raise MisuseError(
            f"@rpc({stub.function.__name__}): {_where(inner)}{found} does not take what its stub "
            f"{_where(stub.function)}{wanted} promises"
        )


def _takes_all(found: inspect.Signature, wanted: list[inspect.Parameter]) -> bool:
    kinds = inspect.Parameter
    open_ended = {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
    if not {p.kind for p in wanted} & open_ended <= {p.kind for p in found.parameters.values()}:
        return False
    every = [p for p in wanted if p.kind not in open_ended]
    for given in (every, [p for p in every if p.default is kinds.empty]):
        for by_name in (False, True):
            named = {kinds.KEYWORD_ONLY, kinds.POSITIONAL_OR_KEYWORD if by_name else None}
            args = [p.name for p in given if p.kind not in named]
            kwargs = {p.name: p.name for p in given if p.kind in named}
            try:
                bound = found.bind(*args, **kwargs).arguments
            except TypeError:
                return False
            if any(name in found.parameters and bound.get(name) != name for name in args):
                return False  # the same names in another order
    return True


def _mark(function: F, method: Method) -> F:
    if inspect.isclass(function):
        raise MisuseError(
            f"@rpc on the class {function.__name__}: it belongs on the methods that are to be called"
        )
    inner = getattr(function, "__func__", function)  # of a staticmethod or classmethod
    if not callable(inner):
        raise MisuseError(f"@rpc: {function!r} cannot be called")
    setattr(inner, _MARK, method)
    if method.export or _is_of_script(inner):
        _declared.functions.append(inner)
        if _declared.listener is not None:
            _declared.listener(inner)
    return function


def _is_of_script(function: Any) -> bool:
    where = getattr(function, "__module__", None)
    return where == "__main__" and "." not in getattr(function, "__qualname__", ".")


def method_of(function: Any) -> Method | None:
    """What `@rpc` recorded on `function`; None when it is not marked."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Method) else None


def rpc_name(method: str | Callable[..., Any] | Named) -> str:
    """The name to call `method` by: itself, its name as given to `@rpc`, or its `__name__`; of a stub,
    that of its function."""
    if isinstance(method, str):
        if not method:
            raise MisuseError("the method to call is an empty text; give its name")
        return method
    if isinstance(method, Named):
        return _own_name(method.function)
    recorded = method_of(method)
    return recorded.name if recorded is not None else _own_name(method)


def _own_name(function: Any) -> str:
    inner = getattr(function, "__func__", function)
    name = getattr(inner, "__name__", None)
    if not isinstance(name, str):
        raise MisuseError(
            f"{function!r} is neither a method's name nor a function that has one; say @rpc('name')"
        )
    return name


def rpc_methods(cls: type) -> dict[str, Method]:
    """The `@rpc` methods of a class by attribute. A method that overrides a marked one is marked
    like it, so that a subclass need not say `@rpc` again."""
    found: dict[str, Method] = {}
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            method = method_of(getattr(value, "__func__", value))
            if method is not None:
                found[attribute] = method
            elif attribute in found and not callable(getattr(value, "__func__", value)):
                del found[attribute]  # hidden by something that cannot be called
    return found


def rpc_functions(module: Any) -> list[Callable[..., Any]]:
    """The `@rpc` functions that `module` itself defines, in the order they stand there."""
    return [
        value
        for value in vars(module).values()
        if inspect.isfunction(value)
        and method_of(value) is not None
        and value.__module__ == module.__name__
    ]


class Exported(NamedTuple):
    """One exposed method."""

    name: str
    function: Callable[..., Any]
    is_async: bool
    concurrency: int | None
    pickle: bool
    raw: bool = False
    stream: bool = False
    thread: bool = True
    """False: a plain function that runs on the peer loop."""


class Exports:
    """What a process exposes, by name. `owner` appears in texts ("evaluator-0")."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._methods: dict[str, Exported] = {}

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        concurrency: int | None = None,
        pickle: bool | None = None,
        raw: bool = False,
    ) -> Exported:
        """Expose `function` as `name`. What is not given is taken from its `@rpc`.

        The same function under the same name again changes nothing. Raises `MisuseError` when the
        name belongs to another function, or `function` cannot be exposed.
        """
        if not isinstance(name, str) or not name:
            raise MisuseError(f"{name!r} is no name to export by: give a text that is not empty")
        if not callable(function):
            raise MisuseError(f"{name!r} cannot be exported: {function!r} is not callable")
        taken = self._methods.get(name)
        if taken is not None:
            if taken.function == function:
                return taken
            raise MisuseError(
                f"{self._owner} exposes {name!r} already, as {_where(taken.function)}; "
                f"{_where(function)} needs another name"
            )
        said = method_of(function) or Method(name)
        call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async one
        is_async_stream = inspect.isasyncgenfunction(function)
        exported = Exported(
            name,
            function,
            is_async_stream
            or inspect.iscoroutinefunction(function)
            or inspect.iscoroutinefunction(call),
            concurrency if concurrency is not None else said.concurrency,
            pickle if pickle is not None else said.pickle,
            raw,
            is_async_stream or inspect.isgeneratorfunction(function),
            said.thread,
        )
        self._methods[name] = exported
        return exported

    def remove(self, name: str) -> None:
        """Expose `name` no longer."""
        self._methods.pop(name, None)

    def find(self, name: str) -> Exported:
        """The method of that name. Raises `NotExposedError` saying what there is."""
        try:
            return self._methods[name]
        except KeyError:
            raise self._unknown(name) from None

    def names(self) -> list[str]:
        """What is exposed to users, sorted."""
        return sorted(name for name in self._methods if not name.startswith(_HIDDEN))

    def _unknown(self, name: str) -> NotExposedError:
        names = self.names()
        return NotExposedError(
            f"{self._owner} exposes no method {name!r}{nearest(name, names, quoted=True)}; "
            f"it exposes {_list(names)}",
            names,
        )


def misfit(
    owner: str, exported: Exported, args: Iterable[Any], kwargs: dict[str, Any]
) -> ArgumentError | None:
    """The error for arguments that do not fit the method's signature; None if they do fit."""
    try:
        signature = inspect.signature(exported.function)
    except (TypeError, ValueError):
        return None  # a builtin without one: whatever it raised was its own
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return ArgumentError(
            f"{owner}.{exported.name}(): {error}; its signature is {exported.name}{signature}"
        )
    return None


def _list(names: list[str]) -> str:
    if not names:
        return "nothing yet"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _where(function: Callable[..., Any]) -> str:
    inner = getattr(function, "__func__", function)
    return f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', repr(inner))}"
