"""The toy densities: they integrate to 1, and samples are distributed as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import simpson

from sde_diffusion.data import load_dataset
from sde_diffusion.data.toy import Checkerboard, grid, moons, ring

NAMES = ("gaussians8", "gaussians25", "moons", "checkerboard")
HALF, CELLS, FINE = 3.2, 16, 12  # a square that holds all of them; coarse bins; points per bin and axis


def bin_probabilities(density) -> torch.Tensor:
    """The probability of each of ``CELLS²`` bins of the square by the midpoint rule."""
    step = 2 * HALF / (CELLS * FINE)
    line = -HALF + step * (torch.arange(CELLS * FINE, dtype=torch.float64) + 0.5)
    points = torch.cartesian_prod(line, line)
    p = torch.cat([density.log_prob(block).exp() for block in points.split(20_000)]) * step**2
    return p.reshape(CELLS, FINE, CELLS, FINE).sum((1, 3))


@pytest.mark.parametrize("name", NAMES)
def test_densities_integrate_to_one_and_samples_agree(name):
    """Samples per bin against the integral of the density: chi-squared within 4 standard deviations."""
    data = load_dataset(name, size=20_000)
    p = bin_probabilities(data.density)
    assert abs(p.sum() - 1) < 1e-4
    x = torch.cat((data.train, data.test)).double()
    index = ((x + HALF) / (2 * HALF / CELLS)).long().clamp(0, CELLS - 1)
    counts = torch.bincount(index[:, 0] * CELLS + index[:, 1], minlength=CELLS**2).double()
    expected = p.flatten() / p.sum() * len(x)
    common = expected > 5
    rest_seen, rest = counts[~common].sum(), expected[~common].sum()
    statistic = ((counts - expected)[common].square() / expected[common]).sum()
    assert abs(rest_seen - rest) < 5 * math.sqrt(rest + 1)
    freedom = int(common.sum())
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", NAMES)
def test_toy_sets(name):
    data = load_dataset(name, size=1000, test_fraction=0.2, split_seed=3)
    assert (len(data.train), len(data.test)) == (800, 200)
    assert data.sample_shape == (2,)
    assert data.levels is None
    assert not data.is_image
    assert data.num_classes is None
    again = load_dataset(name, size=1000, test_fraction=0.2, split_seed=3)
    assert torch.equal(data.train, again.train)
    assert not torch.equal(data.train, load_dataset(name, size=1000, test_fraction=0.2, split_seed=4).train)
    assert 0.4 < data.train.std() < 2.0
    assert data.train.mean(0).abs().max() < 0.25
    assert torch.isfinite(data.density.log_prob(data.test)).all()
    generator = torch.Generator().manual_seed(0)
    assert data.density.sample(5, generator).shape == (5, 2)


def test_known_densities():
    """By hand: at a mode of well separated Gaussians, ``1 / (K 2π s²)``; on a dark square 1/8 of area 1."""
    peak = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    assert ring().log_prob(peak).item() == pytest.approx(-math.log(8 * 2 * math.pi * 0.01), abs=1e-9)
    peak = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    assert grid().log_prob(peak).item() == pytest.approx(-math.log(25 * 2 * math.pi * 0.01), abs=1e-9)
    points = torch.tensor([[-1.5, -1.5], [-0.5, -1.5], [1.9, 1.9], [2.1, 2.1], [-2.5, -2.5]])
    dark = -math.log(8)
    assert Checkerboard().log_prob(points).tolist() == pytest.approx(
        [dark, -math.inf, dark, -math.inf, -math.inf]
    )


def test_checkerboard_samples_lie_on_dark_squares():
    board = Checkerboard(cells=6, width=0.5)
    x = board.sample(3000, torch.Generator().manual_seed(0))
    assert torch.isfinite(board.log_prob(x)).all()
    squares = torch.floor(x / 0.5 + 3).long()
    counts = torch.bincount(squares[:, 0] * 6 + squares[:, 1], minlength=36)
    assert sorted(counts.tolist())[:18] == [0] * 18
    assert min(sorted(counts.tolist())[18:]) > 110  # 3000 / 18 = 167, standard deviation 12.5


def test_the_moons_are_the_integral_over_the_arcs():
    """Against Simpson's rule with 20,001 nodes, which shares nothing with the quadrature in use."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        (moons().sample(20, generator), torch.randn(20, 2, generator=generator, dtype=torch.float64))
    )
    theta = np.linspace(0, math.pi, 20_001)
    arc = np.stack((np.cos(theta) - 0.5, np.sin(theta) - 0.25), 1)
    for point, log_prob in zip(x.numpy(), moons().log_prob(x).tolist(), strict=True):
        p = sum(
            simpson(np.exp(-((point - centre) ** 2).sum(1) / (2 * 0.01)) / (2 * math.pi * 0.01), x=theta)
            for centre in (arc, -arc)
        ) / (2 * math.pi)
        assert log_prob == pytest.approx(math.log(p), abs=1e-8)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: moons(std=0.001), "at least 4935 nodes, got 128"),
        (lambda: moons(std=0.0), "std > 0"),
        (lambda: ring(std=-1.0), "std must be > 0, got -1.0"),
        (lambda: Checkerboard(cells=3), "even integer >= 2, got 3"),
        (lambda: Checkerboard(width=0), "width must be > 0, got 0"),
        (lambda: load_dataset("moons", size=1), "size must be an integer >= 2, got 1"),
        (lambda: load_dataset("moons", test_fraction=1.5), "test_fraction must be > 0 and < 1, got 1.5"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
