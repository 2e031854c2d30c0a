"""The public surface: what can be imported from `runtime`, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import runtime

_SOURCE = Path(runtime.__file__)


def _typed_names() -> dict[str, str]:
    """Name to module, as type checkers see it: the imports below `if TYPE_CHECKING`."""
    tree = ast.parse(_SOURCE.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


@pytest.mark.parametrize("name", runtime.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(runtime, name) is not None
    assert name in dir(runtime)


def test_the_design_s_names_are_there() -> None:
    promised = {
        *("rpc", "export_rpc_method", "export_rpc_instance", "create_rpc_proxy", "RoleGroup"),
        *("RoleActor", "Future", "current_worker", "Node", "barrier", "barrier_async", "kv"),
        *("members", "members_async", "master", "master_async", "CheckpointManager"),
        *("FutureSequence", "Whole", "remote", "UserRpcProxy"),
        *("RuntimeFault", "MisuseError", "PeerLostError", "RemoteError", "Timeout"),
    }
    assert promised <= set(runtime.__all__)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    assert _typed_names() == runtime._MODULE_OF


def test_every_error_of_the_tree_is_public() -> None:
    errors = {
        name
        for name, value in vars(runtime.errors).items()
        if isinstance(value, type) and issubclass(value, runtime.RuntimeFault)
    }
    assert errors <= set(runtime.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'barier'"):
        runtime.barier  # noqa: B018


def test_a_name_is_looked_up_once() -> None:
    found = runtime.RoleGroup
    assert vars(runtime)["RoleGroup"] is found


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import runtime", ("torch", "zmq", "asyncio", "msgpack", "numpy", "boto3")),
        ("from runtime import rpc, current_worker", ("torch", "zmq", "asyncio", "numpy")),
        ("import runtime.node", ("torch", "zmq", "numpy", "boto3")),
    ],
)
def test_importing_stays_cheap(code: str, absent: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys\nprint([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[]\n"


def test_the_package_says_that_it_is_typed() -> None:
    assert (_SOURCE.parent / "py.typed").exists()


def test_the_version_is_that_of_the_project() -> None:
    project = (_SOURCE.parents[1] / "pyproject.toml").read_text()
    assert f'version = "{runtime.__version__}"' in project
