"""Distributions whose score is known in closed form at every noise level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import as_time


class GaussianMixture:
    """``p(x) = sum_k w_k N(x; mu_k, C_k)`` with full covariances, in any dimension.

    Under a linear SDE the marginal at time t is the mixture with means ``alpha mu_k`` and covariances
    ``alpha^2 C_k + sigma^2 I``, whose score is exact. Works in float64 inside; results have the type of
    ``x``.

    Args:
        weights: (K,), positive; normalised to sum to 1.
        means: (K, D), or (K, *shape) for data that are not vectors.
        covariances: (K, D, D), symmetric and positive semi-definite, over flattened data.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, covariances that are not
        symmetric or not positive
            semi-definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        weights, means, covariances = (
            torch.as_tensor(a, dtype=torch.float64).detach() for a in (weights, means, covariances)
        )
        if weights.ndim != 1 or means.ndim < 2 or means.shape[0] != len(weights):
            raise ValueError(
                f"need weights (K,) and means (K, *D), got {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        self.shape = means.shape[1:]
        means = means.flatten(1)
        k, d = means.shape
        if covariances.shape != (k, d, d):
            raise ValueError(f"covariances must have shape {(k, d, d)}, got {tuple(covariances.shape)}")
        if not bool((weights > 0).all()) or not bool(torch.isfinite(weights).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        if not torch.allclose(covariances, covariances.mT, rtol=1e-6, atol=1e-12):
            raise ValueError("covariances must be symmetric")
        eigenvalues, eigenvectors = torch.linalg.eigh(covariances)
        if bool((eigenvalues < -1e-9 * eigenvalues.abs().amax(1, keepdim=True)).any()):
            raise ValueError(
                f"covariances must be positive semi-definite, got the eigenvalue {eigenvalues.min():.4g}"
            )
        self.weights = weights / weights.sum()
        self.means = means
        self.covariances = covariances
        self._eigenvalues = eigenvalues.clamp_min(0)
        self._eigenvectors = eigenvectors

    @property
    def mean(self) -> Tensor:
        """The mean of the mixture, (D,) flattened."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """The covariance of the mixture, (D, D)."""
        centred = self.means - self.mean
        between = torch.einsum("k,ki,kj->ij", self.weights, centred, centred)
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + between

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact samples, float64 (n, *shape)."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        scaled = self._eigenvalues[component].sqrt() * z
        x = self.means[component] + torch.einsum("nij,nj->ni", self._eigenvectors[component], scaled)
        return x.reshape(n, *self.shape)

    def _components(
        self, x: Tensor, alpha: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Joint log-densities (n, K), centred coordinates and variances along the eigenvectors (n, K, D),
        eigenvectors."""
        weights, means, eigenvalues, eigenvectors = (
            a.to(x.device) for a in (self.weights, self.means, self._eigenvalues, self._eigenvectors)
        )
        flat = x.flatten(1).double()
        alpha, variance = alpha.reshape(-1, 1, 1), variance.reshape(-1, 1, 1)
        centred = flat[:, None] - alpha * means
        along = torch.einsum("kij,nki->nkj", eigenvectors, centred)
        variances = alpha**2 * eigenvalues + variance
        log_normal = -0.5 * (along.square() / variances + variances.log() + math.log(2 * math.pi)).sum(2)
        return weights.log() + log_normal, along, variances, eigenvectors

    def _check_density(self) -> None:
        if bool((self._eigenvalues <= 1e-14 * self._eigenvalues.amax(1, keepdim=True)).any()):
            raise ValueError("a mixture with a singular covariance has no density; diffused, it has one")

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x)`` in nats, (n, *shape) -> (n,).

        Raises:
            ValueError: a covariance is singular, so that there is no density.
        """
        self._check_density()
        joint, *_ = self._components(
            x, x.new_ones((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        )
        return joint.logsumexp(1).to(x.dtype)

    def marginal_log_prob(self, sde: SDE, x: Tensor, t: Tensor) -> Tensor:
        """``log p_t(x)`` in nats under ``sde``, (n, *shape) -> (n,)."""
        t = as_time(t).to(x.device).double()
        return self._components(x, sde.alpha(t), sde.variance(t))[0].logsumexp(1).to(x.dtype)

    def component_scores(self, sde: SDE, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``log(w_k p_t(x | k))`` (n, K) and ``grad_x log p_t(x | k)`` (n, K, D) under ``sde``, float64."""
        t = as_time(t).to(x.device).double()
        joint, along, variances, eigenvectors = self._components(x, sde.alpha(t), sde.variance(t))
        return joint, -torch.einsum("kij,nkj->nki", eigenvectors, along / variances)

    def score(self, sde: SDE) -> MixtureScore:
        """The exact score ``(x, t) -> grad_x log p_t(x)`` of the mixture diffused by ``sde``; it has the energy, too:
        ``log_prob(x, t)``."""
        return MixtureScore(self, sde)

    def posterior_weights(self, x: Tensor) -> Tensor:
        """The probability that ``x`` came from each component, (n, *shape) -> (n, K)."""
        self._check_density()
        one, zero = x.new_ones((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        return self._components(x, one, zero)[0].softmax(1)


@dataclass(frozen=True, eq=False)
class MixtureScore:
    """The exact score of a mixture diffused by an SDE, and the log-density that it is the gradient of."""

    mixture: GaussianMixture
    sde: SDE

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """``grad_x log p_t(x)``, of the shape and type of ``x``."""
        t = as_time(t).to(x.device).double()
        joint, along, variances, eigenvectors = self.mixture._components(
            x, self.sde.alpha(t), self.sde.variance(t)
        )
        gradient = -torch.einsum("nk,kij,nkj->ni", joint.softmax(1), eigenvectors, along / variances)
        return gradient.reshape(x.shape).to(x.dtype)

    def rows(self, index: Tensor) -> MixtureScore:
        """The score of some samples of a batch: it is the same for all."""
        return self

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """``log p_t(x)`` in nats, (n,)."""
        return self.mixture.marginal_log_prob(self.sde, x, t)
