"""Solvers of the reverse SDE: exact cases, weak and strong orders, independence of the batch, runs of others."""

from __future__ import annotations

import pytest
import torch

import sde_diffusion as sd
from problems import (
    SDES,
    gaussian_2d,
    marginal_moments,
    run_moments,
    slope,
)

CLOSE_SDES = {name: SDES[name] for name in ("vp", "subvp", "ddpm")}


def moment_error(predictor: sd.Predictor, sde: sd.SDE, times: torch.Tensor, **options: int) -> float:
    """The largest error of a mean plus the largest error of a covariance, for Gaussian data."""
    data = gaussian_2d()
    mean, covariance = run_moments(predictor, sde, data, times, **options)
    exact_mean, exact_covariance = marginal_moments(data, sde, times[-1])
    return float((mean - exact_mean).abs().max() + (covariance - exact_covariance).abs().max())


# The family between the ODE and the SDE ------------------------------------------------------------------


@pytest.mark.parametrize("sde", CLOSE_SDES.values(), ids=CLOSE_SDES)
@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
def test_euler_maruyama_has_the_marginals_for_every_stochasticity(sde: sd.SDE, stochasticity: float) -> None:
    """Mean and full covariance at the end converge to those of ``p_t``, at order 1, whatever the noise."""
    sizes = [64, 128, 256]
    errors = [
        moment_error(sd.EulerMaruyama(stochasticity), sde, sd.quadratic_times(sde, n, 1e-3)) for n in sizes
    ]
    assert 0.9 < slope(sizes, errors) < 1.1, errors
    assert errors[-1] < 0.01


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
def test_reverse_diffusion_has_the_marginals_for_every_stochasticity(stochasticity: float) -> None:
    sizes, sde = [64, 128, 256], sd.VP()
    errors = [
        moment_error(sd.ReverseDiffusion(stochasticity), sde, sd.quadratic_times(sde, n, 1e-3)) for n in sizes
    ]
    assert 0.9 < slope(sizes, errors) < 1.2, errors
    assert errors[-1] < 0.2


def test_without_noise_none_is_drawn() -> None:
    def no_noise() -> torch.Tensor:
        raise AssertionError("a deterministic run needs no noise")

    for predictor in (sd.EulerMaruyama(stochasticity=0.0), sd.ReverseDiffusion(stochasticity=0.0)):
        sd.sample(
            sd.VP(),
            lambda x, t: -x,
            (2, 2),
            predictor=predictor,
            times=sd.uniform_times(sd.VP(), 3),
            noise=no_noise,
            x_init=torch.zeros(2, 2),
        )
