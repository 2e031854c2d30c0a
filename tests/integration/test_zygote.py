"""Workers that are forked from a process with torch in it, through the launcher as users start it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.support.job import Job

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]

Write = Callable[[str, str], Path]
Launch = Callable[..., Job]

TWO = ("--nproc-per-node", "2", "--role", "trainer")

FORKED = """
import os, sys
with open("/proc/self/cmdline") as f:
    how = "forked" if "zygote" in f.read() else "execed"
"""


def said(job: Job) -> set[str]:
    """What workers printed, without their prefixes."""
    return {line.partition("] ")[2] for line in job.out.splitlines() if line.startswith("[")}


GLOO = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
total = torch.tensor([rank + 1.0])
dist.all_reduce(total)
group = dist.new_group([0, 1])
parts = [None, None]
dist.all_gather_object(parts, {"rank": rank}, group=group)
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(8, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
weights = sum(p.double().sum().item() for p in model.parameters())
print(f"sum {total.item()} parts {parts} weights {weights:.6f}")
dist.destroy_process_group()
"""


def test_gloo_groups_and_ddp_work_and_both_start_methods_give_the_same(
    write: Write, launch: Launch
) -> None:
    script = write("train.py", FORKED + GLOO + "print(how)\n")
    weights = {}
    for method, how in (("fork", "forked"), ("spawn", "execed")):
        preload = ("--preload", "torch,torch._dynamo")  # DDP imports the second
        job = launch(*TWO, *preload, "--start-method", method, script)
        assert job.wait(120) == 0, job.describe()
        (weights[method],) = said(job) - {how}
        assert how in said(job), job.describe()
        assert not job.processes()
    assert weights["fork"] == weights["spawn"]
    assert weights["fork"].startswith("sum 3.0 parts [{'rank': 0}, {'rank': 1}] weights ")


LOADER = """
import torch
from torch.utils.data import DataLoader, Dataset

class Squares(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.full((4,), float(i * i))

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        loader = DataLoader(Squares(), batch_size=4, num_workers=2, multiprocessing_context=method)
        print(method, sum(batch.sum().item() for batch in loader))
"""


def test_data_loaders_fork_and_spawn_their_workers_in_forked_workers(
    write: Write, launch: Launch
) -> None:
    job = launch("--nproc-per-node", "1", write("train.py", LOADER))
    assert job.wait(120) == 0, job.describe()
    total = float(4 * sum(i * i for i in range(32)))
    assert said(job) == {f"fork {total}", f"spawn {total}"}, job.describe()
    job.assert_nothing_left()


def test_parallel_matmul_runs_with_as_many_threads_as_the_role_says(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        FORKED
        + """
import torch
a = torch.randn(600, 600)
for _ in range(3):
    a = a @ torch.randn(600, 600) / 25
print(how, torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], bool(a.isfinite().all()))
""",
    )
    job = launch(*TWO, "-x", "OMP_NUM_THREADS=2", script)
    assert job.wait(120) == 0, job.describe()
    assert said(job) == {"forked 2 2 True"}, job.describe()


@pytest.mark.long
def test_torch_compile_works_in_a_forked_worker(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        FORKED
        + """
import torch

@torch.compile(backend="inductor")
def f(x):
    return (x.sin() + 1).square().sum()

x = torch.linspace(0, 1, 64)
eager = ((x.sin() + 1) ** 2).sum()
print(how, torch.allclose(f(x), eager))
""",
    )
    job = launch("--nproc-per-node", "1", script)
    assert job.wait(170) == 0, job.describe()
    assert said(job) == {"forked True"}, job.describe()


def test_random_numbers_differ_between_ranks_in_torch_numpy_and_python(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        FORKED
        + """
import random, numpy, torch
print("torch", torch.rand(1).item())
print("numpy", numpy.random.rand())
print("python", random.random())
""",
    )
    job = launch("--nproc-per-node", "3", script)
    assert job.wait(120) == 0, job.describe()
    found = sorted(line.partition(" ")[0] for line in said(job))  # equal lines would be one
    assert found == ["numpy"] * 3 + ["python"] * 3 + ["torch"] * 3, job.describe()


def test_a_preload_that_runs_a_parallel_operation_is_exec_with_one_line(
    write: Write, launch: Launch
) -> None:
    write("warm.py", "import torch\nx = torch.randn(900, 900)\nx @ x\n")
    script = write(
        "train.py",
        FORKED
        + """
import torch
x = torch.ones(900, 900)
print(how, (x @ x).sum().item())
""",
    )
    options = ("-x", "OMP_NUM_THREADS=2", "--preload", "torch,warm")
    job = launch("--nproc-per-node", "1", *options, script)
    assert job.wait(120) == 0, job.describe()
    assert said(job) == {f"execed {900.0**3}"}, job.describe()
    told = [line for line in job.err.splitlines() if line.startswith("runtime:")]
    assert len(told) == 1, job.describe()
    assert "native thread" in told[0]


def test_a_preload_with_a_thread_of_its_own_is_exec_with_one_line(
    write: Write, launch: Launch
) -> None:
    write(
        "warm.py",
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,), name='mine', daemon=True).start()\n",
    )
    job = launch(*TWO, "--preload", "warm", write("train.py", FORKED + "print(how)\n"))
    assert job.wait() == 0, job.describe()
    assert said(job) == {"execed"}
    told = [line for line in job.err.splitlines() if line.startswith("runtime:")]
    assert len(told) == 1, job.describe()
    assert "mine" in told[0]


def test_a_preload_that_kills_its_process_is_exec_with_one_line(
    write: Write, launch: Launch
) -> None:
    write("warm.py", FORKED + "if how == 'forked': os.kill(os.getpid(), 9)\n")
    job = launch(*TWO, "--preload", "warm", write("train.py", FORKED + "print(how)\n"))
    assert job.wait() == 0, job.describe()
    assert said(job) == {"execed"}
    told = [line for line in job.err.splitlines() if line.startswith("runtime:")]
    assert len(told) == 1, job.describe()


def test_a_killed_zygote_hurts_no_worker_and_is_replaced_for_the_next_start(
    write: Write, launch: Launch
) -> None:
    script = write(
        "train.py",
        FORKED
        + """
import pathlib, sys, time
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
pathlib.Path(f"up.{attempt}").touch()
if attempt == "0":
    while not pathlib.Path("go").exists():
        time.sleep(0.02)
    sys.exit(3)
print(how, "again")
""",
    )
    job = launch("--nproc-per-node", "1", "--max-restarts", "1", script)
    job.wait_for_files("up.0")
    os.kill(job.zygote().pid, signal.SIGKILL)
    time.sleep(0.3)
    assert job.popen.poll() is None
    (job.cwd / "go").touch()
    assert job.wait() == 0, job.describe()
    assert said(job) == {"forked again"}
    job.assert_nothing_left()


def test_a_worker_inherits_nothing_of_the_launchers(write: Write, launch: Launch) -> None:
    script = write(
        "train.py",
        """
        import os, signal, sys
        print("fds", [f for f in os.listdir("/proc/self/fd") if int(f) > 2 and os.path.exists(f"/proc/self/fd/{f}")])
        print("stdin", sys.stdin.read() == "")
        print("session", os.getsid(0) == os.getpid())
        print("hup", signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)
        print("cwd", os.getcwd() == os.environ["PWD_WANTED"])
        print("argv", sys.argv[1:])
        """,
    )
    results = {}
    for method in ("fork", "spawn"):
        job = launch(
            *("--nproc-per-node", "1", "--start-method", method),
            *("-x", f"PWD_WANTED={script.parent}"),
            *(script, "a b", "--c"),
        )
        assert job.wait() == 0, job.describe()
        results[method] = said(job)
    assert results["fork"] == results["spawn"]
    for fact in ("stdin True", "session True", "hup True", "cwd True", "argv ['a b', '--c']"):
        assert fact in results["fork"], results
