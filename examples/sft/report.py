"""What one sees of a run: the progress line, and the held-out loss as CSV and as a picture."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table


class Progress:
    """A line now and then: coloured, with a bar, where the console is a terminal; plain elsewhere."""

    def __init__(self, first: int, steps: int, bytes_a_step: int) -> None:
        self.first, self.steps, self.bytes_a_step = first, steps, bytes_a_step
        self.begun = time.monotonic()
        self.console = Console(highlight=False, width=110)

    def show(self, step: int, loss: float) -> None:
        a_step = (time.monotonic() - self.begun) / (step - self.first)
        left = round((self.steps - step) * a_step)
        facts = [
            f"step {step:{len(str(self.steps))}}/{self.steps}",
            f"loss {loss:.3f}",
            f"{self.bytes_a_step / a_step:,.0f} tokens/s",
            f"{left // 60}:{left % 60:02} left",
        ]
        if not self.console.is_terminal:
            self.console.print("  ".join(facts))
            return
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.steps, completed=step, width=30)
        colours = ["bold", "green", "cyan", "yellow"]
        line.add_row(bar, *(f"[{c}]{fact}[/]" for c, fact in zip(colours, facts, strict=True)))
        self.console.print(line)


class Curve:
    """The held-out loss by step. Each row is in the file as soon as it is known."""

    def __init__(self, path: Path, until_step: int) -> None:
        """Goes on from what is in the file already, up to `until_step`: later rows are of a run that died."""
        self.path = path
        self.losses: dict[int, float] = {}
        if path.exists():
            with path.open() as file:
                rows = csv.DictReader(file)
                known = {int(row["step"]): float(row["nats_per_byte"]) for row in rows}
            self.losses = {step: loss for step, loss in known.items() if step <= until_step}
        self.save()

    def add(self, step: int, loss: float) -> None:
        self.losses[step] = loss
        self.save()

    def save(self) -> None:
        rows = "".join(f"{step},{loss:.6f}\n" for step, loss in sorted(self.losses.items()))
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text("step,nats_per_byte\n" + rows)
        unfinished.replace(self.path)

    def draw(self, picture: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        steps = sorted(self.losses)
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        axes.plot(steps, [self.losses[step] for step in steps], marker="o", markersize=3.5)
        axes.set(xlabel="step", ylabel="held-out loss, nats per byte", ylim=(0, None))
        axes.annotate(
            f"{self.losses[steps[-1]]:.2f}",
            (steps[-1], self.losses[steps[-1]]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
        axes.grid(alpha=0.3)
        figure.savefig(picture, dpi=150)
        pyplot.close(figure)
