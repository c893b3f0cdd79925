"""The schedules of the DDPM papers: betas of a chain of n steps, float64 (n,), from the data end to the noise
end.

Each tends to one process as n grows: what the papers state for a thousand steps is scaled by ``1000 / n``, as
the code of Nichol & Dhariwal (2021) does for "linear". With few steps some betas would reach 1, a step that
leaves nothing of the data; that is an error which names them. ``DDPM(linear_betas(1000))`` is the chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_REFERENCE = 1000


def _steps(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise ValueError(f"a chain needs an integer number of steps n >= 2, got {n!r}")


def _range(first: float, last: float) -> None:
    if not 0 < first <= last < math.inf:
        raise ValueError(f"betas must satisfy 0 < first <= last, got {first} and {last}")


def _checked(betas: Tensor, name: str) -> Tensor:
    n = len(betas)
    if betas.max() >= 1:
        raise ValueError(
            f"{n} steps are too few for the {name} schedule: its largest beta would be {betas.max():.4g}, and betas "
            "must lie in (0, 1); take more steps, or another schedule"
        )
    return betas


def linear_betas(n: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Betas that rise linearly, ``1000 / n`` times from ``first`` to ``last`` (Ho et al. 2020, section 4, for
    n = 1000; scaled as by Nichol & Dhariwal 2021). It is ``VP().discretize(n)``, Song's discretization of the
    VP SDE.

    Raises:
        ValueError: fewer than 2 steps, limits out of order, or a beta >= 1 (21 steps are the fewest).
    """
    _steps(n)
    _range(first, last)
    scale = _REFERENCE / n
    return _checked(torch.linspace(scale * first, scale * last, n, dtype=torch.float64), "linear")


def scaled_linear_betas(n: int, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Betas whose square roots rise linearly, times ``1000 / n`` (Rombach et al. 2022, "High-resolution image
    synthesis with latent diffusion models", whose limits are the default).

    Raises:
        ValueError: fewer than 2 steps, limits out of order, or a beta >= 1.
    """
    _steps(n)
    _range(first, last)
    roots = torch.linspace(math.sqrt(first), math.sqrt(last), n, dtype=torch.float64)
    return _checked(_REFERENCE / n * roots.square(), "scaled linear")


def sigmoid_betas(n: int, first: float = 1e-4, last: float = 0.02, steepness: float = 6.0) -> Tensor:
    """Betas that rise like a sigmoid over [-steepness, steepness], times ``1000 / n`` (Xu et al. 2022,
    "GeoDiff", appendix).

    Raises:
        ValueError: fewer than 2 steps, limits out of order, a steepness that is not positive, or a beta >= 1.
    """
    _steps(n)
    _range(first, last)
    if not 0 < steepness < math.inf:
        raise ValueError(f"steepness must be a finite number > 0, got {steepness!r}")
    rise = torch.linspace(-steepness, steepness, n, dtype=torch.float64).sigmoid()
    return _checked(_REFERENCE / n * (first + (last - first) * rise), "sigmoid")


def cosine_betas(n: int, s: float = 0.008, largest: float = 0.999) -> Tensor:
    """``beta_i = min(1 - h(i / n) / h((i - 1) / n), 0.999)``, ``h(t) = cos^2((t + s) / (1 + s) pi / 2)``
    (Nichol & Dhariwal 2021, eq. 17).

    Only the end, where h is 0, is clipped. The exact transition kernels of
    :class:`~sde_diffusion.sdes.CosineVP`, but for that and for the time at which that process ends.

    Raises:
        ValueError: fewer than 2 steps, a negative offset s, or a largest beta outside (0, 1).
    """
    _steps(n)
    if not 0 <= s < math.inf:
        raise ValueError(f"the offset s must be at least 0, got {s!r}")
    if not 0 < largest < 1:
        raise ValueError(f"the largest beta must lie in (0, 1), got {largest!r}")
    t = torch.arange(n + 1, dtype=torch.float64) / n
    h = torch.cos((t + s) / (1 + s) * (math.pi / 2)).square()
    return (1 - h[1:] / h[:-1]).clamp_max(largest)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
}
"""The schedules by name, for whoever builds from a config."""
