"""How well samples fit a target: distances, modes, moments, with bootstrap standard errors."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from sde_diffusion.arrays import Array
from sde_diffusion.compare.targets import Target
from sde_diffusion.metrics import bootstrap_frechet, wasserstein2

RESAMPLES = 200
BLOCK = 128
"""W2 is the mean over blocks of so many samples, each against as many exact ones."""


def _value(value: float, error: float) -> dict[str, float]:
    return {"value": float(value), "error": float(error)}


@functools.lru_cache(maxsize=16)
def _resampled(n: int, seed: int) -> Array:
    """Bootstrap weights (RESAMPLES, n): how often each sample is drawn, as a share. The same for all arms."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def spread(y: Array) -> float:
    """``E|y - y'|`` of a reference, without bias."""
    return float(cdist(y, y).sum() / (len(y) * (len(y) - 1)))


def energy(x: Array, y: Array, y_spread: float, seed: int = 0) -> dict[str, float]:
    """``2 E|x - y| - E|x - x'| - E|y - y'|``, unbiased, and its bootstrap error over ``x`` (the reference is common).

    ``y_spread`` is ``E|y - y'|``.
    """
    return _energy(cdist(x, x), cdist(x, y).mean(1), y_spread, seed)


def _energy(within: Array, to_reference: Array, y_spread: float, seed: int) -> dict[str, float]:
    """:func:`energy` from the distances within ``x`` (n, n) and the mean ones to ``y`` (n,)."""
    n = len(within)
    value = 2 * to_reference.mean() - within.sum() / (n * (n - 1)) - y_spread
    weights = _resampled(n, seed)
    # A resample holds pairs of one sample and itself, which are 0 apart: a share 1/n more than in the sample.
    quadratic = np.einsum("bi,bi->b", weights @ within, weights) * n / (n - 1)
    return _value(value, np.std(2 * weights @ to_reference - quadratic, ddof=1))


def w2(x: Array, y: Array) -> dict[str, float]:
    """The exact 2-Wasserstein distance of blocks of samples to blocks of exact ones: mean, bootstrap error."""
    blocks = min(len(x), len(y)) // BLOCK
    if blocks == 0:
        return _value(wasserstein2(x[: len(y)], y[: len(x)]), float("nan"))
    values = np.array(
        [wasserstein2(x[i * BLOCK : (i + 1) * BLOCK], y[i * BLOCK : (i + 1) * BLOCK]) for i in range(blocks)]
    )
    error = np.std(_resampled(blocks, 0) @ values, ddof=1) if blocks > 1 else float("nan")
    return _value(values.mean(), error)


def modes(x: Tensor, target: Target) -> dict[str, Any]:
    """Total variation between the weights of the modes, by the nearest mean, and the share of modes that have
    at least a fifth of their weight; ``outside``: samples further than 5 standard deviations from any."""
    assert target.mixture is not None
    means = target.mixture.means.numpy()
    std = float(target.mixture.covariances[0, 0, 0].sqrt())
    distance = cdist(x.flatten(1).numpy(), means)
    hits = np.eye(len(means))[distance.argmin(1)]
    weights = target.mixture.weights.numpy()
    resampled = _resampled(len(x), 1) @ hits
    error = 0.5 * np.abs(hits.mean(0) - weights).sum()
    covered = (hits.mean(0) >= weights / 5).mean()
    return {
        "mode_error": _value(error, np.std(0.5 * np.abs(resampled - weights).sum(1), ddof=1)),
        "coverage": _value(covered, np.std((resampled >= weights / 5).mean(1), ddof=1)),
        "outside": _value(
            (distance.min(1) > 5 * std).mean(), np.std(distance.min(1) > 5 * std) / len(x) ** 0.5
        ),
    }


def moments(x: Array, y_mean: Array, y_std: Array) -> dict[str, dict[str, float]]:
    """The largest error of a coordinate's mean (in its standard deviations) and of its standard deviation
    (relative)."""
    weights = _resampled(len(x), 2)
    mean, square = weights @ x, weights @ x**2
    std = np.sqrt(np.maximum(square - mean**2, 0))
    of_mean, of_std = np.abs(x.mean(0) - y_mean) / y_std, np.abs(x.std(0) / y_std - 1)
    i, j = int(of_mean.argmax()), int(of_std.argmax())
    return {
        "mean_error": _value(of_mean[i], np.std(mean[:, i] / y_std[i], ddof=1)),
        "std_error": _value(of_std[j], np.std(std[:, j] / y_std[j], ddof=1)),
    }


def coordinates(x: Tensor, target: Target) -> Array:
    """``(x / scale, C_k^(-1/2) (x - mu_k))`` with the most probable component k, (n, 2 D): where a sample is,
    and where in its component.

    In plain coordinates the energy distance hardly sees the width of narrow modes and directions. For targets
    that are no mixtures ``x`` itself.
    """
    flat = x.flatten(1).double()
    if target.mixture is None:
        return flat.numpy()
    mixture = target.mixture
    component = mixture.posterior_weights(flat).argmax(1)
    # C^(-1/2) = L^(-1) up to a rotation, with C = L L'.
    roots = torch.linalg.cholesky(mixture.covariances)[component]
    residual = torch.linalg.solve_triangular(roots, (flat - mixture.means[component])[..., None], upper=False)
    return torch.cat([flat / target.scale, residual[..., 0]], 1).numpy()


@functools.lru_cache(maxsize=8)
def _reference(target: Target, n: int, seed: int) -> tuple[Tensor, Array, float]:
    """Exact samples, their coordinates and spread: the same for all arms."""
    exact = target.sample(n, 10_000 + seed)
    seen = coordinates(exact, target)
    return exact, seen, spread(seen)


def measure(x: Tensor, target: Target, seed: int = 1) -> dict[str, Any]:
    """All of them. Samples that are no numbers or far away (beyond 1e3 scales) are counted as ``diverged``, and the
    distances are infinite if there are any.

    The energy distance is that of :func:`coordinates`, W2 in plain ones.

    ``energy_a`` and ``energy_b`` are those of the even and of the odd samples: one to choose a step size by,
    the other to judge the choice.
    """
    flat = x.flatten(1).double()
    bad = ~torch.isfinite(flat).all(1) | (flat.abs().amax(1) > 1e3 * target.scale)
    result: dict[str, Any] = {"diverged": float(bad.double().mean())}
    if bool(bad.any()):
        return result
    exact_samples, b, own = _reference(target, len(x), seed)
    x = target.observe(x)
    flat = x.flatten(1).double()
    reference, points, a = exact_samples.flatten(1).double().numpy(), flat.numpy(), coordinates(x, target)
    within, across = cdist(a, a), cdist(a, b).mean(1)
    result["energy"] = _energy(within, across, own, 0)
    result["energy_a"], result["energy_b"] = (
        _energy(within[i::2, i::2], across[i::2], own, i) for i in (0, 1)
    )
    result["w2"] = w2(points, reference)
    if target.mixture is not None:
        exact = target.mixture
        basis = torch.linalg.eigh(exact.covariance)[1]  # along the principal axes
        mean, std = exact.mean @ basis, (basis.T @ exact.covariance @ basis).diagonal().sqrt()
        result |= moments((flat @ basis).numpy(), mean.numpy(), std.numpy())
    if target.modes:
        result |= modes(flat, target)
    if target.features is not None:
        estimate = bootstrap_frechet(target.features(x), target.features(exact_samples))
        result["frechet"] = _value(*estimate)
    return result
