"""Images side by side: grids, rows with captions, strips over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sde_diffusion.arrays import Array, as_array, as_vector, same_length
from sde_diffusion.pictures.style import TEXT, PathLike, new_figure, ready, time_labels, write

_WIDTH = 700  # pixels that an automatically scaled grid comes near to


def image_grid(
    images: Any,
    *,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    background: int = 255,
) -> Array:
    """The images in reading order on one canvas: uint8 (height, width, C).

    Args:
        images: (N, C, H, W) in [-1, 1], C of 1 or 3.
        columns: images per row; default the rounded-up root of N.
        scale: whole factor by which every pixel is repeated (nearest neighbour, nothing is smoothed); default
            what brings the canvas near 700 pixels of width.
        padding: gap between images and around them, in half pixels of an image.
        background: grey level of the gaps, 0 to 255.
    """
    pixels = _as_pixels(images, "images")
    count, height, width, channels = pixels.shape
    columns = min(count, int(np.ceil(np.sqrt(count)))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be >= 1, got {columns!r}")
    if padding < 0:
        raise ValueError(f"padding must be >= 0, got {padding!r}")
    scale = max(1, round(_WIDTH / (columns * (width + padding / 2)))) if scale is None else scale
    if scale < 1 or scale != int(scale):
        raise ValueError(f"scale must be an integer >= 1, got {scale!r}")
    rows = -(-count // columns)
    gap = padding * max(1, scale // 2)
    tile_height, tile_width = height * scale + gap, width * scale + gap
    canvas = np.full((rows * tile_height + gap, columns * tile_width + gap, channels), background, np.uint8)
    for i, image in enumerate(pixels.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = gap + i // columns * tile_height, gap + i % columns * tile_width
        canvas[top : top + height * scale, left : left + width * scale] = image
    return canvas


def save_image_grid(
    images: Any,
    path: PathLike,
    *,
    columns: int | None = None,
    scale: int | None = None,
    padding: int = 2,
    background: int = 255,
) -> Path:
    """Writes ``image_grid(images, ...)`` without axes or text."""
    canvas = image_grid(images, columns=columns, scale=scale, padding=padding, background=background)
    path = ready(path)
    Image.fromarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas).save(path)
    return path


def save_best_and_worst(
    images: Any, values: Any, path: PathLike, *, count: int = 10, label: str = "bits/dim", title: str = ""
) -> Path:
    """Images with the lowest ``values`` (N,) in the first row, the highest in the second, values below."""
    pixels, numbers = _as_pixels(images, "images"), as_vector(values, "values")
    same_length(images=pixels, values=numbers)
    order = np.argsort(numbers, kind="stable")
    count = min(count, len(order))
    picks = (("lowest", order[:count]), ("highest", order[::-1][:count]))
    rows = [
        (f"{name}\n{label}", [(pixels[i], f"{numbers[i]:.2f}") for i in indices]) for name, indices in picks
    ]
    return _save_rows(rows, path, title=title)


def save_neighbours(
    samples: Any, neighbours: Any, path: PathLike, *, distances: Any = None, title: str = ""
) -> Path:
    """Samples in the first row, below each its nearest training image (and, if given, their distance)."""
    top, bottom = _as_pixels(samples, "samples"), _as_pixels(neighbours, "neighbours")
    same_length(samples=top, neighbours=bottom)
    captions = [""] * len(top)
    if distances is not None:
        numbers = as_vector(distances, "distances")
        same_length(samples=top, distances=numbers)
        captions = [f"{number:.3g}" for number in numbers]
    rows = [
        ("sample", [(image, "") for image in top]),
        ("nearest\ntraining", list(zip(bottom, captions, strict=True))),
    ]
    return _save_rows(rows, path, title=title)


def save_trajectory_strip(states: Any, path: PathLike, *, times: Any = None, title: str = "") -> Path:
    """Images on their way from noise to data: one row per sample, one column per state.

    Args:
        states: (T, N, C, H, W); each state is clipped to [-1, 1].
        times: (T,), written above the columns.
    """
    array = as_array(states, "states")
    if array.ndim != 5:
        raise ValueError(f"states must have shape (T, N, C, H, W), got {array.shape}")
    frames = np.stack([_as_pixels(state, "states") for state in array])
    heads = time_labels(times, len(frames))
    rows = [("", [(frame[i], "") for frame in frames]) for i in range(frames.shape[1])]
    return _save_rows(rows, path, title=title, heads=heads)


def _as_pixels(images: Any, name: str) -> Array:
    """(N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C)."""
    array = as_array(images, name)
    if array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"{name} must have shape (N, C, H, W) with C of 1 or 3, got {array.shape}")
    return np.round((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)


def _save_rows(
    rows: Sequence[tuple[str, Sequence[tuple[Array, str]]]],
    path: PathLike,
    *,
    title: str = "",
    heads: Sequence[str] = (),
) -> Path:
    """Rows of (label, [(pixels, caption)]) as small panels, column heads above the first row."""
    columns = max(len(cells) for _, cells in rows)
    captioned = any(caption for _, cells in rows for _, caption in cells)
    margin = 0.8 if any(label for label, _ in rows) else 0.0
    size = min(0.9, 10.0 / columns)
    height = len(rows) * (size + 0.28 * captioned) + 0.3 * any(heads) + 0.35 * bool(title) + 0.1
    figure = new_figure(columns * size + margin, height)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for line, (label, cells) in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(label, color=TEXT, fontsize=9, rotation=0, ha="right", va="center")
        for axes, (pixels, caption) in zip(line, cells, strict=False):
            grey = pixels[..., 0] if pixels.shape[2] == 1 else pixels
            axes.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xlabel(caption, color=TEXT, fontsize=8, labelpad=2)
    for axes, head in zip(grid[0], heads, strict=False):
        axes.set_title(head, color=TEXT, fontsize=8, pad=3)
    return write(figure, path, title)
