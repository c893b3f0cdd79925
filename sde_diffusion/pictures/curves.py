"""Training curves and histograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sde_diffusion.arrays import Array, as_vector, same_length
from sde_diffusion.pictures.style import COLOURS, TEXT, PathLike, finish, new_axes


def save_curves(
    curves: Mapping[str, tuple[Any, Any]],
    path: PathLike,
    *,
    x_label: str = "step",
    y_label: str = "loss",
    title: str = "",
    log_x: bool = False,
    log_y: bool = False,
    smooth: float = 0.0,
) -> Path:
    """Lines ``{name: (x, y)}``, such as the training and the held-out loss.

    Args:
        smooth: 0 <= smooth < 1, weight of the past in a bias-corrected moving average drawn over the pale raw
            line; applies to curves of more than 50 points.
    """
    if not 0 <= smooth < 1:
        raise ValueError(f"smooth must be at least 0 and below 1, got {smooth!r}")
    figure, axes = new_axes()
    for i, (name, (x_values, y_values)) in enumerate(_filled(curves, "curves").items()):
        x, y = as_vector(x_values, f"x of {name!r}"), as_vector(y_values, f"y of {name!r}")
        same_length(**{f"x of {name!r}": x, f"y of {name!r}": y})
        colour = COLOURS[i % len(COLOURS)]
        many = len(x) > 50
        if smooth and many:
            axes.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
            y = _moving_average(y, smooth)
        axes.plot(x, y, color=colour, linewidth=1.8, label=name, marker=None if many else "o", markersize=3.5)
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    return finish(figure, axes, path, x_label, y_label, title, legend=len(curves) > 1)


def save_histogram(
    values: Mapping[str, Any],
    path: PathLike,
    *,
    bins: int = 40,
    x_label: str = "",
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Path:
    """Histograms of ``{name: (N,)}`` on common bins, with the means in the legend and as lines.

    Areas are fractions of N: 1, or less where ``limits`` leaves values out. Default limits hold all values.
    """
    vectors = {name: as_vector(v, name) for name, v in _filled(values, "values").items()}
    if limits is not None and not limits[0] < limits[1]:
        raise ValueError(f"limits must be (low, high) with low < high, got {limits!r}")
    figure, axes = new_axes()
    labels = {name: f"{name}: mean {vector.mean():.3g}" for name, vector in vectors.items()}
    _draw_histograms(axes, vectors, labels, bins, limits)
    return finish(figure, axes, path, x_label, "density", title, legend=True)


def save_bits_per_dim_histogram(
    bits: Mapping[str, Any], path: PathLike, *, baselines: Mapping[str, float] | None = None, title: str = ""
) -> Path:
    """Bits/dim per image for ``{name: (N,)}``: histograms, mean ± standard error, reference lines."""
    vectors = {name: as_vector(v, name) for name, v in _filled(bits, "bits").items()}
    errors = {name: v.std(ddof=min(1, len(v) - 1)) / np.sqrt(len(v)) for name, v in vectors.items()}
    labels = {name: f"{name}: {v.mean():.3f} ± {errors[name]:.3f}" for name, v in vectors.items()}
    figure, axes = new_axes()
    _draw_histograms(axes, vectors, labels, 40, None)
    for i, (name, value) in enumerate((baselines or {}).items()):
        style = ((0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))[i % 2]
        axes.axvline(value, color=TEXT, linewidth=1.4, linestyle=style, label=f"{name}: {value:.3f}")
    return finish(figure, axes, path, "bits/dim of an image", "density", title, legend=True)


def _filled(mapping: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not mapping:
        raise ValueError(f"{name} must not be empty")
    return mapping


def _draw_histograms(
    axes: Axes,
    vectors: Mapping[str, Array],
    labels: Mapping[str, str],
    bins: int,
    limits: tuple[float, float] | None,
) -> None:
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins!r}")
    # Widens a range of width zero.
    edges = np.histogram_bin_edges(np.concatenate(list(vectors.values())), bins, range=limits)
    for i, (name, vector) in enumerate(vectors.items()):
        colour = COLOURS[i % len(COLOURS)]
        height = np.histogram(vector, edges)[0] / (len(vector) * (edges[1] - edges[0]))
        axes.stairs(height, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(height, edges, color=colour, linewidth=1.6, label=labels[name])
        axes.axvline(vector.mean(), color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)


def _moving_average(values: Array, decay: float) -> Array:
    smooth, state = np.empty_like(values), 0.0
    for i, value in enumerate(values):
        state = decay * state + (1 - decay) * value
        smooth[i] = state / (1 - decay ** (i + 1))
    return smooth
