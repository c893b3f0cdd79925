"""From the density of continuous images to the probability of their grey levels.

Level k of ``levels`` owns a cell of width ``w = (high - low) / levels`` of the data range. With ``u`` in (0, 1) the
place in the cell, ``v = low + w (k + u)``, and any density ``q(u | k)`` of the dequantization noise,

    P(k) = int p(v) w^D du = E_q[ p(v) w^D / q(u | k) ],
    log P(k) >= E_q log mean_{j <= K} [ p(v_j) w^D / q(u_j | k) ],

for K = 1 the bound of Theis et al. (2016) and Ho et al. (2019), which rises with K to the probability itself (Burda
et al. 2016). The noise of an image depends on ``(seed, draw, index)`` only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sde_diffusion.noise import DEQUANTIZATION, SampleNoise
from sde_diffusion.sdes import SDE

__all__ = [
    "Dequantization",
    "TruncatedNormalDequantization",
    "UniformDequantization",
    "VariationalDequantization",
    "cell_log_volume",
    "combine",
    "dequantized",
    "off_the_grid",
    "placed",
]


class Dequantization(Protocol):
    """Where in its cell each value lies."""

    def draw(self, uniforms: Tensor, levels: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` in (0, 1), shaped like the ``uniforms`` (B, *D) it is made of, and ``log q(u | k)`` in nats, (B,).

        Args:
            uniforms: in (0, 1).
            levels: the number of grey levels.
            image: the grey levels ``k`` themselves, (B, *D).
        """
        ...

    def start(self, sde: SDE, levels: int) -> float:
        """The time whose density these data are to be given."""
        ...


@dataclass(frozen=True)
class UniformDequantization:
    """Uniform in the cell: ``log q = 0``; for models trained on data dequantized like that."""

    def draw(self, uniforms: Tensor, levels: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """The uniforms themselves."""
        return uniforms, uniforms.new_zeros(len(uniforms), dtype=torch.float64)

    def start(self, sde: SDE, levels: int) -> float:
        """``t_min``."""
        return sde.t_min


@dataclass(frozen=True)
class TruncatedNormalDequantization:
    """Normal around the centre of the cell, cut off at its edges: for models trained on the centres of cells.

    ``v = centre + s n``, ``|n| < edge``, ``s = half a cell / edge``. The diffusion itself takes the centres to
    ``alpha (centre + s n)`` with n normal, at the time when ``sigma / alpha = s``; there the model's density
    starts, and what it was trained on and what it is given differ by the cut-off alone (Zheng et al. 2023,
    "Improved techniques for maximum likelihood estimation for diffusion ODEs"). For data in [-1, 1].

    Args:
        edge: standard deviations from the centre to the edge of a cell.

    Raises:
        ValueError: an edge that is not positive; by ``start``, a noise level that the process does not have.
    """

    edge: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.edge < math.inf:
            raise ValueError(f"edge must be positive and finite, got {self.edge!r}")

    def draw(self, uniforms: Tensor, levels: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """By the inverse of the distribution function."""
        inside = math.erf(self.edge / math.sqrt(2))
        n = torch.special.ndtri(0.5 + inside * (uniforms.double() - 0.5)).clamp(-self.edge, self.edge)
        log_scale = math.log(2 * self.edge) - 0.5 * math.log(2 * math.pi) - math.log(inside)
        log_q = (log_scale - 0.5 * n.square()).flatten(1).sum(1)
        return (0.5 + n / (2 * self.edge)).to(uniforms.dtype), log_q

    def start(self, sde: SDE, levels: int) -> float:
        """The time when ``sigma / alpha`` is the standard deviation of the noise."""
        wanted = 1 / (levels * self.edge)
        t = float(sde.time_of_log_snr(torch.tensor(-2 * math.log(wanted), dtype=torch.float64)))
        if not sde.t_min <= t < sde.t_max:
            least = float(torch.exp(-0.5 * sde.log_snr(sde.t_min).detach()))
            raise ValueError(
                f"the truncated normal of {levels} levels needs noise of {wanted:.3g}, and {sde!r} begins with "
                f"{least:.3g}"
            )
        return t


class Flow(Protocol):
    """A conditional density on the unit cube, as :class:`VariationalDequantization` uses it."""

    levels: int

    def __call__(self, uniforms: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` made of uniform numbers, (B, *D), and ``log q(u | k)`` in nats, (B,)."""
        ...


@dataclass(frozen=True)
class VariationalDequantization:
    """A learned ``q(u | k)``, trained to make the bound tight (Ho et al. 2019, "Flow++", section 3.1).

    The best is ``p(u | k) = p(v) w^D / P(k)``, for which the bound is the probability itself with a single draw. For
    models trained on uniformly dequantized data, whose density is too smooth for the edges of the cells: ``q``
    keeps away from where the density falls. The density is that of ``t_min``, as for uniform noise.

    Args:
        flow: such as :class:`~sde_diffusion.networks.dequantization_flow.DequantizationFlow`.

    Raises:
        ValueError: by ``draw``, images of another shape or number of levels than the flow's.
    """

    flow: Flow

    @torch.no_grad()
    def draw(self, uniforms: Tensor, levels: int, image: Tensor) -> tuple[Tensor, Tensor]:
        """By the flow."""
        if levels != self.flow.levels:
            raise ValueError(f"the dequantization flow is for {self.flow.levels} grey levels, got {levels}")
        u, log_q = self.flow(uniforms, image)
        return u.to(uniforms.dtype), log_q

    def start(self, sde: SDE, levels: int) -> float:
        """``t_min``."""
        return sde.t_min


def dequantized(
    dequantization: Dequantization,
    levels: Tensor,
    count: int,
    *,
    data_range: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    first_index: int = 0,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """``v`` in the data range, float32 (B, *D), and ``log q(u | k)`` in nats, (B,), for grey levels 0 .. count - 1.

    Raises:
        ValueError: values that are no such levels; those of which image.
    """
    check_grey_levels(levels, count)
    rows = range(first_index, first_index + len(levels))
    noise = SampleNoise(seed, rows, levels.shape[1:], device=levels.device, stream=DEQUANTIZATION)
    noise.draws = draw
    margin = _margin(count)
    u, log_q = dequantization.draw(noise.uniform().double().clamp(margin, 1 - margin), count, levels)
    return placed(u, levels, count, data_range=data_range), log_q


def _margin(count: int) -> float:
    """How far ``u`` stays away from 0 and 1: float32 must not round into a neighbouring cell."""
    return count * 2.0**-24


def placed(u: Tensor, levels: Tensor, count: int, *, data_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """``v = low + w (k + u)``, float32 (B, *D), strictly within its cell; differentiable in ``u``, of [0, 1]."""
    margin = _margin(count)
    low, high = data_range
    v = low + (high - low) / count * (levels.double() + u.double().clamp(margin, 1 - margin))
    return v.float()


def off_the_grid(images: Tensor, count: int) -> Tensor:
    """Which values of ``images`` are no integers from 0 to ``count - 1``, bool of the same shape; NaN is none."""
    values = images.double()
    return ~((values >= 0) & (values <= count - 1) & (values == values.round()))


def check_grey_levels(levels: Tensor, count: int) -> None:
    """Raises ValueError for values that are not integers from 0 to ``count - 1``, naming their images."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise ValueError(f"levels must be an integer >= 2, got {count!r}")
    if levels.dtype == torch.bool or levels.is_complex():
        raise ValueError(f"images must hold grey levels 0 .. {count - 1}, got {levels.dtype}")
    wrong = off_the_grid(levels, count)
    if bool(wrong.any()):
        images = wrong.flatten(1).any(1).nonzero().flatten().tolist()
        more = f" and {len(images) - 10} more" if len(images) > 10 else ""
        raise ValueError(
            f"images must hold grey levels 0 .. {count - 1}; images {', '.join(map(str, images[:10]))}{more} hold "
            f"others, such as {float(levels[wrong][0]):.6g}"
        )


def cell_log_volume(dims: int, levels: int, data_range: tuple[float, float] = (-1.0, 1.0)) -> float:
    """``D log w``: the volume of the cell of an image in nats."""
    low, high = data_range
    if not low < high:
        raise ValueError(f"a data range rises, got {data_range!r}")
    return dims * math.log((high - low) / levels)


def combine(log_ratios: Tensor, *, importance: bool) -> Tensor:
    """The bound on ``log P(k)`` from ``log [p(v_j) w^D / q(u_j)]`` of K draws, (K, B) -> (B,).

    Their mean, or ``log mean exp``: the importance-weighted bound, which is never below it.
    """
    if not importance:
        return log_ratios.mean(0)
    return log_ratios.logsumexp(0) - math.log(len(log_ratios))
