"""What a likelihood through the probability-flow ODE leaves out at the two ends of its interval, estimated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.divergence import Divergence, HutchinsonDivergence
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import batched_time, expand

__all__ = ["PriorMismatch", "prior_mismatch", "truncation_offset"]


@dataclass(frozen=True)
class PriorMismatch:
    """``KL(p_T || N(0, sigma_T^2 I))`` in nats: what the prior costs on average over the data.

    Attributes:
        gaussian: of data that are Gaussian with the given mean and covariance.
        most: ``alpha_T^2 E|x|^2 / (2 sigma_T^2)``, which the divergence cannot exceed (by convexity).
    """

    gaussian: float
    most: float


def prior_mismatch(sde: SDE, x: Tensor) -> PriorMismatch:
    """How far ``p_T`` is from the prior, from data (N, *D): the more the better for ``gaussian``."""
    flat = x.flatten(1).double()
    snr = float(sde.log_snr(torch.tensor(sde.t_max, dtype=torch.float64)).detach().exp())
    most = 0.5 * snr * float(flat.square().sum(1).mean())
    centred = flat - flat.mean(0)
    # Squared singular values: eigenvalues of the covariance, those that are 0 left out.
    eigenvalues = torch.linalg.svdvals(centred).square() / len(flat)
    return PriorMismatch(most - 0.5 * float(torch.log1p(snr * eigenvalues).sum()), most)


def truncation_offset(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    divergence: Divergence | None = None,
    seed: int = 0,
    first_index: int = 0,
    t_start: float | None = None,
) -> Tensor:
    """``log p_0(x) - log p_{t_min}(x)`` to first order in ``log alpha`` and ``sigma^2`` of ``t_min``, nats (B,).

    ``x_t = alpha (x_0 + rho eps)`` changes the density by scaling, ``-log alpha (D + x . s)``, and by the heat
    equation, ``sigma^2 (div s + |s|^2) / 2``, with s the score. Where the offset is not small beside 1, as for the
    smoothed density of discrete data, it is no estimate; then the bound with a decoder
    (:func:`~sde_diffusion.bound.ode_bound`) is what says something of the data themselves.

    Args:
        sde, score, x: as for :func:`~sde_diffusion.likelihood.log_likelihood`.
        divergence: default one Rademacher probe.
        seed, first_index: of the probes.
        t_start: instead of ``t_min``.
    """
    estimator = divergence or HutchinsonDivergence()
    time = batched_time(sde.t_min if t_start is None else t_start, x).double()
    prepared = estimator.prepare(x, seed, first_index)
    with torch.no_grad():
        value, trace = estimator(lambda t, y: score(y, t), time, x, prepared)
    log_alpha, variance = (
        expand(sde.log_alpha(time), trace.double()),
        expand(sde.variance(time), trace.double()),
    )
    s, y = value.flatten(1).double(), x.flatten(1).double()
    scaling = log_alpha * (y.shape[1] + (y * s).sum(1))
    return scaling - 0.5 * variance * (trace.double() + s.square().sum(1))
