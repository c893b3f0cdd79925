"""What all figures share: colours, axes, and how a file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sde_diffusion.arrays import as_vector

COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#c53030", "#4a5568")
TEXT = "#2d3748"
QUIET = "#a0aec0"

PathLike = str | Path


def ready(path: PathLike) -> Path:
    """``path`` with its folder made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches, 150 dots each) that no global state knows of."""
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.02, hspace=0.02)
    return Figure(figsize=(width, height), dpi=150, layout=engine)


def new_axes() -> tuple[Figure, Axes]:
    """A figure with one plot."""
    figure = new_figure(6.4, 3.8)
    return figure, figure.add_subplot()


def write(figure: Figure, path: PathLike, title: str) -> Path:
    """Saves the figure and returns the path."""
    if title:
        figure.suptitle(title, color=TEXT, fontsize=11)
    path = ready(path)
    figure.savefig(path)
    return path


def finish(
    figure: Figure, axes: Axes, path: PathLike, x_label: str, y_label: str, title: str, *, legend: bool
) -> Path:
    """Labels, grid, frame and legend of a plot, then ``write``."""
    axes.set_xlabel(x_label, color=TEXT)
    axes.set_ylabel(y_label, color=TEXT)
    axes.grid(color="#e2e8f0", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(colors=TEXT, labelsize=9)
    if legend:
        axes.legend(facecolor="white", edgecolor="none", framealpha=0.85, labelcolor=TEXT, fontsize=9)
    return write(figure, path, title)


def time_labels(times: Any, count: int) -> list[str]:
    """``t = ...`` for each of ``count`` states; empty where no times are given."""
    if times is None:
        return [""] * count
    numbers = as_vector(times, "times")
    if len(numbers) != count:
        raise ValueError(f"times must hold one number per state ({count}), got {len(numbers)}")
    return [f"t = {number:.3g}" for number in numbers]
