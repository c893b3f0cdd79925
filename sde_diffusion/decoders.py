"""The last term of the bound: the density or probability of the data, given the mean and variance of the last
step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Decoder", "DiscretizedGaussian", "GaussianDecoder", "TanhGaussian"]

_ROUNDING = 1e-5  # of data kept in float32


class Decoder(Protocol):
    """``log p(x_0 | mean, variance)`` in nats, elementwise."""

    def __call__(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        """All broadcast to (B, *D)."""
        ...


@dataclass(frozen=True)
class GaussianDecoder:
    """``log N(x_0; mean, variance)``: a density, for data that are no levels, or dequantized ones."""

    def __call__(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        return -0.5 * (math.log(2 * math.pi) + log_variance + (x0 - mean).square() * (-log_variance).exp())


def _check_range(x0: Tensor) -> None:
    wrong = ~(x0.abs() <= 1 + _ROUNDING)
    if bool(wrong.any()):
        raise ValueError(f"the discretized decoder is for data in [-1, 1], got {float(x0[wrong][0]):.6g}")


def _check_levels(levels: int) -> None:
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")


@dataclass(frozen=True)
class DiscretizedGaussian:
    """``log P(level)``: the Gaussian's mass in the cell of a grey level; the first and last cell have all
    that lies beyond (Ho et al. 2020, eq. 13).

    The mass is exact, by ``log Phi`` on the side where it is small, so that it never needs the floor of 1e-12
    of the published code, whose normal distribution is an approximation: :class:`TanhGaussian` is that one.

    Args:
        levels: how many.
        ends: where the levels lie. False: at the centres of cells of width ``2 / levels``, ``(2 k + 1) /
            levels - 1``, as this package has them. True: from -1 to 1, ``2 k / (levels - 1) - 1``, as Ho et
            al. do.

    Raises:
        ValueError: fewer than 2 levels; when called, data outside of [-1, 1].
    """

    levels: int = 256
    ends: bool = False

    def __post_init__(self) -> None:
        _check_levels(self.levels)

    @property
    def half_width(self) -> float:
        """Half the width of a cell."""
        return 1 / (self.levels - 1 if self.ends else self.levels)

    def __call__(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        _check_range(x0)
        x0, mean = x0.double(), mean.double()
        inverse = (-0.5 * log_variance.double()).exp()
        h = self.half_width
        a, b = (x0 - h - mean) * inverse, (x0 + h - mean) * inverse
        lowest = -1 if self.ends else h - 1
        first, last = x0 < lowest + h, x0 > -lowest - h
        # By symmetry every cell can be put on the side where Phi is small.
        mirrored = a + b > 0
        low, high = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        inside = log_high + torch.log(-torch.expm1((log_low - log_high).clamp_max(-1e-15)))
        upper = torch.where(last, torch.special.log_ndtr(-a), inside)
        return torch.where(first, torch.special.log_ndtr(b), upper)


@dataclass(frozen=True)
class TanhGaussian:
    """The decoder as published code computes it: ``Phi(u) = (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) /
    2``, no probability below 1e-12, and levels from -1 to 1 (Ho et al. 2020; Nichol & Dhariwal 2021).

    For comparing numbers with theirs. The approximation is off by up to 3e-4, and like theirs in float32, where
    small probabilities are differences that keep few digits.

    Raises:
        ValueError: fewer than 2 levels; when called, data outside of [-1, 1].
    """

    levels: int = 256

    def __post_init__(self) -> None:
        _check_levels(self.levels)

    def __call__(self, x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        _check_range(x0)
        x0, mean = x0.float(), mean.float()
        h, inverse = 1 / (self.levels - 1), (-0.5 * log_variance.float()).exp()
        below, above = (self._cdf((x0 - mean + side) * inverse) for side in (-h, h))
        mass = torch.where(x0 < -1 + h, above, torch.where(x0 > 1 - h, 1 - below, above - below))
        return mass.clamp_min(1e-12).log()

    @staticmethod
    def _cdf(u: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
