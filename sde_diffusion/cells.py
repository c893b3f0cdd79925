"""Normal noise on data that lie uniformly in the cells of grey levels: masses, means, and the posterior of a level.

For one pixel with ``y = x_0 + s u``, ``u ~ N(0, 1)``, and ``K`` cells of width ``w = 2 / K`` over [-1, 1],

    p(k | y) ~ exp(logit_k) P(a_k < u < b_k),       a_k = (lo_k - y) / s,   b_k = (hi_k - y) / s,
    E[-u | y] = sum_k p(k | y) E[-u | level k],      where -u given level k is normal, truncated to (a_k, b_k).

Each sample goes one of two ways by its noise:

* cells narrower than half a standard deviation: mass and mean by their series in the width (below), in the type
  of the logits; all levels count;
* wider ones: as it stands, in float64, but only for the 33 cells around ``y``. The others lie at least eight standard
  deviations away.

Of the series, cells narrower than 1/16 of a standard deviation need the first term only: the logarithm of a mass is
then a parabola, and the posterior that of normal noise.

Derivatives are known without a graph: with ``E = E[-u | y]``,

    dE / dlogit_k = p(k | y) (E[-u | level k] - E),      dE / dy = (1 - Var[u | y]) / s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.narrow_cells import narrow_cells
from sde_diffusion.tensors import expand

_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
_NARROW = 1e-3
WINDOW = 33
"""Cells that count where the noise is less than two of them; so many levels or fewer are computed as they stand."""
_SERIES = 0.5
_SERIES_REACH = 36.0
_PARABOLA = 1 / 16
_CACHED = 2**18


def truncated_normal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``log P(a < u < b)`` and ``E[u | a < u < b]`` for ``u ~ N(0, 1)`` and ``a < b``, elementwise.

    Both keep their digits in the tails (by ``log Phi`` on the side where it is small) and for narrow cells
    (by the series of the density around the middle, with an error of order ``(b - a)^4``). Meant for
    float64.
    """
    mirrored, low, high = _on_negative_side(a, b)
    logs = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return _truncated_normal(b - a, mirrored, low, high, *logs)


@torch.no_grad()
def truncated_normals(edges: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`truncated_normal`, without a derivative, of the cells between each two of ``edges`` (B, K + 1, P), with
    one ``log Phi`` for each edge: (B, K, P) each."""
    a, b = edges[:, :-1], edges[:, 1:]
    mirrored, low, high = _on_negative_side(a, b)
    tail = torch.special.log_ndtr(-edges.abs())
    log_low = torch.where(mirrored, tail[:, 1:], tail[:, :-1])
    log_high = torch.where(mirrored, tail[:, :-1], tail[:, 1:])
    log_high = torch.where(high > 0, torch.log1p(-log_high.exp()), log_high)
    return _truncated_normal(b - a, mirrored, low, high, log_low, log_high)


def _on_negative_side(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether a cell from a to b is to be mirrored to have its middle there, and its ends then."""
    mirrored = a + b > 0
    return mirrored, torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)


def _truncated_normal(
    width: Tensor, mirrored: Tensor, low: Tensor, high: Tensor, log_low: Tensor, log_high: Tensor
) -> tuple[Tensor, Tensor]:
    middle = (low + high) / 2
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


def truncated_variance(a: Tensor, b: Tensor, log_mass: Tensor, mean: Tensor) -> Tensor:
    """``Var[u | a < u < b] = 1 + (a phi(a) - b phi(b)) / P - E[u]^2``, given what :func:`truncated_normal` says."""
    density_low = (-0.5 * a.square() - _LOG_SQRT_2PI - log_mass).exp()
    density_high = (-0.5 * b.square() - _LOG_SQRT_2PI - log_mass).exp()
    variance = 1 + a * density_low - b * density_high - mean.square()
    uniform = (b - a).square() / 12
    # Neither more than that of a uniform one (the density is log-concave), nor, by rounding, less than nothing.
    variance = torch.minimum(variance.clamp_min(0), uniform)
    return torch.where((b - a) * (1 + (a + b).abs() / 2) < _NARROW, uniform, variance)


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
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or (torch.is_grad_enabled() and s.requires_grad):
        return _by_width(logits, y, s)
    if not torch.is_grad_enabled():
        logits, y = logits.detach(), y.detach()
    with torch.autocast(y.device.type, enabled=False):
        return _ExpectedNoise.apply(logits, y, s)


def _by_width(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    levels = logits.shape[-1]
    if levels <= WINDOW:
        return _all_cells(logits, y, s).to(logits.dtype)
    smooth = 2 / levels <= _SERIES * s
    near, far = (~smooth).nonzero()[:, 0], smooth.nonzero()[:, 0]
    parts = []
    if len(near):
        parts.append(_nearby_cells(logits[near], y[near], s[near]).to(logits.dtype))
    if len(far):
        parts.append(_narrow_cells(logits[far], y[far], s[far]))
    return torch.cat(parts)[torch.cat([near, far]).argsort()] if len(parts) > 1 else parts[0]


def _mean(logits: Tensor, log_mass: Tensor, mean: Tensor) -> Tensor:
    return -((logits + log_mass).softmax(-1) * mean).sum(-1)


def _all_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    edges = torch.linspace(-1, 1, logits.shape[-1] + 1, dtype=torch.float64, device=y.device)
    cells = (edges - y[..., None]) / expand(s, y)[..., None]
    return _mean(logits, *truncated_normal(cells[..., :-1], cells[..., 1:]))


def _window(y: Tensor, levels: int, count: int) -> Tensor:
    """The first of ``count`` cells around ``y``, whole numbers as float64."""
    return ((y.detach() + 1) * levels / 2 - count / 2).round().nan_to_num(0.0).clamp(0, levels - count)


def _nearby_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    levels = logits.shape[-1]
    first = _window(y, levels, WINDOW)[..., None]
    edges = 2 * (first + torch.arange(WINDOW + 1, device=y.device)) / levels - 1
    cells = (edges - y[..., None]) / expand(s, y)[..., None]
    logits = logits.gather(-1, first.long() + torch.arange(WINDOW, device=y.device))
    return _mean(logits, *truncated_normal(cells[..., :-1], cells[..., 1:]))


def _centres(levels: int, device: torch.device) -> Tensor:
    return (torch.arange(levels, dtype=torch.float64, device=device) + 0.5) * (2 / levels) - 1


def _narrow_cells(logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
    levels = logits.shape[-1]
    scaled = (_centres(levels, y.device) / s[:, None]).reshape(len(s), *(1,) * (y.ndim - 1), levels)
    middle = scaled.to(logits.dtype) - (y / expand(s, y)).to(logits.dtype)[..., None]
    width = expand(2 / levels / s, logits)
    return _mean(logits, *series(middle, width))


# ---------------------------------------------------------------- with derivatives, without a graph

_Slopes = tuple[Tensor, Tensor | None, Tensor | None]
"""``E`` (B, P), ``dE / dlogits`` (B, K, P), ``dE / dy`` (B, P), the latter two where they are wanted."""


class _ExpectedNoise(torch.autograd.Function):
    """The same with the derivatives in closed form; they are all that is kept for the way back.

    Levels come before pixels here, as a network gives them. On CPUs it goes by as many samples as fit into a cache,
    elsewhere in one go.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, y: Tensor, s: Tensor) -> Tensor:
        levels_first = logits.movedim(-1, 1)
        noise = torch.empty_like(y, dtype=logits.dtype, memory_format=torch.contiguous_format)
        # Training needs no derivative in the state, and it is the dearer one.
        of_logits, of_y = ctx.needs_input_grad[:2]
        slopes = torch.empty_like(levels_first) if of_logits or of_y else None
        in_y = torch.empty_like(noise) if of_y else None
        kinds = _kinds(s, logits.shape[-1])
        if logits.device.type == "cpu":
            far = (kinds < _NEARBY).nonzero()[:, 0]
            into = None if slopes is None else slopes.movedim(1, -1)
            if narrow_cells(logits, y, s, _cumulants(2 / logits.shape[-1] / s), far, noise, into, in_y):
                kinds[far] = _DONE
        for rows, method in _groups(kinds, logits, s):
            own = levels_first[rows].flatten(2)
            value, in_logits, in_state = method(own, y[rows].flatten(1), s[rows], slopes is not None, of_y)
            noise[rows] = value.to(noise.dtype).reshape(-1, *noise.shape[1:])
            if slopes is not None:
                slopes[rows] = in_logits.reshape(-1, *slopes.shape[1:])
            if in_y is not None:
                in_y[rows] = in_state.to(noise.dtype).reshape(-1, *noise.shape[1:])
        ctx.save_for_backward(slopes, in_y, *((logits, y, s) if of_y else ()))
        return noise

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        slopes, in_y, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(inputs, gradient, ctx.needs_input_grad)
        of_logits = (slopes * gradient.unsqueeze(1)).movedim(1, -1) if ctx.needs_input_grad[0] else None
        return of_logits, (in_y * gradient).double() if ctx.needs_input_grad[1] else None, None


def _differentiable(
    inputs: list[Tensor], gradient: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, None]:
    """The product with the derivatives, itself with a graph: through the operations."""
    if not inputs:
        raise RuntimeError("second derivatives of levels need a state that requires a gradient")
    logits, y, s = inputs
    wanted = [tensor for tensor, need in zip((logits, y), needed[:2], strict=True) if need]
    products = iter(torch.autograd.grad(_by_width(logits, y, s), wanted, gradient, create_graph=True))
    of_logits, of_y = (next(products) if need else None for need in needed[:2])
    return of_logits, of_y, None


_DONE, _NEARBY = -1, 2


def _kinds(s: Tensor, levels: int) -> Tensor:
    """How the samples are computed: 0 by a parabola, 1 by the series, 2 by the cells nearby."""
    width = 2 / levels / s
    # With few levels, cells that the series has to five digits only are computed as they stand.
    return (width > _SERIES if levels > WINDOW else width > _SERIES / 2).int() + (width > _PARABOLA).int()


def _groups(kinds: Tensor, logits: Tensor, s: Tensor) -> Iterator[tuple[slice | Tensor, Any]]:
    """Samples that are computed together, and how."""
    on_cpu = logits.device.type == "cpu"
    together = max(1, _CACHED // max(1, logits[:1].numel())) if on_cpu else max(1, len(kinds))
    if on_cpu:
        # Those that look at 2, 4, 8 cells or more have groups of their own.
        sizes = _reach(s, logits.shape[-1]).log2().floor().int()
        kinds = torch.where(kinds == _NEARBY, kinds + sizes, kinds)
    for kind in kinds.unique().tolist():
        if kind == _DONE:
            continue
        method = (_parabola, _series, _nearby)[min(kind, _NEARBY)]
        for part in (kinds == kind).nonzero()[:, 0].split(together):
            if len(part) == 1:  # without a copy
                yield slice(int(part), int(part) + 1), method
            else:
                yield part, method


def _reach(s: Tensor, levels: int) -> Tensor:
    """How many cells around it a pixel sees: eight standard deviations to both sides."""
    return (2 + (8 * levels * s).ceil()).clamp_max(min(WINDOW, levels))


def _parabola(logits: Tensor, y: Tensor, s: Tensor, in_logits: bool, in_state: bool) -> _Slopes:
    # log mass = -a (centre - y)^2 / (2 s^2) up to what all levels share, mean = a (centre - y) / s.
    levels = logits.shape[1]
    centres = _centres(levels, y.device)
    inside = 2 * _cumulants(2 / levels / s)[0]
    a = 1 - inside
    precision = (a / s.square())[:, None]
    linear, constant = precision * centres, -0.5 * precision * centres.square()
    linear, constant = (term.to(logits.dtype)[:, :, None] for term in (linear, constant))
    p = torch.addcmul(logits, linear, y.to(logits.dtype)[:, None]).add_(constant).softmax(1)
    single = centres.to(logits.dtype)
    mean = _over_levels(single, p)
    noise = (a / s)[:, None] * (y - mean.double())
    if not in_logits:
        return noise, None, None
    spread = p.mul_(single[:, None] - mean[:, None])
    slope = None
    if in_state:
        variance = inside[:, None] + (a / s).square()[:, None] * _over_levels(single, spread)
        slope = (1 - variance) / s[:, None]
    return noise, spread.mul_(-(a / s).to(p.dtype)[:, None, None]), slope


def _over_levels(values: Tensor, p: Tensor) -> Tensor:
    """``sum_k values_k p_k``, (B, P); on a GPU not by a product of matrices, which may have ten bits there."""
    if p.device.type == "cpu":
        return torch.einsum("k,bkp->bp", values, p)
    return (p * values[:, None]).sum(1)


def _series(logits: Tensor, y: Tensor, s: Tensor, in_logits: bool, in_state: bool) -> _Slopes:
    levels = logits.shape[1]
    scaled = (_centres(levels, y.device) / s[:, None]).to(logits.dtype)
    middle = scaled[:, :, None] - (y / s[:, None]).to(logits.dtype)[:, None]
    width = expand(2 / levels / s, logits)
    log_mass, mean = series(middle, width)
    p = log_mass.add_(logits).softmax(1)
    noise = -(p * mean).sum(1)
    if not in_logits:
        return noise, None, None
    spread = mean.add_(noise[:, None])
    if not in_state:
        return noise, p.mul_(spread).neg_(), None
    slopes = p * spread
    c1, c2, c3 = _cumulants(width)
    m = middle.square_().clamp_max_(_SERIES_REACH)
    # d mean / d middle; where the series is held at its reach, of the line through it.
    within_reach = (30 * c3 * m + 12 * c2) * m
    slope = 1 - 2 * c1 - torch.where(m < _SERIES_REACH, within_reach, (6 * c3 * m + 4 * c2) * m)
    within = p.mul_(slope).sum(1)
    between = (slopes * spread).sum(1)
    return noise, slopes.neg_(), (within - between) / s[:, None]


def _nearby(logits: Tensor, y: Tensor, s: Tensor, in_logits: bool, in_state: bool) -> _Slopes:
    levels = logits.shape[1]
    count = int(_reach(s.max(), levels))
    first = _window(y, levels, count)[:, None]
    cells = torch.arange(count + 1, device=y.device)[:, None]
    edges = (2 * (first + cells) / levels - 1 - y[:, None]) / s[:, None, None]
    low, high = edges[:, :-1], edges[:, 1:]
    log_mass, mean = truncated_normals(edges)
    index = first.long() + cells[:-1]
    p = (logits.gather(1, index) + log_mass).softmax(1)
    noise = -(p * mean).sum(1)
    if not in_logits:
        return noise, None, None
    inside = (p * (-mean - noise[:, None])).to(logits.dtype)
    slopes = torch.zeros_like(logits).scatter_(1, index, inside)
    if not in_state:
        return noise, slopes, None
    variance = (p * (truncated_variance(low, high, log_mass, mean) + mean.square())).sum(1) - noise.square()
    return noise, slopes, (1 - variance) / s[:, None]
