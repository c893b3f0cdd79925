"""Normal noise on data that lie uniformly in the cells of grey levels: masses, means, and the posterior of a level.

For one pixel with ``y = x_0 + s u``, ``u ~ N(0, 1)``, and ``K`` cells of width ``w = 2 / K`` over [-1, 1],

    p(k | y) ~ exp(logit_k) P(a_k < u < b_k),       a_k = (lo_k - y) / s,   b_k = (hi_k - y) / s,
    E[-u | y] = sum_k p(k | y) E[-u | level k],      where -u given level k is normal, truncated to (a_k, b_k).

With few levels that is computed as it stands. With many, each sample goes one of two ways by its noise:

* cells narrower than half a standard deviation: mass and mean by their series in the width (below), in the type
  of the logits; all levels count;
* wider ones: as it stands, in float64, but only for the 33 cells around ``y``. The others lie at least eight standard
  deviations away.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.tensors import expand

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_NARROW = 1e-3
WINDOW = 33
"""Cells that count where the noise is less than two of them; so many levels or fewer are computed as they stand."""
_SERIES = 0.5
_SERIES_REACH = 36.0


def truncated_normal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``log P(a < u < b)`` and ``E[u | a < u < b]`` for ``u ~ N(0, 1)`` and ``a < b``, elementwise.

    Both keep their digits in the tails (by ``log Phi`` on the side where it is small) and for narrow cells
    (by the series of the density around the middle, with an error of order ``(b - a)^4``). Meant for
    float64.
    """
    # By symmetry every cell can be put on the negative side.
    mirrored = a + b > 0
    low, high = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
    width, middle = b - a, (low + high) / 2
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    log_mass = log_high + torch.log(-torch.expm1((log_low - log_high).clamp_max(-1e-15)))
    mean = (-0.5 * low.square() - _LOG_SQRT_2PI - log_mass).exp() - (
        -0.5 * high.square() - _LOG_SQRT_2PI - log_mass
    ).exp()
    narrow = width * (1 + middle.abs()) < _NARROW
    curvature = (middle.square() - 1) * width.square() / 24
    narrow_mass = width.log() - 0.5 * middle.square() - _LOG_SQRT_2PI + torch.log1p(curvature.clamp_min(-0.5))
    log_mass = torch.where(narrow, narrow_mass, log_mass)
    mean = torch.where(narrow, middle * (1 - width.square() / 12), mean)
    # Rounding must not carry a mean out of its cell.
    mean = torch.minimum(torch.maximum(mean, low), high)
    return log_mass, torch.where(mirrored, -mean, mean)


def series(middle: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """``log (P(a < u < b) / P_0)`` and ``E[u | a < u < b]`` of cells by middle and width (at most 0.5).

    ``P_0`` is the mass around 0. With ``L = log P`` as a function of the middle ``m``, ``E[u] = -L'``. The mass is
    ``phi(m)`` times the mean of ``exp(-m v)`` over the cell, ``v`` with density ``~ exp(-v^2 / 2)``, so that ``L`` is
    ``-m^2 / 2`` plus the cumulants of ``v``: ``k2 m^2 / 2 + k4 m^4 / 24 + k6 m^6 / 720 + ..``. Beyond six standard
    deviations the mean is that of ``u = m`` less the correction at six.
    """
    c1, c2, c3 = _cumulants(width)
    square = middle.square()
    m = square.clamp_max(_SERIES_REACH)
    log_mass = ((c3 * m + c2) * m + c1) * m - 0.5 * square
    mean = middle * (1 - 2 * c1 - (6 * c3 * m + 4 * c2) * m)
    return log_mass, mean


def _cumulants(width: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``k2 / 2, k4 / 24, k6 / 720`` of a standard normal within ``width / 2`` of 0, to the sixth order."""
    w = width.square()
    k2 = w * (1 / 12 + w * (-1 / 360 + w / 30240))
    k4 = w.square() * (-1 / 120 + w / 1260)
    k6 = w * w.square() / 252
    return k2 / 2, k4 / 24, k6 / 720


def expected_noise(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The expected noise ``-E[u | y]`` of each pixel; see the module.

    Args:
        logits: of the K levels, (B, *D, K), float32 or float64.
        y: the noisy data in the data's own scale, (B, *D), float64.
        s: the standard deviation of the noise in it, (B,), float64.

    Returns:
        (B, *D), in the type of the logits.
    """
    if logits.shape[-1] <= WINDOW:
        return _all_cells(logits, y, s).to(logits.dtype)
    if torch.is_grad_enabled() and (y.requires_grad or s.requires_grad):
        return _by_width(logits, y, s)
    return _OfLogits.apply(logits, y, s)


def _by_width(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    smooth = 2 / logits.shape[-1] <= _SERIES * s
    near, far = (~smooth).nonzero()[:, 0], smooth.nonzero()[:, 0]
    parts = []
    if len(near):
        parts.append(_nearby_cells(logits[near], y[near], s[near]).to(logits.dtype))
    if len(far):
        parts.append(_narrow_cells(logits[far], y[far], s[far]))
    return torch.cat(parts)[torch.cat([near, far]).argsort()] if len(parts) > 1 else parts[0]


class _OfLogits(torch.autograd.Function):
    """The same as a function of the logits alone, a sample at a time.

    What one sample needs fits into a cache, and the derivative, ``p_k (-mean_k - E)``, is all that is kept: training
    images of 256 levels is three times faster so than through a graph of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
        noise = torch.empty_like(y, dtype=logits.dtype)
        keep = ctx.needs_input_grad[0]
        slopes = torch.empty_like(logits, memory_format=torch.contiguous_format) if keep else None
        for i in range(len(s)):
            row = slice(i, i + 1)
            with torch.set_grad_enabled(keep):
                own = logits[row].detach().contiguous().requires_grad_(keep)
                value = _by_width(own, y[row], s[row])
                total = value.sum()
            noise[row] = value.detach()
            if slopes is not None:
                # A pixel depends on its own logits only, so the gradient of the sum holds every derivative.
                (slopes[row],) = torch.autograd.grad(total, own)
        ctx.save_for_backward(slopes)
        return noise

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[..., None], None, None


def _mean(logits: Tensor, log_mass: Tensor, mean: Tensor) -> Tensor:
    return -((logits + log_mass).softmax(-1) * mean).sum(-1)


def _all_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    edges = torch.linspace(-1, 1, logits.shape[-1] + 1, dtype=torch.float64, device=y.device)
    cells = (edges - y[..., None]) / expand(s, y)[..., None]
    return _mean(logits, *truncated_normal(cells[..., :-1], cells[..., 1:]))


def _nearby_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    levels = logits.shape[-1]
    first = ((y.detach() + 1) * levels / 2 - WINDOW / 2).round().clamp(0, levels - WINDOW)[..., None]
    edges = 2 * (first + torch.arange(WINDOW + 1, device=y.device)) / levels - 1
    cells = (edges - y[..., None]) / expand(s, y)[..., None]
    logits = logits.gather(-1, first.long() + torch.arange(WINDOW, device=y.device))
    return _mean(logits, *truncated_normal(cells[..., :-1], cells[..., 1:]))


def _narrow_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    levels = logits.shape[-1]
    centres = (torch.arange(levels, dtype=torch.float64, device=y.device) + 0.5) * (2 / levels) - 1
    scaled = (centres / s[:, None]).reshape(len(s), *(1,) * (y.ndim - 1), levels)
    middle = scaled.to(logits.dtype) - (y / expand(s, y)).to(logits.dtype)[..., None]
    width = expand(2 / levels / s, logits)
    return _mean(logits, *series(middle, width))
