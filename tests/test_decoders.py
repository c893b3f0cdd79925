"""Decoders against SciPy, their total mass, and derivatives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from sde_diffusion.decoders import DiscretizedGaussian, GaussianDecoder, TanhGaussian


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("levels", [2, 5, 17, 256])
def test_levels_have_all_the_mass(levels: int, ends: bool) -> None:
    k = torch.arange(levels, dtype=torch.float64)
    x = 2 * k / (levels - 1) - 1 if ends else (2 * k + 1) / levels - 1
    for mean in (-3.0, -0.9, 0.013, 0.5, 1.7):
        for std in (1e-3, 0.05, 0.7, 10.0):
            log_p = DiscretizedGaussian(levels, ends)(x, x.new_tensor(mean), x.new_tensor(2 * math.log(std)))
            assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=1e-12)
            edges = (x[1:] + x[:-1]) / 2
            cdf = stats.norm.cdf(np.concatenate([[-np.inf], edges.numpy(), [np.inf]]), mean, std)
            assert_close(log_p.exp(), torch.from_numpy(np.diff(cdf)), rtol=1e-9, atol=1e-13)


def test_far_tails_keep_their_digits() -> None:
    """Where a difference of two normal probabilities is 0 in float64: log of the density times the width, nearly."""
    decoder = DiscretizedGaussian(256)
    x = torch.tensor([(2 * 200 + 1) / 256 - 1], dtype=torch.float64)
    for mean in (-0.9, 0.9):
        std = 0.005
        ours = decoder(x, x.new_tensor(mean), x.new_tensor(2 * math.log(std)))
        # The mass of the cell is nearly all at its edge next to the mean.
        edge = x + math.copysign(1 / 256, mean - float(x))
        tail = stats.norm.logsf(abs(float(edge) - mean) / std)
        assert float(ours) == pytest.approx(float(tail), rel=1e-3)


def test_derivatives_are_finite_and_right() -> None:
    decoder = DiscretizedGaussian(17)
    x = ((2 * torch.arange(17, dtype=torch.float64) + 1) / 17 - 1).repeat(4)
    mean = torch.linspace(-1.5, 1.5, len(x), dtype=torch.float64).requires_grad_()
    log_variance = torch.linspace(-12, 3, len(x), dtype=torch.float64).requires_grad_()
    decoder(x, mean, log_variance).sum().backward()
    assert bool(torch.isfinite(mean.grad).all()) and bool(torch.isfinite(log_variance.grad).all())
    soft = torch.linspace(-4, 1, len(x), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, v: decoder(x, m, v), (mean.detach().requires_grad_(), soft))


def test_density_and_many_levels_agree() -> None:
    x, mean, log_variance = (torch.tensor([v], dtype=torch.float64) for v in (0.3, 0.25, -4.0))
    density = GaussianDecoder()(x, mean, log_variance)
    assert float(density) == pytest.approx(stats.norm.logpdf(0.3, 0.25, math.exp(-2.0)), rel=1e-12)
    n = 100_001
    level = round((0.3 + 1) / 2 * n - 0.5)
    x = torch.tensor([(2 * level + 1) / n - 1], dtype=torch.float64)
    mass = DiscretizedGaussian(n)(x, mean, log_variance) - math.log(2 / n)
    assert_close(mass, GaussianDecoder()(x, mean, log_variance), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decoder", [DiscretizedGaussian(256), TanhGaussian(256)])
@pytest.mark.parametrize("value", [1.001, -1.5, math.nan, math.inf])
def test_data_outside_are_refused(decoder, value: float) -> None:
    x = torch.tensor([[0.0, value]])
    with pytest.raises(ValueError, match=r"data in \[-1, 1\], got"):
        decoder(x, x, torch.zeros(1))


@pytest.mark.parametrize("kind", [DiscretizedGaussian, TanhGaussian])
@pytest.mark.parametrize("levels", [1, 0, 2.0, True, "256"])
def test_levels_must_be_levels(kind, levels: object) -> None:
    with pytest.raises(ValueError, match="levels must be an integer >= 2, got"):
        kind(levels)
