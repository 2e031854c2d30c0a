"""What both examples use: the checkpoint, the progress line, the curve."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from examples.common import report, saving


def test_a_checkpoint_holds_all_that_the_next_step_depends_on() -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    packed = saving.pack(model, optimizer, seed=3, step=7)
    state = torch.load(io.BytesIO(packed), weights_only=True)
    assert set(state) == {"step", "seed", "model", "optimizer", "random"}
    assert (state["step"], state["seed"]) == (7, 3)
    assert torch.equal(state["model"]["weight"], model.weight)
    assert torch.equal(state["random"], torch.get_rng_state())
    assert len(state["optimizer"]["state"]) == len(list(model.parameters()))


def _line(**console: bool) -> str:
    out = io.StringIO()
    progress = report.Progress(first=0, steps=100, a_step=1000, unit="tokens")
    progress.begun -= 20.0
    progress.console = Console(file=out, width=110, highlight=False, **console)  # type: ignore[arg-type]
    progress.show(10, "loss 3.142")
    return out.getvalue()


def test_the_progress_line_says_step_loss_speed_and_time_left() -> None:
    assert _line() == "step  10/100  loss 3.142  500 tokens/s  3:00 left\n"


def test_on_a_terminal_the_line_has_a_bar_and_colours_and_is_one_line() -> None:
    line = _line(force_terminal=True)
    assert "━" in line
    assert "\x1b[" in line
    assert "tokens/s" in line
    assert line.count("\n") == 1


def test_the_curve_goes_on_from_its_file_up_to_the_step_resumed_from(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    curve = report.Curve(path, "loss", until_step=-1)
    for step, loss in [(0, 5.5), (50, 2.5), (25, 3.5)]:
        curve.add(step, loss)
    assert path.read_text() == "step,loss\n0,5.500000\n25,3.500000\n50,2.500000\n"
    assert report.Curve(path, "loss", until_step=30).values == {0: 5.5, 25: 3.5}
    assert path.read_text() == "step,loss\n0,5.500000\n25,3.500000\n"
    assert report.Curve(path, "loss", until_step=-1).values == {}


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    curve = report.Curve(tmp_path / "curve.csv", "loss", until_step=-1)
    curve.add(0, 5.5)
    curve.add(10, 2.5)
    curve.draw(tmp_path / "curve.png", "loss")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
