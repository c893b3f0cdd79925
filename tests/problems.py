"""The analytic cases that the tests draw on: processes, mixtures, exact flows, measures of samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sde_diffusion as sd

FIXTURES = Path(__file__).resolve().parent / "fixtures"

SDES: dict[str, sd.SDE] = {
    "vp": sd.VP(),
    "subvp": sd.SubVP(),
    "ve": sd.VE(),
    "cosine": sd.CosineVP(),
    "ddpm": sd.DDPM(sd.VP().discretize(1000)),
}

PREDICTORS: dict[str, sd.Predictor] = {
    "euler-maruyama": sd.EulerMaruyama(),
    "euler-maruyama-1.5": sd.EulerMaruyama(stochasticity=1.5),
    "reverse-diffusion": sd.ReverseDiffusion(),
    "ancestral-small": sd.Ancestral(variance="small"),
    "ancestral-large": sd.Ancestral(variance="large"),
    "ddim": sd.DDIM(),
    "ddim-half": sd.DDIM(eta=0.5),
    "ddim-eta-1": sd.DDIM(eta=1.0),
    "sde-dpm-solver++": sd.SDEDPMSolverPP(),
    "sa-solver": sd.SASolver(),
}

CORRECTORS: dict[str, tuple[sd.Corrector, ...]] = {
    "none": (),
    "langevin": (sd.Langevin(snr=0.16),),
    "annealed-langevin": (sd.AnnealedLangevin(snr=0.16),),
}

# Every corrector of the package with steps small enough for a mixture in the plane.
KERNELS: dict[str, sd.Corrector] = {
    "langevin": sd.Langevin(snr=0.1),
    "langevin-batch": sd.Langevin.original(snr=0.1),
    "annealed": sd.AnnealedLangevin(snr=0.1),
    "sgld": sd.SGLD(sd.SigmaScaled(0.02)),
    "sgld-decaying": sd.SGLD.decaying(0.04),
    "sgld-displacement": sd.SGLD(sd.DualAveraging(0.2, of="displacement", initial=0.01)),
    "psgld": sd.PreconditionedSGLD(sd.SigmaScaled(0.01)),
    "baoab": sd.Underdamped(sd.SigmaScaled(0.05)),
    "sghmc": sd.SGHMC(sd.SigmaScaled(0.002)),
    "mala": sd.MALA(sd.SigmaScaled(0.3), energy="exact"),
    "mala-path": sd.MALA(sd.SigmaScaled(0.2), points=4),
    "mala-adapted": sd.MALA(sd.DualAveraging(0.8), energy="exact"),
    "barker": sd.Barker(sd.SigmaScaled(0.3), energy="exact"),
    "barker-unadjusted": sd.Barker(sd.SigmaScaled(0.02), adjusted=False),
    "tamed": sd.TamedLangevin(sd.SigmaScaled(0.02)),
    "implicit": sd.ImplicitLangevin(sd.SigmaScaled(0.1)),
    "renoise": sd.Renoise(0.02),
}


def times64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_grid(sde: sd.SDE, n: int = 60) -> Tensor:
    """``n`` times from 1e-5 to t_max, equally spaced in their logarithm."""
    return torch.logspace(-5, math.log10(sde.t_max), n, dtype=torch.float64).clamp(1e-5, sde.t_max)


# Distributions ------------------------------------------------------------------------------------


@functools.lru_cache
def mixture_2d() -> sd.GaussianMixture:
    """Three components with unequal weights and full covariances; each has a mode of its own."""
    return sd.GaussianMixture(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[2.0, 1.0], [-1.5, 0.5], [0.0, -2.0]]),
        torch.tensor(
            [[[0.30, 0.12], [0.12, 0.20]], [[0.15, -0.05], [-0.05, 0.25]], [[0.40, 0.0], [0.0, 0.05]]]
        ),
    )


def random_covariances(k: int, d: int, seed: int = 0) -> Tensor:
    """``k`` full covariances with eigenvalues 0.1 to 2 along random directions."""
    generator = torch.Generator().manual_seed(seed)
    rotations, _ = torch.linalg.qr(torch.randn(k, d, d, dtype=torch.float64, generator=generator))
    eigenvalues = 0.1 + 1.9 * torch.rand(k, d, dtype=torch.float64, generator=generator)
    return rotations @ torch.diag_embed(eigenvalues) @ rotations.mT


def random_mixture(k: int, shape: tuple[int, ...], seed: int = 0) -> sd.GaussianMixture:
    """``k`` components of random weights, means and full covariances over data of ``shape``."""
    generator = torch.Generator().manual_seed(seed + 1)
    weights = 0.2 + torch.rand(k, dtype=torch.float64, generator=generator)
    means = torch.randn(k, *shape, dtype=torch.float64, generator=generator)
    return sd.GaussianMixture(weights, means, random_covariances(k, math.prod(shape), seed))


def gaussian_2d() -> sd.GaussianMixture:
    """One Gaussian with a full covariance."""
    return sd.GaussianMixture(
        torch.ones(1), torch.tensor([[0.7, -0.4]]), torch.tensor([[[0.5, 0.2], [0.2, 0.3]]])
    )


def marginal_moments(mixture: sd.GaussianMixture, sde: sd.SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of ``p_t``."""
    alpha, variance = sde.alpha(t), sde.variance(t)
    eye = torch.eye(len(mixture.mean), dtype=torch.float64)
    return alpha * mixture.mean, alpha**2 * mixture.covariance + variance * eye


# Exact answers ------------------------------------------------------------------------------------


def gaussian_flow(gaussian: sd.GaussianMixture, sde: sd.SDE, x: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Where the probability-flow ODE carries ``x`` from ``t0`` to ``t1`` for Gaussian data, in closed form.

    Along an eigenvector of the covariance the centred coordinate obeys ``u' = (f + g^2 / (2 v)) u``
    with ``v = alpha^2 lambda + sigma^2``, and so does ``sqrt(v)``, since ``v' = 2 f v + g^2``: the two
    stay proportional.
    """
    eigenvalues, vectors = torch.linalg.eigh(gaussian.covariances[0])
    mean = gaussian.means[0]
    start, end = (sde.alpha(t) ** 2 * eigenvalues + sde.variance(t) for t in (t0, t1))
    along = (x.flatten(1).double() - sde.alpha(t0) * mean) @ vectors
    return ((along * (end / start).sqrt()) @ vectors.T + sde.alpha(t1) * mean).reshape(x.shape)


def affine_map(step: Callable[[Tensor, Tensor], Tensor], d: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(A, b, B)`` of a step that is ``x, z -> A x + b + B z``, read off its values at unit vectors."""
    eye, zero = torch.eye(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    x = torch.cat([torch.zeros(1, d, dtype=torch.float64), eye, zero])
    z = torch.cat([torch.zeros(1, d, dtype=torch.float64), zero, eye])
    y = step(x, z)
    return (y[1 : d + 1] - y[0]).T, y[0], (y[d + 1 :] - y[0]).T


def push_moments(
    step: Callable[[Tensor, Tensor], Tensor], mean: Tensor, covariance: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance after an affine step with standard normal noise."""
    a, b, noise = affine_map(step, len(mean))
    return a @ mean + b, a @ covariance @ a.T + noise @ noise.T


def run_moments(
    predictor: sd.Predictor, sde: sd.SDE, data: sd.GaussianMixture, times: Tensor, draws: int | None = None
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance of what a sampler makes of Gaussian data, started from the true ``p_T``.

    With a linear score a whole run is an affine function of its initial state and of each of its draws (of which
    there are ``draws``, default one a step), and can be read off its values at unit vectors.
    """
    mean, covariance = marginal_moments(data, sde, times[0])
    d, given = len(mean), 0
    draws = len(times) - 1 if draws is None else draws
    x = torch.zeros(1 + d + draws * d, d, dtype=torch.float64)
    eye, first = torch.eye(d, dtype=torch.float64), 1 + d
    x[1:first] = eye

    def unit_vectors() -> Tensor:
        nonlocal given
        z = torch.zeros_like(x)
        z[first + given * d : first + (given + 1) * d] = eye
        given += 1
        return z

    out = sd.sample(
        sde,
        data.score(sde),
        tuple(x.shape),
        predictor=predictor,
        times=times,
        noise=unit_vectors,
        x_init=x,
        denoise=False,
        dtype=torch.float64,
    ).x
    assert given in (0, draws)
    a, noise = (out[1:first] - out[0]).T, out[first:] - out[0]
    return a @ mean + out[0], a @ covariance @ a.T + noise.T @ noise


def slope(sizes: list[int], errors: list[float]) -> float:
    """The order of convergence: minus the slope of log(error) against log(size)."""
    return -float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


# Measuring samples --------------------------------------------------------------------------------


def _moment_statistics(x: Tensor, mixture: sd.GaussianMixture) -> dict[str, tuple[Tensor, Tensor]]:
    """Functions of ``x``, (n, m), and their expectations, (m,), by the name of what they measure."""
    flat = x.flatten(1).double()
    posterior = mixture.posterior_weights(x)[..., None]
    centred, offsets = flat - mixture.mean, flat[:, None] - mixture.means
    weights = mixture.weights[:, None, None]

    def squares(v: Tensor) -> Tensor:
        return v[..., :, None] * v[..., None, :]

    statistics = {
        "mean": (flat, mixture.mean),
        "covariance": (squares(centred), mixture.covariance),
        "weights": (posterior, mixture.weights),
        "component means": (posterior * offsets, torch.zeros_like(mixture.means)),
        "component covariances": (posterior[..., None] * squares(offsets), weights * mixture.covariances),
    }
    return {name: (values.flatten(1), want.flatten()) for name, (values, want) in statistics.items()}


@functools.lru_cache
def _statistics_spread(mixture: sd.GaussianMixture) -> dict[str, Tensor]:
    """The standard deviations of the same functions, measured on many exact samples."""
    exact = mixture.sample(50_000, torch.Generator().manual_seed(12345))
    return {name: values.std(0) for name, (values, _) in _moment_statistics(exact, mixture).items()}


def moment_errors(x: Tensor, mixture: sd.GaussianMixture) -> dict[str, float]:
    """How far the samples' moments are from the mixture's, in standard errors (the largest over the entries).

    Beside the mean and covariance of the whole, those of each component: for exact samples and the
    posterior probability ``r_k(x)`` of component k, ``E[r_k(x) h(x)] = w_k E_k[h]``, which for ``h = 1``,
    ``x - mu_k`` and its square gives weights, means and covariances without assigning samples to components.
    Every statistic is an average of a function of ``x``; its standard error is that of independent samples.
    """
    spread = _statistics_spread(mixture)
    return {
        name: float(((values.mean(0) - want).abs() * len(x) ** 0.5 / (spread[name] + 1e-12)).max())
        for name, (values, want) in _moment_statistics(x, mixture).items()
    }


def assert_moments(x: Tensor, mixture: sd.GaussianMixture, standard_errors: float) -> None:
    """Means, covariances and weights of ``x`` are the mixture's within so many standard errors."""
    assert bool(torch.isfinite(x).all())
    errors = moment_errors(x, mixture)
    assert max(errors.values()) <= standard_errors, errors


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 64) -> float:
    """The root mean square over directions of the 2-Wasserstein distance between the projections."""
    angles = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    axes = torch.stack([angles.cos(), angles.sin()])
    a, b = ((z.double() @ axes).sort(0).values for z in (x, y))
    return float((a - b).square().mean().sqrt())


# Scores and counters ------------------------------------------------------------------------------


class CallCounter:
    """A score or field that counts its calls and remembers the times and shapes it was asked at."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.calls = 0
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        self.times.append(torch.as_tensor(t).detach().clone())
        return self.function(x, t)


def queue_noise(draws: Tensor) -> Callable[[], Tensor]:
    """A noise source that hands out the rows of ``draws`` in order."""
    iterator = iter(draws)
    return lambda: next(iterator)


LIKELIHOOD_DATA = {
    "gaussian-8": random_mixture(1, (8,)),
    "mixture-8": random_mixture(3, (8,)),
    "images": random_mixture(2, (1, 4, 4)),
}


def exact_likelihood(sde: sd.SDE, data: sd.GaussianMixture, x: Tensor, **options) -> sd.Likelihood:
    """With the true ``p_T`` in place of the prior, so that the only error is the solver's."""
    end = times64(sde.t_max)[0]
    settings = {"prior_log_prob": lambda z: data.marginal_log_prob(sde, z, end)} | options
    return sd.log_likelihood(sde, data.score(sde), x, **settings)


def samples(data: sd.GaussianMixture, n: int, seed: int = 0) -> Tensor:
    return data.sample(n, torch.Generator().manual_seed(seed))
