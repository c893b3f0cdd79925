"""Monotone rational-quadratic splines of the unit interval: distribution functions with a density in closed form.

Between two knots, with ``w, h`` the sides of the bin, ``s = h / w``, slopes ``d_0, d_1`` at its ends and
``r = (x - x_0) / w`` (Gregory and Delbourgo 1982; Durkan et al. 2019, "Neural spline flows", eqs. 4 to 8),

    F(x)  = y_0 + h (s r^2 + d_0 r (1 - r)) / (s + (d_1 + d_0 - 2 s) r (1 - r)),
    F'(x) = s^2 (d_1 r^2 + 2 s r (1 - r) + d_0 (1 - r)^2) / (s + (d_1 + d_0 - 2 s) r (1 - r))^2,

and the inverse is the root of a quadratic.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["parameter_count", "spline", "spline_inverse"]

_LEAST_SIDE = 1e-3
"""Of a bin, as a fraction of an even share; keeps every density between 1e-3 and 1e3 or so."""
_LEAST_SLOPE = 1e-3


def parameter_count(bins: int) -> int:
    """Unconstrained numbers for each spline: widths, heights, and slopes at all knots."""
    return 3 * bins + 1


class _Bins:
    """The bin of each value, by the axis (0: x, 1: y) that the value is on."""

    def __init__(self, parameters: Tensor, values: Tensor, axis: int) -> None:
        bins = (parameters.shape[-1] - 1) // 3
        sides = parameters[..., : 2 * bins].unflatten(-1, (2, bins)).softmax(-1)
        sides = (1 - _LEAST_SIDE) * sides + _LEAST_SIDE / bins
        inner = sides.cumsum(-1)[..., :-1]
        knots = torch.cat([torch.zeros_like(inner[..., :1]), inner], -1)
        # 0 is slope 1, so that parameters of 0 are the identity.
        slopes = _LEAST_SLOPE + F.softplus(
            parameters[..., 2 * bins :] + math.log(math.expm1(1 - _LEAST_SLOPE))
        )
        index = (values[..., None] >= inner[..., axis, :]).sum(-1, keepdim=True)

        def own(table: Tensor, shift: int = 0) -> Tensor:
            return table.gather(-1, index + shift)[..., 0]

        self.x, self.y = own(knots[..., 0, :]), own(knots[..., 1, :])
        self.width, self.height = own(sides[..., 0, :]), own(sides[..., 1, :])
        self.first, self.second = own(slopes), own(slopes, 1)
        self.slope = self.height / self.width
        self.bend = self.first + self.second - 2 * self.slope

    def log_density(self, r: Tensor) -> Tensor:
        """``log F'`` at relative positions."""
        mixed = r * (1 - r)
        rises = self.second * r.square() + 2 * self.slope * mixed + self.first * (1 - r).square()
        return 2 * self.slope.log() + rises.log() - 2 * (self.slope + self.bend * mixed).log()


def spline(x: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """``F(x)`` and ``log F'(x)``, elementwise.

    Args:
        x: in [0, 1], any shape.
        parameters: unconstrained, (*x.shape, parameter_count(bins)); zeros make the identity.
    """
    found = _Bins(parameters, x, 0)
    r = ((x - found.x) / found.width).clamp(0, 1)
    mixed = r * (1 - r)
    rise = (found.slope * r.square() + found.first * mixed) / (found.slope + found.bend * mixed)
    return found.y + found.height * rise, found.log_density(r)


def spline_inverse(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` with ``F(x) = y``, and ``log F'(x)``; the arguments are those of :func:`spline`."""
    found = _Bins(parameters, y, 1)
    rise = (y - found.y).clamp_min(0)
    b = found.height * found.first - rise * found.bend
    a = found.height * found.slope - b
    c = found.slope * rise
    # The root that is 0 for c = 0, in the form that loses no digits there.
    r = (2 * c / (b + (b.square() + 4 * a * c).clamp_min(0).sqrt())).clamp(0, 1)
    return found.x + found.width * r, found.log_density(r)
