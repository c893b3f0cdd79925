"""The forward processes: linear SDEs, each stated by two formulas.

Every process here is ``dx = f(t) x dt + g(t) dw`` with Gaussian marginals
``x_t = alpha(t) x_0 + sigma(t) eps``, ``eps ~ N(0, I)``, for ``t`` from 0 (data) to ``t_max`` (noise).
A subclass of :class:`SDE` states ``log_alpha(t)`` and ``variance(t) = sigma(t)^2``; all else follows once:

    f = d log_alpha / dt
    g^2 = d variance / dt - 2 f variance
    x_t | x_s ~ N(ratio x_s, var I),  ratio = alpha_t / alpha_s,  var = variance_t - ratio^2 variance_s
    E[x_s | x_t] = (x_t + var * score(x_t, t)) / ratio            (Tweedie's formula)

No SDE has a number of steps: a grid of times belongs to a sampler, a chain of betas to
:mod:`sde_diffusion.ddpm`.

Reference: Y. Song et al., "Score-based generative modeling through stochastic differential equations", 2021.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from sde_diffusion.errors import unknown_name
from sde_diffusion.tensors import Time, as_time, expand

_SDE = TypeVar("_SDE", bound="SDE")


def in_float64(formula: Callable[[_SDE, Tensor], Tensor]) -> Callable[[_SDE, Time], Tensor]:
    """Evaluate a formula of ``t`` in float64 and return it in the type of ``t``.

    Near ``t = 0`` (and over the 12 octaves of a VE schedule) float32 arithmetic loses up to 1%; the cost of
    float64 on a handful of times is nothing.
    """

    @functools.wraps(formula)
    def wrapped(self: _SDE, t: Time) -> Tensor:
        t = as_time(t)
        return formula(self, t.double()).to(t.dtype)

    return wrapped


@dataclass(frozen=True, kw_only=True)
class SDE(abc.ABC):
    """A linear SDE ``dx = f(t) x dt + g(t) dw``; subclasses state :meth:`log_alpha` and :meth:`variance`.

    All functions of time take ``t`` of shape () or (B,), float32 or float64 (or a Python number), compute
    in float64 and return the type of ``t``. Data have any shape (B, *D).

    Attributes:
        t_min: where sampling and likelihoods end and training begins; the score is singular at 0.
        t_max: the time of the prior.
    """

    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max < math.inf:
            raise ValueError(
                f"times must satisfy 0 <= t_min < t_max, got t_min={self.t_min}, t_max={self.t_max}"
            )

    @abc.abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """``log alpha(t)``, the log of the factor on the data."""

    @abc.abstractmethod
    def variance(self, t: Time) -> Tensor:
        """``sigma(t)^2``, the variance of the noise; its derivative must be finite at 0 (that of sigma need
        not be)."""

    @in_float64
    def alpha(self, t: Tensor) -> Tensor:
        """``alpha(t)``, the factor on the data in ``x_t = alpha x_0 + sigma eps``."""
        return self.log_alpha(t).exp()

    @in_float64
    def sigma(self, t: Tensor) -> Tensor:
        """``sigma(t)``, the standard deviation of the noise in ``x_t = alpha x_0 + sigma eps``."""
        return self.variance(t).sqrt()

    @in_float64
    def log_snr(self, t: Tensor) -> Tensor:
        """``log(alpha^2 / sigma^2)``, which falls as ``t`` grows (Kingma et al. 2021, eq. 2)."""
        return 2 * self.log_alpha(t) - self.variance(t).log()

    def f_and_g2(self, t: Time) -> tuple[Tensor, Tensor]:
        """The drift factor ``f(t)`` and squared diffusion ``g(t)^2``, by differentiating the two formulas."""
        t = as_time(t)
        # Reverse mode, for forward mode costs eight times as much on a handful of numbers; out of inference mode,
        # which knows no derivatives.
        with torch.inference_mode(False), torch.enable_grad():
            t64 = t.detach().double().clone().requires_grad_()
            # A formula may be a constant, which has no graph: adding 0 t gives it one, of slope 0.
            log_alpha, variance = self.log_alpha(t64) + 0 * t64, self.variance(t64) + 0 * t64
            (f,) = torch.autograd.grad(log_alpha.sum(), t64, retain_graph=True)
            (slope,) = torch.autograd.grad(variance.sum(), t64)
        return f.to(t.dtype), (slope - 2 * f * variance.detach()).to(t.dtype)

    def f(self, t: Time) -> Tensor:
        """The drift factor ``f(t) = d log_alpha / dt`` in ``dx = f x dt + g dw``."""
        return self.f_and_g2(t)[0]

    def g2(self, t: Time) -> Tensor:
        """The squared diffusion ``g(t)^2 = d variance / dt - 2 f variance`` in ``dx = f x dt + g dw``."""
        return self.f_and_g2(t)[1]

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """``x_t = alpha(t) x0 + sigma(t) noise``; ``x0`` and ``noise`` (B, *D), ``t`` () or (B,)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise

    def transition(self, s: Time | None, t: Time) -> tuple[Tensor, Tensor]:
        """``(ratio, var)`` of the exact kernel ``x_t | x_s ~ N(ratio x_s, var I)`` for ``s <= t``.

        ``s = None`` stands for clean data, ``alpha = 1`` and ``sigma = 0`` (which is not ``t = 0`` for a VE
        SDE).
        """
        t = as_time(t)
        t64 = t.double().contiguous()
        if s is None:
            return self.alpha(t), self.variance(t)
        s64 = as_time(s).to(t.device).double()
        log_ratio = self.log_alpha(t64) - self.log_alpha(s64)
        var = self.variance(t64) - (2 * log_ratio).exp() * self.variance(s64)
        return log_ratio.exp().to(t.dtype), var.clamp_min(0).to(t.dtype)

    def posterior(self, s: Time, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """``(on_data, on_state, var)`` of ``q(x_s | x_t, x_0) = N(on_data x_0 + on_state x_t, var I)`` for ``s < t``.

        With ``(ratio, var_ts)`` of the kernel from s to t: ``on_data = alpha_s var_ts / variance_t``, ``on_state =
        ratio variance_s / variance_t`` and ``var = var_ts variance_s / variance_t``, which on a chain are the
        coefficients of Ho et al. (2020), eq. 7; ``var`` is its beta-tilde (Kingma et al. 2021, eq. 25 and 26).
        """
        t = as_time(t)
        t64, s64 = t.double(), as_time(s).to(t.device).double()
        ratio, var = self.transition(s64, t64)
        variance_s, variance_t = self.variance(s64), self.variance(t64)
        results = (
            self.alpha(s64) * var / variance_t,
            ratio * variance_s / variance_t,
            var * variance_s / variance_t,
        )
        on_data, on_state, variance = (r.to(t.dtype) for r in results)
        return on_data, on_state, variance

    def posterior_mean(self, x: Tensor, score: Tensor, t: Time, s: Time | None = None) -> Tensor:
        """``E[x_s | x_t = x] = (x + var * score) / ratio`` for ``s < t``, with ``score`` that of ``p_t`` at
        ``x``.

        With ``s = None`` this is the posterior mean of the clean data, the final denoising of a sampler.
        """
        ratio, var = self.transition(s, t)
        return (x + expand(var, x) * score) / expand(ratio, x)

    @property
    def prior_std(self) -> float:
        """The standard deviation ``sigma(t_max)`` of the prior ``N(0, sigma(t_max)^2 I)``."""
        return float(self.sigma(self.t_max).detach())

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """``log N(x; 0, sigma(t_max)^2 I)`` in nats, (B, *D) -> (B,)."""
        z = x.flatten(1).double() / self.prior_std
        normaliser = z.shape[1] * (0.5 * math.log(2 * math.pi) + math.log(self.prior_std))
        return (-0.5 * z.square().sum(1) - normaliser).to(x.dtype)

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """The ``t`` in [0, t_max] at which ``log_snr(t)`` has the given value, by bisection to float64
        rounding.

        Values outside the range of the schedule give the nearest end. Subclasses with a closed form
        override this.
        """
        wanted = as_time(log_snr)
        low = torch.zeros_like(wanted, dtype=torch.float64)
        high = torch.full_like(low, self.t_max)
        for _ in range(64):
            middle = (low + high) / 2
            too_clean = self.log_snr(middle) > wanted
            low, high = torch.where(too_clean, middle, low), torch.where(too_clean, high, middle)
        return ((low + high) / 2).to(wanted.dtype)


def _exact_betas(sde: SDE, n: int) -> Tensor:
    times = torch.linspace(0, sde.t_max, n + 1, dtype=torch.float64)
    log_alpha = sde.log_alpha(times)
    return -torch.expm1(2 * log_alpha.diff())


def _check_steps(n: int) -> None:
    if not isinstance(n, int) or n < 2:
        raise ValueError(f"a chain needs an integer number of steps n >= 2, got {n!r}")


def _check_betas(betas: Tensor, n: int) -> Tensor:
    if betas.max() >= 1:
        raise ValueError(
            f"{n} steps are too few for this schedule: the largest beta would be {betas.max():.4g}, and betas must "
            "lie in (0, 1); take more steps, or discretize with method='exact'"
        )
    return betas


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(SDE):
    """SDEs with ``alpha^2 + sigma^2 = 1``; a subclass states ``log_alpha`` only."""

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        """``sigma^2 = 1 - alpha^2``, through ``expm1``."""
        return -torch.expm1(2 * self.log_alpha(t))

    def discretize(self, n: int, method: str = "exact") -> Tensor:
        """Betas of an n-step DDPM chain, float64 (n,), whose marginals at ``t_i = i t_max / n`` are this
        SDE's.

        ``beta_i = 1 - alpha(t_i)^2 / alpha(t_{i-1})^2`` (the exact transition kernel).

        Raises:
            ValueError: fewer than 2 steps, an unknown method, or a beta >= 1.
        """
        if method != "exact":
            raise unknown_name("discretization", method, ("exact",))
        _check_steps(n)
        return _check_betas(_exact_betas(self, n), n)


def _linear_beta_integral(sde: VP | SubVP, t: Tensor) -> Tensor:
    return t * (sde.beta_min + 0.5 * (sde.beta_max - sde.beta_min) * t)


def _time_of_beta_integral(sde: VP | SubVP, integral: Tensor) -> Tensor:
    slope = sde.beta_max - sde.beta_min
    root = (sde.beta_min**2 + 2 * slope * integral).sqrt()
    return (2 * integral / (sde.beta_min + root)).clamp(0, sde.t_max)


def _check_linear_betas(sde: VP | SubVP) -> None:
    if not 0 < sde.beta_min <= sde.beta_max < math.inf:
        raise ValueError(
            f"betas must satisfy 0 < beta_min <= beta_max, got {sde.beta_min} and {sde.beta_max}"
        )


@dataclass(frozen=True)
class VP(VariancePreserving):
    """The variance-preserving SDE, ``dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw``, the limit of DDPM.

    ``beta(t) = beta_min + t (beta_max - beta_min)``, so ``log_alpha = -(beta_min t + (beta_max - beta_min)
    t^2 / 2) / 2`` and ``sigma^2 = 1 - alpha^2`` (Song et al. 2021, eq. 11 and 33).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_linear_betas(self)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """``-1/2`` times the integral of beta."""
        return -0.5 * _linear_beta_integral(self, t)

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Closed form: ``int beta = log(1 + exp(-log_snr))``, a quadratic equation in t."""
        return _time_of_beta_integral(self, torch.nn.functional.softplus(-log_snr))

    def discretize(self, n: int, method: str = "song") -> Tensor:
        """Betas of an n-step DDPM chain, float64 (n,).

        ``"song"``: ``beta_i = beta(s_i) / n`` with ``s_i = (i - 1) / (n - 1)``, that is
        ``linspace(beta_min, beta_max) / n``, which for n = 1000 is the schedule of Ho et al. (2020), 1e-4
        to 0.02 (Song et al. 2021, appendix C). ``"exact"``: ``beta_i = 1 - alpha(t_i)^2 /
        alpha(t_{i-1})^2`` at ``t_i = i / n``: the chain whose marginals are this SDE's.

        They differ at first order in 1/n. "song" takes the first beta at the start of its interval, where beta(t) is
        less than on average: too small by ``(beta_max - beta_min) / (2 n beta_min)`` (9% for n = 1000); and the last
        too large by ``beta_max / (2 n)`` (1%), since ``log(1 - beta)`` is not ``-beta``. Of ``log alpha_bar`` at the
        end of the chain, -10, it makes ``(beta_min^2 + beta_min beta_max + beta_max^2) / (6 n)`` too much: 0.067.

        Raises:
            ValueError: fewer than 2 steps, an unknown method, or a beta >= 1 (too few steps for "song").
        """
        if method not in ("song", "exact"):
            raise unknown_name("discretization", method, ("song", "exact"))
        if method == "exact":
            return super().discretize(n)
        _check_steps(n)
        return _check_betas(torch.linspace(self.beta_min, self.beta_max, n, dtype=torch.float64) / n, n)


@dataclass(frozen=True)
class SubVP(SDE):
    """The sub-VP SDE: the drift of VP, a smaller diffusion, ``sigma = 1 - alpha^2``.

    ``g^2 = beta(t) (1 - exp(-2 int beta))`` follows from the two formulas (Song et al. 2021, eq. 27 and 28).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_linear_betas(self)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """``-1/2`` times the integral of beta, as for VP."""
        return -0.5 * _linear_beta_integral(self, t)

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        """``(1 - alpha^2)^2``."""
        return torch.expm1(2 * self.log_alpha(t)).square()

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Closed form: ``rho = (1 - alpha^2) / alpha = 2 sinh(int beta / 2)`` and a quadratic equation in t."""
        return _time_of_beta_integral(self, 2 * torch.asinh(torch.exp(-0.5 * log_snr) / 2))


@dataclass(frozen=True)
class VE(SDE):
    """The variance-exploding SDE, ``dx = sqrt(d sigma^2 / dt) dw``, the limit of SMLD.

    ``sigma(t) = sigma_min (sigma_max / sigma_min)^t`` and ``alpha = 1`` (Song et al. 2021, eq. 9 and 30).
    As in the paper ``sigma(0) = sigma_min``, so ``x_0`` of the process is not quite the data.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """0: the data are not scaled."""
        return 0 * t

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        """``sigma_min^2 (sigma_max / sigma_min)^(2 t)``."""
        return (2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))).exp()

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Closed form: ``log sigma = -log_snr / 2`` is linear in t."""
        t = (-0.5 * log_snr - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)
        return t.clamp(0, self.t_max)

    def discretize(self, n: int) -> Tensor:
        """The SMLD ladder: n noise levels, float64 (n,), a geometric sequence from sigma_min to sigma_max.

        (Song and Ermon 2019, section 4; Song et al. 2021, appendix C.)
        """
        _check_steps(n)
        return torch.linspace(
            math.log(self.sigma_min), math.log(self.sigma_max), n, dtype=torch.float64
        ).exp()


@dataclass(frozen=True)
class CosineVP(VariancePreserving):
    """The variance-preserving SDE of the cosine schedule, ``alpha = cos(phi(t)) / cos(phi(0))``.

    ``phi(t) = (t + s) / (1 + s) * pi / 2`` (Nichol and Dhariwal 2021, eq. 17). The schedule reaches ``alpha
    = 0`` at ``t = 1``, where the log-SNR is minus infinity; the process therefore ends at ``t_max =
    0.999``, with a log-SNR of -12.9, which leaves less than 2e-6 nats per dimension between ``p_T`` and the
    prior for data in [-1, 1].
    """

    s: float = 0.008
    t_max: float = field(default=0.999, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.s < math.inf:
            raise ValueError(f"the offset s must be at least 0, got {self.s}")
        if self.t_max >= 1:
            raise ValueError(
                f"the cosine schedule has alpha = 0 at t = 1, so t_max must be below 1, got {self.t_max}"
            )

    def _angle(self, t: Tensor | float) -> Any:
        return (t + self.s) / (1 + self.s) * (math.pi / 2)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """``log cos(phi(t)) - log cos(phi(0))``, as ``log1p`` of a difference that is exact near 0."""
        # cos(a) - cos(b) = -2 sin((a + b) / 2) sin((a - b) / 2) keeps every digit near t = 0.
        start = self._angle(0.0)
        angle = self._angle(t)
        difference = -2 * torch.sin((angle + start) / 2) * torch.sin(t / (1 + self.s) * (math.pi / 4))
        return torch.log1p(difference / math.cos(start))

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Closed form: ``cos(phi) = cos(phi(0)) sqrt(sigmoid(log_snr))``."""
        cosine = math.cos(self._angle(0.0)) * torch.sigmoid(log_snr).sqrt()
        t = torch.acos(cosine) / (math.pi / 2) * (1 + self.s) - self.s
        return t.clamp(0, self.t_max)


@dataclass(frozen=True)
class EDM(SDE):
    """The process of EDM, ``dx = sqrt(2 t) dw``: ``alpha = 1`` and ``sigma(t) = t``, so a time is a noise
    level.

    (Karras et al. 2022, section 3 and table 1.) It runs from ``t_min = 0.002`` to ``t_max = 80``.
    """

    t_min: float = field(default=0.002, kw_only=True)
    t_max: float = field(default=80.0, kw_only=True)

    @in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """0: the data are not scaled."""
        return 0 * t

    @in_float64
    def variance(self, t: Tensor) -> Tensor:
        """``t^2``."""
        return t.square()

    @in_float64
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Closed form: ``t = exp(-log_snr / 2)``."""
        return (-0.5 * log_snr).exp().clamp(0, self.t_max)
