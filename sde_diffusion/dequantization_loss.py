"""What variational dequantization is trained by: a bound on ``-log P(k)`` that costs one evaluation of the score.

With ``u ~ q(. | k)`` made of uniform numbers by a flow, and ``v`` the image with ``u`` in its cells,

    -log P(k) <= E_q[ log q(u | k) - log p(v) ] - D log w.

The likelihoods that are reported have ``log p`` by the probability-flow ODE. Its gradient in ``v`` takes a second
derivative of the network at every step of the solver, with the noise of a probe; here it takes one evaluation. The
score at ``t_min``, for an exact model that gradient, is where a network is worst: its error in ``eps`` is divided by
a tiny sigma, while the density that the ODE makes of it depends on all noise levels. So ``log p`` is replaced by its
variational bound in continuous time (Song, Durkan, Murray, Ermon 2021, theorem 1; Kingma et al. 2021, eq. 17), tight
where the score is exact,

    -log p(v) <= KL(q(x_T | v) || p(x_T)) + 1/2 int E |eps_hat(x_t, t) - eps|^2 d log_snr - E log p(v | x_{t_min}),

with one noise level for each image, drawn where the place in a cell matters. The gradient reaches the flow through
``x_t``; the score model stays as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sde_diffusion.bound import prior_kl
from sde_diffusion.data import from_model
from sde_diffusion.dequantization import Flow, cell_log_volume, placed
from sde_diffusion.reverse_steps import sum_dims
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand

__all__ = ["CellTime", "DequantizationLoss", "FlowModel", "denoising_bound"]


@dataclass(frozen=True)
class CellTime:
    """A time sampler for the bound: most noise levels near the width of a cell, where its gradient in ``u`` lives.

    The bound is ``1/2`` of the integral of ``E |eps_hat - eps|^2`` over the measure "log-SNR between its ends, and
    one unit more at ``t_min``": a Gaussian decoder of variance ``sigma^2 / alpha^2`` is a constant and such a unit. A
    quarter of the draws is uniform in this measure, which bounds the weights by four times its total; for the others
    ``log(sigma / alpha)`` is normal.

    Args:
        width: of a cell, in the range of the model.
        centre: the median of their ``sigma / alpha``, in cells.
        spread: the standard deviation of its logarithm.

    Raises:
        ValueError: (when called) a process whose log-SNR is infinite at ``t_min``.
    """

    width: float
    centre: float = 0.25
    spread: float = 1.1
    uniform: float = 0.25

    def _ends(self, sde: SDE) -> tuple[float, float]:
        low, high = (float(sde.log_snr(t).detach()) for t in (sde.t_max, sde.t_min))
        if not math.isfinite(high):
            raise ValueError(f"the bound needs a t_min at which the log-SNR is finite, got {sde!r}")
        return low, high

    def _normal(self, low: float, high: float) -> tuple[float, float, Tensor, Tensor]:
        """Mean and standard deviation of the log-SNR, and what is below the two ends."""
        mean, std = min(max(-2 * math.log(self.centre * self.width), low), high), 2 * self.spread
        below, above = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64) - mean) / std)
        return mean, std, below, above

    def __call__(self, sde: SDE, u: Tensor, /) -> tuple[Tensor, Tensor]:
        """Times, and their weights."""
        low, high = self._ends(sde)
        mean, std, below, above = self._normal(low, high)
        anywhere = low + (high - low + 1) * u / self.uniform
        rest = ((u - self.uniform) / (1 - self.uniform)).clamp(0, 1)
        near = mean + std * torch.special.ndtri(below + (above - below) * rest).clamp(-40, 40)
        log_snr = torch.where(u < self.uniform, anywhere, near.clamp(low, high))
        t = sde.time_of_log_snr(log_snr.clamp(low, high)).clamp(sde.t_min, sde.t_max)
        t = torch.where(log_snr >= high, sde.t_min, t)
        return t, self.weight(sde, t)

    def weight(self, sde: SDE, t: Tensor) -> Tensor:
        """The measure over the probability of the draws, shaped like ``t``."""
        low, high = self._ends(sde)
        mean, std, below, above = self._normal(low, high)
        z = (sde.log_snr(t).detach() - mean) / std
        normal = torch.exp(-0.5 * z.square()) / (math.sqrt(2 * math.pi) * std * (above - below).to(z.device))
        normal = torch.where(t > sde.t_min, normal, 0.0)
        return 1 / (self.uniform / (high - low + 1) + (1 - self.uniform) * normal)


def denoising_bound(
    sde: SDE, score: Score, x0: Tensor, t: Tensor, noise: Tensor, weight: Tensor, **cond: Tensor
) -> Tensor:
    """An unbiased estimate of the bound on ``-log p(x0)`` in nats, (B,), differentiable in ``x0``.

    Args:
        sde, score: the model; ``score(x, t, **cond)``.
        x0: (B, *D).
        t, weight: of :class:`CellTime`, (B,) each.
        noise: standard normal, (B, *D).
        cond: conditions of the score.
    """
    x = sde.perturb(x0, t, noise)
    predicted = -expand(sde.sigma(t), x) * score(x, t, **cond)
    error = sum_dims((predicted - noise).double().square())
    decoder = 0.5 * math.log(2 * math.pi) - 0.5 * float(sde.log_snr(sde.t_min).detach())
    return prior_kl(sde, x0) + 0.5 * weight.double() * error + x0[0].numel() * decoder


class FlowModel(nn.Module):
    """What the training loop trains: a flow, and the process of its score."""

    def __init__(self, flow: nn.Module, sde: SDE) -> None:
        super().__init__()
        self.flow = flow
        self.sde = sde


@dataclass(frozen=True, eq=False)
class DequantizationLoss:
    """The bound on the bits per dimension of grey levels, as a loss of :class:`~sde_diffusion.training.Trainer`.

    Args:
        score: the model, which gets no gradients.
        levels: grey levels of the data.
        times: those that the trainer draws.
        data_range: of the model.
    """

    score: Score
    levels: int
    times: CellTime
    data_range: tuple[float, float] = (-1.0, 1.0)

    def __repr__(self) -> str:
        return f"DequantizationLoss(levels={self.levels}, times={self.times}, data_range={self.data_range})"

    def for_data(self, levels: int | None, dequantized: bool) -> DequantizationLoss:
        """Itself, for data of the right number of levels that come with uniform noise."""
        if levels != self.levels or not dequantized:
            raise ValueError(f"the loss is for dequantized images of {self.levels} levels, got {levels}")
        return self

    def __call__(self, model: Any, x0: Tensor, t: Tensor, noise: Tensor, /, **cond: Any) -> Tensor:
        """Bits per dimension of each image, (B,), from images with uniform noise in their cells, (B, C, H, W).

        Image and noise can be told apart again; the noise is what the flow starts from.
        """
        flow: Flow = model.flow
        image = from_model(x0, self.levels).long()
        uniforms = (0.5 * self.levels * (x0.double() + 1) - image).clamp(0, 1)
        u, log_q = flow(uniforms, image)
        v = placed(u, image, self.levels, data_range=self.data_range)
        weight = self.times.weight(model.sde, t)
        nats = denoising_bound(model.sde, self.score, v, t, noise, weight, **cond) + log_q
        dims = v[0].numel()
        return (nats - cell_log_volume(dims, self.levels, self.data_range)) / (dims * math.log(2))
