"""What noisy pixels say of their grey levels: as channels for a network, and counted over the image.

For one pixel ``y = x_0 + s u``, ``u ~ N(0, 1)``, and levels k in cells of width ``2 / K`` that are all as likely
(0 .. K - 1 over [-1, 1], and on beyond it),

    E[cos(2 pi k / P) | y],   E[sin(2 pi k / P) | y],       P = 2, 4, 8, .. up to the first that is >= K.

Fourier features of the *level* in place of the input's own (Kingma et al. 2021, "Variational diffusion models",
app. C, take ``sin(2^n pi x)``): a network sees two neighbouring levels, which differ by 2 / K in x, as far apart,
however coarse its arithmetic. The expectation makes them smooth on the scale of the noise (a derivative of at most
about 1 / s) and 0 where a level cannot be told, so that they add no noise of their own, nor stiffness to an ODE.
Where noise is low, they are those of the level to the digit: where in its cell a uniformly dequantized value lies
is no information.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sde_diffusion.tensors import expand

_SMOOTH = 1.5
_CELLS = 18
"""Cells that count at most while the noise is below ``_SMOOTH`` of them: five standard deviations to both sides."""


def level_feature_count(levels: int) -> int:
    """How many channels :func:`level_features` makes of one."""
    return 2 * _octaves(levels) - 1


def level_features(y: Tensor, s: Tensor, levels: int) -> Tensor:
    """The expected Fourier features of each pixel's level; see the module.

    Args:
        y: the noisy data in the data's own scale, (B, C, *S), float64.
        s: the standard deviation of the noise in it, (B,), float64.
        levels: K.

    Returns:
        (B, C * level_feature_count(K), *S), float32: of each channel the cosines, period 2 first, then the sines from
        period 4 on (the sine of period 2 is 0).
    """
    position, spread = _in_levels(y, s, levels)
    with torch.autocast(y.device.type, enabled=False):
        return _features(position, spread, _octaves(levels))


def _features(position: Tensor, spread: Tensor, octaves: int) -> Tensor:
    periods = 2.0 ** torch.arange(1, octaves + 1, dtype=torch.float64, device=position.device)
    frequencies = 2 * math.pi / periods
    smooth = _smooth(position, spread.clamp_min(_SMOOTH), frequencies)
    sharp = _sharp(position, spread.clamp_max(_SMOOTH), frequencies)
    both = torch.where((spread < _SMOOTH)[..., None], sharp, smooth).movedim(-1, 2)
    return torch.cat([both[:, :, :octaves], both[:, :, octaves + 1 :]], 2).flatten(1, 2)


def level_counts(y: Tensor, s: Tensor, levels: int) -> Tensor:
    """How many pixels of each channel have each level, as far as noise lets it be told:

        c_k = f(s) sum_pixels P(level k | y),       f = (1 - (2 s / (3 w))^2)^2,   0 from s = 1.5 w on,   w = 2 / K.

    Images often have few of the possible levels, or many pixels of some (a scanner's, a palette's); those that other
    pixels have are more likely for a pixel too, as words that a text has used are (Grave et al. 2017, "Improving
    neural language models with a continuous cache"). The pixel itself is counted with them: what is known of it is
    known anyway.

    Args:
        y, s, levels: as for :func:`level_features`.

    Returns:
        (B, C, K), float32.
    """
    position, spread = _in_levels(y, s, levels)
    first, masses = _nearby(position, spread.clamp_max(_SMOOTH))
    index = first[..., None].long() + torch.arange(_CELLS, device=y.device)
    inside = (index >= 0) & (index < levels)
    fade = (1 - (spread / _SMOOTH).clamp_max(1).square()).square()
    # Sums in float64: in which order a GPU adds does not show.
    masses = masses.double() * fade[..., None] * inside
    counts = y.new_zeros((*y.shape[:2], levels))
    return counts.scatter_add(2, index.clamp(0, levels - 1).flatten(2), masses.flatten(2)).float()


def _in_levels(y: Tensor, s: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """``y`` on a scale where cell k has its centre at k, and the noise's standard deviation there."""
    if levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
    return (y + 1) * (levels / 2) - 0.5, expand(s * (levels / 2), y)


def _octaves(levels: int) -> int:
    return max(1, math.ceil(math.log2(levels)))


def _smooth(position: Tensor, spread: Tensor, frequencies: Tensor) -> Tensor:
    """Noise of many cells: the first term of the Fourier series in the position; of period 2 the first two, which are
    alike."""
    half = frequencies / 2
    size = half.sin() / half * (-0.5 * (frequencies * spread[..., None]).square()).exp()
    size = (size * (1 + (frequencies == math.pi))).float()
    angle = (position[..., None] * frequencies).float()
    return torch.cat([size * angle.cos(), size * angle.sin()], -1)


def _sharp(position: Tensor, spread: Tensor, frequencies: Tensor) -> Tensor:
    """Noise of few cells: the sum over those nearby, turned by the angle of the first of them."""
    first, masses = _nearby(position, spread)
    angles = torch.arange(_CELLS, dtype=torch.float64, device=position.device)[:, None] * frequencies
    turns = torch.cat([angles.cos(), angles.sin()], -1)
    # On a GPU not in float32, of which a product of matrices may keep ten bits there.
    exact = torch.float32 if masses.device.type == "cpu" else torch.float64
    cosine, sine = (masses.to(exact) @ turns.to(exact)).float().chunk(2, -1)
    start = first[..., None] * frequencies
    c, s = start.cos().float(), start.sin().float()
    return torch.cat([c * cosine - s * sine, s * cosine + c * sine], -1)


def _nearby(position: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the cells around each position, and the probabilities of all of them, which sum to 1."""
    first = (position.detach() - (_CELLS - 1) / 2).round()
    edges = torch.arange(0.5, _CELLS - 1, dtype=torch.float64, device=position.device)
    below = torch.special.ndtr(((edges - (position - first)[..., None]) / spread[..., None]).float())
    # What is beyond the cells counted belongs to the outermost.
    return first, torch.cat([below[..., :1], below.diff(dim=-1), 1 - below[..., -1:]], -1)
