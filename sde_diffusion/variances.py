"""The variance of a reverse step ``p(x_s | x_t)``: fixed, or learned between two bounds.

Where ``x_t | x_s ~ N(ratio x_s, var I)``, the variance of ``x_s`` given ``x_t`` lies between that of ``q(x_s
| x_t, x_0)`` (data that are a point) and ``var`` (data that are a unit normal): beta-tilde and beta of DDPM
(Ho et al. 2020, section 3.2). A *reverse variance* is a function ``(x, t, limits) -> log variance``, of a
shape that broadcasts with ``x``; ``limits`` are the logs of these two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand

__all__ = [
    "FixedDensity",
    "FixedLarge",
    "FixedSmall",
    "LearnedLog",
    "LearnedRange",
    "Limits",
    "ReverseVariance",
    "fixed_variance",
]

Values = Callable[[Tensor, Tensor], Tensor]
"""``values(x, t)``: what a network says of the variance, (B, *D)."""


@dataclass(frozen=True)
class Limits:
    """Logs of the smallest and the largest variance that a reverse step can have, () or (B,) each.

    Attributes:
        small: ``log beta-tilde``; at the last step, to the data, where it is minus infinity, that of the step
            before.
        large: ``log beta``.
        last: whether it is the last step, to the data.
    """

    small: Tensor
    large: Tensor
    last: Tensor

    @staticmethod
    def of(sde: SDE, s: Tensor, t: Tensor) -> Limits:
        """For the step from ``t`` to ``s``, which is not the last."""
        small, large = sde.posterior(s, t)[2].log(), sde.transition(s, t)[1].log()
        return Limits(small, large, torch.zeros_like(small, dtype=torch.bool))


class ReverseVariance(Protocol):
    """The log-variance of ``p(x_s | x_t)``."""

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        """At ``x`` (B, *D) and ``t`` (B,), broadcastable to ``x``."""
        ...


@dataclass(frozen=True)
class FixedSmall:
    """``beta-tilde``: best for data that are a point (Ho et al. 2020, section 3.2)."""

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        return expand(limits.small, x)


@dataclass(frozen=True)
class FixedLarge:
    """``beta``: best for data that are a unit normal; at the last step the smaller variance, for the sake of
    the decoder (as in the code of Ho et al. 2020)."""

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        return expand(torch.where(limits.last, limits.small, limits.large), x)


@dataclass(frozen=True)
class FixedDensity:
    """``beta-tilde``, and at the last step ``sigma^2``: the spread of data around their mean given ``x_1`` where
    their density is smooth at that scale. With it a chain tends to the reverse SDE as its steps become short."""

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        return expand(torch.where(limits.last, limits.large, limits.small), x)


@dataclass(frozen=True)
class LearnedRange:
    """``v log beta + (1 - v) log beta-tilde`` with ``v = (values + 1) / 2`` (Nichol & Dhariwal 2021, eq. 15).

    ``v`` is not confined to [0, 1], as in their code.
    """

    values: Values

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        v = (self.values(x, t).to(x.dtype) + 1) / 2
        # At the last step of a sampler the smaller variance is 0: so is then the interpolated one.
        small = expand(limits.small.clamp_min(-1e30), x)
        return v * expand(limits.large, x) + (1 - v) * small


@dataclass(frozen=True)
class LearnedLog:
    """``values`` themselves are the log-variance (``LEARNED`` in the code of Nichol & Dhariwal 2021)."""

    values: Values

    def __call__(self, x: Tensor, t: Tensor, limits: Limits) -> Tensor:
        return self.values(x, t).to(x.dtype)


def fixed_variance(name: str) -> ReverseVariance:
    """The fixed variance of a name: ``small`` or ``large``."""
    table: dict[str, Callable[[], ReverseVariance]] = {"small": FixedSmall, "large": FixedLarge}
    if name not in table:
        raise unknown_name("variance", name, table)
    return table[name]()
