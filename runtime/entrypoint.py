"""What a worker runs: finding the entry, calling it as Python itself would, telling how it ended.

Scripts and modules run as the real `__main__`, so that pickling, `multiprocessing` and
`inspect` see what they see under `python script.py`. Objects are imported, checked before they are
called, and called. How a program ended becomes an exit code, a traceback of the user's own frames on
stderr and the error file that the agent reads. Process state (signals, identity, the node) is
`runtime.worker`'s.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import difflib
import gc
import importlib
import importlib.util
import inspect
import io
import json
import logging
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import MisuseError, RuntimeFault
from runtime.job import Entry

logger = logging.getLogger(__name__)

_FLUSH_S = 0.3
_PACKAGE_FOLDER = os.path.dirname(os.path.abspath(__file__)) + os.sep
_IMPORT_MACHINERY = (
    "<frozen importlib",
    "<frozen runpy",
    os.path.dirname(importlib.__file__) + os.sep,
)


class Program(NamedTuple):
    """A script or module, compiled, with the `__main__` that it is going to run in."""

    code: types.CodeType
    module: types.ModuleType
    rpc_names: frozenset[str]
    """Top-level functions that the source decorates with `rpc`: exported once all are defined."""
    own_node: bool
    """The source speaks of `Node.from_env`: it runs the node in its own loop, so none is started for
    it when a function is declared."""


class Target(NamedTuple):
    """An object entry: what to call, and the module whose `@rpc` functions go with it."""

    module: types.ModuleType
    callable: Callable[..., Any]


# -- scripts and modules ----------------------------------------------------------------------


def new_main() -> types.ModuleType:
    """Install an empty `__main__`, so that nothing of the process that forked us shows through."""
    main = types.ModuleType("__main__")
    vars(main)["__builtins__"] = sys.modules["builtins"]
    sys.modules["__main__"] = main
    return main


def prepare_script(entry: Entry) -> Program:
    """Read and compile a script; set `sys.argv` and `sys.path[0]` as the interpreter does.

    Raises `MisuseError` naming the path when there is no such file; `SyntaxError` as Python does.
    """
    path = os.path.abspath(entry.target)
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        raise MisuseError(
            f"cannot read the script {entry.target!r}: {error.strerror} (looked for {path})"
        ) from None
    sys.argv = [entry.target, *entry.args]
    _set_path_0(os.path.dirname(os.path.realpath(path)))
    code = compile(source, path, "exec", dont_inherit=True)
    main = new_main()
    vars(main).update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
    return _program(code, main, source)


def prepare_module(entry: Entry) -> Program:
    """Find and compile a module for running it as `python -m` does (a package: its `__main__`).

    Raises `MisuseError` saying what is missing.
    """
    _set_path_0(os.getcwd())
    sys.argv = ["-m", *entry.args]
    found = _find_module(entry.target)
    if found.submodule_search_locations is not None:
        found = _find_module(f"{entry.target}.__main__")
    get_code = getattr(found.loader, "get_code", None)
    code = get_code(found.name) if get_code is not None else None
    if code is None:
        raise MisuseError(f"cannot run module {entry.target!r}: it has no Python code")
    main = new_main()
    main.__spec__ = found
    vars(main).update(
        __file__=found.origin,
        __cached__=found.cached,
        __loader__=found.loader,
        __package__=found.parent,
    )
    sys.argv[0] = found.origin or entry.target
    source = Path(found.origin).read_bytes() if found.origin and found.has_location else b""
    return _program(code, main, source)


def _program(code: types.CodeType, main: types.ModuleType, source: bytes) -> Program:
    return Program(code, main, top_level_rpc_names(source), b"from_env" in source)


def run_program(program: Program) -> None:
    """Execute the program in its `__main__`, on this thread."""
    exec(program.code, vars(program.module))


def top_level_rpc_names(source: bytes) -> frozenset[str]:
    """Names of module-level functions decorated with `rpc`, `x.rpc` or a call of either.

    A script's functions become callable for others together: a caller that saw only the first of
    them would be told that the second does not exist.
    """
    if b"rpc" not in source:
        return frozenset()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return frozenset()
    return frozenset(
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and any(_is_rpc(decorator) for decorator in node.decorator_list)
    )


def _is_rpc(decorator: ast.expr) -> bool:
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    name = decorator.attr if isinstance(decorator, ast.Attribute) else None
    return (decorator.id if isinstance(decorator, ast.Name) else name) == "rpc"


def _find_module(name: str) -> ModuleSpec:
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, name):
            raise
        raise MisuseError(f"cannot run module {name!r}: {error} in {_searched()}") from None
    except ValueError as error:  # a module that is loaded already and has no spec
        raise MisuseError(f"cannot run module {name!r}: {error}") from None
    if found is None or found.loader is None:
        raise MisuseError(
            f"cannot run module {name!r}: no such module in {_searched()}"
            if "." not in name
            else f"cannot run module {name!r}: its package has no such module"
        )
    return found


def _is_part_of(missing: str | None, wanted: str) -> bool:
    return missing is not None and f"{wanted}.".startswith(f"{missing}.")


def _set_path_0(folder: str) -> None:
    # Our own start has left no entry of its own there (see `launcher.child.restore_path`).
    sys.path.insert(0, folder)


def _searched() -> str:
    return ", ".join(entry or os.getcwd() for entry in sys.path)


# -- objects ----------------------------------------------------------------------------------


def load_target(entry: Entry) -> Target:
    """Import "pkg.mod:obj" and find the object.

    Raises `MisuseError` when the module or the object does not exist, listing near names, or cannot be
    called. An error inside of the module's own code is raised as it is.
    """
    module_name, colon, attribute = entry.target.partition(":")
    if not colon or not module_name or not attribute:
        raise MisuseError(
            f"entry {entry.target!r}: expected \"package.module:object\", as in 'pkg.mod:run'"
        )
    _set_path_0(os.getcwd())
    sys.argv = [entry.target, *entry.args]
    new_main()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not _is_part_of(error.name, module_name):
            raise
        raise MisuseError(
            f"entry {entry.target!r}: no module named {error.name!r} in {_searched()}"
        ) from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise MisuseError(_no_attribute(entry.target, found, part))
        found = getattr(found, part)
    if not callable(found):
        raise MisuseError(
            f"entry {entry.target!r} is {type(found).__name__!r}: expected a function or a class"
        )
    return Target(module, found)


def _no_attribute(target: str, owner: Any, name: str) -> str:
    where = f"module {owner.__name__!r}" if inspect.ismodule(owner) else f"{owner!r}"
    near = difflib.get_close_matches(name, [n for n in dir(owner) if not n.startswith("_")], 3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"entry {target!r}: {where} has no {name!r}{hint}"


def arguments_for(
    function: Callable[..., Any], config: Callable[[], Any], target: str
) -> list[Any]:
    """What a function entry is called with: nothing, or the user config if it takes one argument.

    Raises `MisuseError` naming its parameters when it needs anything else.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables of extension modules have none to show
        return []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    by_name = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(needed) > 1 or by_name:
        names = ", ".join(p.name for p in [*needed, *by_name])
        raise MisuseError(
            f"entry {target!r} needs the arguments ({names}): a function entry takes none, or one, "
            "which gets the job's config"
        )
    return [config()] if needed or len(positional) == 1 else []


def check_constructor(cls: Callable[..., Any], target: str) -> None:
    """Raises `MisuseError` when a class entry cannot be constructed without arguments."""
    try:
        inspect.signature(cls).bind()
    except TypeError as error:
        raise MisuseError(
            f"entry {target!r}: a class entry is constructed without arguments, but its constructor "
            f"says: {error}"
        ) from None
    except ValueError:  # no signature to look at
        pass


# -- how it ended -----------------------------------------------------------------------------


def exit_code(error: BaseException | None) -> int:
    """The code of a Python process whose program ended with `error` (None: it returned)."""
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code & 0xFF if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def is_failure(error: BaseException | None) -> bool:
    """Whether there is something to tell: an exception, or `sys.exit("text")`."""
    if isinstance(error, SystemExit):
        return not (error.code is None or isinstance(error.code, int))
    return error is not None


def report_error(error: BaseException, error_file: str, step: int | None = None) -> None:
    """Print the error as an uncaught one, without our own frames, and write the error file."""
    if isinstance(error, SystemExit):
        text = message = f"{error.code}"
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            print(text, file=sys.stderr)  # noqa: T201 - as the interpreter does with sys.exit("text")
    else:
        frames = _without_our_frames(error)
        message = "".join(traceback.format_exception_only(error)).strip()
        text = "".join(traceback.format_exception(type(error), error, frames))
        try:
            sys.excepthook(type(error), error, frames)
        except Exception:  # noqa: BLE001 - the hook may be the program's own, and stderr closed
            sys.__excepthook__(type(error), error, frames)
    _write_error_file(error_file, type(error), message, text, step)


def user_frames(error: BaseException) -> types.TracebackType | None:
    """The error's traceback without our frames and those of the import machinery: without any where
    we raised the error on purpose, else without those before the program's first. Where the program
    has none it is our own mistake, to be seen as it is."""
    frames = []
    found = error.__traceback__
    while found is not None:
        frames.append(found)
        found = found.tb_next
    theirs = [_is_the_programs(frame) for frame in frames]
    if isinstance(error, RuntimeFault | SyntaxError) or not isinstance(error, Exception):
        kept = [frame for frame, is_theirs in zip(frames, theirs, strict=True) if is_theirs]
    else:
        kept = frames[theirs.index(True) :] if True in theirs else frames
    whole: types.TracebackType | None = None
    for frame in reversed(kept):
        whole = types.TracebackType(whole, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return whole


def _without_our_frames(error: BaseException) -> types.TracebackType | None:
    """Cut the tracebacks of the error and of all that is printed with it; gives the error's own."""
    found: list[BaseException | None] = [error]
    seen: set[int] = set()
    while found:
        link = found.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        link.__traceback__ = user_frames(link)
        found += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            found += link.exceptions
    return error.__traceback__


def _is_the_programs(frame: types.TracebackType) -> bool:
    return not frame.tb_frame.f_code.co_filename.startswith((_PACKAGE_FOLDER, *_IMPORT_MACHINERY))


def _write_error_file(
    path: str, kind: type[BaseException], message: str, text: str, step: int | None
) -> None:
    if not path:
        return
    # The shape is torchelastic's, which tools around torchrun read; `type` and `step` are ours.
    extra = {"py_callstack": text, "timestamp": str(int(datetime.now(UTC).timestamp()))}
    record = {
        "message": {"message": message, "extraInfo": extra},
        "type": f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins."),
        "step": step,
    }
    unfinished = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(record, file)
        os.replace(unfinished, path)
    except OSError as error:
        logger.warning("cannot write the error file %s: %s", path, error)


# -- leaving ----------------------------------------------------------------------------------


def finish_program(close_loop: Callable[[], None]) -> None:
    """What a normal interpreter exit does for a program: wait for its threads, run its exit handlers,
    flush its files; before that, end the loop that its coroutines ran in. May take as long as they do."""
    try:
        close_loop()
        threading._shutdown()  # type: ignore[attr-defined]  # joins threads that are no daemons
        atexit._run_exitfuncs()
    except BaseException as error:  # noqa: BLE001 - a Ctrl-C in between must not change the exit code
        logger.warning("the end of the program was interrupted: %r", error)
    flush_files()


@contextlib.contextmanager
def bounded(what: str, seconds: float | None, code: int) -> Iterator[None]:
    """End the process with `code` if the block takes longer than `seconds` (None: as long as it likes),
    telling on stderr where the program's threads were."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(seconds):
            text = f"runtime: {what} did not end within {seconds:g} s; leaving\n{_stacks()}"
            os.write(2, text.encode(errors="backslashreplace"))
            end_now(code)

    if seconds is not None:
        threading.Thread(target=watch, name="runtime-limit", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _stacks() -> str:
    """Where the threads are that the end of the program waits for; without our own frames."""
    frames = sys._current_frames()
    text = []
    for thread in threading.enumerate():
        if thread.daemon or thread.ident not in frames:
            continue
        stack = traceback.extract_stack(frames[thread.ident])
        if stack[-1].name == "_shutdown":
            continue  # it waits for the others
        lines = [
            f for f in stack if not f.filename.startswith((_PACKAGE_FOLDER, threading.__file__))
        ]
        text += [f"  still running: {thread.name}\n", *traceback.format_list(lines)]
    return "".join(text)


def flush_files() -> None:
    """Flush what the program left open: the process ends without destructors."""
    # By exact type: isinstance is slow here, and runs code of objects that are proxies.
    kinds = {io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom}
    for file in [item for item in gc.get_objects() if type(item) in kinds]:
        with contextlib.suppress(OSError, ValueError):
            if not file.closed:
                file.flush()


def end_now(code: int) -> None:
    """End the process from a helper thread, with what can be flushed in a short time."""
    flushed = threading.Event()

    def flush() -> None:
        flush_files()
        flushed.set()

    # The main thread may hold a stream's lock: it is given a moment, no more.
    threading.Thread(target=flush, name="runtime-flush", daemon=True).start()
    flushed.wait(_FLUSH_S)
    os._exit(code)
