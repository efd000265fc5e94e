"""What the demo shows at its end: a table, a picture, a file for machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from demo_checks import Check
from rich.console import Console
from rich.table import Table

INK, FAINT, FIRST, SECOND, BAD = "#24292f", "#8b949e", "#9a6700", "#0969da", "#cf222e"


def print_checks(console: Console, checks: list[Check]) -> None:
    """Print each claim with what was seen."""
    table = Table(title="What was checked", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1, style="dim")
    for check in checks:
        table.add_row("[green]yes[/]" if check.holds else "[bold red]NO[/]", check.claim, check.seen)
    console.print(table)


def print_measures(console: Console, names: list[str], rows: list[tuple[str, list[str]]]) -> None:
    """Print measures as rows, one column for each of *names*."""
    table = Table(title="What was measured", title_justify="left", header_style="bold")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for label, cells in rows:
        table.add_row(label, *cells)
    console.print(table)


def smoothed(values: list[float], *, width: int = 9) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the running mean over about *width* neighbours, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw(path: Path, *, lives: list[dict[str, Any]], digits: dict[str, Any]) -> None:
    """Draw both trainings.

    Args:
        path: The PNG.
        lives: Of the language model: ``{"steps": […], "losses": […]}``, the one that was killed first.
        digits: ``{"losses": […], "accuracies": […], "skips": […]}``, a value for each epoch.
    """
    plt.rcParams.update({"font.size": 10, "axes.edgecolor": FAINT, "axes.spines.top": False, "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=(3, 2), layout="constrained")
    _draw_language_model(left, *lives)
    _draw_digits(right, digits)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_language_model(axes: Any, killed: dict[str, Any], resumed: dict[str, Any]) -> None:
    kill, restart = killed["steps"][-1], resumed["steps"][0]
    for life, color, label in ((killed, FIRST, "first process"), (resumed, SECOND, "second process")):
        axes.plot(life["steps"], life["losses"], color=color, alpha=0.3, linewidth=1)
        axes.plot(life["steps"], smoothed(life["losses"]), color=color, linewidth=2, label=label)
    done_twice = axes.axvspan(restart - 0.5, kill + 0.5, color=FAINT, alpha=0.25, linewidth=0)
    done_twice.set_label("steps done again")
    axes.axvline(kill + 0.5, color=BAD, linewidth=1.5)
    low, high = min(resumed["losses"]), max(killed["losses"])
    axes.annotate(
        f"SIGKILL\nafter step {kill}",
        (kill + 0.5, low + 0.80 * (high - low)), (8, 0), textcoords="offset points", color=BAD, va="center",
    )  # fmt: skip
    axes.annotate(
        f"resumed from the\ncheckpoint of step {restart - 1}",
        (restart - 0.5, low + 0.60 * (high - low)), (-8, 0), textcoords="offset points", color=SECOND,
        ha="right", va="center",
    )  # fmt: skip
    axes.set(title="Bytes of Python's standard library", xlabel="step", ylabel="loss, nats per byte")
    axes.spines.right.set_visible(False)
    axes.set_xlim(0, resumed["steps"][-1] + 1)
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, loc="upper right")


def _draw_digits(axes: Any, digits: dict[str, Any]) -> None:
    epochs = np.arange(1, len(digits["losses"]) + 1)
    (loss_line,) = axes.plot(epochs, digits["losses"], color=SECOND, marker="o", label="training loss")
    axes.spines.right.set_visible(False)
    axes.set(title="scikit-learn's digits", xlabel="epoch", ylabel="loss, nats per digit")
    axes.set_ylim(0)
    axes.set_xticks(epochs)
    axes.grid(axis="y", alpha=0.25)
    other = axes.twinx()
    percent = [100 * value for value in digits["accuracies"]]
    (accuracy_line,) = other.plot(epochs, percent, color=FIRST, marker="s", label="held-out digits right, %")
    other.set_ylim(min(80.0, min(percent) - 2), 100)
    other.set_ylabel("held-out digits right, %", color=FIRST)
    other.tick_params(axis="y", colors=FIRST)
    axes.yaxis.label.set_color(SECOND)
    axes.tick_params(axis="y", colors=SECOND)
    lines = [loss_line, accuracy_line]
    bad = [epoch for epoch, skips in zip(epochs, digits["skips"], strict=True) if skips]
    if bad:
        span = axes.axvspan(bad[0] - 0.5, bad[-1] + 0.5, color=BAD, alpha=0.10, linewidth=0)
        span.set_label("one shard is corrupt")
        lines.append(span)
    axes.set_xlim(0.5, len(epochs) + 0.5)
    axes.legend(handles=lines, frameon=False, loc="center right")
