"""What the network predicts: a linear combination ``a x_0 + b eps`` of data and noise.

Given ``x_t = alpha x_0 + sigma eps`` and the network's ``F = a x_0 + b eps``, both unknowns follow from one
inverse:

    x_0 = (sigma F - b x) / (a sigma - b alpha),        eps = (a x - alpha F) / (a sigma - b alpha).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.tensors import expand

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parametrization:
    """A network output ``F = a x_0 + b eps`` with ``(a, b) = coefficients(alpha, sigma)``.

    ``alpha`` and ``sigma`` have shape () or (B,); ``x``, ``x_0``, ``eps`` and ``F`` have shape (B, *D).
    """

    name: str
    coefficients: Coefficients

    def target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should output, ``a x_0 + b eps``."""
        a, b = self.coefficients(alpha, sigma)
        return expand(a, x0) * x0 + expand(b, x0) * noise

    def to_data(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``x_0 = (sigma F - b x) / (a sigma - b alpha)``."""
        a, b = self.coefficients(alpha, sigma)
        determinant = a * sigma - b * alpha
        return expand(sigma / determinant, x) * output - expand(b / determinant, x) * x

    def to_noise(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """``eps = (a x - alpha F) / (a sigma - b alpha)``."""
        a, b = self.coefficients(alpha, sigma)
        determinant = a * sigma - b * alpha
        return expand(a / determinant, x) * x - expand(alpha / determinant, x) * output


def _zero_one(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(alpha), torch.ones_like(alpha)


NOISE = Parametrization("noise", _zero_one)
"""``eps`` (Ho et al. 2020, eq. 14)."""

DATA = Parametrization("data", lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)))
"""``x_0``."""

SCORE = Parametrization("score", lambda alpha, sigma: (torch.zeros_like(alpha), -torch.ones_like(alpha)))
"""``-eps = sigma * score``, the scaled score (Song et al. 2021, appendix C)."""

RAW_SCORE = Parametrization("raw_score", lambda alpha, sigma: (torch.zeros_like(alpha), -1 / sigma))
"""``-eps / sigma``, the score itself (Song and Ermon 2019, and the VE networks of Song et al. 2021)."""

V = Parametrization("v", lambda alpha, sigma: (-sigma, alpha))
"""``v = alpha eps - sigma x_0`` (Salimans and Ho 2022, appendix D)."""


def edm(sigma_data: float = 1.0) -> Parametrization:
    """The preconditioned target of EDM, of unit variance for data of standard deviation ``sigma_data``.

    With ``s = sigma / alpha`` and ``d = sigma_data``, ``F = (s x_0 - d^2 eps) / (d sqrt(s^2 + d^2))``,
    which is ``(D - c_skip y) / c_out`` of Karras et al. (2022), table 1 and eq. 7. For ``d = 1``: ``(sigma,
    -alpha) / sqrt(alpha^2 + sigma^2)``.
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data!r}")

    def coefficients(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = sigma_data * (sigma.square() + (alpha * sigma_data).square()).sqrt()
        return sigma / norm, -alpha * sigma_data**2 / norm

    return Parametrization("edm", coefficients)


def parametrization(name: str, sigma_data: float = 1.0, others: tuple[str, ...] = ()) -> Parametrization:
    """The parametrization of a name from a config: noise, data, score, raw_score, v or edm.

    Args:
        name: the name.
        sigma_data: the standard deviation of the data, for edm.
        others: names that the caller knows besides, for the error message.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    fixed = {p.name: p for p in (NOISE, DATA, SCORE, RAW_SCORE, V)}
    if name == "edm":
        return edm(sigma_data)
    if name not in fixed:
        raise unknown_name("parametrization", name, (*fixed, "edm", *others))
    return fixed[name]
