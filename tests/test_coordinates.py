"""Coordinates of the likelihood's ODE: the result is the same in each, errors are what was asked for, reach."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import sde_diffusion as sd
from problems import (
    LIKELIHOOD_DATA as DATA,
)
from problems import (
    SDES,
    mixture_2d,
    samples,
    times64,
)
from problems import exact_likelihood as likelihood

sdes = pytest.mark.parametrize("sde", SDES.values(), ids=SDES)
COORDINATES = {
    "angle": sd.LogSNRCoordinates(),
    "angle-0.3": sd.LogSNRCoordinates(0.3),
    "log-snr": sd.LogSNRCoordinates(1.0, "log_snr"),
    "log-snr-2": sd.LogSNRCoordinates(2.0, "log_snr"),
    "time": sd.TimeCoordinates(),
}


@pytest.mark.parametrize("name", COORDINATES)
@pytest.mark.parametrize("sde", [sd.SubVP(), sd.VE(), sd.EDM()], ids=["subvp", "ve", "edm"])
def test_coordinates_do_not_change_the_result(sde: sd.SDE, name: str) -> None:
    data = mixture_2d()
    x = samples(data, 4)
    exact = data.marginal_log_prob(sde, x, times64(sde.t_min)[0])
    found = likelihood(sde, data, x, coordinates=COORDINATES[name])
    assert_close(found.log_prob, exact, rtol=0, atol=2e-4)
    if sde.t_max == 1:
        flow = likelihood(sde, data, x).latent
        assert_close(found.latent, flow, rtol=2e-4, atol=2e-4)


def test_the_angle_needs_the_same_few_evaluations_whatever_the_process() -> None:
    data = mixture_2d()
    x = samples(data, 3)
    needed: dict[str, dict[str, float]] = {name: {} for name in ("angle", "log-snr", "time")}
    for name, found in needed.items():
        for process, sde in SDES.items():
            out = likelihood(sde, data, x, coordinates=COORDINATES[name], rtol=1e-4, atol=1e-4)
            found[process] = float(out.nfe_per_sample.double().mean())
    angle = needed["angle"]
    assert max(angle.values()) < 1.25 * min(angle.values()) < 85
    assert angle["ve"] < 0.6 * needed["time"]["ve"]
    for process in SDES:
        assert angle[process] < 0.7 * needed["log-snr"][process]
        assert angle[process] < 0.9 * needed["time"][process]


def test_a_process_that_starts_without_noise() -> None:
    """At ``t_min = 0`` the log-SNR is infinite and the angle 0."""
    data, sde = mixture_2d(), sd.VP(t_min=0.0)
    x = samples(data, 4)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return data.score(sde)(x, t)

    found = sd.log_likelihood(
        sde, score, x, prior_log_prob=lambda z: data.marginal_log_prob(sde, z, times64(1.0)[0])
    )
    assert_close(found.log_prob, data.log_prob(x), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="the log-SNR is infinite at t = 0"):
        sd.log_likelihood(sde, score, x, coordinates=COORDINATES["log-snr"])


@sdes
@pytest.mark.parametrize("name", ["angle", "angle-0.3", "log-snr-2", "time"])
def test_the_score_is_found_again_in_the_field(sde: sd.SDE, name: str) -> None:
    """``grad_z log p`` is ``scale`` times the score in x."""
    data, way, when = mixture_2d(), COORDINATES[name], 0.3 * sde.t_max
    x = samples(data, 4)
    u = torch.full((4,), way.variable(sde, when), dtype=torch.float64)
    scale = way.scale(sde, when)
    z = x / scale
    found = way.score(sde, u, z, way.field(sde, data.score(sde))(u, z))
    assert_close(found, scale * data.score(sde)(x, times64(when)[0]), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["vp", "ve"])
@pytest.mark.parametrize("data", [mixture_2d(), DATA["mixture-8"]], ids=["2", "8"])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-3])
def test_the_error_is_what_was_asked_for(name: str, data: sd.GaussianMixture, tolerance: float) -> None:
    sde = SDES[name]
    x = samples(data, 16)
    found = likelihood(sde, data, x, rtol=tolerance, atol=tolerance).log_prob
    error = found - data.marginal_log_prob(sde, x, times64(sde.t_min)[0])
    assert float(error.square().mean().sqrt()) < tolerance * (1 + data.means.shape[1])


class Labelled:
    """A score that belongs to its batch: each sample has a mean of its own. It notes the sizes of batches."""

    def __init__(self, sde: sd.SDE, means: Tensor, spread: Tensor, sizes: list[int]) -> None:
        self.sde, self.means, self.spread, self.sizes = sde, means, spread, sizes

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.sizes.append(len(x))
        alpha, variance = self.sde.alpha(t)[:, None], self.sde.variance(t)[:, None]
        return (alpha * self.means - x) / (alpha**2 * self.spread[:, None] + variance)

    def rows(self, index: Tensor) -> Labelled:
        return Labelled(self.sde, self.means[index], self.spread[index], self.sizes)


def test_samples_that_have_arrived_leave_the_batch() -> None:
    """And those that stay keep their conditions and their probes, and are given back in their order."""
    sde, n, sizes = sd.VE(), 6, []
    means, spread = 3 * torch.randn(n, 3, dtype=torch.float64), times64(1, 1e-4, 1, 1e-2, 4, 1e-3)
    x = means + spread.sqrt()[:, None] * torch.randn(n, 3, dtype=torch.float64)
    score = Labelled(sde, means, spread, sizes)
    options = {"divergence": "gaussian", "rtol": 1e-4, "atol": 1e-4}
    leaving = sd.log_likelihood(sde, score, x, **options)
    assert sizes[0] == n > sizes[-1] and sum(sizes) < n * len(sizes)
    waiting = sd.log_likelihood(sde, lambda x, t: score(x, t), x, **options)
    assert_close(leaving.log_prob, waiting.log_prob, rtol=1e-9, atol=1e-9)
    assert_close(leaving.latent, waiting.latent, rtol=1e-9, atol=1e-9)
    assert torch.equal(leaving.nfe_per_sample, waiting.nfe_per_sample)
    assert len(set(leaving.nfe_per_sample.tolist())) > 1
    assert sum(sizes[: leaving.nfe]) == int(leaving.nfe_per_sample.sum())


@pytest.mark.parametrize("name", sorted(COORDINATES))
@pytest.mark.parametrize("process", sorted(SDES))
def test_a_reach_multiplies_the_noise(name: str, process: str) -> None:
    sde, coordinates = SDES[process], COORDINATES[name]

    def noise(u: Tensor) -> Tensor:
        if isinstance(coordinates, sd.TimeCoordinates):
            return (-0.5 * sde.log_snr(u)).exp()
        assert isinstance(coordinates, sd.LogSNRCoordinates)
        return coordinates.sigma_data * u.tan() if coordinates.variable_name == "angle" else u.exp()

    t = sde.t_min + torch.logspace(-3, -0.2, 8, dtype=torch.float64) * (sde.t_max - sde.t_min)
    u = torch.tensor([coordinates.variable(sde, float(time)) for time in t], dtype=torch.float64)
    ends = u + coordinates.reach(sde, u, 1.5)
    grown = noise(ends) / noise(u)
    if name.startswith("angle"):  # as the noise where that is small but not nothing
        small = (u > 0.003) & (ends < 0.3)
        assert small.any() and bool((ends > u).all())
        assert_close(grown[small], torch.full_like(grown[small], 1.5), rtol=0.06, atol=0)
    else:
        assert_close(grown, torch.full_like(grown, 1.5), rtol=1e-6, atol=0)


def test_without_any_noise_time_is_left_by_a_short_step() -> None:
    sde, data = sd.VP(t_min=0.0), mixture_2d()
    x = samples(data, 3)
    found = sd.log_likelihood(
        sde,
        data.score(sde),
        x,
        coordinates=sd.TimeCoordinates(),
        prior_log_prob=lambda z: data.marginal_log_prob(sde, z, times64(1.0)[0]),
    )
    assert_close(found.log_prob, data.log_prob(x), rtol=0, atol=1e-4)


def test_a_reach_in_time_ends_with_the_process() -> None:
    sde = sd.VP()
    u = torch.tensor([0.9, 0.99, 1.0], dtype=torch.float64)
    ends = u + sd.TimeCoordinates().reach(sde, u, 100.0)
    assert_close(ends[:2], torch.ones(2, dtype=torch.float64))
    assert 1 < float(ends[2]) < 1.02  # a step is never nothing
