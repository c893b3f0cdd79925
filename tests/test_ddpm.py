"""A chain of betas as an SDE: exact at its grid points, and back again."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import gaussian_2d, times64

SCHEDULES = {
    "linear-1000": sd.VP().discretize(1000),
    "linear-100": sd.VP().discretize(100),
    "cosine-50": sd.CosineVP().discretize(50),
    "rough": torch.tensor([0.3, 1e-6, 0.9, 0.02, 0.5, 0.999], dtype=torch.float64),
}
schedules = pytest.mark.parametrize("betas", SCHEDULES.values(), ids=SCHEDULES)


def grid(n: int, t_max: float = 1.0) -> Tensor:
    return torch.arange(n + 1, dtype=torch.float64) / n * t_max


@schedules
def test_marginals_at_the_grid_points_are_the_chains(betas: Tensor) -> None:
    sde, t = sd.DDPM(betas), grid(len(betas))
    products = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    assert_close(sde.alpha(t) ** 2, products, rtol=1e-11, atol=0)
    assert_close(sde.variance(t), 1 - products, rtol=1e-10, atol=1e-14)
    assert sde.num_steps == len(betas)


@schedules
def test_kernels_between_grid_points_are_the_chains(betas: Tensor) -> None:
    sde, t = sd.DDPM(betas), grid(len(betas))
    ratio, var = sde.transition(t[:-1], t[1:])
    # var is a difference of numbers up to 1: its absolute error is a rounding error of 1.
    assert_close(var, betas, rtol=1e-12, atol=4e-16)
    assert_close(ratio, (1 - betas).sqrt(), rtol=1e-12, atol=0)


@schedules
def test_betas_survive_the_way_through_the_sde(betas: Tensor) -> None:
    again = sd.DDPM(betas).discretize(len(betas))
    assert_close(again, betas, rtol=1e-10, atol=1e-15)
    assert_close(sd.DDPM(again).discretize(len(betas)), betas, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("sde", [sd.VP(), sd.CosineVP(), sd.VP(t_max=0.7)], ids=["vp", "cosine", "vp-0.7"])
def test_the_chain_of_exact_betas_has_the_marginals_of_its_sde(sde: sd.VariancePreserving) -> None:
    chain = sd.DDPM(sde.discretize(64, "exact"), t_max=sde.t_max)
    t = grid(64, sde.t_max)
    for quantity in ("alpha", "sigma"):
        assert_close(getattr(chain, quantity)(t), getattr(sde, quantity)(t), rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(chain.transition(t[3], t[40]), sde.transition(t[3], t[40]), strict=True):
        assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_a_long_chain_tends_to_its_sde() -> None:
    """Song's betas are those of the SDE in the limit: the error of the marginals falls as 1/n."""
    t, errors = times64(0.2, 0.5, 0.9), []
    for n in (100, 200, 400, 800):
        chain = sd.DDPM(sd.VP().discretize(n))
        errors.append(float((chain.log_alpha(t) / sd.VP().log_alpha(t) - 1).abs().max()))
    assert all(1.8 < a / b < 2.2 for a, b in pairwise(errors)), errors


@schedules
def test_between_grid_points_beta_is_positive_and_continuous(betas: Tensor) -> None:
    """A drift that jumps would cost an adaptive ODE solver its accuracy."""
    n = len(betas)
    sde, t = sd.DDPM(betas), torch.linspace(0, 1, 40 * n + 1, dtype=torch.float64)
    f, g2 = sde.f_and_g2(t)
    assert bool((g2 > 0).all())
    assert_close(g2, -2 * f, rtol=1e-6, atol=1e-9)
    inner = grid(n)[1:-1]
    before, after = sde.f(inner - 1e-9 / n), sde.f(inner + 1e-9 / n)
    assert_close(before, after, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [100, 1000])
def test_beta_of_a_smooth_chain_is_that_of_its_sde(n: int) -> None:
    t = torch.linspace(0, 1, 999, dtype=torch.float64)
    chain = sd.DDPM(sd.VP().discretize(n, "exact"))
    assert_close(chain.g2(t), sd.VP().g2(t), rtol=1e-6, atol=0)
    assert_close(chain.variance(t[1:]), sd.VP().variance(t[1:]), rtol=1e-6, atol=0)


def test_the_interpolation_falls_however_rough_the_chain() -> None:
    """A plain spline through such values would rise in places: a negative beta, noise taken away."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        exponents = -6 * torch.rand(12, dtype=torch.float64, generator=generator)
        sde = sd.DDPM(0.99 * 10**exponents)
        assert bool((sde.log_alpha(torch.linspace(0, 1, 2001, dtype=torch.float64)).diff() < 0).all())


@schedules
def test_log_snr_falls_and_inverts_between_and_on_the_grid_points(betas: Tensor) -> None:
    sde = sd.DDPM(betas)
    t = torch.linspace(1e-4, 1, 4 * len(betas) + 1, dtype=torch.float64)
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() < 0).all())
    assert_close(sde.time_of_log_snr(log_snr), t, rtol=1e-8, atol=1e-12)


@schedules
def test_posterior_of_ddpm_is_the_ancestral_step(betas: Tensor) -> None:
    """Ho et al. (2020), eq. 7: the mean and variance of ``q(x_{i-1} | x_i, x_0)``, from a point."""
    sde, t = sd.DDPM(betas), grid(len(betas))
    cumulated = (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), cumulated[:-1]])
    x, x0 = times64(0.8, -1.7)[None], times64(0.5, 0.25)[None]

    for i in range(0, len(betas), max(1, len(betas) // 50)):

        def score(x: Tensor, time: Tensor) -> Tensor:
            return -(x - sde.alpha(time) * x0) / sde.variance(time)

        mean = (
            before[i].sqrt() * betas[i] / (1 - cumulated[i]) * x0
            + (1 - betas[i]).sqrt() * (1 - before[i]) / (1 - cumulated[i]) * x
        )
        tilde = (1 - before[i]) / (1 - cumulated[i]) * betas[i]
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        ours = sd.Ancestral("small").step(sde, score, x, t[i + 1], t[i], zero)
        assert_close(ours, mean, rtol=1e-8, atol=1e-8)
        spread = sd.Ancestral("small").step(sde, score, x, t[i + 1], t[i], one) - ours
        assert_close(spread, tilde.sqrt().expand_as(x), rtol=1e-6, atol=1e-7)
        large = sd.Ancestral("large").step(sde, score, x, t[i + 1], t[i], one) - ours
        assert_close(large, betas[i].sqrt().expand_as(x), rtol=1e-6, atol=1e-7)


def test_the_last_step_of_a_chain_reaches_clean_data() -> None:
    """From the first grid point to t = 0 the ancestral step is the posterior mean, without noise."""
    sde, data = sd.DDPM(SCHEDULES["linear-100"]), gaussian_2d()
    x, t = torch.randn(5, 2, dtype=torch.float64), grid(100)
    score = data.score(sde)
    step = sd.Ancestral("small").step(sde, score, x, t[1], t[0], torch.randn_like(x))
    assert_close(step, sde.posterior_mean(x, score(x, t[1]), t[1]), rtol=1e-12, atol=1e-12)


def test_betas_may_be_a_list_an_array_or_a_tensor() -> None:
    values = [0.1, 0.2, 0.3]
    chain = sd.DDPM(values)
    for betas in (tuple(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert sd.DDPM(betas) == chain and hash(sd.DDPM(betas)) == hash(chain)
    assert sd.DDPM([0.1, 0.2]) != chain
    assert sd.DDPM(torch.tensor(values)).betas == pytest.approx(values, rel=1e-7)  # float32 betas
    assert isinstance(chain.betas, tuple) and chain.t_max == 1.0


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ((), "at least 2 betas, got shape"),
        ([0.1], "at least 2 betas"),
        (torch.full((2, 3), 0.1), r"vector of at least 2 betas, got shape \(2, 3\)"),
        ([0.1, 1.0], r"betas must lie in \(0, 1\), got 1 at index 1"),
        ([0.0, 0.5], "got 0 at index 0"),
        ([0.1, 0.2, -0.5], "got -0.5 at index 2"),
        ([0.1, float("nan")], "got nan at index 1"),
    ],
)
def test_betas_outside_of_a_chain_are_refused(betas: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sd.DDPM(betas)
