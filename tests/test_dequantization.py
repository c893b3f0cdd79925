"""The probability of grey levels against its closed form; what the ends of the interval leave out, likewise."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import mixture_2d, random_mixture, times64
from sde_diffusion.dequantization import (
    TruncatedNormalDequantization,
    UniformDequantization,
    cell_log_volume,
    combine,
    dequantized,
)
from sde_diffusion.ends import prior_mismatch, truncation_offset

KINDS = {
    "uniform": UniformDequantization(),
    "normal": TruncatedNormalDequantization(),
    "wide": TruncatedNormalDequantization(0.5),
}


def ratios(
    kind: str, levels: Tensor, count: int, log_density: Callable[[Tensor], Tensor], draws: int, **options
) -> Tensor:
    """``log p w^D / q`` for each draw and image."""
    found = []
    for draw in range(draws):
        v, log_q = dequantized(KINDS[kind], levels, count, draw=draw, **options)
        volume = cell_log_volume(levels[0].numel(), count, options.get("data_range", (-1.0, 1.0)))
        found.append(log_density(v.double()) + volume - log_q)
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 17, 256])
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 1.0), (-3.0, 5.0)])
def test_the_weights_average_to_the_probability_of_the_level(
    kind: str, count: int, data_range: tuple[float, float]
) -> None:
    """One dimension, a normal density: the probability of a cell is a difference of ``Phi``."""
    n = 20_000
    low, high = data_range
    normal = torch.distributions.Normal(
        torch.tensor((low + high) / 2, dtype=torch.float64), torch.tensor((high - low) / 4)
    )
    k = min(count - 1, int(0.7 * count))
    edges = low + (high - low) * times64(k, k + 1) / count
    exact = float(normal.cdf(edges).diff())
    levels = torch.full((n, 1), k)
    found = ratios(kind, levels, count, lambda v: normal.log_prob(v)[:, 0], 1, data_range=data_range)[0].exp()
    error = 3 * float(found.std()) / n**0.5 + 1e-6 * exact
    assert float(found.mean()) == pytest.approx(exact, abs=error)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bounds_rise_with_the_draws_to_the_probability(kind: str) -> None:
    """Averages of logarithms are below; importance weights close the gap."""
    count, n = 4, 2000
    data = random_mixture(2, (2,))
    levels = torch.tensor([[1, 2]])
    axis = torch.linspace(0, 1, 401, dtype=torch.float64)[:-1] + 1 / 800
    grid = -1 + 2 / count * (torch.cartesian_prod(axis, axis) + levels)
    exact = math.log(float(data.log_prob(grid).exp().mean())) + cell_log_volume(2, count)
    found = ratios(kind, levels.expand(n, 2), count, data.log_prob, 16)
    single = float(combine(found[:1], importance=True).mean())
    average = float(combine(found, importance=False).mean())
    assert average == pytest.approx(single, abs=0.05)
    bounds = [single, *(float(combine(found[:m], importance=True).mean()) for m in (4, 16))]
    noise = 3 * float(found[0].std()) / n**0.5
    assert bounds[0] < bounds[1] + noise < bounds[2] + 2 * noise < exact + 4 * noise
    assert bounds[2] == pytest.approx(exact, abs=0.4 * (exact - single) + noise)


def test_noise_of_the_truncated_normal_is_that_of_the_diffusion() -> None:
    """Its standard deviation in the data range is ``sigma / alpha`` at its start, up to the cut-off at 3."""
    sde, count = sd.VP(), 17
    kind = TruncatedNormalDequantization()
    t = kind.start(sde, count)
    std = float(sde.sigma(t) / sde.alpha(t))
    v, _ = dequantized(kind, torch.full((20_000, 1), 8), count)
    assert float(v.mean()) == pytest.approx(0, abs=4 * std / 20_000**0.5)
    assert float(v.std()) == pytest.approx(std * 0.98658, rel=0.02)  # of a normal cut off at 3
    assert float(v.abs().max()) < 1 / count
    with pytest.raises(ValueError, match="needs noise of 1.3e-05, and VE.* begins with 0.01"):
        kind.start(sd.VE(), 25_600)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_belongs_to_the_image_and_stays_in_its_cell(kind: str) -> None:
    levels = torch.arange(256).repeat(40).reshape(40, 256)
    v, log_q = dequantized(KINDS[kind], levels, 256, seed=1)
    assert torch.equal(((v.double() + 1) * 128).floor().long(), levels)
    part, part_q = dequantized(KINDS[kind], levels[3:5], 256, seed=1, first_index=3)
    assert torch.equal(part, v[3:5])
    assert_close(part_q, log_q[3:5])
    assert not torch.equal(dequantized(KINDS[kind], levels, 256, seed=1, draw=1)[0], v)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (torch.tensor([[0, 1], [3, 17], [-1, 2]]), r"images 1, 2 hold others, such as 17"),
        (torch.tensor([[0.0, 1.0], [0.5, 1.0]]), r"grey levels 0 .. 16; images 1 hold others, such as 0.5"),
        (torch.tensor([[math.nan, 1.0]]), "images 0 hold others"),
        (torch.tensor([[True, False]]), "got torch.bool"),
    ],
)
def test_values_that_are_no_levels_are_named(levels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantized(UniformDequantization(), levels, 17)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TruncatedNormalDequantization(0.0), "edge must be positive and finite, got 0.0"),
        (lambda: cell_log_volume(2, 4, (1.0, 1.0)), "a data range rises"),
        (
            lambda: dequantized(UniformDequantization(), torch.zeros(1, 2), 1),
            "levels must be an integer >= 2",
        ),
    ],
)
def test_wrong_settings_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# The ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sde", [sd.VP(t_max=0.4), sd.VE(sigma_max=5.0), sd.SubVP()], ids=["vp", "ve", "subvp"]
)
def test_mismatch_of_the_prior_for_a_gaussian(sde: sd.SDE) -> None:
    data = random_mixture(1, (3,))
    end = times64(sde.t_max)[0]
    alpha, variance = float(sde.alpha(end)), float(sde.variance(end))
    eye = torch.eye(3, dtype=torch.float64)
    p = torch.distributions.MultivariateNormal(alpha * data.mean, alpha**2 * data.covariance + variance * eye)
    prior = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), variance * eye)
    exact = float(torch.distributions.kl_divergence(p, prior))
    found = prior_mismatch(sde, data.sample(100_000, torch.Generator().manual_seed(0)))
    assert found.gaussian == pytest.approx(exact, rel=0.03)
    assert exact < found.most < 100 * exact + 1


@pytest.mark.parametrize("sde", [sd.VP(), sd.VE(), sd.SubVP()], ids=["vp", "ve", "subvp"])
def test_offset_of_the_truncation_to_first_order(sde: sd.SDE) -> None:
    """Against the densities of a mixture: what remains is of second order."""
    data = mixture_2d()
    x = data.sample(6, torch.Generator().manual_seed(0))
    remainders = []
    for variance in (1e-4, 4e-4):
        t = float(sde.time_of_log_snr(torch.tensor(-math.log(variance), dtype=torch.float64)))
        start = times64(t)[0]
        exact = data.log_prob(x) - data.marginal_log_prob(sde, x, start)
        found = truncation_offset(sde, data.score(sde), x, divergence=sd.ExactDivergence(), t_start=t)
        remainders.append(float((found - exact).abs().max()))
        assert remainders[-1] < 0.15 * float(exact.abs().max())
    # log alpha grows like the variance for VP, and like its root for sub-VP.
    assert remainders[1] / remainders[0] == pytest.approx(4 if isinstance(sde, sd.SubVP) else 16, rel=0.25)
