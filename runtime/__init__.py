"""The public names of the package, each imported when it is first asked for.

`import runtime` must stay cheap: the launcher and the agent import it without torch and without
zmq. So this module imports nothing but the standard library's loader; type checkers see the real
imports below `TYPE_CHECKING`.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # not typing's: importing that takes longer than all else here

__version__ = "0.1.0"

if TYPE_CHECKING:
    from runtime.checkpoint.manager import CheckpointManager as CheckpointManager
    from runtime.control.public import Member as Member
    from runtime.control.public import barrier as barrier
    from runtime.control.public import barrier_async as barrier_async
    from runtime.control.public import kv as kv
    from runtime.control.public import master as master
    from runtime.control.public import master_async as master_async
    from runtime.control.public import members as members
    from runtime.control.public import members_async as members_async
    from runtime.data.queue import DataQueue as DataQueue
    from runtime.data.queue import Leased as Leased
    from runtime.embedding import init as init
    from runtime.embedding import shutdown as shutdown
    from runtime.errors import ArgumentError as ArgumentError
    from runtime.errors import BarrierBroken as BarrierBroken
    from runtime.errors import CallGroupError as CallGroupError
    from runtime.errors import CheckpointCorrupt as CheckpointCorrupt
    from runtime.errors import CheckpointError as CheckpointError
    from runtime.errors import Closed as Closed
    from runtime.errors import ConfigError as ConfigError
    from runtime.errors import Empty as Empty
    from runtime.errors import Failure as Failure
    from runtime.errors import Full as Full
    from runtime.errors import LeaseLost as LeaseLost
    from runtime.errors import MisuseError as MisuseError
    from runtime.errors import NotExposedError as NotExposedError
    from runtime.errors import PeerLostError as PeerLostError
    from runtime.errors import QuorumLost as QuorumLost
    from runtime.errors import RemoteError as RemoteError
    from runtime.errors import RendezvousError as RendezvousError
    from runtime.errors import ResourceInsufficientError as ResourceInsufficientError
    from runtime.errors import RuntimeFault as RuntimeFault
    from runtime.errors import Timeout as Timeout
    from runtime.errors import VersionConflict as VersionConflict
    from runtime.errors import WireError as WireError
    from runtime.errors import WorkerFailureError as WorkerFailureError
    from runtime.job import ActorInfo as ActorInfo
    from runtime.job import JobInfo as JobInfo
    from runtime.node import Node as Node
    from runtime.peer.actor import RoleActor as RoleActor
    from runtime.peer.batch import Whole as Whole
    from runtime.peer.future import Future as Future
    from runtime.peer.group import RoleGroup as RoleGroup
    from runtime.peer.method import rpc as rpc
    from runtime.peer.proxy import UserRpcProxy as UserRpcProxy
    from runtime.peer.proxy import create_rpc_proxy as create_rpc_proxy
    from runtime.peer.proxy import export_rpc_instance as export_rpc_instance
    from runtime.peer.proxy import export_rpc_method as export_rpc_method
    from runtime.peer.sequence import FutureSequence as FutureSequence
    from runtime.peer.stub import remote as remote
    from runtime.worker import Worker as Worker
    from runtime.worker import current_worker as current_worker

_NAMES_BY_MODULE = {
    "runtime.checkpoint.manager": ("CheckpointManager",),
    "runtime.control.public": (
        "Member",
        "barrier",
        "barrier_async",
        "kv",
        "master",
        "master_async",
        "members",
        "members_async",
    ),
    "runtime.data.queue": ("DataQueue", "Leased"),
    "runtime.embedding": ("init", "shutdown"),
    "runtime.errors": (
        "ArgumentError",
        "BarrierBroken",
        "CallGroupError",
        "CheckpointCorrupt",
        "CheckpointError",
        "Closed",
        "ConfigError",
        "Empty",
        "Failure",
        "Full",
        "LeaseLost",
        "MisuseError",
        "NotExposedError",
        "PeerLostError",
        "QuorumLost",
        "RemoteError",
        "RendezvousError",
        "ResourceInsufficientError",
        "RuntimeFault",
        "Timeout",
        "VersionConflict",
        "WireError",
        "WorkerFailureError",
    ),
    "runtime.job": ("ActorInfo", "JobInfo"),
    "runtime.node": ("Node",),
    "runtime.peer.actor": ("RoleActor",),
    "runtime.peer.batch": ("Whole",),
    "runtime.peer.future": ("Future",),
    "runtime.peer.group": ("RoleGroup",),
    "runtime.peer.method": ("rpc",),
    "runtime.peer.proxy": (
        "UserRpcProxy",
        "create_rpc_proxy",
        "export_rpc_instance",
        "export_rpc_method",
    ),
    "runtime.peer.sequence": ("FutureSequence",),
    "runtime.peer.stub": ("remote",),
    "runtime.worker": ("Worker", "current_worker"),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
