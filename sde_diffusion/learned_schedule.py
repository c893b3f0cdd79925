"""A schedule that is learned: the log-SNR as a monotone network of time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sde_diffusion.sdes import VariancePreserving, in_float64


class MonotoneNetwork(nn.Module):
    """A function of time that rises from 0 at 0 to 1 at 1: ``(g(t) - g(0)) / (g(1) - g(0))`` with ``g(t) = w
    t + sum_k a_k sigmoid(b_k t + c_k)`` and ``w, a, b > 0`` (after Kingma et al. 2021, appendix H).

    A new one is close to the identity.

    Args:
        hidden: how many sigmoids.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden must be an integer >= 1, got {hidden!r}")
        self.slope = nn.Parameter(torch.zeros(()))
        self.height = nn.Parameter(torch.full((hidden,), -4.0))
        self.rate = nn.Parameter(torch.full((hidden,), 10.0))
        self.centre = nn.Parameter((torch.arange(hidden) + 0.5) / hidden)

    def forward(self, t: Tensor) -> Tensor:
        """Any shape, in [0, 1] -> the same shape, float64."""
        slope, height, rate, centre = (
            p.double()
            for p in (F.softplus(self.slope), F.softplus(self.height), F.softplus(self.rate), self.centre)
        )

        def curve(t: Tensor) -> Tensor:
            return slope * t + (torch.sigmoid(rate * (t[..., None] - centre)) * height).sum(-1)

        start, end = curve(torch.tensor([0.0, 1.0], dtype=torch.float64, device=t.device)).unbind()
        return (curve(t.double()) - start) / (end - start)

    def extra_repr(self) -> str:
        """Its size."""
        return f"hidden={len(self.height)}"


@dataclass(frozen=True)
class LearnedSchedule(VariancePreserving):
    """The variance-preserving process whose log-SNR falls from ``log_snr_max`` to ``log_snr_min`` as a
    network says.

    ``log_snr(t) = log_snr_max + (log_snr_min - log_snr_max) m(t)``, ``alpha^2 = sigmoid(log_snr)`` (Kingma et
    al. 2021, section 4.1). The bound in continuous time depends on the two ends only; the curve between them
    decides how much a stochastic estimate of it varies, which is what the network is trained to reduce
    (:class:`~sde_diffusion.chain_losses.VariationalLoss`). Here t = 0 has a finite log-SNR.

    Args:
        network: ``m``, rising from 0 at 0 to 1 at 1.
        log_snr_max, log_snr_min: at the data and at the noise.
    """

    network: nn.Module = field(default_factory=MonotoneNetwork, repr=False)
    log_snr_max: float = 13.0
    log_snr_min: float = -10.0
    t_min: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -math.inf < self.log_snr_min < self.log_snr_max < math.inf:
            raise ValueError(
                f"need log_snr_min < log_snr_max, both finite, got {self.log_snr_min} and {self.log_snr_max}"
            )

    @in_float64
    def log_snr(self, t: Tensor) -> Tensor:
        """The network's, between the two ends."""
        # Times of grids and reports are on the CPU, wherever the network is.
        device = next(self.network.parameters()).device
        rise: Tensor = self.network((t / self.t_max).to(device)).to(t.device)
        return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * rise

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """``log sigmoid(log_snr) / 2``."""
        return F.logsigmoid(self.log_snr(t)) / 2

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        """``sigmoid(-log_snr)``."""
        return torch.sigmoid(-self.log_snr(t))
