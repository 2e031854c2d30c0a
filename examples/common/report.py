"""What one sees of a run: the progress line, and a figure by step as CSV and as a picture."""

from __future__ import annotations

import csv
import time
from pathlib import Path

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table


class Progress:
    """A line now and then: coloured, with a bar, where the console is a terminal; plain elsewhere."""

    def __init__(self, first: int, steps: int, a_step: int, unit: str) -> None:
        """`a_step`: how many `unit` ("tokens") a step takes."""
        self.first, self.steps, self.a_step, self.unit = first, steps, a_step, unit
        self.begun = time.monotonic()
        self.console = Console(highlight=False, width=110)

    def show(self, step: int, learnt: str) -> None:
        """`learnt`: what is told of this step, as "loss 1.234"."""
        seconds = (time.monotonic() - self.begun) / (step - self.first)
        left = round((self.steps - step) * seconds)
        facts = [
            f"step {step:{len(str(self.steps))}}/{self.steps}",
            learnt,
            f"{self.a_step / seconds:,.0f} {self.unit}/s",
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
    """A figure by step. Each row is in the file as soon as it is known."""

    def __init__(self, path: Path, column: str, until_step: int) -> None:
        """Goes on from what is in the file already, up to `until_step`: later rows are of a run that died."""
        self.path, self.column = path, column
        self.values: dict[int, float] = {}
        if path.exists():
            with path.open() as file:
                rows = csv.DictReader(file)
                known = {int(row["step"]): float(row[column]) for row in rows}
            self.values = {step: value for step, value in known.items() if step <= until_step}
        self.save()

    def add(self, step: int, value: float) -> None:
        self.values[step] = value
        self.save()

    def save(self) -> None:
        rows = "".join(f"{step},{value:.6f}\n" for step, value in sorted(self.values.items()))
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(f"step,{self.column}\n" + rows)
        unfinished.replace(self.path)

    def draw(self, picture: Path, label: str, top: float | None = None) -> None:
        """`label` says what the figure is, `top` how far its axis goes (as far as the figure does)."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        steps = sorted(self.values)
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        axes.plot(steps, [self.values[step] for step in steps], marker="o", markersize=3.5)
        axes.set(xlabel="step", ylabel=label, ylim=(0, top))
        axes.annotate(
            f"{self.values[steps[-1]]:.2f}",
            (steps[-1], self.values[steps[-1]]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
        )
        axes.grid(alpha=0.3)
        figure.savefig(picture, dpi=150)
        pyplot.close(figure)
