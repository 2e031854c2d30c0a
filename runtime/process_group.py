"""`torch.distributed` for elastic roles: the node check, the default process group, its end.

What torchrun leaves to each script is done here before a function or class entry runs, unless the role
says no: choose the device, meet the other ranks (`env://`), and find out with a small matmul and a small
all-reduce whether this node computes and talks. Every step is bounded, and a failure names the rank and
the host. torch is imported only when something of this was asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from runtime.errors import RendezvousError, RuntimeFault

if TYPE_CHECKING:
    from runtime.launcher.plan import WorkerSpec

logger = logging.getLogger(__name__)

_CHECK_S = 60.0
_DESTROY_S = 5.0
_MATMUL_SIZE = 256


@contextlib.contextmanager
def opened(spec: WorkerSpec) -> Iterator[None]:
    """Set up what `spec` asks for around a block; the group is destroyed only after a good end: when
    this rank fails, others may be inside of a collective, and waiting for them would hide the failure.

    Raises `RendezvousError` when the ranks do not come together, `RuntimeFault` when the check fails.
    """
    if not (spec.init_process_group or spec.node_check):
        yield
        return
    device = _choose_device(spec)
    if spec.node_check:
        _check_matmul(spec, device)
    if spec.init_process_group:
        _init(spec, device)
        if spec.node_check:
            _check_all_reduce(spec, device)
    try:
        yield
    except SystemExit as end:
        if not end.code:
            _destroy(_DESTROY_S)
        raise
    _destroy(_DESTROY_S)


def use_device(spec: WorkerSpec) -> None:
    """Make the calling thread use this rank's GPU; nothing where there is none or no torch."""
    if "torch" in sys.modules:
        _choose_device(spec)


def _choose_device(spec: WorkerSpec) -> str:
    import torch

    if spec.job.device_type != "GPU" or not torch.cuda.is_available():
        return "cpu"
    # Fewer visible devices than ranks of the host: each rank was given its own, as number 0.
    index = spec.info.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def _where(spec: WorkerSpec) -> str:
    return f"{spec.info.name} on {spec.info.host}"


def _init(spec: WorkerSpec, device: str) -> None:
    import torch.distributed as dist

    backend = "gloo" if device == "cpu" else "nccl"
    options: dict[str, Any] = {}
    if device != "cpu":
        import torch

        options["device_id"] = torch.device(device)
    try:
        dist.init_process_group(
            backend,
            init_method="env://",
            timeout=timedelta(seconds=spec.start_timeout_s),
            **options,
        )
    except (RuntimeError, ValueError) as error:  # torch's own errors are RuntimeErrors
        master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RendezvousError(
            f"{_where(spec)} could not form the process group ({backend}, {spec.info.world_size} ranks, "
            f"master {master}, limit {spec.start_timeout_s:g} s): {error}"
        ) from error


def _check_matmul(spec: WorkerSpec, device: str) -> None:
    """Multiply by a permutation: the right answer is known exactly, whatever the hardware's rounding."""
    import torch

    limit = min(_CHECK_S, spec.start_timeout_s)
    found: list[bool] = []

    def multiply() -> None:
        n = _MATMUL_SIZE
        values = torch.arange(n * n, dtype=torch.float32, device=device).reshape(n, n) % 1024
        swap = torch.eye(n, device=device).flip(0)
        found.append(bool(torch.equal(swap @ values, values.flip(0))))

    _ends_within(limit, "runtime-node-check", multiply)
    if found != [True]:
        what = "gave a wrong result" if found else f"failed or took longer than {limit:g} s"
        raise RuntimeFault(f"node check: a matmul on {device} {what} in {_where(spec)}")


def _check_all_reduce(spec: WorkerSpec, device: str) -> None:
    import torch
    import torch.distributed as dist

    limit = min(_CHECK_S, spec.start_timeout_s)
    size, rank = dist.get_world_size(), dist.get_rank()
    value = torch.full((1024,), float(rank + 1), device=device)
    try:
        work = dist.all_reduce(value, async_op=True)
        if work is not None:
            work.wait(timedelta(seconds=limit))
    except RuntimeError as error:
        raise RendezvousError(
            f"node check: the all-reduce of {size} ranks failed in {_where(spec)} "
            f"(limit {limit:g} s): {error}"
        ) from error
    expected = size * (size + 1) / 2
    if not bool((value == expected).all()):
        raise RuntimeFault(
            f"node check: the all-reduce gave a wrong result in {_where(spec)}: "
            f"{value[0].item()} instead of {expected}"
        )


def _destroy(limit: float) -> None:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return  # the program did it itself

    def destroy() -> None:
        try:
            dist.destroy_process_group()
        except RuntimeError as error:
            logger.warning("destroying the process group failed: %s", error)

    if not _ends_within(limit, "runtime-destroy-group", destroy):
        logger.warning("destroying the process group took longer than %g s; going on", limit)


def _ends_within(limit: float, name: str, work: Callable[[], None]) -> bool:
    """Call `work` on a thread that nobody waits for longer than `limit` seconds."""
    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    thread.join(limit)
    return not thread.is_alive()
