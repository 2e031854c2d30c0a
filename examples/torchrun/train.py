"""An ordinary DDP script, started by torchrun, that uses the runtime besides: three lines more, marked below.

    torchrun --nproc-per-node 2 examples/torchrun/train.py

Each rank trains on its own part of a random linear problem. Rank 0 collects what all of them measured, by calls
between the ranks; without the marked lines the script is what it was before.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import runtime  # 1
from runtime import RoleGroup, rpc

STEPS = 60
loss_here = float("nan")


@rpc
def last_loss() -> float:
    """The loss of this rank at the moment: any rank may ask, at any time."""
    return loss_here


def main() -> None:
    dist.init_process_group("gloo")
    worker = runtime.init()  # 2
    train(worker)
    losses = RoleGroup("default").call(last_loss).result(timeout=30)
    runtime.barrier("all have asked", timeout=30)
    if dist.get_rank() == 0:
        print("loss by rank: " + ", ".join(f"{loss:.4f}" for loss in losses), flush=True)
    runtime.shutdown()  # 3
    dist.destroy_process_group()


def train(worker: runtime.Worker) -> None:
    """Nothing new here, but for the report."""
    global loss_here
    torch.manual_seed(0)
    truth = torch.randn(16, 1)
    model = DistributedDataParallel(torch.nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + dist.get_rank())
    for step in range(STEPS):
        x = torch.randn(64, 16)
        loss = (model(x) - x @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_here = loss.item()
        worker.report(step=step, loss=loss_here)


if __name__ == "__main__":
    main()
