"""Runge-Kutta methods in Karras et al.'s coordinates: Heun's, with their churn, and the classical one of order 4.

``y = x / alpha`` obeys ``dy / d rho = eps(x, t)`` with ``rho = sigma / alpha`` for every linear SDE, which is the
ODE of Karras et al. (2022), eq. 4 and appendix B. A method for it is a tableau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sde_diffusion.noise import NoiseSource
from sde_diffusion.predictors.exponential import NOISE, Level, combine, next_step
from sde_diffusion.predictors.protocol import Predictor
from sde_diffusion.predictors.stages import Method, Stage, StagesRun, step_between, steps_along, take
from sde_diffusion.score import Score
from sde_diffusion.sdes import SDE
from sde_diffusion.tensors import as_time, expand

_HEUN = ((1.0,), (1 / 2, 1 / 2))
_CLASSICAL = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _tableau(rows: tuple[tuple[float, ...], ...]) -> Method:
    """The method in rho whose stages have these weights, the last row giving the result; a row's sum is its node."""

    def method(sde: SDE, start: Level, end: Level) -> list[Stage]:
        h = end.rho - start.rho
        levels = [start]
        for row in rows[:-1]:
            node = sum(row)
            rho = start.rho + node * h
            levels.append(end if node == 1 else Level.at(sde, sde.time_of_log_snr(-2 * rho.log())))
        stages = []
        for here, there, row in zip(levels, [*levels[1:], end], rows, strict=True):
            stages.append(Stage.of(NOISE, here, start, there, [there.alpha * h * a for a in row]))
        return stages

    return method


@dataclass(frozen=True)
class RK4:
    """The classical Runge-Kutta method of order 4, four evaluations a step.

    In ``y = x / alpha`` and ``rho = sigma / alpha`` rather than in x and t: the linear part of the ODE is then exact,
    lines are solved exactly in one step (near the data the flow is nearly a line), and no derivative of the schedule
    is asked for, so that a schedule that is only piecewise smooth does not spoil the order. A step to the data
    themselves (``sigma = 0``), where the last stage would lie, is Euler's.

    Reference: Kutta (1901).
    """

    stochastic = False
    order = 4
    convergence = 4

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        return StagesRun(_tableau(_CLASSICAL), NOISE, sde, times)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``."""
        stages = step_between(_tableau(_CLASSICAL), NOISE, sde, t, s)
        return take([stage.like(x) for stage in stages], score, x)


@dataclass(frozen=True)
class EDMHeun:
    """Heun's method of order 2, two evaluations a step, with the "churn" of Karras et al. (2022), algorithm 2.

    With churn a step first adds noise, from ``rho`` to ``rho (1 + gamma)``, and then solves the ODE from there.
    ``gamma = min(churn / n, sqrt(2) - 1)`` in a run of n steps where ``s_min <= rho <= s_max``, else 0; no step goes
    beyond the beginning of the schedule. The step to the data themselves (``sigma = 0``) is Euler's, one evaluation.
    Works on every linear SDE, in ``y = x / alpha`` and ``rho = sigma / alpha``; ``s_min`` and ``s_max`` are in rho.

    Without churn the method is deterministic, and goes in either direction of time.

    Args:
        churn: ``S_churn``; 0 for none.
        s_min: ``S_min``, where the churn begins.
        s_max: ``S_max``, where it ends.
        s_noise: ``S_noise``, the standard deviation of the noise that is added, in units of what it should be.
    """

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    order = 2
    convergence = 2

    def __post_init__(self) -> None:
        if not 0 <= self.churn < math.inf:
            raise ValueError(f"churn must be at least 0, got {self.churn!r}")
        if not 0 <= self.s_min < self.s_max:
            raise ValueError(f"need 0 <= s_min < s_max, got {self.s_min!r} and {self.s_max!r}")
        if not 0 < self.s_noise < math.inf:
            raise ValueError(f"s_noise must be positive, got {self.s_noise!r}")

    @property
    def stochastic(self) -> bool:
        """Whether a step uses its noise."""
        return self.churn > 0

    def _raised(self, sde: SDE, t: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """``(t_hat, on_state, on_noise)`` of ``x_hat = on_state x + on_noise z``, for ``t`` of any shape."""
        level, top = Level.at(sde, t), Level.at(sde, as_time(sde.t_max).to(t.device))
        gamma = min(self.churn / steps, math.sqrt(2) - 1)
        inside = (level.rho >= self.s_min) & (level.rho <= self.s_max)
        rho = torch.where(inside, torch.minimum(level.rho * (1 + gamma), top.rho), level.rho)
        raised = rho > level.rho
        # Where nothing is added the time stays what it is, to the last digit.
        t_hat = torch.where(raised, sde.time_of_log_snr(-2 * rho.log()), level.t)
        hat = Level.at(sde, t_hat)
        added = (hat.rho.square() - level.rho.square()).clamp_min(0).sqrt()
        on_noise = torch.where(raised, self.s_noise * hat.alpha * added, torch.zeros_like(rho))
        return t_hat, hat.alpha / level.alpha, on_noise

    def start(self, sde: SDE, times: Tensor, draw: NoiseSource) -> Predictor:
        """One run along ``times``."""
        if not self.stochastic:
            return StagesRun(_tableau(_HEUN), NOISE, sde, times)
        return _ChurnRun(self, sde, times)

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``; with churn, that of a run of this one step."""
        if self.stochastic:
            t, on_state, on_noise = self._raised(sde, as_time(t).double(), 1)
            x = expand(on_state, x) * x + expand(on_noise, x) * noise
        stages = step_between(_tableau(_HEUN), NOISE, sde, t, s)
        return take([stage.like(x) for stage in stages], score, x)


class _ChurnRun:
    """One run with churn along a grid: the noise of each step and then its stages, all coefficients ready."""

    def __init__(self, heun: EDMHeun, sde: SDE, times: Tensor) -> None:
        t_hat, on_state, on_noise = heun._raised(sde, times[:-1], len(times) - 1)
        stages = steps_along(_tableau(_HEUN), NOISE, sde, t_hat, times[1:])
        self._steps = iter(list(zip(on_state.tolist(), on_noise.tolist(), stages, strict=True)))

    def step(self, sde: SDE, score: Score, x: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """The state at ``s``, the next time of the grid."""
        on_state, on_noise, stages = next_step(self._steps)
        return take(stages, score, combine([(on_state, x), (on_noise, noise)]) if on_noise else x)
