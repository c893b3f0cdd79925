"""Two-dimensional sets whose density is known: samples, log-densities; for mixtures, scores too.

All are centred and of about unit scale. ``size`` samples are drawn from ``split_seed``; the last
``test_fraction`` of them is the held-out part.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sde_diffusion.analytic import GaussianMixture
from sde_diffusion.data.dataset import DataSet, Density

SIZE = 20_000


def _isotropic(weights: Tensor, means: Tensor, std: float) -> GaussianMixture:
    if not std > 0:
        raise ValueError(f"std must be > 0, got {std!r}")
    return GaussianMixture(
        weights, means, std**2 * torch.eye(2, dtype=torch.float64).expand(len(means), 2, 2)
    )


def ring(modes: int = 8, radius: float = 2.0, std: float = 0.1) -> GaussianMixture:
    """Equal Gaussians of standard deviation ``std``, evenly spaced on a circle."""
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack((angles.cos(), angles.sin()), 1)
    return _isotropic(torch.ones(modes), means, std)


def grid(side: int = 5, spacing: float = 1.0, std: float = 0.1) -> GaussianMixture:
    """``side²`` equal Gaussians of standard deviation ``std`` on a centred square grid."""
    line = spacing * (torch.arange(side, dtype=torch.float64) - (side - 1) / 2)
    return _isotropic(torch.ones(side**2), torch.cartesian_prod(line, line), std)


def moons(std: float = 0.1, nodes: int = 128) -> GaussianMixture:
    """Two interlocking half circles, blurred: ``p(x) = ½ Σ_arcs (1/π) ∫ N(x; c(θ), std² I) dθ``.

    The arcs are ``(cos θ, sin θ) - (½, ¼)`` and ``(½ - cos θ, ¼ - sin θ)``, 0 <= θ <= π. The integral is
    taken by Gauss-Legendre quadrature, which makes the density a mixture of ``2 nodes`` Gaussians:
    log-density, samples and score are exactly those of one and the same distribution. At the defaults the
    nodes lie at most 0.4 ``std`` apart, and the mixture equals the integral to rounding.

    Raises:
        ValueError: so few nodes, or so small a ``std``, that neighbouring nodes lie more than one ``std``
            apart.
    """
    if not std > 0 or math.pi**2 / (2 * nodes) > std:
        need = math.ceil(math.pi**2 / (2 * std)) if std > 0 else 0
        raise ValueError(f"moons with std={std!r} needs std > 0 and at least {need} nodes, got {nodes}")
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    angles = (points + 1) * (math.pi / 2)
    arc = torch.stack((angles.cos() - 0.5, angles.sin() - 0.25), 1)
    return _isotropic(weights.repeat(2), torch.cat((arc, -arc)), std)


class Checkerboard:
    """Uniform on the dark squares of a board of ``cells x cells`` squares of side ``width``, centred at 0.

    Square ``(i, j)``, counted from the lower left corner, is dark when ``i + j`` is even.

    Raises:
        ValueError: an odd or non-positive number of cells, or a width that is not positive.
    """

    def __init__(self, cells: int = 4, width: float = 1.0) -> None:
        if cells < 2 or cells % 2:
            raise ValueError(f"cells must be an even integer >= 2, got {cells!r}")
        if not width > 0:
            raise ValueError(f"width must be > 0, got {width!r}")
        self.cells, self.width = cells, width

    def log_prob(self, x: Tensor) -> Tensor:
        """``-log(area of the dark squares)`` on them and -inf elsewhere: (B, 2) -> (B,), nats."""
        cell = torch.floor(x / self.width + self.cells / 2)
        dark = ((cell >= 0) & (cell < self.cells)).all(1) & (cell.sum(1) % 2 == 0)
        inside = -math.log(self.cells**2 / 2 * self.width**2)
        return torch.where(dark, x.new_full((), inside), x.new_full((), -math.inf))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` exact samples, float64 (n, 2)."""
        row = torch.randint(self.cells, (n,), generator=generator)
        column = 2 * torch.randint(self.cells // 2, (n,), generator=generator) + row % 2
        corner = torch.stack((column, row), 1) - self.cells / 2
        return self.width * (corner + torch.rand(n, 2, dtype=torch.float64, generator=generator))


def _draw(name: str, density: Density, size: int, split_seed: int, test_fraction: float) -> DataSet:
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"size must be an integer >= 2, got {size!r}")
    if not 0.0 < test_fraction < 1.0:
        raise ValueError(f"test_fraction must be > 0 and < 1, got {test_fraction!r}")
    held = min(max(round(test_fraction * size), 1), size - 1)
    x = density.sample(size, torch.Generator().manual_seed(split_seed)).float()
    return DataSet(name, x[: size - held], x[size - held :], density=density)


def load_ring(*, size: int = SIZE, split_seed: int = 0, test_fraction: float = 0.1) -> DataSet:
    """Eight Gaussians on a circle, see :func:`ring`."""
    return _draw("gaussians8", ring(), size, split_seed, test_fraction)


def load_grid(*, size: int = SIZE, split_seed: int = 0, test_fraction: float = 0.1) -> DataSet:
    """Twenty-five Gaussians on a grid, see :func:`grid`."""
    return _draw("gaussians25", grid(), size, split_seed, test_fraction)


def load_moons(*, size: int = SIZE, split_seed: int = 0, test_fraction: float = 0.1) -> DataSet:
    """Two interlocking half circles, see :func:`moons`."""
    return _draw("moons", moons(), size, split_seed, test_fraction)


def load_checkerboard(*, size: int = SIZE, split_seed: int = 0, test_fraction: float = 0.1) -> DataSet:
    """The dark squares of a 4 x 4 board, see :class:`Checkerboard`."""
    return _draw("checkerboard", Checkerboard(), size, split_seed, test_fraction)
