"""Every picture is written, is what was asked for where that can be measured, and repeats to the byte."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from sde_diffusion import pictures


def images(n, c=1, h=8, w=8, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, c, h, w))


def points(n=200, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 2))


def gaussian(x):
    return -0.5 * (x**2).sum(-1)


STEPS = np.arange(1, 201)
DRAWN = {
    "grid": lambda path: pictures.save_image_grid(images(12), path),
    "best_and_worst": lambda path: pictures.save_best_and_worst(
        images(30), np.arange(30) / 10, path, title="t"
    ),
    "neighbours": lambda path: pictures.save_neighbours(
        images(5), images(5, seed=1), path, distances=range(5)
    ),
    "strip": lambda path: pictures.save_trajectory_strip(
        np.stack([images(3)] * 4), path, times=[1, 0.5, 0.1, 0]
    ),
    "curves": lambda path: pictures.save_curves({"a": (STEPS, 1 / STEPS), "b": ([1], [1])}, path, smooth=0.9),
    "histogram": lambda path: pictures.save_histogram({"a": STEPS, "b": STEPS**0.5}, path, x_label="x"),
    "bits": lambda path: pictures.save_bits_per_dim_histogram(
        {"test": STEPS}, path, baselines={"mixture": 99}
    ),
    "scatter": lambda path: pictures.save_scatter_2d(
        points(), path, log_density=gaussian, reference=points()
    ),
    "trajectory": lambda path: pictures.save_trajectory_2d(np.stack([points()] * 8), path, times=range(8)),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_picture_is_written_and_the_same_every_time(name, tmp_path):
    first = DRAWN[name](tmp_path / "new" / "folder" / "a.png")
    second = DRAWN[name](str(tmp_path / "b.png"))
    assert first == tmp_path / "new" / "folder" / "a.png"
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        pixels = np.asarray(picture.convert("L"), dtype=float)
    assert min(pixels.shape) >= 100
    assert pixels.std() > 5  # something is drawn


def test_grid_puts_every_pixel_in_its_place():
    batch = images(5, c=3, h=4, w=6)
    canvas = pictures.image_grid(batch, columns=3, scale=5, padding=1, background=128)
    gap = 2  # half of the scale, rounded down
    assert canvas.shape == (gap + 2 * (20 + gap), gap + 3 * (30 + gap), 3)
    for i, image in enumerate(batch):
        top, left = gap + i // 3 * (20 + gap), gap + i % 3 * (30 + gap)
        for y, x in ((0, 0), (3, 5), (1, 2)):
            block = canvas[top + 5 * y : top + 5 * y + 5, left + 5 * x : left + 5 * x + 5]
            assert (block == np.round((image[:, y, x] + 1) * 127.5)).all()
    assert (canvas[:gap] == 128).all()
    assert (canvas[gap + 20 + gap :, gap + 2 * (30 + gap) :] == 128).all()  # the sixth place is empty


@pytest.mark.parametrize(("n", "side", "columns"), [(100, 8, 10), (64, 28, None), (100, 32, 10), (16, 8, 4)])
def test_the_default_size_is_pleasant(n, side, columns):
    _, width, channels = pictures.image_grid(images(n, h=side, w=side), columns=columns).shape
    assert 550 <= width <= 800
    assert channels == 1


def test_grey_levels_span_black_to_white_and_overshoot_is_clipped(tmp_path):
    flat = np.stack([np.full((1, 2, 2), level) for level in (-1.0, 1.0, -7.0, 7.0, 0.0)])
    path = pictures.save_image_grid(torch.tensor(flat), tmp_path / "grey.png", columns=5, scale=1, padding=0)
    with Image.open(path) as picture:
        assert picture.mode == "L"
        assert np.asarray(picture)[0, ::2].tolist() == [0, 255, 0, 255, 128]


def test_colour_grids_are_rgb(tmp_path):
    red = np.stack([np.full((4, 4), level) for level in (1.0, -1.0, -1.0)])[None]
    path = pictures.save_image_grid(red, tmp_path / "red.png", padding=0, scale=2)
    with Image.open(path) as picture:
        assert (picture.mode, picture.size, picture.getpixel((3, 3))) == ("RGB", (8, 8), (255, 0, 0))


def test_best_and_worst_shows_the_right_images(tmp_path):
    """One white image has the lowest value, all others are black: only the upper row is bright."""
    batch = np.full((9, 1, 8, 8), -1.0)
    batch[4] = 1.0
    values = np.arange(9.0) + 5
    values[4] = 0
    path = pictures.save_best_and_worst(batch, values, tmp_path / "a.png", count=1)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    black = (pixels < 10).sum(1) > pixels.shape[1] / 4
    assert not black[: len(black) // 2 - 5].any()
    assert black[len(black) // 2 :].any()


def test_the_density_may_be_a_tensor_and_may_vanish(tmp_path):
    def half(x):
        result = torch.tensor(gaussian(x))
        result[torch.tensor(x[:, 0] < 0)] = -torch.inf
        return result

    pictures.save_scatter_2d(torch.tensor(points()), tmp_path / "a.png", log_density=half, limits=3.0)


def test_constant_values_have_a_histogram(tmp_path):
    pictures.save_histogram({"all equal": np.full(10, 0.99)}, tmp_path / "a.png")
    pictures.save_bits_per_dim_histogram({"one": [2.0]}, tmp_path / "b.png")


def test_matplotlib_is_left_as_it_was(tmp_path):
    """No pyplot (which picks a backend and keeps every figure), and no changed default."""
    for source in Path(pictures.__file__).parent.glob("*.py"):
        assert "pyplot" not in source.read_text(encoding="utf-8")
    before = dict(matplotlib.rcParams)
    DRAWN["histogram"](tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before


NAN = np.full((2, 1, 4, 4), np.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: pictures.save_image_grid(NAN, p), "images must be finite, got 32 NaN"),
        (lambda p: pictures.save_image_grid(images(0), p), "images must not be empty"),
        (lambda p: pictures.save_image_grid(images(2)[:, 0], p), r"\(N, C, H, W\) .* got \(2, 8, 8\)"),
        (lambda p: pictures.save_image_grid(images(2, c=4), p), r"C of 1 or 3, got \(2, 4, 8, 8\)"),
        (lambda p: pictures.save_image_grid(images(2), p, columns=0), "columns must be >= 1, got 0"),
        (lambda p: pictures.save_image_grid(images(2), p, scale=0), "scale must be an integer >= 1, got 0"),
        (lambda p: pictures.save_image_grid(images(2), p, padding=-1), "padding must be >= 0, got -1"),
        (lambda p: pictures.save_best_and_worst(images(3), [1, 2], p), "got images 3, values 2"),
        (lambda p: pictures.save_neighbours(images(3), images(2), p), "got samples 3, neighbours 2"),
        (lambda p: pictures.save_trajectory_strip(images(3), p), r"\(T, N, C, H, W\), got \(3, 1, 8, 8\)"),
        (lambda p: pictures.save_trajectory_strip(images(3)[None], p, times=[1, 2]), "per state .1., got 2"),
        (lambda p: pictures.save_curves({}, p), "curves must not be empty"),
        (lambda p: pictures.save_curves({"a": ([1, 2], [1])}, p), "got x of 'a' 2, y of 'a' 1"),
        (lambda p: pictures.save_curves({"a": ([1], [np.inf])}, p), "y of 'a' must be finite"),
        (lambda p: pictures.save_curves({"a": ([1], [1])}, p, smooth=1.0), "smooth .* got 1.0"),
        (lambda p: pictures.save_histogram({}, p), "values must not be empty"),
        (lambda p: pictures.save_histogram({"a": [1]}, p, limits=(1, 1)), r"low < high, got \(1, 1\)"),
        (lambda p: pictures.save_histogram({"a": [[1]]}, p), r"a must have shape \(N,\), got \(1, 1\)"),
        (lambda p: pictures.save_bits_per_dim_histogram({}, p), "bits must not be empty"),
        (lambda p: pictures.save_scatter_2d(np.ones((4, 3)), p), r"\(N, 2\), got \(4, 3\)"),
        (lambda p: pictures.save_scatter_2d(points(), p, log_density=lambda x: x), "return shape"),
        (lambda p: pictures.save_scatter_2d(points(), p, log_density=lambda x: x[:, 0] * np.nan), "NaN"),
        (lambda p: pictures.save_trajectory_2d(points(), p), r"\(T, N, 2\), got \(200, 2\)"),
    ],
)
def test_errors(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
