"""Denoising score matching: the one loss, its weightings, and how noise levels are drawn.

Every loss here is a weighted noise-prediction error. With ``x_t = alpha(t) x0 + sigma(t) eps`` and the
model's estimate ``eps_hat = -sigma(t) s(x_t, t)``,

    loss(x0, t, eps) = w(t) * mean over dimensions of |eps_hat - eps|^2.

A *weighting* is the function ``w(sde, t)``. A *time draw* makes numbers ``u`` in [0, 1], a *time sampler*
turns ``u`` into times ``t`` and says with which density ``p(t)``; dividing by that density makes an average
over draws an unbiased estimate of the integral over all times, whatever the sampler:

    E_u[ loss(t(u)) / p(t(u)) ] = integral of loss(t) dt from t_min to t_max.

All linear SDEs satisfy ``g^2 / sigma^2 = -d log_snr / dt``, which is why most formulas below speak of the
log-SNR alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "TIME_DRAWS",
    "TIME_SAMPLERS",
    "WEIGHTINGS",
    "AntitheticDraw",
    "EDMWeighting",
    "LikelihoodWeighting",
    "LogNormalTime",
    "LogSNRUniformTime",
    "MinSNRWeighting",
    "RandomDraw",
    "SimpleWeighting",
    "StratifiedDraw",
    "TimeDraw",
    "TimeSampler",
    "UniformTime",
    "Weighting",
    "denoising_error",
    "denoising_loss",
]


class Weighting(Protocol):
    """``w(sde, t)``: the factor on the noise-prediction error, shaped like ``t``."""

    def __call__(self, sde: Any, t: Tensor, /) -> Tensor: ...


class TimeDraw(Protocol):
    """``draw(n, generator, device)``: ``n`` numbers in [0, 1], float64, each uniformly distributed."""

    def __call__(
        self, n: int, /, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


class TimeSampler(Protocol):
    """``sampler(sde, u)``: times ``t`` in [t_min, t_max] and ``1 / p(t)``, both shaped like ``u``."""

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]: ...


def _positive(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def _log_snr_rate(sde: Any, t: Tensor) -> Tensor:
    """``-d log_snr / dt = g^2 / sigma^2``, positive.

    By reverse-mode differentiation, at a tenth of the cost of ``sde.g2``: every training step needs it twice.
    """
    with torch.inference_mode(False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(sde.log_snr(t).sum(), t)
    return -slope


# ------------------------------------------------------------ the loss


def denoising_error(model: Any, x0: Tensor, t: Tensor, noise: Tensor, **cond: Any) -> Tensor:
    """The unweighted error ``mean over dimensions of |eps_hat(x_t, t) - eps|^2`` of each sample.

    Args:
        model: has ``sde`` and ``predict_noise(x, t, **cond)``; usually a ``ScoreModel``.
        x0: data, (B, *D).
        t: times, (B,).
        noise: standard normal draws, (B, *D).
        cond: passed on to the model (such as ``y=labels``).

    Returns:
        (B,), at least float32.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise must have the shape of x0, {tuple(x0.shape)}, got {tuple(noise.shape)}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t must have shape ({x0.shape[0]},), one time per sample, got {tuple(t.shape)}")
    x = model.sde.perturb(x0, t, noise)
    error = model.predict_noise(x, t, **cond) - noise
    return error.square().flatten(1).mean(1)


def denoising_loss(
    model: Any, x0: Tensor, t: Tensor, noise: Tensor, *, weighting: Weighting, **cond: Any
) -> Tensor:
    """The weighted denoising score matching loss of each sample, ``w(t) * mean_D |eps_hat(x_t, t) - eps|^2``.

    With ``LikelihoodWeighting``, integrated over t and times D, this is the part of the
    negative-log-likelihood bound that depends on the model, in nats (Song, Durkan, Murray, Ermon 2021,
    "Maximum likelihood training of score-based diffusion models", Theorem 1; Kingma et al. 2021, "Variational
    diffusion models", eq. 17).

    Args:
        model: has ``sde`` and ``predict_noise(x, t, **cond)``.
        x0: data, (B, *D).
        t: times, (B,).
        noise: standard normal draws, (B, *D).
        weighting: ``w(sde, t)``, one of the weightings of this module or any function like them.
        cond: passed on to the model.

    Returns:
        (B,), at least float32.
    """
    error = denoising_error(model, x0, t, noise, **cond)
    return weighting(model.sde, t).to(error.dtype) * error


# ------------------------------------------------------------ weightings


@dataclass(frozen=True)
class SimpleWeighting:
    """``w = 1``: the plain noise-prediction error (Ho, Jain, Abbeel 2020, eq. 14)."""

    def __call__(self, sde: Any, t: Tensor, /) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LikelihoodWeighting:
    """``w = g^2 / (2 sigma^2) = -(1/2) d log_snr / dt``: maximum likelihood.

    Equal to the weight ``g^2 / 2`` on the squared error of the score (Song et al. 2021, Theorem 1). Grows
    like 1/t near the data; draw times by ``LogSNRUniformTime``, under which ``w(t) / p(t)`` is constant.
    """

    def __call__(self, sde: Any, t: Tensor, /) -> Tensor:
        return 0.5 * _log_snr_rate(sde, t)


@dataclass(frozen=True)
class EDMWeighting:
    """``w = 1 + exp(-log_snr) / sigma_data^2``: unit weight on the output of the EDM-preconditioned network.

    Karras et al. 2022, Table 1: ``(s^2 + sigma_data^2) / (s sigma_data)^2`` on the error of the denoised
    data, where ``s = sigma / alpha``; on the noise error, which is ``1/s`` times as large, it is ``(s^2 +
    sigma_data^2) / sigma_data^2``. To be used with ``LogNormalTime`` and without the density correction:
    there the density is part of the objective.

    Args:
        sigma_data: standard deviation of the data, > 0.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _positive("sigma_data", self.sigma_data)

    def __call__(self, sde: Any, t: Tensor, /) -> Tensor:
        return 1.0 + torch.exp(-sde.log_snr(t)) / self.sigma_data**2


@dataclass(frozen=True)
class MinSNRWeighting:
    """``w = min(1, gamma / SNR)``: the min-SNR-gamma strategy (Hang et al. 2023, eq. 8).

    On the error of the denoised data it is ``min(SNR, gamma)``; the noise error is SNR times as large.

    Args:
        gamma: the SNR above which a level counts less, > 0.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma)

    def __call__(self, sde: Any, t: Tensor, /) -> Tensor:
        return torch.exp((math.log(self.gamma) - sde.log_snr(t)).clamp(max=0.0))


# ------------------------------------------------------------ how numbers u are drawn


@dataclass(frozen=True)
class RandomDraw:
    """Independent uniform numbers."""

    def __call__(
        self, n: int, /, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.rand(n, generator=generator, device=device, dtype=torch.float64)


@dataclass(frozen=True)
class StratifiedDraw:
    """``u_i = (u + i / n) mod 1`` with one uniform ``u`` for the batch: each of the n strata is hit exactly
    once.

    Low-discrepancy sampling (Kingma et al. 2021, appendix I.1): every ``u_i`` is uniform, their average error
    is O(1/n).
    """

    def __call__(
        self, n: int, /, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        start = torch.rand((), generator=generator, device=device, dtype=torch.float64)
        return (start + torch.arange(n, device=device, dtype=torch.float64) / n) % 1.0


@dataclass(frozen=True)
class AntitheticDraw:
    """Pairs ``(u, 1 - u)``: half of the batch from ``base``, the other half mirrored (Ho et al. 2020's
    practice).

    Args:
        base: the draw of the first half.
    """

    base: TimeDraw = field(default_factory=RandomDraw)

    def __call__(
        self, n: int, /, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        half = self.base((n + 1) // 2, generator, device)
        return torch.cat((half, 1.0 - half))[:n]


# ------------------------------------------------------------ how u becomes a time


@dataclass(frozen=True)
class UniformTime:
    """``t = t_min + u (t_max - t_min)``, density ``1 / (t_max - t_min)``."""

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        span = sde.t_max - sde.t_min
        return sde.t_min + span * u, torch.full_like(u, span)


def _log_snr_ends(sde: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The log-SNR at ``t_max`` (lowest) and at ``t_min`` (highest), 0-dimensional float64."""
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64, device=like.device)
    low, high = sde.log_snr(ends).unbind()
    return low, high


@dataclass(frozen=True)
class LogSNRUniformTime:
    """The log-SNR is uniform between its ends: ``p(t) = (g^2 / sigma^2) / (log_snr(t_min) -
    log_snr(t_max))``.

    This is importance sampling for the likelihood weighting (Song et al. 2021, section 5.1; the density is
    proportional to ``g^2 / sigma^2``), in closed form for every linear SDE because ``g^2 / sigma^2 = -d
    log_snr / dt``.
    """

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        low, high = _log_snr_ends(sde, u)
        t = sde.time_of_log_snr(low + (high - low) * u).clamp(sde.t_min, sde.t_max)
        return t, (high - low) / _log_snr_rate(sde, t)


@dataclass(frozen=True)
class LogNormalTime:
    """``log(sigma / alpha)`` is normal, as in EDM (Karras et al. 2022, Table 1), truncated to the SDE's range
    of noise.

    ``p(t) = N(log(sigma/alpha); mean, std^2) / Z * (g^2 / sigma^2) / 2``, with Z the normal probability of
    the range.

    Args:
        mean: of ``log(sigma / alpha)``.
        std: of ``log(sigma / alpha)``, > 0.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _positive("std", self.std)
        if not math.isfinite(self.mean):
            raise ValueError(f"mean must be a finite number, got {self.mean!r}")

    def __call__(self, sde: Any, u: Tensor, /) -> tuple[Tensor, Tensor]:
        low, high = _log_snr_ends(sde, u)
        ends = torch.stack((-0.5 * high, -0.5 * low))  # log(sigma/alpha) at t_min, at t_max
        # erfc and not ndtr, which is 0 from 8 standard deviations below the mean.
        below, above = (0.5 * torch.erfc((self.mean - ends) / (self.std * math.sqrt(2.0)))).unbind()
        if not bool(above > below):
            raise ValueError(
                f"log-normal times of mean {self.mean} and std {self.std} miss all noise levels of {sde!r}"
            )
        log_noise = (self.mean + self.std * torch.special.ndtri(below + (above - below) * u)).clamp(*ends)
        t = sde.time_of_log_snr(-2.0 * log_noise).clamp(sde.t_min, sde.t_max)
        z = (log_noise - self.mean) / self.std
        normal = torch.exp(-0.5 * z.square()) / (self.std * math.sqrt(2.0 * math.pi))
        return t, 2.0 * (above - below) / (normal * _log_snr_rate(sde, t))


# ------------------------------------------------------------ names, for whoever builds from a config

WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "simple": SimpleWeighting,
    "likelihood": LikelihoodWeighting,
    "edm": EDMWeighting,
    "min_snr": MinSNRWeighting,
}
TIME_SAMPLERS: dict[str, Callable[..., TimeSampler]] = {
    "uniform": UniformTime,
    "log_snr": LogSNRUniformTime,
    "log_normal": LogNormalTime,
}
TIME_DRAWS: dict[str, Callable[..., TimeDraw]] = {
    "random": RandomDraw,
    "stratified": StratifiedDraw,
}
