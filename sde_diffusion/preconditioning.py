"""The four preconditionings of EDM as score models over one process.

Karras et al. (2022), table 1, write the denoiser of each family of models as

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise),     x = x_0 + sigma eps.

All run over :class:`~sde_diffusion.sdes.EDM`, whose time is the noise level (alpha = 1, sigma = t). With a
network that predicts ``F = a x_0 + b eps`` each is a parametrization (c_skip, c_out follow from a and b), an
input scaling (c_in) and a time conditioning (c_noise):

    =======  ===========================================  =========================  ===================
    name     (a, b)                                       c_in                       c_noise
    =======  ===========================================  =========================  ===================
    VP       (0, 1), the noise                            1 / sqrt(sigma^2 + 1)      999 t(sigma)
    VE       (0, -1), the scaled score                    1                          log(sigma / 2)
    iDDPM    (0, 1), the noise                            1 / sqrt(sigma^2 + 1)      999 - j(sigma)
    EDM      (sigma, -d^2) / (d sqrt(sigma^2 + d^2))      1 / sqrt(sigma^2 + d^2)    log(sigma) / 4
    =======  ===========================================  =========================  ===================

with t(sigma) the time at which the VP SDE has this ratio of noise to data, j(sigma) the position in the
cosine chain, and d the standard deviation of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sde_diffusion.parametrization import NOISE, SCORE, Parametrization
from sde_diffusion.parametrization import edm as edm_parametrization
from sde_diffusion.score import LOG_NOISE, UNIT_VARIANCE, UNSCALED, Conditioning, InputScaling, ScoreModel
from sde_diffusion.sdes import EDM, SDE, VP

#: Where EDM's sampler begins and ends with models that set no bounds of their own (table 1).
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0


@dataclass(frozen=True)
class Preconditioning:
    """How the output of a network becomes a score; the attributes are arguments of :class:`ScoreModel`."""

    sde: SDE
    parametrization: Parametrization
    conditioning: Conditioning
    input_scaling: InputScaling = UNIT_VARIANCE
    sigma_data: float = 1.0

    def score(self, net: nn.Module) -> ScoreModel:
        """The score model of a network of this kind, for data in [-1, 1]."""
        return ScoreModel(
            net,
            self.sde,
            self.parametrization,
            conditioning=self.conditioning,
            input_scaling=self.input_scaling,
            sigma_data=self.sigma_data,
        )


def edm_preconditioning(
    sigma_data: float = 0.5, sigma_min: float = 0.0, sigma_max: float = math.inf
) -> Preconditioning:
    """EDM's own: F has unit variance at each noise level (Karras et al. 2022, eq. 7 and app. B.6).

    Bounds beyond 0.002 and 80 are cut to these.
    """
    process = EDM(t_min=max(sigma_min, SIGMA_MIN), t_max=min(sigma_max, SIGMA_MAX))
    return Preconditioning(process, edm_parametrization(sigma_data), LOG_NOISE, sigma_data=sigma_data)


def vp_preconditioning(
    beta_d: float = 19.9, beta_min: float = 0.1, steps: int = 1000, epsilon_t: float = 1e-5
) -> Preconditioning:
    """That of networks trained with the VP SDE, ``beta(t) = beta_min + beta_d t`` (Song et al. 2021).

    The noise levels are those of the times epsilon_t to 1.
    """
    vp = VP(beta_min=beta_min, beta_max=beta_min + beta_d)
    ends = torch.tensor([epsilon_t, 1.0], dtype=torch.float64)
    low, high = (-0.5 * vp.log_snr(ends)).exp().tolist()
    told = Conditioning("vp_time", lambda sde, t: (steps - 1) * vp.time_of_log_snr(sde.log_snr(t)))
    return Preconditioning(EDM(t_min=low, t_max=high), NOISE, told)


def ve_preconditioning(sigma_min: float = 0.02, sigma_max: float = 100.0) -> Preconditioning:
    """That of networks trained with the VE SDE (Song et al. 2021), on data in [-1, 1].

    Their data were in [0, 1], so sigma there is half of sigma here.
    """
    told = Conditioning("log_half_sigma", lambda sde, t: -0.5 * sde.log_snr(t) - math.log(2))
    return Preconditioning(EDM(t_min=sigma_min, t_max=sigma_max), SCORE, told, UNSCALED)


def iddpm_preconditioning(
    ratio_min: float = 0.001, offset: float = 0.008, steps: int = 1000
) -> Preconditioning:
    """That of improved DDPM: the cosine chain, whose position is told (Nichol & Dhariwal 2021).

    Between the chain's noise levels the position is interpolated in log sigma, where EDM's own code takes the
    nearest; at these levels the two agree.
    """
    levels = iddpm_noise_levels(ratio_min, offset, steps)
    # From small to large noise: level k is what the network was told as k.
    ladder = levels[:-1].flip(0).log()

    def position(sde: SDE, t: Tensor) -> Tensor:
        steps_up = ladder.to(t.device)
        wanted = (-0.5 * sde.log_snr(t)).double()
        left = torch.searchsorted(steps_up, wanted.detach().contiguous(), right=True) - 1
        left = left.clamp(0, steps - 2)
        low, high = steps_up[left], steps_up[left + 1]
        return left + ((wanted - low) / (high - low)).clamp(0, 1)

    process = EDM(t_min=float(levels[-2]), t_max=min(float(levels[0]), SIGMA_MAX))
    return Preconditioning(process, NOISE, Conditioning("iddpm_step", position))


def iddpm_noise_levels(ratio_min: float = 0.001, offset: float = 0.008, steps: int = 1000) -> Tensor:
    """The ``steps + 1`` noise levels of improved DDPM, descending to 0 (Karras et al. 2022, table 1).

    ``u_M = 0``, ``u_{j-1}^2 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, ratio_min) - 1`` with
    ``abar_j = sin(pi j / (2 M (offset + 1)))^2``.
    """
    j = torch.arange(steps + 1, dtype=torch.float64)
    abar = (0.5 * math.pi * j / steps / (offset + 1)).sin().square()
    ratios = (abar[:-1] / abar[1:]).clamp(min=ratio_min)
    total = torch.cumsum(-ratios.flip(0).log(), 0).flip(0)  # log(u_{j-1}^2 + 1)
    return torch.cat([torch.expm1(total).sqrt(), torch.zeros(1, dtype=torch.float64)])
