"""Between grey levels ``0 .. levels - 1`` and the numbers in [-1, 1] that a model sees."""

from __future__ import annotations

import torch
from torch import Tensor


def check_levels(levels: object) -> int:
    """``levels`` itself when it is an integer >= 2.

    Raises:
        ValueError: it is not.
    """
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer >= 2, got {levels!r}")
    return levels


def to_model(x: Tensor, levels: int, uniforms: Tensor | None = None) -> Tensor:
    """Level indices to [-1, 1], uniformly dequantized: ``2 (x + u) / levels - 1`` (Theis et al., 2016).

    Level ``x`` owns the bin ``[2 x / levels - 1, 2 (x + 1) / levels - 1)``; ``u`` says where in it. So a
    density of the result is a bound on the probability of the level, with a volume of ``(2 / levels)`` per
    dimension.

    Args:
        x: integer tensor of levels in ``0 .. levels - 1``, any shape.
        levels: number of grey levels.
        uniforms: ``u`` in [0, 1), shaped like ``x``; None for the centre of the bin, ``u = 1/2``. ``u`` is
            kept ``levels * 2**-24`` (four roundings) away from 0 and 1, so that float32 never rounds into a
            neighbouring bin and :func:`from_model` gives ``x`` back exactly.

    Returns:
        float32, shaped like ``x``, in (-1, 1).

    Raises:
        ValueError: levels not integer, or outside ``0 .. levels - 1``; uniforms of another shape.
    """
    check_levels(levels)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise ValueError(f"x must hold integer levels 0 .. {levels - 1}, got dtype {x.dtype}")
    if not torch.compiler.is_compiling() and x.numel():
        low, high = int(x.min()), int(x.max())
        if low < 0 or high >= levels:
            raise ValueError(f"levels must lie in 0 .. {levels - 1}, got values from {low} to {high}")
    if uniforms is None:
        return ((x.double() + 0.5) * (2.0 / levels) - 1.0).float()
    if uniforms.shape != x.shape:
        raise ValueError(f"uniforms must have the shape of x, {tuple(x.shape)}, got {tuple(uniforms.shape)}")
    margin = levels * 2.0**-24
    inside = uniforms.double().clamp(margin, 1.0 - margin)
    return ((x.double() + inside) * (2.0 / levels) - 1.0).float()


def rescale(x: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
    """The affine map that takes one interval to another; ``x`` itself where they are the same."""
    if tuple(source) == tuple(target):
        return x
    return (x - source[0]) * ((target[1] - target[0]) / (source[1] - source[0])) + target[0]


def from_model(x: Tensor, levels: int) -> Tensor:
    """[-1, 1] to level indices: ``floor((x + 1) / 2 * levels)``, clamped to ``0 .. levels - 1``.

    Args:
        x: floating-point tensor of any shape; values beyond [-1, 1] go to the first or last level.
        levels: number of grey levels.

    Returns:
        Level indices shaped like ``x``: uint8 up to 256 levels, int32 beyond.

    Raises:
        ValueError: ``x`` is not floating-point or has non-finite values.
    """
    check_levels(levels)
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got dtype {x.dtype}")
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
        raise ValueError("x has values that are not finite")
    index = torch.floor((x.double() + 1.0) * (levels / 2.0)).clamp(0, levels - 1)
    return index.to(torch.uint8 if levels <= 256 else torch.int32)
