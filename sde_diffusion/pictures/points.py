"""Points in the plane, over their density and over time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from sde_diffusion.arrays import Array, as_array
from sde_diffusion.pictures.style import COLOURS, QUIET, TEXT, PathLike, new_figure, time_labels, write

_DENSITY = LinearSegmentedColormap.from_list("density", ("#ffffff", "#f3e3c8", "#e0b173", "#b87a33"))


def save_scatter_2d(
    samples: Any,
    path: PathLike,
    *,
    log_density: Callable[[Array], Any] | None = None,
    reference: Any = None,
    limits: float | None = None,
    title: str = "",
) -> Path:
    """Points (N, 2) over the density they should have, or beside exact samples.

    Args:
        log_density: (M, 2) float64 array -> (M,) natural logarithm of the density (``-inf`` allowed), drawn
            as filled contours; the colour is proportional to the density.
        reference: exact samples (K, 2), drawn in a second panel.
        limits: the panels show ``[-limits, limits]``^2; default what holds every point.
    """
    points = _as_points(samples, "samples")
    panels = [("samples" if reference is not None else "", points)]
    if reference is not None:
        panels.append(("reference", _as_points(reference, "reference")))
    limits = _limits(points for _, points in panels) if limits is None else limits
    figure = new_figure(4.6 * len(panels), 4.6 + 0.3 * bool(title))
    for i, (name, panel) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        if log_density is not None:
            _draw_density(axes, log_density, limits)
        _draw_points(axes, panel, limits)
        axes.set_title(name, color=TEXT, fontsize=10)
    return write(figure, path, title)


def save_trajectory_2d(
    states: Any, path: PathLike, *, times: Any = None, limits: float | None = None, title: str = ""
) -> Path:
    """Points (T, N, 2) at several times, one panel per time (in one row of at most six, then the next)."""
    array = as_array(states, "states")
    if array.ndim != 3 or array.shape[2] != 2:
        raise ValueError(f"states must have shape (T, N, 2), got {array.shape}")
    limits = _limits(array) if limits is None else limits
    heads = time_labels(times, len(array))
    columns = min(6, len(array))
    rows = -(-len(array) // columns)
    figure = new_figure(2.1 * columns, 2.3 * rows + 0.3 * bool(title))
    for i, points in enumerate(array):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_points(axes, points, limits)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(heads[i], color=TEXT, fontsize=9)
    return write(figure, path, title)


def _as_points(points: Any, name: str) -> Array:
    array = as_array(points, name)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} must have shape (N, 2), got {array.shape}")
    return array


def _limits(sets: Any) -> float:
    return 1.05 * max(float(np.abs(points).max()) for points in sets) or 1.0


def _draw_density(axes: Axes, log_density: Callable[[Array], Any], limits: float) -> None:
    side = np.linspace(-limits, limits, 201)
    points = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    result = log_density(points)
    values = result.detach().cpu() if isinstance(result, torch.Tensor) else result
    density = np.exp(np.asarray(values, dtype=np.float64))
    if density.shape != (len(points),):
        raise ValueError(f"log_density must return shape ({len(points)},), got {density.shape}")
    if not np.isfinite(density).all():
        raise ValueError("log_density must return numbers below infinity, got NaN or infinity")
    if density.max() > 0:
        levels = density.max() * np.concatenate([[0.01, 0.04], np.linspace(0.1, 1, 10)])
        axes.contourf(side, side, density.reshape(201, 201), levels=levels, cmap=_DENSITY, vmin=0)


def _draw_points(axes: Axes, points: Array, limits: float) -> None:
    many = len(points)
    axes.scatter(
        points[:, 0], points[:, 1], s=float(np.clip(6000 / many, 1.0, 14.0)), color=COLOURS[0], linewidths=0,
        alpha=float(np.clip(600 / many, 0.25, 0.8)),
    )  # fmt: skip
    axes.set_xlim(-limits, limits)
    axes.set_ylim(-limits, limits)
    axes.set_aspect("equal")
    axes.tick_params(colors=TEXT, labelsize=8)
    axes.spines[:].set_color(QUIET)
