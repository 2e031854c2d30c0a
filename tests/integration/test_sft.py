"""The main example as a user runs it, small: it learns, and whatever is killed, the weights come out the same."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from examples.sft.settings import FAST
from tests.integration.support.job import ROOT, Job

Launch = Callable[..., Job]

STEPS = FAST["steps"]
SETTINGS = {**FAST, "print_every": 1}

WITH_PIDS = """
import os

from examples.sft.evaluate import Evaluator as Evaluator
from examples.sft.train import main as train
from runtime import current_worker


def note_pid():
    me = current_worker().actor_info
    with open(f"pid.{me.role}.{me.rank}.{me.restart_count}", "w") as file:
        file.write(str(os.getpid()))


def main(config):
    note_pid()
    train(config)


class Noted(Evaluator):
    def __init__(self):
        note_pid()
        super().__init__()
"""


def write_job(cwd: Path, name: str, **settings: object) -> Path:
    """The example's own job file with other settings, and workers that write down their pids."""
    text = (ROOT / "examples" / "sft" / "job.toml").read_text()
    config = {**SETTINGS, "seed": 0, "out": str(cwd / name), **settings}
    lines = "".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else value!r}\n"
        for key, value in config.items()
    )
    text = re.sub(r"\[config\].*?\n\n", f"[config]\n{lines}\n", text, flags=re.DOTALL)
    text = text.replace("examples.sft.train:main", "with_pids:main")
    text = text.replace("examples.sft.evaluate:Evaluator", "with_pids:Noted")
    (cwd / "with_pids.py").write_text(WITH_PIDS)
    for old in cwd.glob("pid.*"):
        old.unlink()
    file = cwd / f"{name}.toml"
    file.write_text(text)
    return file


def curve(out: Path) -> list[tuple[int, float]]:
    rows = csv.DictReader((out / "curve.csv").read_text().splitlines())
    return [(int(row["step"]), float(row["nats_per_byte"])) for row in rows]


def weights(out: Path) -> str:
    return (out / "weights.sha256").read_text().strip()


class Undisturbed(NamedTuple):
    """A run by the example's own command, to which nothing happened."""

    out: Path
    stdout: str
    weights: str


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    cwd = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "sft" / "run.py", "--fast", "--out", cwd / "out"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (cwd / "curve.csv").exists()
    return Undisturbed(cwd / "out", done.stdout, weights(cwd / "out"))


def start(launch: Launch, cwd: Path, **settings: object) -> Job:
    # torch keeps a cache in the temporary directory, which is to be empty after a job.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(cwd / "torch-cache")}
    return launch("--job", write_job(cwd, "out", **settings), env=cache)


def at_a_random_step(job: Job, seed: int) -> None:
    """Return in the middle of training, at a step that differs from test to test."""
    chance = random.Random(seed)
    step = chance.randrange(8, STEPS - 15)
    job.wait_until(
        lambda: re.search(rf"step +{step}/{STEPS} ", job.out), f"step {step}", timeout=60
    )
    time.sleep(chance.random() * 0.05)


def pid_of(job: Job, actor: str, attempt: int = 0) -> int:
    name = f"pid.{actor}.{attempt}"
    job.wait_for_files(name)
    job.wait_until((job.cwd / name).read_text, f"{name} was written")
    return int((job.cwd / name).read_text())


def resume(launch: Launch, cwd: Path) -> Job:
    job = start(launch, cwd, resume=True)
    assert job.wait(120) == 0, job.describe()
    return job


@pytest.mark.timeout(240)
def test_the_example_runs_from_its_own_command_and_writes_all_its_results(
    undisturbed: Undisturbed,
) -> None:
    out, stdout, weights = undisturbed
    assert re.search(r"\[trainer 0\] step +40/40  loss \d\.\d+  [\d,]+ tokens/s  0:00 left", stdout)
    assert f"weights {weights}" in stdout
    (first, before), *_, (last, after) = curve(out)
    assert (first, last) == (0, 40)
    assert before == pytest.approx(5.6, abs=0.2)
    assert after < 5.0
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("actor", ["trainer.0", pytest.param("trainer.1", marks=pytest.mark.long)])
def test_a_killed_trainer_costs_no_bit(
    tmp_path: Path, launch: Launch, undisturbed: Undisturbed, actor: str
) -> None:
    job = start(launch, tmp_path)
    at_a_random_step(job, seed=int(actor[-1]))
    os.kill(pid_of(job, actor), signal.SIGKILL)
    assert job.wait(120) == 0, job.describe()
    assert "restarting" in job.err
    assert weights(tmp_path / "out") == undisturbed.weights
    job.assert_nothing_left()


@pytest.mark.timeout(240)
def test_a_killed_evaluator_is_asked_again_and_costs_no_bit(
    tmp_path: Path, launch: Launch, undisturbed: Undisturbed
) -> None:
    job = start(launch, tmp_path)
    at_a_random_step(job, seed=2)
    os.kill(pid_of(job, "evaluator.0"), signal.SIGKILL)
    assert job.wait(120) == 0, job.describe()
    assert weights(tmp_path / "out") == undisturbed.weights
    assert curve(tmp_path / "out")[-1][0] == STEPS


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("victim", "seed"), [("agent", 3), pytest.param("launcher", 4, marks=pytest.mark.long)]
)
def test_a_killed_job_goes_on_from_the_newest_checkpoint_with_the_same_bits(
    tmp_path: Path, launch: Launch, undisturbed: Undisturbed, victim: str, seed: int
) -> None:
    job = start(launch, tmp_path)
    at_a_random_step(job, seed)
    os.kill(job.pid if victim == "launcher" else job.agent().pid, signal.SIGKILL)
    assert job.wait(60) != 0
    job.assert_nothing_left()
    assert not (tmp_path / "out" / "weights.sha256").exists()

    resumed = resume(launch, tmp_path)
    first = re.search(rf"parameters, steps (\d+) to {STEPS}", resumed.out)
    assert first is not None
    assert int(first[1]) >= 5
    assert weights(tmp_path / "out") == undisturbed.weights
    steps = [step for step, _ in curve(tmp_path / "out")]
    assert (steps[0], steps[-1]) == (0, STEPS)


@pytest.mark.timeout(240)
def test_a_damaged_newest_checkpoint_is_passed_over(
    tmp_path: Path, launch: Launch, undisturbed: Undisturbed
) -> None:
    shutil.copytree(undisturbed.out, tmp_path / "out")
    newest = tmp_path / "out" / "checkpoints" / f"checkpoint-{STEPS}.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = resume(launch, tmp_path)
    assert f"steps {STEPS - 5} to {STEPS}" in resumed.out
    assert weights(tmp_path / "out") == undisturbed.weights
