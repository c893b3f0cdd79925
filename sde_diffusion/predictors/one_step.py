"""Predictors that ask for the score once in a step and remember nothing. With ``noise = 0`` a step gives its mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.exponential import DATA
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import StagesRun, first_order
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import expand
from sde_diffusion.variances import Limits, ReverseVariance


def check_stochasticity(stochasticity: float) -> None:
    """A clear error for a stochasticity that there is not."""
    if isinstance(stochasticity, bool) or not 0 <= stochasticity < math.inf:
        raise ValueError(f"stochasticity must be at least 0, got {stochasticity!r}")


@dataclass(frozen=True)
class EulerMaruyama:
    """``x_s = x - [f x - (1 + lambda^2) / 2 g^2 score] (t - s) + lambda g sqrt(t - s) z``, by Euler and Maruyama.

    A step of the family of reverse processes ``dx = [f x - (1 + lambda^2) / 2 g^2 score] dt + lambda g dw``, which
    all have the marginals ``p_t``: ``lambda = 1`` is the reverse SDE (Song et al. 2021, eq. 6) and ``lambda = 0`` the
    probability-flow ODE; beyond 1 there is more Langevin diffusion than the SDE has, which forgets earlier errors
    faster and needs smaller steps. The step is the true ``t - s`` of the grid.

    Reference: Zhang and Chen (2022), section 2; Karras et al. (2022), eq. 6, where ``beta = lambda^2 g^2 / (2 t^2)``.

    Args:
        stochasticity: ``lambda >= 0``.
    """

    stochasticity: float = 1.0

    def __post_init__(self) -> None:
        check_stochasticity(self.stochasticity)

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.stochasticity > 0

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        f, g2 = sde.f_and_g2(t)
        h = t - s
        drift = expand(f, x) * x - expand(0.5 * (1 + self.stochasticity**2) * g2, x) * score(x, t)
        mean = x - drift * expand(h, x)
        return mean + expand(self.stochasticity * (g2 * h).sqrt(), x) * noise if self.stochastic else mean


@dataclass(frozen=True)
class ReverseDiffusion:
    """``x_s = (2 - ratio) x + (1 + lambda^2) / 2 var score + lambda sqrt(var) z``: the reverse process discretized
    as the forward one.

    The forward step is ``x_t = ratio x_s + sqrt(var) z``, the exact kernel of the SDE between the two
    times; on the grid of a :class:`~sde_diffusion.ddpm.DDPM` chain it is the chain's. Reference: Song et
    al. (2021), appendix E, eq. 45 and 46 (``lambda = 1``) and 47 (``lambda = 0``, the probability-flow sampler).

    Args:
        stochasticity: ``lambda >= 0``, as for :class:`EulerMaruyama`.
    """

    stochasticity: float = 1.0

    def __post_init__(self) -> None:
        check_stochasticity(self.stochasticity)

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.stochasticity > 0

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        ratio, var = sde.transition(s, t)
        weight = 0.5 * (1 + self.stochasticity**2) * var
        mean = expand(2 - ratio, x) * x + expand(weight, x) * score(x, t)
        return mean + expand(self.stochasticity * var.sqrt(), x) * noise if self.stochastic else mean


@dataclass(frozen=True)
class Ancestral:
    """``x_s = (x + var score) / ratio + sqrt(v) z``: ancestral sampling, for every linear SDE.

    The mean is ``E[x_s | x_t]`` (Tweedie). ``v`` is the variance of ``q(x_s | x_t, x_0)``:
    ``variance="small"`` knows ``x_0``, ``var variance_s / variance_t`` (beta-tilde of DDPM; SMLD's
    ancestral step); ``variance="large"`` takes ``var`` (beta of DDPM). They are the two extremes for a
    point and for a unit normal (Ho et al. 2020, section 3.2; Song et al. 2021, appendix F).
    """

    variance: str = "small"

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large"):
            raise unknown_name("variance", self.variance, ("small", "large"))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        mean = sde.posterior_mean(x, score(x, t), t, s)
        v = sde.posterior(s, t)[2] if self.variance == "small" else sde.transition(s, t)[1]
        return mean + expand(v.sqrt(), x) * noise


@dataclass(frozen=True)
class LearnedVariance:
    """``x_s = (x + var score) / ratio + sqrt(v) z`` with a variance that depends on the state: ancestral sampling
    from a model with learned variances (Nichol & Dhariwal 2021, section 3.1).

    ``variance`` is asked after the score, at the same state and time, so that a
    :class:`~sde_diffusion.learned_variance.LearnedVarianceModel` evaluates its network once for both. A step to the
    data themselves (``variance_s = 0``) adds no noise.

    Args:
        variance: ``(x, t, limits) -> log v``, such as ``model.reverse_variance``; see :mod:`sde_diffusion.variances`.
    """

    variance: ReverseVariance

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        mean = sde.posterior_mean(x, score(x, t), t, s)
        log_v = self.variance(x, t, Limits.of(sde, s, t))
        return mean + torch.where(expand(sde.variance(s), x) > 0, (0.5 * log_v).exp(), 0) * noise


@dataclass(frozen=True)
class DDIM:
    """``x_s = alpha_s x_0 + sqrt(variance_s - v) eps + sqrt(v) z`` with ``v = eta^2 var variance_s /
    variance_t``.

    ``x_0`` and ``eps`` are the expected data and noise at ``(x, t)``. ``eta = 0`` is deterministic, the
    exponential Euler step of the probability-flow ODE; ``eta = 1`` is ancestral sampling (Song et al. 2020,
    "Denoising diffusion implicit models", eq. 12 and 16).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie between 0 and 1, got {self.eta!r}")

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.eta > 0

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``: without noise, with all coefficients ready."""
        if self.stochastic:
            return self
        return StagesRun(lambda _, start, end: first_order(DATA, start, end), DATA, sde, times)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        gradient = score(x, t)
        eps = -expand(sde.sigma(t), x) * gradient
        x0 = sde.posterior_mean(x, gradient, t)
        v = self.eta**2 * sde.posterior(s, t)[2]
        deterministic = (sde.variance(s) - v).clamp_min(0).sqrt()
        mean = expand(sde.alpha(s), x) * x0 + expand(deterministic, x) * eps
        return mean if self.eta == 0 else mean + expand(torch.sqrt(v), x) * noise
