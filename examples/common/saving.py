"""Checkpoints of data-parallel training: bytes, by step. Rank 0 saves, all ranks go on from the same."""

from __future__ import annotations

import io

import torch
import torch.distributed as dist
from torch import nn

from runtime import CheckpointManager


def pack(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, step: int) -> bytes:
    """All that the next step depends on. The position in the data is the step."""
    state = {
        "step": step,
        "seed": seed,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def restore(
    checkpoints: CheckpointManager,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    seed: int,
    steps: int,
) -> int | None:
    """Go on from the newest checkpoint; rank 0 says which, so that all have the same.

    Gives the next step, None where there is no checkpoint yet.
    """
    found: list[bytes | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [checkpoints.load_latest_sync()]
        except FileNotFoundError:
            print("no checkpoint yet: starting at step 0", flush=True)
    dist.broadcast_object_list(found)
    if found[0] is None:
        return None
    state = torch.load(io.BytesIO(found[0]), weights_only=True)
    if state["seed"] != seed or state["step"] > steps:
        raise ValueError(
            f"the checkpoint has seed {state['seed']} and step {state['step']}: "
            f"it cannot be gone on from with seed {seed} to step {steps}"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return int(state["step"])


def start_anew(checkpoints: CheckpointManager) -> None:
    """Remove what an earlier run left in the same place: `--resume` would go on from that."""
    for step in checkpoints.list_checkpoints_sync():
        checkpoints.delete_sync(step)
